"""Cut one item: read its windows strip by strip, write a tar of chips and one row per window.

A strip is a run of neighbouring cells in one row of the grid. Strips are read in batches of about
`BATCH_BYTES` of compressed blocks. While a batch is decoded the next one is fetched, so at most
three batches of a scene are in memory, whatever its size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.hashing import canonical, digest_of
from data_catalog.progress import advance
from data_catalog.sources import Source
from data_catalog.tables import write_rows
from geofm.chips.items import ItemRecord
from geofm.chips.offset_check import OffsetCounter, check_offset, offset_counter_for
from geofm.chips.schema import ASSET_COLUMNS, CHIP_COLUMNS, chip_id
from geofm.config.recipe import CutSettings
from geofm.formats.npy import SUFFIX, chip_bytes, pixel_sha256
from geofm.formats.tar import write_tar
from geofm.raster.grid import Cell, Grid, footprints
from geofm.raster.scene import Scene, open_scene
from geofm.raster.windows import (
    Seen,
    Strip,
    channel_method,
    chip_dtype,
    cloud_shares,
    file_window,
    is_constant,
    radiometry,
    read_strip,
    saturated_share,
)
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import Range, RangeSource, coalesce
from geofm.remote.url_policy import Access
from geofm.types import Json

log = logging.getLogger("geofm.cut")

#: Compressed bytes of all bands that are fetched as one batch.
BATCH_BYTES = 8 * 2**20
#: Widest strip in pixels of the grid; wider ones are divided.
STRIP_PX = 16_384
#: Settings that a scene's chips depend on, once its windows are chosen.
PIXEL_SETTINGS = ("size_px", "gsd_m", "anchor", "bands", "resampling", "whole_max_mib")
#: Files of a part: the chips, and the rows with how the part ended.
CHIPS_TAR, SCENE_ROWS = "chips.tar", "scene.arrow"
#: Columns that every row of an item has.
ITEM_KEYS = ("item_id", "item_sha256", "collection")

#: Neighbouring cells of one row of the grid: y, first x, x after the last.
RowSpan = tuple[int, int, int]


def to_spans(cells: Iterable[Cell]) -> list[RowSpan]:
    """Return cells as spans, by rows from north to south."""
    spans: list[RowSpan] = []
    for x, y in sorted(cells, key=lambda cell: (-cell[1], cell[0])):
        if spans and spans[-1][0] == y and spans[-1][2] == x:
            spans[-1] = (y, spans[-1][1], x + 1)
        else:
            spans.append((y, x, x + 1))
    return spans


def from_spans(spans: Iterable[RowSpan]) -> list[Cell]:
    """Return the cells of spans."""
    return [(x, y) for y, first, end in spans for x in range(first, end)]


@dataclass(frozen=True)
class CutWindows:
    """The windows to cut of one item.

    Attributes:
        grid: Grid of the scene, as far as it is known.
        spans: Cells to cut.
        lost: Cells that belong to another item, as spans by its id; they get rows without pixels.
    """

    grid: Grid
    spans: list[RowSpan]
    lost: list[tuple[str, list[RowSpan]]]

    def to_json(self) -> Json:
        """Return the payload of a part."""
        return {"grid": asdict(self.grid), **self.windows_json()}

    def windows_json(self) -> Json:
        """Return the windows without the grid, in the types that JSON returns."""
        lost = [[owner, [list(span) for span in spans]] for owner, spans in self.lost]
        return {"runs": [list(span) for span in self.spans], "lost": lost}

    @staticmethod
    def from_json(content: Json) -> CutWindows:
        """Read the payload of a part."""
        lost = [(owner, [_span(span) for span in spans]) for owner, spans in content["lost"]]
        return CutWindows(Grid(**content["grid"]), [_span(s) for s in content["runs"]], lost)

    def lost_cells(self) -> dict[Cell, str]:
        """Return the id of the owner of each lost cell."""
        return {cell: owner for owner, spans in self.lost for cell in from_spans(spans)}


def _span(numbers: Sequence[int]) -> RowSpan:
    y, first, end = numbers
    return y, first, end


# One item


def cut_or_quarantine(
    item: ItemRecord,
    settings: CutSettings,
    access: Access,
    windows: CutWindows,
    out: Path,
    attempt: str,
) -> None:
    """Cut an item's windows into an empty folder; a bad item leaves one row with the reason.

    Args:
        item: The item.
        settings: Settings of the stage.
        access: Which hosts may be read, and the timeouts.
        windows: Windows to cut.
        out: Empty folder of the part.
        attempt: Id of the attempt (``Job.attempt``); a failure counts for this attempt only.
    """
    try:
        cut_item(item, settings, access, windows, out)
    except Quarantine as problem:
        log.info("cut: %s", problem)
        quarantine_item(item, settings, problem, out, attempt)


def cut_item(
    item: ItemRecord, settings: CutSettings, access: Access, windows: CutWindows, out: Path
) -> None:
    """Write the part of one scene: ``chips.tar`` and ``scene.arrow``.

    A scene that lies elsewhere than planned is not cut; its state says where it lies.

    Args:
        item: The item.
        settings: Settings of the stage.
        access: Which hosts may be read, and the timeouts.
        windows: Windows to cut.
        out: Empty folder of the part.

    Raises:
        Quarantine: The item is bad; then nothing in the folder may be used.
    """
    lost = windows.lost_cells()
    if not windows.spans:  # all of its ground belongs to other items: no file is read
        rows = lost_rows(item, settings, windows.grid, lost)
        write_scene(out, item, "ok", rows, grid=windows.grid, windows=windows)
        return
    with open_scene(item.item, item.geometry, item.profile, settings, access) as scene:
        grid = scene.grid
        if not same_pixels(windows.grid, grid):
            log.info("cut: %s lies elsewhere than its metadata state", item.item_id)
            write_scene(out, item, "moved", grid=grid, windows=windows)
            return
        rows = lost_rows(item, settings, grid, lost)
        chips = window_rows(item, settings, grid, from_spans(windows.spans))
        counter = offset_counter_for(item.profile, item.baseline)

        def members() -> Iterator[tuple[str, bytes]]:
            for cell, strip in cut_cells(scene, windows.spans, counter):
                chips[cell].update(measure(strip, scene, item.profile))
                yield f"{chips[cell]['chip_id']}{SUFFIX}", chip_bytes(strip.counts)
                advance(1)

        tar = tar_name(item, settings, windows.spans)
        written = write_tar(out / CHIPS_TAR, members(), digests=False)
        for row, member in zip(chips.values(), written, strict=True):
            row.update(part=tar, offset=member.offset, size=member.size)
        finding = check_scene(scene, counter, item) if counter else {}
        assets = [{**row, **finding} for row in asset_rows(item, scene)]
    write_scene(out, item, "ok", [*chips.values(), *rows], assets, grid, windows, tar=tar)


def same_pixels(a: Grid, b: Grid) -> bool:
    """Return whether two grids have the same pixels, to a hundredth of a pixel."""
    exact = [(g.crs, g.size, g.height, g.width, g.left, g.top) for g in (a, b)]
    near = max(abs(a.west - b.west), abs(a.north - b.north)) < 0.01 * b.gsd
    return exact[0] == exact[1] and near and math.isclose(a.gsd, b.gsd, rel_tol=1e-6)


def tar_name(item: ItemRecord, settings: CutSettings, spans: list[RowSpan]) -> str:
    """Return the name of an item's tar in the artifact; it depends on the content alone."""
    content = [item.covers, settings.model_dump(mode="json", include=set(PIXEL_SETTINGS)), spans]
    return f"parts/{digest_of(content)[:16]}.tar"


