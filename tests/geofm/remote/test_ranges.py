"""Byte ranges: what is asked for ahead, what is joined, and that it is always the file's bytes."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import rasterio
import s3fs
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.io import MemoryFile
from rasterio.windows import Window
from shapely.geometry import shape

from data_catalog.sources import source_named
from geofm.chips import writer
from geofm.chips.writer import cut_cell, cut_cells, to_spans
from geofm.config.recipe import CutSettings
from geofm.raster.reader import fetch, open_raster
from geofm.raster.scene import open_scene
from geofm.remote import ranges
from geofm.remote.assets import Piece, S3Asset
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import BLOCK, GAP, MOST_RANGE, RangeSource, coalesce
from geofm.remote.url_policy import Access, Signing
from geofm.runtime.threads import shared_pool
from tests.geofm.stac.small_world import World, add_scene, texture

DATA = np.random.default_rng(0).bytes(40 * BLOCK + 123)


@dataclass
class Bytes:
    """A remote file that counts what it is asked for; after ``changes`` requests it is another."""

    data: bytes = DATA
    changes: int = 10**9
    asked: list[tuple[int, int]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def whole(self, most: int) -> Piece | None:
        return None

    def part(self, start: int, end: int) -> Piece:
        with self.lock:
            self.asked.append((start, end))
            other = len(self.asked) > self.changes
        data = self.data[::-1] if other else self.data
        return Piece(data[start:end], len(data), '"b"' if other else '"a"')


PLACES = st.integers(0, len(DATA) - 1)
RANGES = st.lists(st.tuples(PLACES, st.integers(1, 5 * BLOCK)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(RANGES, st.lists(st.tuples(PLACES, st.integers(1, 8 * BLOCK)), min_size=1, max_size=12),
       st.booleans())  # fmt: skip
def test_reads_are_the_files_bytes_whatever_was_asked_for_ahead(
    ahead: list[tuple[int, int]], reads: list[tuple[int, int]], forget: bool
) -> None:
    source = RangeSource(Bytes(), 0, "here")
    spans = coalesce((start, min(start + size, len(DATA))) for start, size in ahead)
    source.prefetch(spans)
    for number, (start, size) in enumerate(reads):
        assert source.read(start, size) == DATA[start : start + size]
        if forget and number == len(reads) // 2:
            source.forget(spans)
            assert not source.segments
    assert source.read(len(DATA), 10) == b""


def test_near_ranges_become_one_and_long_ones_are_split() -> None:
    assert coalesce([(100, 200), (0, 50), (200 + GAP, 300 + GAP)]) == [(0, 300 + GAP)]
    assert coalesce([(0, 10), (11 + GAP, 20 + GAP)]) == [(0, 10), (11 + GAP, 20 + GAP)]
    pieces = coalesce([(7, 7 + 3 * MOST_RANGE - 5)])
    assert len(pieces) == 3
    assert pieces[0][0] == 7
    assert all(a[1] == b[0] for a, b in pairwise(pieces))


def test_blocks_one_after_the_other_are_asked_for_in_growing_steps() -> None:
    asset = Bytes()
    source = RangeSource(asset, 0, "here")
    for number in range(40):
        source.read(number * BLOCK, 100)
    assert len(asset.asked) < 8
    jumping = Bytes()
    source = RangeSource(jumping, 0, "here")
    for number in (30, 20, 10):
        source.read(number * BLOCK, 100)
    assert jumping.asked[1:] == [(n * BLOCK, (n + 1) * BLOCK) for n in (30, 20, 10)]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_file_that_changes_between_two_ranges_is_noticed(ahead: bool) -> None:
    source = RangeSource(Bytes(changes=1), 1, "here")
    if ahead:
        source.prefetch([(5 * BLOCK, 6 * BLOCK)])
    with pytest.raises(Quarantine, match="changed while it was read") as found:
        source.read(5 * BLOCK, 10)
    assert found.value.passing


def test_an_object_that_is_shortened_between_two_ranges_is_noticed(s3: str) -> None:
    # one of the same size would show by its ETag, which this gateway does not give
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    place = f"{s3}/changes.bin"
    files.pipe_file(place, DATA)
    access = Access("https://example.org", credentials_for=("bucket",))
    source = RangeSource(S3Asset(place, access), 1, "here")
    assert source.read(3 * BLOCK, 100) == DATA[3 * BLOCK : 3 * BLOCK + 100]
    files.pipe_file(place, DATA[: len(DATA) // 2])
    with pytest.raises(Quarantine) as found:
        source.read(30 * BLOCK, 100)
    assert found.value.passing


def cog(pixels: np.ndarray[Any, Any]) -> bytes:
    """A COG with overviews, in blocks of 64."""
    with MemoryFile() as memory:
        with memory.open(
            driver="COG", height=pixels.shape[0], width=pixels.shape[1], count=1,
            dtype=pixels.dtype, crs="EPSG:32631", nodata=0, compress="deflate", blocksize=128,
            transform=rasterio.Affine(10, 0, 448_000, 0, -10, 5_411_200),
        ) as file:  # fmt: skip
            file.write(pixels, 1)
        return bytes(memory.read())


def big_scene(world: World) -> dict[str, Any]:
    pixels = {key: texture(2048, 2048, seed) for seed, key in enumerate(("red", "green"))}
    item = add_scene(world, "a", pixels)
    for key, some in pixels.items():
        world.add(f"/files/a/{key}.tif", cog(some))
    return item


def test_only_the_blocks_that_windows_touch_are_fetched_and_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BATCH_BYTES", 2**21)
    monkeypatch.setattr(writer, "STRIP_PX", 700)  # strips in pieces of 5 cells
    item = big_scene(world)
    settings = CutSettings(size_px=128, bands=["red", "green"])
    access = Access(world.url, whole_max=0)
    source = source_named("sentinel-2")
    world.asked.clear()
    with open_scene(item, shape(item["geometry"]), source, settings, access) as scene:
        cells = list(scene.grid.cells())
        touched = {
            (channel.band.asset, block)
            for channel in scene.channels
            for cell in cells
            for block in channel.raster.ranges(
                1, Window(*reversed(scene.grid.window(cell)), 128, 128)
            )
        }
        held = 0
        for _ in cut_cells(scene, to_spans(cells)):
            sources = [channel.raster.source for channel in scene.channels]
            held = max(held, sum(s.end - s.start for one in sources for s in one.segments))
    compressed = sum(end - start for _, (start, end) in touched)
    assert compressed > 12 * 2**20
    assert sum(world.sent) <= 1.02 * compressed
    assert held < 0.55 * compressed  # not the whole scene at a time
    assert len(world.asked) < 40


def test_a_file_that_its_item_states_to_be_large_is_opened_by_a_small_request(
    world: World,
) -> None:
    item = big_scene(world)
    for asset in item["assets"].values():
        asset["file:size"] = 10**9
    settings = CutSettings(size_px=128, bands=["red", "green"])
    access = Access(world.url, whole_max=2**20)
    with open_scene(item, shape(item["geometry"]), source_named("sentinel-2"), settings, access):
        assert world.sent == [ranges.BLOCK] * 2


def test_a_single_cell_leaves_nothing_behind(world: World) -> None:
    """As many chips of a scene may be cut again; their blocks don't stay until it is closed."""
    item = big_scene(world)
    settings = CutSettings(size_px=128, bands=["red", "green"])
    access = Access(world.url, whole_max=0)
    source = source_named("sentinel-2")
    with open_scene(item, shape(item["geometry"]), source, settings, access) as scene:
        for cell in list(scene.grid.cells())[:3]:
            cut_cell(scene, cell)
            sources = [channel.raster.source for channel in scene.channels]
            assert not any(one.segments for one in sources if one)


