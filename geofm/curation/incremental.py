"""New and withdrawn chips against a pool that was searched before.

Which pairs are searched depends on the two vectors and the frame alone (``frame.py``). So with
the frame of an earlier search, the pairs of vectors that are still there are known, those of
withdrawn ones fall away, and only pairs with a new vector are left to find: a new vector is
compared with the cells that begin within the whole reach of it, for that is where the other
vector of every searched pair has its home. The union is, pair for pair, what a full search over
the same frame finds, and the leader rule makes the same decisions of it.

Vectors are recognised by the hash of their bytes (64 bits), not by the name of their chip.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from geofm.curation.edges import Edges, join_edges, no_edges, sort_edges
from geofm.curation.frame import Cells, Frame, assign, sort_cells, visit_codes
from geofm.curation.join import DENSE_PAIRS, decide_pairs
from geofm.curation.products import (
    Precision,
    as_factors,
    best_precision,
    near_pairs,
    on_every_core,
    pick,
)
from geofm.curation.space import Indices, Space, take_rows, unit_rows

Hashes = NDArray[np.uint64]


def match_rows(before: Hashes, home: NDArray[np.int32], now: Hashes) -> Indices:
    """For each row of now, the searched row of before with the same vector; -1 where none has."""
    rows = np.flatnonzero(home >= 0)
    rows = rows[np.argsort(before[rows])]
    if not len(rows):
        return np.full(len(now), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(before[rows], now), len(rows) - 1)
    return np.where(before[rows[at]] == now, rows[at], -1).astype(np.int64)


def turn_round(of: Indices, rows: int, pool: NDArray[np.bool_]) -> Indices:
    """For each of ``rows`` earlier rows, the searched row of now that it is; -1 where withdrawn."""
    to = np.full(rows, -1, dtype=np.int64)
    kept = np.flatnonzero((of >= 0) & pool)
    to[of[kept]] = kept
    return to


def carry_cells(before: Cells, of: Indices, to: Indices, new: Indices, fresh: Cells) -> Cells:
    """Cells of now: those of rows that were there, and ``fresh`` ones of the rows ``new``."""
    home = np.full(len(of), -1, dtype=np.int32)
    old = to[to >= 0]
    home[old] = before.home[of[old]]
    home[new] = fresh.home
    row = to[before.row]
    there = row >= 0
    codes = visit_codes(row[there], before.cell[there])
    more = visit_codes(new[fresh.row], fresh.cell)
    if len(old) > 1 and not (np.diff(old) > 0).all():
        return sort_cells(home, [codes, more])
    place = np.searchsorted(codes, more)
    rows = np.insert(row[there].astype(np.int32), place, new[fresh.row].astype(np.int32))
    return Cells(home, rows, np.insert(before.cell[there], place, fresh.cell))


def carry_edges(before: Edges, to: Indices) -> Edges:
    """The edges whose two rows are still there, by their rows of now."""
    left, right = to[before.left], to[before.right]
    there = (left >= 0) & (right >= 0)
    return sort_edges(left[there], right[there], before.similarity[there])


def could_be_dense(edges: Edges, home: NDArray[np.int32]) -> bool:
    """Whether a cell has so many pairs that a full search might not list them."""
    return bool(np.bincount(home[edges.left]).max(initial=0) > DENSE_PAIRS // 2)


def join_new(space: Space, frame: Frame, cells: Cells, new: Indices, threshold: float) -> Edges:
    """All searched pairs of which at least one row is new."""
    if not len(new):
        return no_edges()
    precision = best_precision()
    units = unit_rows(take_rows(space.stored, new), space.centre)
    factors = as_factors(units, precision)
    part = Space(take_rows(space.stored, new), space.centre)
    wide = assign(frame, part, 0, len(part), width=frame.reach)
    asked = [np.concatenate(wide.members(number)) for number in range(frame.count)]

    def work(number: int) -> tuple[Indices, Indices]:
        mine = asked[number]
        homes = cells.members(number)[0]
        if not len(mine) or not len(homes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        others = _factors(space, homes, precision)
        i, j = near_pairs(pick(factors, mine), others, threshold, precision)
        return new[mine[i]], homes[j]

    found = list(on_every_core(work, range(frame.count)))
    left = np.concatenate([pair[0] for pair in found])
    right = np.concatenate([pair[1] for pair in found])
    return decide_pairs(space, frame, cells, left, right, threshold)


def _factors(space: Space, rows: Indices, precision: Precision) -> torch.Tensor:
    return as_factors(unit_rows(space.stored[rows], space.centre), precision)


def extend(
    space: Space,
    frame: Frame,
    before: tuple[Cells, Edges],
    of: Indices,
    pool: NDArray[np.bool_],
    threshold: float,
) -> tuple[Cells, Edges, Indices]:
    """Cells and edges of a pool from those of an earlier one over the same frame.

    Args:
        space: the pool of now, compared in the frame's centre.
        frame: of the earlier search.
        before: its cells and edges.
        of: for each row of now its earlier row, -1 for a new one (``match_rows``).
        pool: the rows of now that are searched.
        threshold: of both searches.

    Returns:
        Cells, edges, and the rows that were new.
    """
    old, edges = before
    to = turn_round(of, len(old.home), pool)
    new = np.flatnonzero(pool & (of < 0))
    part = Space(take_rows(space.stored, new), space.centre)
    fresh = assign(frame, part, 0, len(part))
    cells = carry_cells(old, of, to, new, fresh)
    found: Sequence[Edges] = [carry_edges(edges, to), join_new(space, frame, cells, new, threshold)]
    return cells, join_edges(found), new