def quarantine_item(
    item: ItemRecord, settings: CutSettings, problem: Quarantine, out: Path, attempt: str
) -> None:
    """Write the part of a bad item: one row with the reason."""
    for path in out.iterdir():
        path.unlink()
    status = {"status": "quarantined", "reason": problem.reason}
    row = {
        **item.facts,
        **status,
        "detail": problem.kept,
        "geometry": item.geometry,
        "bands": settings.bands,
        "chip_id": chip_id(
            item.collection, item.item_id, item.item_sha256, "", settings.bands, settings.size_px
        ),
    }
    assets = [{**{key: item.facts[key] for key in ITEM_KEYS}, **status}]
    state = "passing" if problem.passing else "bad"
    write_scene(out, item, state, [row], assets, problem=problem, attempt=attempt)


def write_scene(
    out: Path,
    item: ItemRecord,
    state: str,
    rows: Sequence[Json] = (),
    assets: Sequence[Json] = (),
    grid: Grid | None = None,
    windows: CutWindows | None = None,
    problem: Quarantine | None = None,
    tar: str = "",
    attempt: str = "",
) -> None:
    """Write a part's rows, and a note on how it ended, which the seal reads.

    Args:
        out: Folder of the part.
        item: The item.
        state: ``ok``, ``bad``, ``passing`` or ``moved``.
        rows: Rows of ``chips.parquet``.
        assets: Rows of ``assets.parquet``.
        grid: Grid of the scene, if its files were read.
        windows: Windows that the part holds.
        problem: Reason of a failure.
        tar: Name of the part's tar in the artifact.
        attempt: Id of the attempt that failed.
    """
    note = {
        "item": list(item.key),
        "state": state,
        "grid": asdict(grid) if grid else None,
        "order": windows.windows_json() if windows else None,
        "tar": tar,
        "attempt": attempt,
        "bad": [problem.reason, problem.kept, problem.passing] if problem else None,
    }
    tables = (rows, CHIP_COLUMNS), (assets, ASSET_COLUMNS)
    write_rows(out / SCENE_ROWS, *tables, note=canonical(note))


