"""New and withdrawn chips against a pool that was searched before.

Which pairs are searched depends on the two vectors and the frame alone (``frame.py``). So with
the frame of an earlier search, the pairs of vectors that are still there are known, those of
withdrawn ones fall away, and only pairs with a new vector are left to find. The union is, pair
for pair, what a full search over the same frame finds, and the leader rule makes the same
decisions of it. (Over another frame the pairs are the same as far as both searches miss nothing;
the certificate bounds that.)

Vectors are recognised by the hash of their bytes (64 bits), not by the name of their chip.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from geofm.dedup.edges import Edges, sort_edges
from geofm.dedup.exact_pairs import first_alike, slots, table_of, tell_apart
from geofm.dedup.join import DENSE_PAIRS
from geofm.dedup.matmul import on_every_core
from geofm.dedup.partition import (
    Cells,
    Frame,
    assign,
    keep_visits,
    slice_cells,
    sort_cells,
    visit_codes,
)
from geofm.dedup.sketch import Sketches
from geofm.embeddings.vectors import READ, Space, take_rows
from geofm.types import Indices

Hashes = NDArray[np.uint64]
#: Cells whose visits are carried over at once.
CELLS_AT_ONCE = 64


def match_rows(before: Hashes, home: NDArray[np.int32], now: Hashes) -> Indices:
    """For each row of now, the searched row of before with the same vector; -1 where none has."""
    rows = np.flatnonzero(home >= 0)
    found = np.full(len(now), -1, dtype=np.int64)
    if not len(rows):
        return found
    known = before[rows]
    table, slot = table_of(known)

    def work(first: int) -> None:
        some = slice(first, first + READ)
        guess = table[slots(now[some], len(table))]
        found[some] = np.where(known[guess] == now[some], rows[guess], -1)

    for _ in on_every_core(work, range(0, len(now), READ)):
        pass
    # of rows that share a slot the table has one: the others are looked up in order
    hidden = np.flatnonzero(table[slot] != np.arange(len(rows)))
    missing = np.flatnonzero(found < 0)
    if len(hidden) and len(missing):
        hidden = hidden[np.argsort(known[hidden])]
        at = np.minimum(np.searchsorted(known[hidden], now[missing]), len(hidden) - 1)
        same = known[hidden[at]] == now[missing]
        found[missing[same]] = rows[hidden[at[same]]]
    return found


def collapse_known(stored: NDArray[np.float16], hashes: Hashes, of: Indices) -> Indices:
    """``collapse_vectors`` of matched rows and others: those of one earlier row are alike."""
    stands_for = np.arange(len(of))
    old, new = np.flatnonzero(of >= 0), np.flatnonzero(of < 0)
    first = np.empty(int(of.max(initial=-1)) + 1, dtype=np.int64)
    first[of[old[::-1]]] = old[::-1]
    stands_for[old] = first[of[old]]
    stands_for[new] = new[first_alike(hashes[new])]
    return tell_apart(stored, hashes, stands_for)


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
    row_of, new_row = to.astype(np.int32), new.astype(np.int32)
    gone, ascending = len(old) < len(to), len(old) < 2 or bool((np.diff(old) > 0).all())

    def work(first: int) -> Cells:
        some = slice_cells(before, first, first + CELLS_AT_ONCE)
        known = replace(some, row=row_of[some.row])
        if gone:
            known = keep_visits(known, known.row >= 0)
        more = slice_cells(fresh, first, first + CELLS_AT_ONCE)
        mine, cell = new_row[more.row], more.cell
        if not ascending:
            codes = [visit_codes(known.row, known.cell), visit_codes(mine, cell)]
            return sort_cells(home, codes, len(known.begin) - 1)
        place = _places(known.row, known.begin, mine, cell)
        return Cells(home, np.insert(known.row, place, mine), known.begin + more.begin)

    count = len(before.begin) - 1
    parts = list(on_every_core(work, range(0, count, CELLS_AT_ONCE)))
    sizes = np.concatenate([np.diff(part.begin) for part in parts])
    begin = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(sizes, out=begin[1:])
    return Cells(home, np.concatenate([part.row for part in parts]), begin)


def _places(
    row: NDArray[np.int32],
    begin: Indices,
    more_row: NDArray[np.int32],
    more_cell: NDArray[np.int32],
) -> Indices:
    """Where visits belong among others that are sorted by (cell, row): by halving, few in many."""
    low, high = begin[more_cell], begin[more_cell + 1]
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        middle = (low + high) // 2
        beyond = (low < high) & (row[np.minimum(middle, len(row) - 1)] < more_row)
        low, high = np.where(beyond, middle + 1, low), np.where(beyond, high, middle)
    return np.asarray(low, dtype=np.int64)


def carry_sketches(before: Sketches, of: Indices, pool: NDArray[np.bool_], into: Sketches) -> None:
    """The sketches of rows that were there, by their rows of now; the others get zeros.

    Args:
        before: of the earlier rows.
        of: for each row of now its earlier row, -1 for a new one.
        pool: the rows of now that are searched.
        into: [len(of), WIDTH], written.
    """

    def work(first: int) -> None:
        some = slice(first, first + READ)
        before.take(of[some], axis=0, out=into[some], mode="clip")
        into[some][(of[some] < 0) | ~pool[some]] = 0

    for _ in on_every_core(work, range(0, len(of), READ)):
        pass


def carry_edges(before: Edges, to: Indices) -> Edges:
    """The edges whose two rows are still there, by their rows of now."""
    left, right = to[before.left], to[before.right]
    there = (left >= 0) & (right >= 0)
    return sort_edges(left[there], right[there], before.similarity[there])


def could_be_dense(edges: Edges, home: NDArray[np.int32]) -> bool:
    """Whether a cell has so many pairs that a full search might not list them."""
    count = int(home.max(initial=0)) + 1
    pairs = np.bincount(home[edges.left], minlength=count)
    pairs += np.bincount(home[edges.right], minlength=count)
    return bool(pairs.max(initial=0) > DENSE_PAIRS)


def extend(
    space: Space, frame: Frame, before: Cells, of: Indices, pool: NDArray[np.bool_]
) -> tuple[Cells, Indices, Indices]:
    """The cells of a pool from those of an earlier one over the same frame.

    Args:
        space: the pool of now, compared in the frame's centre.
        frame: of the earlier search.
        before: its cells.
        of: for each row of now its earlier row, -1 for a new one (``match_rows``).
        pool: the rows of now that are searched.

    Returns:
        Cells; for each earlier row its row of now or -1; the new rows.
    """
    to = turn_round(of, len(before.home), pool)
    new = np.flatnonzero(pool & (of < 0))
    part = Space(take_rows(space.stored, new), space.centre)
    return carry_cells(before, of, to, new, assign(frame, part, 0, len(part))), to, new