def test_what_was_asked_for_ahead_ends_with_the_scene(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = big_scene(world)
    settings = CutSettings(size_px=128, bands=["red", "green"])
    access = Access(world.url, whole_max=0)
    source = source_named("sentinel-2")
    monkeypatch.setattr(ranges, "PREFETCH_THREADS", 1)
    release = threading.Event()
    with open_scene(item, shape(item["geometry"]), source, settings, access) as scene:
        cells = cut_cells(scene, to_spans(scene.grid.cells()))
        next(cells)
        sources = [raster for channel in scene.channels if (raster := channel.raster.source)]
        calls = [segment.data for one in sources for segment in one.segments]
        assert calls
        shared_pool("geofm-prefetch", 1).submit(release.wait, 10)  # what comes next does not begin
        sources[0].prefetch([(sources[0].size - 10, sources[0].size)])
        waiting = next(s.data for s in sources[0].segments if s.start == sources[0].size - 10)
    assert not any(one.segments for one in sources)
    release.set()
    wait(calls, timeout=10)
    assert waiting.cancelled()


def test_a_block_beyond_the_end_of_the_file_is_told_before_it_is_read(world: World) -> None:
    item = big_scene(world)
    whole = world.files["/files/a/red.tif"]
    world.files["/files/a/red.tif"] = whole[: len(whole) - 2000]
    settings = CutSettings(size_px=128, bands=["red", "green"])
    access = Access(world.url, whole_max=0)
    source = source_named("sentinel-2")
    with (
        pytest.raises(Quarantine, match="ends before its pixels do"),
        open_scene(item, shape(item["geometry"]), source, settings, access) as scene,
    ):
        list(cut_cells(scene, to_spans(scene.grid.cells())))


def masked() -> bytes:
    """A TIFF whose mask lies far behind its beginning."""
    pixels = texture(512, 512)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=512, width=512, count=1, dtype="uint16", crs="EPSG:32631",
            transform=rasterio.Affine(10, 0, 448_000, 0, -10, 5_411_200), tiled=True,
            blockxsize=64, blockysize=64, compress="deflate",
        ) as file:  # fmt: skip
            file.write(pixels, 1)
            file.write_mask(np.arange(512 * 512).reshape(512, 512) % 3 > 0)
        return bytes(memory.read())


