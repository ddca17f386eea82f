"""Files read without GDAL: the same pixels, places and errors as with it, and only where plain."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.windows import Window

from geofm.raster import reader
from geofm.raster.reader import open_raster
from geofm.raster.tiff import TileCache, Unsure, parse
from geofm.remote.assets import Piece
from geofm.remote.quarantine import Quarantine
from tests.geofm.raster.crafted import craft, tile, usual
from tests.geofm.stac.small_world import NORTH, WEST, tiff

HEIGHT, WIDTH = 150, 215
USUAL: dict[str, Any] = {
    "driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 1, "dtype": "uint16",
    "crs": "EPSG:32631", "transform": rasterio.Affine(10, 0, WEST, 0, -10, NORTH),
    "tiled": True, "blockxsize": 32, "blockysize": 64, "compress": "deflate",
}  # fmt: skip
COG: dict[str, Any] = {
    "driver": "COG", "tiled": None, "blockxsize": None, "blockysize": None, "blocksize": 128,
    "overview_count": 2, "predictor": "YES",
}  # fmt: skip
PLAIN: list[dict[str, Any]] = [
    {}, {"predictor": 2}, {"dtype": "uint8", "nodata": 255}, {"dtype": "int16", "predictor": 2},
    {"dtype": "float32", "nodata": float("nan")}, {"dtype": "float64"}, {"BIGTIFF": "YES"},
    {"nodata": 0, "zlevel": 9}, {"interleave": "band"}, {"crs": "EPSG:3035"},
    {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-4, 0, 3, 0, -1e-4, 49)},
    {"crs": "ESRI:54009"}, COG, {**COG, "dtype": "uint8", "nodata": 0, "BIGTIFF": "YES"},
]  # fmt: skip
OTHER: list[dict[str, Any]] = [
    {"compress": "lzw"}, {"compress": None}, {"compress": "zstd"}, {"count": 2},
    {"count": 2, "interleave": "pixel"}, {"tiled": False, "blockxsize": None, "blockysize": 16},
    {"ENDIANNESS": "BIG"}, {"dtype": "float32", "predictor": 3}, {"dtype": "uint32"},
    {"dtype": "float32", "predictor": 2}, {"dtype": "float32", "nodata": -9999},
    {"photometric": "MINISWHITE"}, {"crs": None}, {"transform": None},
    {"transform": rasterio.Affine(10, 1, WEST, 1, -10, NORTH)}, {"NBITS": 12},
    {"mask": True}, {"tags": {"AREA_OR_POINT": "Point"}}, {"empty": True, "SPARSE_OK": True},
]  # fmt: skip


def pixels_of(dtype: str, seed: int = 0) -> NDArray[Any]:
    """Numbers of the whole range of a type, so that differences wrap around."""
    rng = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return rng.normal(0, 1e3, (HEIGHT, WIDTH)).astype(dtype)
    span = np.iinfo(dtype)
    return rng.integers(span.min, span.max, (HEIGHT, WIDTH), dtype=dtype, endpoint=True)


def written(change: dict[str, Any]) -> bytes:
    """A file by rasterio."""
    profile = {**USUAL, **change}
    mask, empty, tags = (profile.pop(key, None) for key in ("mask", "empty", "tags"))
    profile = {key: value for key, value in profile.items() if value is not None or key == "crs"}
    pixels = pixels_of(profile["dtype"])
    if "NBITS" in profile:
        pixels %= 4000
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        MemoryFile() as memory,
    ):
        with memory.open(**profile) as file:
            if tags:
                file.update_tags(**tags)
            if not empty:
                file.write(np.stack([pixels.astype(profile["dtype"])] * profile["count"]))
            if mask:
                file.write_mask(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3 > 0)
        return bytes(memory.read())


def outcome(data: bytes, by_gdal: bool, *windows: tuple[int, int, int, int]) -> list[Any]:
    """Everything that a scene asks of a file, or why it can't be had."""
    results: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        if by_gdal:
            patch.setattr(reader, "parse", lambda *_: None)
        try:
            with open_raster(Piece(data, len(data), ""), "here") as raster:
                results += [raster.layout, str(raster.crs)]
                for row, col, height, width in windows:
                    try:
                        pixels = raster.read(1, Window(col, row, width, height))
                    except Quarantine as problem:
                        results.append((problem.reason, problem.detail))
                    else:
                        results.append((pixels.shape, pixels.dtype.name, pixels.tobytes()))
        except Quarantine as problem:
            results.append((problem.reason, problem.detail))
    return results


