"""The leader rule: who stays when chips are near duplicates of each other.

Chips are taken in one total order, best first. A chip stays unless one that stayed before it is
within the threshold. Unlike connected components, and unlike "drop what resembles any earlier
one", this loses nothing: no two chips that stay are within the threshold, and every chip that
goes has one that stayed within it, its witness.

It is computed in rounds (Luby 1986, with fixed priorities): a chip that comes before all its
undecided neighbours stays, its neighbours go. That is the answer of the sequential rule, for any
order of the input and however the pairs were found. In a dense cell, whose pairs are not written
down, the rule asks only for the neighbours of chips that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import CheckError
from geofm.dedup.edges import Edges, join_edges, nearest_kept, neighbour_lists, no_edges
from geofm.types import Floats, Indices

#: Rounds after which the rest is decided one by one: a chain in its own order needs one each.
MOST_ROUNDS = 200
#: Rows decided at once where pairs have to be asked for.
AT_ONCE = 4096

#: ``hidden(left, right)``: the pairs of dense cells between some rows and others.
Hidden = Callable[[Indices, Indices], Edges]


class LeaderRuleBroken(CheckError):
    """The result does not have the two properties that define the rule."""


@dataclass(frozen=True)
class Leaders:
    """Who stays: ``kept`` [n]; for the others ``witness`` (a row, else -1) and ``similarity``.

    ``edges`` are the pairs that were given, and those of dense cells that the witnesses need.
    """

    kept: NDArray[np.bool_]
    witness: Indices
    similarity: Floats
    edges: Edges = field(default_factory=no_edges)


def total_order(quality: Floats, chip_ids: list[str]) -> Indices:
    """Rows by quality, best first, then by id."""
    ids = np.array(chip_ids, dtype=np.str_)
    return np.lexsort((ids, -quality)).astype(np.int64)


def choose_leaders(
    order: Indices, edges: Edges, hidden: Hidden | None = None, dense: Indices | None = None
) -> Leaders:
    """Apply the rule to rows in ``order`` (every row once, best first).

    The witness of a dropped row is the most similar of the kept rows within the threshold,
    ties going to the lower row.

    Args:
        order: rows, best first.
        edges: pairs within the threshold.
        hidden: asks for the pairs of dense cells, where there are any.
        dense: the rows of dense cells.

    Raises:
        LeaderRuleBroken: when the result lacks one of the two properties (a defect).
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    if hidden is None or dense is None or not len(dense):
        kept = decide(rank, edges)
    else:
        kept = _decide_dense(order, rank, edges, hidden, dense)
        edges = join_edges([edges, best_hidden(kept, hidden, dense)])
    witness, similarity = _witnesses(kept, edges)
    leaders = Leaders(kept, witness, similarity, edges)
    check_leaders(leaders, edges)
    return leaders


def decide(rank: Indices, edges: Edges) -> NDArray[np.bool_]:
    """Who stays, by rounds. ``rank`` [n] is each row's place in the order."""
    rows = len(rank)
    kept = np.zeros(rows, dtype=np.bool_)
    open_ = np.ones(rows, dtype=np.bool_)
    left, right = edges.left, edges.right
    for _ in range(MOST_ROUNDS):
        # the first of each pair in the order, and the one it can drop
        first = np.where(rank[left] < rank[right], left, right)
        second = np.where(rank[left] < rank[right], right, left)
        waits = np.zeros(rows, dtype=np.bool_)
        waits[second] = True
        stay = open_ & ~waits
        kept |= stay
        open_ &= waits
        open_[second[stay[first]]] = False
        if not open_.any():
            return kept
        still = open_[left] & open_[right]
        left, right = left[still], right[still]
    return _one_by_one(rank, left, right, kept, open_)