@pytest.mark.parametrize("lost", range(1, 12))
def test_an_outage_is_never_taken_for_damage_or_for_data(lost: int) -> None:
    """Whichever request fails: the pixels and their mask are right, or the fault may pass."""

    class Failing(Bytes):
        def part(self, start: int, end: int) -> Piece:
            piece = super().part(start, end)
            if len(self.asked) == lost:
                raise Quarantine("unreachable", "an outage", passing=True)
            return piece

    window = Window(0, 0, 512, 512)
    asset = Failing(masked())
    try:
        with open_raster(RangeSource(asset, 0, "here"), "here") as raster:
            assert np.array_equal(raster.read(1, window), texture(512, 512))
            assert raster.layout.masked == (True,)
            assert raster.mask(1, window).mean() == pytest.approx(2 / 3, abs=0.01)
    except Quarantine as fault:
        assert fault.passing
    else:
        assert len(asset.asked) < lost, "the fault was never met"


def test_a_passing_etag_is_not_written_down() -> None:
    class Passing(Bytes):
        def part(self, start: int, end: int) -> Piece:
            piece = super().part(start, end)
            return Piece(piece.data, piece.total, '"fault"') if len(self.asked) == 1 else piece

    asset = Passing(masked())
    source = RangeSource(asset, 1, "here")
    with open_raster(source, "here") as raster:
        raster.read(1, Window(0, 0, 512, 512))
        assert raster.fetched.etag == '"a"'


def test_jpeg_2000_is_read_by_range(world: World) -> None:
    pixels = texture(512, 512)
    with MemoryFile() as memory:
        with memory.open(
            driver="JP2OpenJPEG", height=512, width=512, count=1, dtype="uint16",
            crs="EPSG:32631", transform=rasterio.Affine(10, 0, 448_000, 0, -10, 5_411_200),
            QUALITY="100", REVERSIBLE="YES", BLOCKXSIZE=128, BLOCKYSIZE=128,
        ) as file:  # fmt: skip
            file.write(pixels, 1)
        href = world.add("/a.jp2", bytes(memory.read()))
    fetched = fetch(href, Access(world.url, whole_max=0), Signing())
    with open_raster(fetched, href) as raster:
        with raster.by_gdal() as data:
            assert data.driver == "JP2OpenJPEG"
        # rasterio writes no place into such a file
        assert raster.layout.transform == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        assert raster.ranges(1, Window(0, 0, 10, 10)) == []
        window = Window(200, 120, 90, 80)
        assert np.array_equal(raster.read(1, window), pixels[120:200, 200:290])