def is_plain(data: bytes) -> bool:
    return parse(lambda offset, size: data[offset : offset + size], len(data)) is not None


WINDOWS = st.tuples(
    st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1),
    st.integers(1, HEIGHT), st.integers(1, WIDTH),
).map(lambda w: (w[0], w[1], min(w[2], HEIGHT - w[0]), min(w[3], WIDTH - w[1])))  # fmt: skip


@pytest.mark.parametrize("change", PLAIN, ids=str)
def test_plain_files_are_read_as_gdal_reads_them(change: dict[str, Any]) -> None:
    data = written(change)
    assert is_plain(data)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(WINDOWS, min_size=1, max_size=4))
    def check(windows: list[tuple[int, int, int, int]]) -> None:
        # A NaN nodata value equals nothing, so texts are compared.
        here, there = outcome(data, False, *windows), outcome(data, True, *windows)
        assert [str(result) for result in here[:2]] == [str(result) for result in there[:2]]
        assert here[2:] == there[2:]

    check()


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_what_is_not_plain_is_left_to_gdal(change: dict[str, Any]) -> None:
    data = written(change)
    assert not is_plain(data)
    whole = (0, 0, HEIGHT, WIDTH)
    assert str(outcome(data, False, whole)) == str(outcome(data, True, whole))


def test_damage_is_for_gdal_to_judge() -> None:
    small = np.arange(1, 64 * 64 + 1, dtype=np.uint16).reshape(64, 64)
    data = bytearray(tiff(small))
    plain = parse(lambda offset, size: bytes(data[offset : offset + size]), len(data))
    assert plain is not None
    start, end = plain.range_of((0, 1))
    data[(start + end) // 2] ^= 0xFF
    with pytest.raises(Unsure):
        plain.read(lambda offset, size: bytes(data[offset : offset + size]), "", 0, 32, 32, 32)
    for window in ((0, 0, 32, 32), (0, 32, 32, 32)):
        assert outcome(bytes(data), False, window) == outcome(bytes(data), True, window)


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1,
                               max_size=3))  # fmt: skip
@example(False, [(18, 1)])  # another width: the windows leave the raster
def test_bytes_that_are_changed_end_the_same_with_and_without_it(
    big: bool, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(craft(usual(), tile(), big=big))
    for place, value in changes:
        data[place % len(data)] = value
    windows = [(0, 0, 32, 32), (3, 5, 20, 10)]
    assert str(outcome(bytes(data), False, *windows)) == str(outcome(bytes(data), True, *windows))


def test_a_crs_whose_name_is_no_text_is_told() -> None:
    data = written({})
    name = b"WGS 84 / UTM zone 31N|"
    assert data.count(name) == 1
    # defined by its name alone: code 32767 of the projected CRS (key 3072) means "by the user"
    data = data.replace(name, b"\xff" * (len(name) - 1) + b"|")
    data = data.replace(
        struct.pack("<4H", 3072, 0, 1, 32631), struct.pack("<4H", 3072, 0, 1, 32767)
    )
    results = outcome(data, False)
    assert results == outcome(data, True)
    assert results[0][0] == "not_a_tiff"


def test_tiles_are_kept_up_to_a_limit_and_dropped_with_their_file() -> None:
    kept = TileCache(limit=3000)
    for number in range(4):
        kept.put(("a" if number % 2 else "b", number), np.zeros(1000, np.uint8))
        kept.get(("a", 1))
    assert [key[1] for key in kept.tiles] == [2, 3, 1]
    kept.forget("a")
    assert (list(kept.tiles), kept.size) == ([("b", 2)], 1000)
