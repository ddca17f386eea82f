"""Cutting one item: its windows into a tar of ``.npy`` members and a row for each window."""

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
from data_catalog.sources import Source
from data_catalog.tables import write_rows
from geofm.chips.items import Listed
from geofm.chips.offset_check import OffsetWatch, check_offset, watch_for
from geofm.chips.schema import ASSET_COLUMNS, CHIP_COLUMNS, chip_id
from geofm.config.recipe import CutSettings
from geofm.formats.npy import chip_bytes, pixel_sha256
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

# Cells of a scene, strip by strip: what comes next is fetched while what is there is decoded.
# A strip is a run of neighbouring cells in one row. So many strips as fit into ``BATCH_BYTES`` of
# compressed blocks are asked for together; three batches are in memory at most, whatever the
# scene's size.

#: Compressed bytes of all bands that are asked for at once.
BATCH_BYTES = 8 * 2**20

#: Widest strip in pixels of the grid; wider ones are cut into pieces.
STRIP_PX = 16_384

#: Cells of one row next to each other: y, first x, x after the last.
Run = tuple[int, int, int]


@dataclass
class _Batch:
    """Strips that are fetched together, and the ranges that were asked for, by asset."""

    runs: list[Run] = field(default_factory=list)
    blocks: dict[str, set[Range]] = field(default_factory=dict)
    asked: list[tuple[RangeSource, list[Range]]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop what was asked for."""
        for source, ranges in self.asked:
            source.forget(ranges)

    @property
    def bytes(self) -> int:
        """Compressed bytes of its blocks."""
        return sum(end - start for some in self.blocks.values() for start, end in some)


def to_runs(cells: Iterable[Cell]) -> list[Run]:
    """Cells as runs, by rows from north to south."""
    runs: list[Run] = []
    for x, y in sorted(cells, key=lambda cell: (-cell[1], cell[0])):
        if runs and runs[-1][0] == y and runs[-1][2] == x:
            runs[-1] = (y, runs[-1][1], x + 1)
        else:
            runs.append((y, x, x + 1))
    return runs


def from_runs(runs: Iterable[Run]) -> list[Cell]:
    """The cells of runs."""
    return [(x, y) for y, first, end in runs for x in range(first, end)]


def cut_cells(
    scene: Scene, runs: Iterable[Run], seen: Seen | None = None
) -> Iterator[tuple[Cell, Strip]]:
    """Yield the pixels of each cell, in the order of the runs.

    While a batch of strips is decoded, the next one is fetched.

    Args:
        scene: open.
        runs: the cells.
        seen: is shown each band's stored numbers before any offset.

    Raises:
        Quarantine: for what is found wrong with the pixels.
    """
    grid, following = scene.grid, batches(scene, runs)
    before, current, after = _Batch(), next(following, None), None
    try:
        while current is not None:
            after = next(following, None)
            for y, first, end in current.runs:
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


def cut_one(scene: Scene, cell: Cell) -> NDArray[Any]:
    """The pixels of a single cell."""
    y = cell[1]
    return next(cut_cells(scene, [(y, cell[0], cell[0] + 1)]))[1].counts


def narrow(runs: Iterable[Run], most: int) -> Iterator[Run]:
    """Runs of at most so many cells."""
    for y, first, end in runs:
        for start in range(first, end, most):
            yield y, start, min(start + most, end)


def batches(scene: Scene, runs: Iterable[Run]) -> Iterator[_Batch]:
    """Strips in batches, each asked for when it is taken."""
    batch, last = _Batch(), _Batch()
    for run in narrow(runs, max(1, STRIP_PX // scene.grid.size)):
        for key, blocks in strip_blocks(scene, run).items():
            batch.blocks.setdefault(key, set()).update(blocks)
        batch.runs.append(run)
        if batch.bytes >= BATCH_BYTES:
            yield ask(scene, batch, last)
            batch, last = _Batch(), batch
    if batch.runs:
        yield ask(scene, batch, last)


def ask(scene: Scene, batch: _Batch, last: _Batch) -> _Batch:
    """Ask for the blocks of a batch that the one before did not ask for already."""
    sources = {channel.band.asset: channel.raster.source for channel in scene.all_channels}
    for key, blocks in batch.blocks.items():
        source = sources[key]
        ranges = coalesce(blocks - last.blocks.get(key, set()))
        if source is not None and ranges:
            source.prefetch(ranges)
            batch.asked.append((source, ranges))
    return batch


def strip_blocks(scene: Scene, run: Run) -> dict[str, set[Range]]:
    """Byte ranges of the compressed blocks that a strip needs, by asset."""
    y, first, end = run
    row, col = scene.grid.window((first, y))
    window = (row, col, scene.grid.size, (end - first) * scene.grid.size)
    found: dict[str, set[Range]] = {}
    for channel in scene.all_channels:
        place = file_window(scene, channel, window)
        if place is not None:
            ranges = channel.raster.ranges(channel.band.index, place)
            found.setdefault(channel.band.asset, set()).update(ranges)
    return found


log = logging.getLogger("geofm.cut")

#: The settings that a scene's chips depend on, once its windows are chosen.
PIXELS = ("size_px", "gsd_m", "anchor", "bands", "resampling", "whole_max_mib")

CHIPS, SCENE = "chips.tar", "scene.arrow"


@dataclass(frozen=True)
class Order:
    """What is to be cut of a scene.

    Attributes:
        grid: where the scene's pixels lie, as far as is known.
        runs: the cells to cut.
        lost: cells that belong to another item, as runs by its id; rows without pixels.
    """

    grid: Grid
    runs: list[Run]
    lost: list[tuple[str, list[Run]]]

    def to_json(self) -> Json:
        """As a part's payload."""
        return {"grid": asdict(self.grid), **self.windows_json()}

    def windows_json(self) -> Json:
        """The windows alone, as JSON gives them back."""
        lost = [[owner, [list(run) for run in runs]] for owner, runs in self.lost]
        return {"runs": [list(run) for run in self.runs], "lost": lost}

    @staticmethod
    def from_json(content: Json) -> Order:
        """From a part's payload."""
        lost = [(owner, [_run(run) for run in runs]) for owner, runs in content["lost"]]
        return Order(Grid(**content["grid"]), [_run(run) for run in content["runs"]], lost)

    def lost_cells(self) -> dict[Cell, str]:
        """The owner's id by cell."""
        return {cell: owner for owner, runs in self.lost for cell in from_runs(runs)}


def _run(numbers: Sequence[int]) -> Run:
    y, first, end = numbers
    return y, first, end


def same_place(a: Grid, b: Grid) -> bool:
    """Whether two grids have the same pixels, to a hundredth of one."""
    exact = [(g.crs, g.size, g.height, g.width, g.left, g.top) for g in (a, b)]
    near = max(abs(a.west - b.west), abs(a.north - b.north)) < 0.01 * b.gsd
    return exact[0] == exact[1] and near and math.isclose(a.gsd, b.gsd, rel_tol=1e-6)


def cut_or_quarantine(
    one: Listed, settings: CutSettings, access: Access, order: Order, out: Path, attempt: str
) -> None:
    """Cut windows of a scene into an empty folder; a bad item leaves one row.

    Args:
        one: the item.
        settings: the cut.
        access: what may be read, and how.
        order: which windows.
        out: an empty folder.
        attempt: id of the attempt (``Job.attempt``): a failure counts for this attempt only.
    """
    try:
        cut_item(one, settings, access, order, out)
    except Quarantine as problem:
        log.info("cut: %s", problem)
        quarantine_item(one, settings, problem, out, attempt)


def cut_item(
    listed: Listed, settings: CutSettings, access: Access, order: Order, out: Path
) -> None:
    """Write the part of one scene: ``chips.tar`` and ``scene.arrow``.

    A scene that lies elsewhere than the order says is not cut; its state says where it lies.

    Args:
        listed: the item.
        settings: the cut.
        access: what may be read, and how.
        order: which windows.
        out: an empty folder.

    Raises:
        Quarantine: when the item turns out to be bad; then nothing of it is to be used.
    """
    source = listed.profile
    lost = order.lost_cells()
    if not order.runs:  # all of its ground belongs to others: nothing is read
        rows = lost_rows(listed, settings, order.grid, lost)
        write_scene(out, listed, "ok", rows, grid=order.grid, order=order)
        return
    with open_scene(listed.item, listed.geometry, source, settings, access) as scene:
        grid = scene.grid
        if not same_place(order.grid, grid):
            log.info("cut: %s lies elsewhere than its metadata say", listed.item_id)
            write_scene(out, listed, "moved", grid=grid, order=order)
            return
        rows = lost_rows(listed, settings, grid, lost)
        cut = window_rows(listed, settings, grid, from_runs(order.runs))
        watch = watch_for(source, listed.baseline)

        def members() -> Iterator[tuple[str, bytes]]:
            for cell, strip in cut_cells(scene, order.runs, watch):
                cut[cell].update(measure(strip, scene, source))
                yield f"{cut[cell]['chip_id']}.npy", chip_bytes(strip.counts)

        part = tar_name(listed, settings, order.runs)
        if cut:
            written = write_tar(out / CHIPS, members(), digests=False)
            for row, member in zip(cut.values(), written, strict=True):
                row.update(part=part, offset=member.offset, size=member.size)
        found = check_scene(scene, watch, listed) if watch else {}
        assets = [{**row, **found} for row in asset_rows(listed, scene)]
    tar = part if cut else ""
    write_scene(out, listed, "ok", [*cut.values(), *rows], assets, scene.grid, order, tar=tar)


def lost_rows(
    listed: Listed, settings: CutSettings, grid: Grid, lost: dict[Cell, str]
) -> list[Json]:
    """A row for each window whose ground another scene owns."""
    return [
        {**row, "status": "dropped", "reason": "overlap", "witness": lost[cell]}
        for cell, row in window_rows(listed, settings, grid, sorted(lost)).items()
    ]


def tar_name(listed: Listed, settings: CutSettings, runs: list[Run]) -> str:
    """Name of the item's tar in the artifact: by its content, not by the run that wrote it."""
    what = [listed.covers, settings.model_dump(mode="json", include=set(PIXELS)), runs]
    return f"parts/{digest_of(what)[:16]}.tar"


def window_rows(
    listed: Listed, settings: CutSettings, grid: Grid, cells: list[Cell]
) -> dict[Cell, Json]:
    """What is known of windows before their pixels are read."""
    rows = {}
    for cell, area in zip(cells, footprints(grid, cells), strict=True):
        name = grid.name(cell)
        row, col = grid.window(cell)
        rows[cell] = {
            **listed.facts,
            "chip_id": chip_id(
                listed.collection, listed.item_id, listed.item_sha256, name, settings.bands,
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
        }  # fmt: skip
    return rows


def measure(strip: Strip, scene: Scene, source: Source) -> Json:
    """Digest and fractions of a chip's pixels."""
    how = [radiometry(channel) for channel in scene.channels]
    cloud, shadow = cloud_shares(strip.classes, source.cloud)
    names = [channel.band.name for channel in scene.channels]
    scales = [one.scale for one in how]
    return {
        "dtype": chip_dtype(scene).name,
        "scale": scales,
        "dn_offset": [one.add for one in how],
        "pixel_sha256": pixel_sha256(strip.counts),
        "valid_fraction": float(np.count_nonzero(strip.valid) / strip.valid.size),
        "cloud_fraction": cloud,
        "shadow_fraction": shadow,
        "saturated_fraction": saturated_share(strip, names, scales),
        "constant": is_constant(strip.counts),
    }


def check_scene(scene: Scene, watch: OffsetWatch, listed: Listed) -> Json:
    """What the pixels say against the item, as columns of its assets."""
    added = {channel.band.name: radiometry(channel).add for channel in scene.channels}
    finding = check_offset(watch.seen, added, listed.baseline)
    if finding is None:
        return {}
    log.warning("cut: %s: %s: %s", listed.item_id, finding.kind, finding.detail)
    return {"finding": finding.kind, "finding_detail": finding.detail}


def asset_rows(listed: Listed, scene: Scene) -> list[Json]:
    """One row per band (and the cloud layer) with where it came from."""
    rows = []
    fetched = scene.fetched()
    for channel in scene.all_channels:
        bytes_, band = fetched[channel.band.asset], channel.band
        layer = channel is scene.layer
        how = radiometry(channel)
        rows.append(
            {
                **{key: listed.facts[key] for key in ("item_id", "item_sha256", "collection")},
                "asset": band.asset,
                "band": band.name,
                "href": band.href,
                "sha256": bytes_.sha256,
                "sha256_from": bytes_.sha256_from,
                "etag": bytes_.etag,
                "size": bytes_.size,
                "scale": float("nan") if layer else how.scale,
                "dn_offset": 0 if layer else how.add,
                "resampling": "nearest" if layer else channel_method(scene, channel),
            }
        )
    return rows


def quarantine_item(
    listed: Listed, settings: CutSettings, problem: Quarantine, out: Path, attempt: str
) -> None:
    """Write the part of a bad item: one row that says why."""
    for path in out.iterdir():
        path.unlink()
    told = {"status": "quarantined", "reason": problem.reason}
    row = {
        **listed.facts,
        **told,
        "detail": problem.kept,
        "geometry": listed.geometry,
        "bands": settings.bands,
        "chip_id": chip_id(
            listed.collection, listed.item_id, listed.item_sha256, "", settings.bands,
            settings.size_px,
        ),
    }  # fmt: skip
    facts = {key: listed.facts[key] for key in ("item_id", "item_sha256", "collection")}
    state = "passing" if problem.passing else "bad"
    assets = [{**facts, **told}]
    write_scene(out, listed, state, [row], assets, problem=problem, attempt=attempt)


def write_scene(
    out: Path,
    listed: Listed,
    state: str,
    rows: Sequence[Json] = (),
    assets: Sequence[Json] = (),
    grid: Grid | None = None,
    order: Order | None = None,
    problem: Quarantine | None = None,
    tar: str = "",
    attempt: str = "",
) -> None:
    """The part's rows, and how it ended, for the seal: ``ok``, ``bad``, ``passing`` or ``moved``.

    ``tar`` is the name that the part's tar has in the artifact; ``attempt`` is the attempt that
    failed.
    """
    content = {
        "item": list(listed.key),
        "state": state,
        "grid": asdict(grid) if grid else None,
        "order": order.windows_json() if order else None,
        "tar": tar,
        "attempt": attempt,
        "bad": [problem.reason, problem.kept, problem.passing] if problem else None,
    }
    tables = (rows, CHIP_COLUMNS), (assets, ASSET_COLUMNS)
    write_rows(out / SCENE, *tables, note=canonical(content))
