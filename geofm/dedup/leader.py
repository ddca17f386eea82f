"""The leader rule: which chips stay when chips are near duplicates of each other.

Chips are taken in one total order, best first. A chip is kept unless a chip that was kept before it
is within the threshold. The result has two properties: no two kept chips are within the threshold,
and each dropped chip has a kept chip within the threshold, its witness. Two common rules lack the
second one: keeping one chip of each connected component, and dropping each chip that resembles any
earlier one.

The rule is computed in rounds (Luby 1986, with fixed priorities): a chip that comes before all its
undecided neighbours is kept, and its neighbours are dropped. The result is that of the sequential
rule, for any order of the edges.

The pairs of a dense cell are not listed. There the rule requests the neighbours of the chips that
it keeps (``join.dense_pair_search``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import CheckError
from geofm.dedup.edges import Edges, empty_edges, merge_edges, nearest_kept, neighbour_lists
from geofm.types import Floats, Indices

#: Rounds after which the rest is decided row by row: a chain in its own order needs a round each.
MOST_ROUNDS = 200
#: Rows that are decided at once where the pairs of dense cells are requested.
BLOCK_ROWS = 4096

#: ``search(left, right)``: the pairs of dense cells between two ascending lists of rows.
DensePairSearch = Callable[[Indices, Indices], Edges]


class LeaderRuleBroken(CheckError):
    """The result lacks one of the two properties that define the rule."""


@dataclass(frozen=True)
class Leaders:
    """Result of the leader rule.

    Attributes:
        kept: whether each row is kept, shape (n,).
        witness: the most similar kept row of each dropped row, shape (n,); -1 for kept rows.
        similarity: similarity to the witness, shape (n,); NaN for kept rows.
        edges: the given edges, and those of dense cells that the witnesses need.
    """

    kept: NDArray[np.bool_]
    witness: Indices
    similarity: Floats
    edges: Edges = field(default_factory=empty_edges)


def total_order(quality: Floats, chip_ids: list[str]) -> Indices:
    """Sort rows by quality, best first, then by chip id."""
    ids = np.array(chip_ids, dtype=np.str_)
    return np.lexsort((ids, -quality)).astype(np.int64)


def choose_leaders(
    order: Indices,
    edges: Edges,
    dense_search: DensePairSearch | None = None,
    dense_rows: Indices | None = None,
) -> Leaders:
    """Apply the leader rule.

    The witness of a dropped row is its most similar kept neighbour; ties go to the lower row.

    Args:
        order: all rows, best first, shape (n,).
        edges: pairs within the threshold.
        dense_search: finds the pairs of dense cells; None without such cells.
        dense_rows: rows in dense cells.

    Raises:
        LeaderRuleBroken: The result lacks one of the two properties. This is a defect.
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    if dense_search is None or dense_rows is None or not len(dense_rows):
        kept = _keep_in_rounds(rank, edges)
    else:
        kept = _keep_with_dense_cells(order, rank, edges, dense_search, dense_rows)
        edges = merge_edges([edges, best_dense_pairs(kept, dense_search, dense_rows)])
    witness, similarity = _find_witnesses(kept, edges)
    leaders = Leaders(kept, witness, similarity, edges)
    check_leaders(leaders, edges)
    return leaders


def _keep_in_rounds(rank: Indices, edges: Edges) -> NDArray[np.bool_]:
    """Decide which rows are kept.

    Args:
        rank: position of each row in the order, shape (n,).
        edges: pairs within the threshold.
    """
    rows = len(rank)
    kept = np.zeros(rows, dtype=np.bool_)
    undecided = np.ones(rows, dtype=np.bool_)
    left, right = edges.left, edges.right
    for _ in range(MOST_ROUNDS):
        left_is_first = rank[left] < rank[right]
        first = np.where(left_is_first, left, right)
        second = np.where(left_is_first, right, left)
        has_earlier_neighbour = np.zeros(rows, dtype=np.bool_)
        has_earlier_neighbour[second] = True
        keep = undecided & ~has_earlier_neighbour
        kept |= keep
        undecided &= has_earlier_neighbour
        undecided[second[keep[first]]] = False
        if not undecided.any():
            return kept
        is_open = undecided[left] & undecided[right]
        left, right = left[is_open], right[is_open]
    return _keep_row_by_row(rank, left, right, kept, undecided)