# Pixels of a scene, strip by strip


@dataclass
class _Batch:
    """Strips that are fetched together.

    Attributes:
        spans: The strips.
        blocks: Compressed blocks that they need, by asset.
        prefetched: Ranges that are being fetched, with the file that they belong to.
    """

    spans: list[RowSpan] = field(default_factory=list)
    blocks: dict[str, set[Range]] = field(default_factory=dict)
    prefetched: list[tuple[RangeSource, list[Range]]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop the bytes that were fetched."""
        for source, ranges in self.prefetched:
            source.forget(ranges)

    @property
    def bytes(self) -> int:
        """Compressed bytes of the blocks."""
        return sum(end - start for blocks in self.blocks.values() for start, end in blocks)


def cut_cells(
    scene: Scene, spans: Iterable[RowSpan], seen: Seen | None = None
) -> Iterator[tuple[Cell, Strip]]:
    """Yield the pixels of each cell, in the order of the spans.

    While a batch of strips is decoded, the next one is fetched.

    Args:
        scene: Open scene.
        spans: Cells to read.
        seen: Called with each band's stored numbers, before any offset is applied.

    Raises:
        Quarantine: The pixels are damaged, or can't be fetched.
    """
    grid, following = scene.grid, batches(scene, spans)
    before, current, after = _Batch(), next(following, None), None
    try:
        while current is not None:
            after = next(following, None)
            for y, first, end in current.spans:
                row, col = grid.window((first, y))
                strip = read_strip(scene, row, col, grid.size, (end - first) * grid.size, seen)
                for x in range(first, end):
                    yield (x, y), strip.part((x - first) * grid.size, grid.size)
            before.forget()
            before, current, after = current, after, None
    finally:  # also if the caller stops early
        for batch in (before, current, after):
            if batch is not None:
                batch.forget()


def cut_cell(scene: Scene, cell: Cell) -> NDArray[Any]:
    """Return the pixels of one cell, shape (bands, size, size)."""
    x, y = cell
    return next(cut_cells(scene, [(y, x, x + 1)]))[1].counts


def batches(scene: Scene, spans: Iterable[RowSpan]) -> Iterator[_Batch]:
    """Yield strips in batches; fetching a batch begins when it is yielded."""
    batch, last = _Batch(), _Batch()
    for span in divide(spans, max(1, STRIP_PX // scene.grid.size)):
        for key, blocks in strip_blocks(scene, span).items():
            batch.blocks.setdefault(key, set()).update(blocks)
        batch.spans.append(span)
        if batch.bytes >= BATCH_BYTES:
            yield prefetch_batch(scene, batch, last)
            batch, last = _Batch(), batch
    if batch.spans:
        yield prefetch_batch(scene, batch, last)


def divide(spans: Iterable[RowSpan], longest: int) -> Iterator[RowSpan]:
    """Divide spans into pieces of at most ``longest`` cells."""
    for y, first, end in spans:
        for start in range(first, end, longest):
            yield y, start, min(start + longest, end)


def prefetch_batch(scene: Scene, batch: _Batch, last: _Batch) -> _Batch:
    """Begin to fetch the blocks of a batch, except those of the batch before it."""
    sources = {channel.band.asset: channel.raster.source for channel in scene.all_channels}
    for key, blocks in batch.blocks.items():
        source = sources[key]
        ranges = coalesce(blocks - last.blocks.get(key, set()))
        if source is not None and ranges:
            source.prefetch(ranges)
            batch.prefetched.append((source, ranges))
    return batch


def strip_blocks(scene: Scene, span: RowSpan) -> dict[str, set[Range]]:
    """Return the byte ranges of the compressed blocks that a strip needs, by asset."""
    y, first, end = span
    row, col = scene.grid.window((first, y))
    window = (row, col, scene.grid.size, (end - first) * scene.grid.size)
    blocks: dict[str, set[Range]] = {}
    for channel in scene.all_channels:
        native = file_window(scene, channel, window)
        if native is not None:
            ranges = channel.raster.ranges(channel.band.index, native)
            blocks.setdefault(channel.band.asset, set()).update(ranges)
    return blocks


# Rows


def window_rows(
    item: ItemRecord, settings: CutSettings, grid: Grid, cells: list[Cell]
) -> dict[Cell, Json]:
    """Return the row of each window, as far as it is known before pixels are read."""
    rows = {}
    for cell, area in zip(cells, footprints(grid, cells), strict=True):
        name = grid.name(cell)
        row, col = grid.window(cell)
        rows[cell] = {
            **item.facts,
            "chip_id": chip_id(
                item.collection,
                item.item_id,
                item.item_sha256,
                name,
                settings.bands,
                settings.size_px,
            ),
            "cell": name,
            "row": row,
            "col": col,
            "width": grid.size,
            "height": grid.size,
            "gsd_m": grid.metres,
            "crs": grid.crs,
            "transform": grid.transform(cell),
            "geometry": area,
            "bands": settings.bands,
        }
    return rows


def lost_rows(
    item: ItemRecord, settings: CutSettings, grid: Grid, lost: dict[Cell, str]
) -> list[Json]:
    """Return a row for each window whose ground another scene owns."""
    return [
        {**row, "status": "dropped", "reason": "overlap", "witness": lost[cell]}
        for cell, row in window_rows(item, settings, grid, sorted(lost)).items()
    ]


def measure(strip: Strip, scene: Scene, source: Source) -> Json:
    """Return the columns that are computed from a chip's pixels."""
    conversions = [radiometry(channel) for channel in scene.channels]
    cloud, shadow = cloud_shares(strip.classes, source.cloud)
    names = [channel.band.name for channel in scene.channels]
    scales = [conversion.scale for conversion in conversions]
    return {
        "dtype": chip_dtype(scene).name,
        "scale": scales,
        "dn_offset": [conversion.add for conversion in conversions],
        "pixel_sha256": pixel_sha256(strip.counts),
        "valid_fraction": float(np.count_nonzero(strip.valid) / strip.valid.size),
        "cloud_fraction": cloud,
        "shadow_fraction": shadow,
        "saturated_fraction": saturated_share(strip, names, scales),
        "constant": is_constant(strip.counts),
    }


def check_scene(scene: Scene, counter: OffsetCounter, item: ItemRecord) -> Json:
    """Return asset columns with a contradiction between pixels and item; empty if they agree."""
    added = {channel.band.name: radiometry(channel).add for channel in scene.channels}
    finding = check_offset(counter.counts, added, item.baseline)
    if finding is None:
        return {}
    log.warning("cut: %s: %s: %s", item.item_id, finding.kind, finding.detail)
    return {"finding": finding.kind, "finding_detail": finding.detail}


def asset_rows(item: ItemRecord, scene: Scene) -> list[Json]:
    """Return one row per band, and one for the cloud layer, with its provenance."""
    rows = []
    fetched = scene.fetched()
    for channel in scene.all_channels:
        file, band = fetched[channel.band.asset], channel.band
        is_layer = channel is scene.layer
        conversion = radiometry(channel)
        rows.append(
            {
                **{key: item.facts[key] for key in ITEM_KEYS},
                "asset": band.asset,
                "band": band.name,
                "href": band.href,
                "sha256": file.sha256,
                "sha256_from": file.sha256_from,
                "etag": file.etag,
                "size": file.size,
                "scale": float("nan") if is_layer else conversion.scale,
                "dn_offset": 0 if is_layer else conversion.add,
                "resampling": "nearest" if is_layer else channel_method(scene, channel),
            }
        )
    return rows
