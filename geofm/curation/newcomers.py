"""The bucket join for the new rows of a pool: all searched pairs that have one, decided exactly.

The few new rows of a cell are compared with everybody there, and those that visit it with those at
home. To read and multiply everybody is most of the work then, so sketches of the vectors propose
(``sketch.py``): they are a quarter as long, and their products are never below the vectors' own.
What is audited anew looks at the vectors while they are read for the sketches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import faiss  # noqa: F401  before torch: both bring an OpenMP
import numpy as np
import torch
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.curation.edges import Edges
from geofm.curation.frame import Cells, Frame
from geofm.curation.join import decide_pairs, dense_from
from geofm.curation.products import (
    COLUMN_STEP,
    ROW_STEP,
    Precision,
    TooManyProposals,
    as_factors,
    best_precision,
    look_at_all,
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

#: ``look(first, units)``: see ``look_at_all``.
Look = Callable[[int, NDArray[np.float32]], None]


def join_new(
    space: Space, frame: Frame, cells: Cells, threshold: float, new: Indices, *looks: Look
) -> Edges | None:
    """Search the pairs of new rows.

    Args:
        space: where the rows are.
        frame: the cells' centroids.
        cells: who is where.
        threshold: least similarity of a pair.
        new: the rows of which each pair has at least one, ascending.
        looks: what else is to be done with all vectors, as ``look_at_all`` takes it.

    Returns:
        The edges; None where a cell has so many proposals that it may be dense.
    """
    precision = best_precision()
    factors, least = _factors(space, frame, cells, new, threshold, precision, looks)
    new = new[np.argsort(cells.home[new], kind="stable")]
    ours = pick(factors, new, ROW_STEP)  # they stay in a core's cache, and in the order of homes
    every = np.arange(frame.count + 1)
    homes_at = np.searchsorted(cells.home[new], every)
    guests, guests_at = _guests(cells, new, every)

    def search(cell: int) -> Iterator[tuple[Indices, Indices]]:
        homes, visitors = cells.members(cell)
        everyone = np.concatenate([homes, visitors])
        theirs = pick(factors, everyone, COLUMN_STEP, into="everyone")
        first, last = homes_at[cell], homes_at[cell + 1]
        young = ours[first : last + -(last - first) % ROW_STEP]  # more come with them: see shape
        visiting = guests[guests_at[cell] : guests_at[cell + 1]]
        for mine, factors_of_mine, count in (
            (np.arange(first, last), young, len(everyone)),
            (visiting, pick(ours, visiting, ROW_STEP, into="guests"), len(homes)),
        ):
            i, j = near_pairs(
                factors_of_mine,
                theirs[: count + -count % COLUMN_STEP],
                least,
                precision,
                most=dense_from(len(homes), len(visitors)),
                shape=(len(mine), count),
            )
            yield new[mine[i]], everyone[j]

    def work(first: int) -> list[tuple[Indices, Indices]]:
        some = range(first, min(first + CELLS_AT_ONCE, frame.count))
        return [pairs for cell in some for pairs in search(cell)]

    proposed = [(new[:0], new[:0])]
    try:
        for found in on_every_core(work, range(0, frame.count, CELLS_AT_ONCE)):
            tick("duplicates of new chips", len(proposed) // 2, frame.count)
            proposed.extend(found)
    except TooManyProposals:
        return None
    left, right = (np.concatenate(side) for side in zip(*proposed, strict=True))
    # a pair of two new rows may come twice, and each comes with itself: both are sorted out here
    return decide_pairs(space, frame, cells, left, right, threshold)


def _factors(
    space: Space,
    frame: Frame,
    cells: Cells,
    new: Indices,
    threshold: float,
    precision: Precision,
    looks: tuple[Look, ...],
) -> tuple[torch.Tensor, float]:
    """What is multiplied in place of all rows' vectors, and the least product of a pair."""
    short = space.stored.shape[1] >= WORTH * WIDTH
    axes = _axes(space, frame, cells, new) if short else None
    width = WIDTH if short else space.stored.shape[1]
    factors = torch.empty((len(space), width), dtype=precision.dtype)

    def keep(first: int, units: NDArray[np.float32]) -> None:
        some = units if axes is None else sketch(units, axes)
        factors[first : first + len(some)] = as_factors(some, precision)

    look_at_all(space, keep, *looks)
    return factors, threshold - MARGIN if short else threshold


def _axes(space: Space, frame: Frame, cells: Cells, new: Indices) -> NDArray[np.float32]:
    """The axes of the sketches: along them rows differ most from the centroids of their cells."""
    some = new[:: -(-len(new) // AXES_FROM)]
    units = unit_rows(take_rows(space.stored, some), space.centre)
    return find_axes(units - frame.centroids[cells.home[some]])


def _guests(cells: Cells, new: Indices, every: Indices) -> tuple[Indices, Indices]:
    """The new rows that visit each cell, by their place in ``new``; and where each cell begins."""
    place = np.full(len(cells.home), -1, dtype=np.int32)
    place[new] = np.arange(len(new), dtype=np.int32)
    guests = place[cells.row]
    visits = np.flatnonzero(guests >= 0)
    return guests[visits].astype(np.int64), np.searchsorted(cells.cell[visits], every)
