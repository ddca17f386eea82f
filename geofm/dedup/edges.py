"""Pairs of rows with their exact similarity, and how to look them up by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.types import Floats, Indices


@dataclass(frozen=True)
class Edges:
    """Pairs of rows ``left < right`` with their exact similarity, sorted by (left, right)."""

    left: Indices
    right: Indices
    similarity: Floats

    def __len__(self) -> int:
        return len(self.left)


def no_edges() -> Edges:
    """No pair."""
    return Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def sort_edges(left: Indices, right: Indices, similarity: Floats) -> Edges:
    """Edges from pairs in any order and direction, each once."""
    low, high = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((high, low))
    low, high, similarity = low[order], high[order], similarity[order]
    new = np.ones(len(low), dtype=np.bool_)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return Edges(low[new], high[new], similarity[new])


def join_edges(parts: Sequence[Edges]) -> Edges:
    """All edges of several lists, each once."""
    if not parts:
        return no_edges()
    return sort_edges(
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.right for part in parts]),
        np.concatenate([part.similarity for part in parts]),
    )


def neighbour_lists(edges: Edges, rows: int) -> tuple[Indices, Indices, Floats]:
    """The edges in both directions, grouped by row.

    Returns:
        ``start`` [rows + 1], and for row r in ``start[r]:start[r + 1]`` its neighbours and
        their similarities, most similar first, ties by row.
    """
    source = np.concatenate([edges.left, edges.right])
    target = np.concatenate([edges.right, edges.left])
    value = np.concatenate([edges.similarity, edges.similarity])
    order = np.lexsort((target, -value, source))
    start = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(source, minlength=rows), out=start[1:])
    return start, target[order], value[order]


def nearest_kept(kept: NDArray[np.bool_], edges: Edges) -> tuple[Indices, Indices, Indices]:
    """For rows that go and have a neighbour that stays, the most similar one.

    Returns:
        The rows, ascending; of each its neighbour (ties: the lower); and the number of their edge.
    """
    mixed = np.flatnonzero(kept[edges.left] != kept[edges.right])
    left, right, similarity = (part[mixed] for part in (edges.left, edges.right, edges.similarity))
    row, other = np.where(kept[left], right, left), np.where(kept[left], left, right)
    order = np.lexsort((other, -similarity, row))
    dropped, first = np.unique(row[order], return_index=True)
    best = order[first]
    return dropped, other[best], mixed[best]