def _keep_row_by_row(
    rank: Indices,
    left: Indices,
    right: Indices,
    kept: NDArray[np.bool_],
    undecided: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Decide the remaining rows in their order."""
    start, target, _ = neighbour_lists(Edges(left, right, np.zeros(len(left))), len(rank))
    rows = np.flatnonzero(undecided)
    for row in rows[np.argsort(rank[rows])]:
        if undecided[row]:
            kept[row] = True
            undecided[target[start[row] : start[row + 1]]] = False
    return kept


def _keep_with_dense_cells(
    order: Indices,
    rank: Indices,
    edges: Edges,
    dense_search: DensePairSearch,
    dense_rows: Indices,
) -> NDArray[np.bool_]:
    """Decide block by block in the order, and request the pairs of dense cells for each block."""
    rows = len(order)
    kept = np.zeros(rows, dtype=np.bool_)
    undecided = np.ones(rows, dtype=np.bool_)
    start, target, _ = neighbour_lists(edges, rows)
    is_dense = np.zeros(rows, dtype=np.bool_)
    is_dense[dense_rows] = True
    begin = 0
    while begin < rows:
        block = order[begin:][undecided[order[begin:]]][:BLOCK_ROWS]
        if not len(block):
            break
        begin = int(rank[block[-1]]) + 1
        dense_in_block = np.sort(block[is_dense[block]])
        block_edges = merge_edges(
            [
                _edges_within(block, start, target, rows),
                dense_search(dense_in_block, dense_in_block),
            ]
        )
        position = np.full(rows, -1, dtype=np.int64)
        position[block] = np.arange(len(block))
        local = Edges(
            position[block_edges.left], position[block_edges.right], block_edges.similarity
        )
        keep = block[_keep_in_rounds(np.arange(len(block)), local)]
        kept[keep] = True
        undecided[block] = False
        undecided[_neighbours_of(keep, start, target)[1]] = False
        later = np.flatnonzero(undecided & is_dense)
        to_later = dense_search(np.sort(keep[is_dense[keep]]), later)
        undecided[to_later.left] = False
        undecided[to_later.right] = False
    return kept


def _neighbours_of(rows: Indices, start: Indices, target: Indices) -> tuple[Indices, Indices]:
    """List (row, neighbour) for all neighbours of some rows (see ``neighbour_lists``)."""
    count = start[rows + 1] - start[rows]
    offset = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(rows, count), target[np.repeat(start[rows], count) + offset]


def _edges_within(block: Indices, start: Indices, target: Indices, rows: int) -> Edges:
    """List the edges between two rows of a block."""
    left, right = _neighbours_of(block, start, target)
    in_block = np.zeros(rows, dtype=np.bool_)
    in_block[block] = True
    within = in_block[right] & (left < right)
    return Edges(left[within], right[within], np.zeros(int(within.sum())))


def best_dense_pairs(
    kept: NDArray[np.bool_], dense_search: DensePairSearch, dense_rows: Indices
) -> Edges:
    """Find the most similar kept row of each dropped row of a dense cell, as edges.

    Args:
        kept: whether each row is kept, shape (n,).
        dense_search: finds the pairs of dense cells.
        dense_rows: rows in dense cells.
    """
    parts = [empty_edges()]
    kept_rows = np.sort(dense_rows[kept[dense_rows]])
    dropped_rows = np.sort(dense_rows[~kept[dense_rows]])
    for first in range(0, len(dropped_rows), BLOCK_ROWS):
        edges = dense_search(kept_rows, dropped_rows[first : first + BLOCK_ROWS])
        best = nearest_kept(kept, edges)[2]
        parts.append(Edges(edges.left[best], edges.right[best], edges.similarity[best]))
    return merge_edges(parts)


def _find_witnesses(kept: NDArray[np.bool_], edges: Edges) -> tuple[Indices, Floats]:
    """Find the most similar kept neighbour of each dropped row, and the similarity."""
    witness = np.full(len(kept), -1, dtype=np.int64)
    similarity = np.full(len(kept), np.nan)
    dropped, neighbour, best = nearest_kept(kept, edges)
    witness[dropped] = neighbour
    similarity[dropped] = edges.similarity[best]
    return witness, similarity


def check_leaders(leaders: Leaders, edges: Edges) -> None:
    """Check that no two kept rows share an edge, and that each dropped row has a kept witness.

    Raises:
        LeaderRuleBroken: A row breaks one of the two properties; the message names the first.
    """
    both = np.flatnonzero(leaders.kept[edges.left] & leaders.kept[edges.right])
    if len(both):
        pair = int(edges.left[both[0]]), int(edges.right[both[0]])
        raise LeaderRuleBroken(
            f"{len(both)} pairs of kept chips are within the threshold, e.g. rows {pair}; "
            "this is a defect of the curate stage, nothing was published"
        )
    dropped = np.flatnonzero(~leaders.kept)
    has_witness = (leaders.witness[dropped] >= 0) & leaders.kept[leaders.witness[dropped]]
    alone = dropped[~has_witness]
    if len(alone):
        raise LeaderRuleBroken(
            f"{len(alone)} dropped chips have no kept witness, e.g. row {int(alone[0])}; "
            "this is a defect of the curate stage, nothing was published"
        )
