"""Cells of a scene, strip by strip: what comes next is fetched while what is there is decoded.

A strip is a run of neighbouring cells in one row. So many strips as fit into ``BATCH_BYTES`` of
compressed blocks are asked for together; three batches are in memory at most, whatever the
scene's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from geofm.imagery.grid import Cell
from geofm.imagery.pixels import Seen, Strip, file_window, read_strip
from geofm.imagery.ranges import Range, RangeSource, coalesce
from geofm.imagery.scene import Scene

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
    """The pixels of each cell, in the order of the runs; the first are asked for at once.

    Args:
        scene: open.
        runs: the cells.
        seen: is shown each band's stored numbers before any offset.

    Raises:
        Quarantine: for what is found wrong with the pixels.
    """
    following = batches(scene, runs)
    return _cut(scene, next(following, None), following, seen)


def _cut(
    scene: Scene, current: _Batch | None, following: Iterator[_Batch], seen: Seen | None
) -> Iterator[tuple[Cell, Strip]]:
    grid, before, after = scene.grid, _Batch(), None
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
    finally:  # also of what nobody waits for any more
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
