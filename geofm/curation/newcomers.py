"""The bucket join for the new rows of a pool: all searched pairs that have one, decided exactly.

The few new rows of a cell are compared with everybody there, and those that visit it with those at
home. To read and multiply everybody is most of the work then, so sketches of the vectors propose
(``sketch.py``): they are a quarter as long, and their products are never below the vectors' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.curation.edges import Edges
from geofm.curation.frame import Cells, Frame
from geofm.curation.join import decide_pairs, dense_from, load_factors
from geofm.curation.products import (
    COLUMN_STEP,
    ROW_STEP,
    Precision,
    TooManyProposals,
    best_precision,
    near_pairs,
    on_every_core,
    pick,
)
from geofm.curation.sketch import WIDTH, WORTH, find_axes, sketch
from geofm.curation.space import MARGIN, Indices, Space, take_rows, unit_rows

#: New rows that the axes of sketches are found from.
AXES_FROM = 4096
#: Cells that a thread searches before another may need the interpreter.
CELLS_AT_ONCE = 64


def join_new(
    space: Space,
    frame: Frame,
    cells: Cells,
    numbers: Sequence[int],
    threshold: float,
    new: Indices,
) -> Edges | None:
    """Search the pairs of new rows in the cells with these numbers.

    Args:
        space: where the rows are.
        frame: the cells' centroids.
        cells: who is where.
        numbers: the cells to search.
        threshold: least similarity of a pair.
        new: the rows of which each pair has at least one, ascending.

    Returns:
        The edges; None where a cell has so many proposals that it may be dense.
    """
    precision = best_precision()
    rows = _touched(cells, numbers)
    factors, least = _factors(space, frame, cells, rows, new, threshold, precision)
    place = np.zeros(len(space), dtype=np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    young, guests = _by_cell(cells, numbers, new)

    def search(at: int) -> Iterator[tuple[Indices, Indices]]:
        homes, visitors = cells.members(numbers[at])
        everyone = np.concatenate([homes, visitors])
        theirs = pick(factors, place[everyone], COLUMN_STEP)
        for mine, count in ((young[at], len(everyone)), (guests[at], len(homes))):
            i, j = near_pairs(
                pick(factors, place[mine], ROW_STEP),
                theirs[: count + -count % COLUMN_STEP],
                least,
                precision,
                most=dense_from(len(homes), len(visitors)),
                shape=(len(mine), count),
            )
            yield mine[i], everyone[j]

    def work(first: int) -> list[tuple[Indices, Indices]]:
        some = range(first, min(first + CELLS_AT_ONCE, len(numbers)))
        return [pairs for at in some for pairs in search(at)]

    proposed = [(new[:0], new[:0])]
    try:
        for found in on_every_core(work, range(0, len(numbers), CELLS_AT_ONCE)):
            tick("duplicates of new chips", len(proposed) // 2, len(numbers))
            proposed.extend(found)
    except TooManyProposals:
        return None
    left, right = (np.concatenate(side) for side in zip(*proposed, strict=True))
    # a pair of two new rows may come twice, and each comes with itself: both are sorted out here
    return decide_pairs(space, frame, cells, left, right, threshold)


def _touched(cells: Cells, numbers: Sequence[int]) -> Indices:
    """Rows that are at home in some cells or visit them, ascending."""
    here = np.zeros(len(cells.home), dtype=np.bool_)
    for number in numbers:
        for part in cells.members(number):
            here[part] = True
    return np.flatnonzero(here)


def _factors(
    space: Space,
    frame: Frame,
    cells: Cells,
    rows: Indices,
    new: Indices,
    threshold: float,
    precision: Precision,
) -> tuple[torch.Tensor, float]:
    """What is multiplied in place of the rows' vectors, and the least product of a pair."""
    if space.stored.shape[1] < WORTH * WIDTH:
        return load_factors(space, rows, precision), threshold
    some = new[:: -(-len(new) // AXES_FROM)]
    units = unit_rows(take_rows(space.stored, some), space.centre)
    # what tells vectors of one cell apart is how they differ from its centroid
    shorten = partial(sketch, axes=find_axes(units - frame.centroids[cells.home[some]]))
    return load_factors(space, rows, precision, WIDTH, shorten), threshold - MARGIN


def _by_cell(
    cells: Cells, numbers: Sequence[int], new: Indices
) -> tuple[list[Indices], list[Indices]]:
    """The new rows at home in each cell, and those that visit it."""
    every = np.asarray(numbers)
    home = cells.home[new]
    order = np.argsort(home, kind="stable")
    is_new = np.zeros(len(cells.home), dtype=np.bool_)
    is_new[new] = True
    visits = np.flatnonzero(is_new[cells.row])
    return (
        _divide(new[order], home[order], every),
        _divide(cells.row[visits].astype(np.int64), cells.cell[visits], every),
    )


def _divide(rows: Indices, cell: NDArray[np.int32], every: Indices) -> list[Indices]:
    """Rows, sorted by cell, of each cell."""
    first, last = np.searchsorted(cell, every), np.searchsorted(cell, every + 1)
    return [rows[begin:end] for begin, end in zip(first, last, strict=True)]