def _one_by_one(
    rank: Indices,
    left: Indices,
    right: Indices,
    kept: NDArray[np.bool_],
    open_: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """The rest of the rows in their order."""
    start, target, _ = neighbour_lists(Edges(left, right, np.zeros(len(left))), len(rank))
    rows = np.flatnonzero(open_)
    for row in rows[np.argsort(rank[rows])]:
        if open_[row]:
            kept[row] = True
            open_[target[start[row] : start[row + 1]]] = False
    return kept


def _decide_dense(
    order: Indices, rank: Indices, edges: Edges, hidden: Hidden, dense: Indices
) -> NDArray[np.bool_]:
    """Who stays where some pairs have to be asked for: block by block in the order."""
    rows = len(order)
    kept = np.zeros(rows, dtype=np.bool_)
    open_ = np.ones(rows, dtype=np.bool_)
    start, target, _ = neighbour_lists(edges, rows)
    is_dense = np.zeros(rows, dtype=np.bool_)
    is_dense[dense] = True
    at = 0
    while at < rows:
        block = order[at:][open_[order[at:]]][:AT_ONCE]
        if not len(block):
            break
        at = int(rank[block[-1]]) + 1
        asks = np.sort(block[is_dense[block]])
        here = join_edges([_within(block, start, target, rows), hidden(asks, asks)])
        place = np.full(rows, -1, dtype=np.int64)
        place[block] = np.arange(len(block))
        local = Edges(place[here.left], place[here.right], here.similarity)
        stay = block[decide(np.arange(len(block)), local)]
        kept[stay] = True
        open_[block] = False
        open_[_neighbours(stay, start, target)[1]] = False
        later = np.flatnonzero(open_ & is_dense)
        found = hidden(np.sort(stay[is_dense[stay]]), later)
        open_[found.left] = False
        open_[found.right] = False
    return kept


def _neighbours(rows: Indices, start: Indices, target: Indices) -> tuple[Indices, Indices]:
    """(row, neighbour) for all neighbours of some rows."""
    count = start[rows + 1] - start[rows]
    offset = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(rows, count), target[np.repeat(start[rows], count) + offset]


def _within(block: Indices, start: Indices, target: Indices, rows: int) -> Edges:
    """The pairs of which both rows are in a block."""
    left, right = _neighbours(block, start, target)
    inside = np.zeros(rows, dtype=np.bool_)
    inside[block] = True
    both = inside[right] & (left < right)
    return Edges(left[both], right[both], np.zeros(int(both.sum())))


def best_hidden(kept: NDArray[np.bool_], hidden: Hidden, dense: Indices) -> Edges:
    """Find the most similar kept row of each dropped row of a dense cell, as edges."""
    found = [no_edges()]
    stay = np.sort(dense[kept[dense]])
    gone = np.sort(dense[~kept[dense]])
    for first in range(0, len(gone), AT_ONCE):
        some = gone[first : first + AT_ONCE]
        edges = hidden(stay, some)
        best = nearest_kept(kept, edges)[2]
        found.append(Edges(edges.left[best], edges.right[best], edges.similarity[best]))
    return join_edges(found)


def _witnesses(kept: NDArray[np.bool_], edges: Edges) -> tuple[Indices, Floats]:
    """The most similar kept row of each other row, and how similar."""
    witness = np.full(len(kept), -1, dtype=np.int64)
    similarity = np.full(len(kept), np.nan)
    dropped, kept_ones, best = nearest_kept(kept, edges)
    witness[dropped] = kept_ones
    similarity[dropped] = edges.similarity[best]
    return witness, similarity


def check_leaders(leaders: Leaders, edges: Edges) -> None:
    """No two kept rows share an edge; every other row has a kept witness.

    Raises:
        LeaderRuleBroken: naming the first rows that break it.
    """
    both = np.flatnonzero(leaders.kept[edges.left] & leaders.kept[edges.right])
    if len(both):
        pair = int(edges.left[both[0]]), int(edges.right[both[0]])
        raise LeaderRuleBroken(
            f"{len(both)} pairs of kept chips are within the threshold, e.g. rows {pair}; "
            "this is a defect of the curate stage, nothing was published"
        )
    gone = np.flatnonzero(~leaders.kept)
    alone = gone[(leaders.witness[gone] < 0) | ~leaders.kept[leaders.witness[gone]]]
    if len(alone):
        raise LeaderRuleBroken(
            f"{len(alone)} dropped chips have no kept witness, e.g. row {int(alone[0])}; "
            "this is a defect of the curate stage, nothing was published"
        )
