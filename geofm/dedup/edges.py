"""Edges: pairs of rows with their exact similarity, lookups by row, and codes of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.types import Bools, Floats, Indices


@dataclass(frozen=True)
class Edges:
    """Pairs of rows ``left < right`` with their exact similarity, sorted by (left, right)."""

    left: Indices
    right: Indices
    similarity: Floats

    def __len__(self) -> int:
        return len(self.left)

    def select(self, selected: NDArray[np.bool_]) -> Edges:
        """Return the edges where a mask of shape (edges,) is true."""
        return Edges(self.left[selected], self.right[selected], self.similarity[selected])


def empty_edges() -> Edges:
    """Return a list without edges."""
    return Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def sort_edges(left: Indices, right: Indices, similarity: Floats) -> Edges:
    """Build edges from pairs in any order and direction; a repeated pair is kept once."""
    low, high = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((high, low))
    low, high, similarity = low[order], high[order], similarity[order]
    first = np.ones(len(low), dtype=np.bool_)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return Edges(low[first], high[first], similarity[first])


def concat_edges(parts: Sequence[Edges]) -> Edges:
    """Append several lists as they are: unsorted, and a pair may be repeated."""
    if not parts:
        return empty_edges()
    return Edges(
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.right for part in parts]),
        np.concatenate([part.similarity for part in parts]),
    )


def merge_edges(parts: Sequence[Edges]) -> Edges:
    """Merge several lists into one sorted list in which each pair occurs once."""
    edges = concat_edges(parts)
    return sort_edges(edges.left, edges.right, edges.similarity)


def neighbour_lists(edges: Edges, rows: int) -> tuple[Indices, Indices, Floats]:
    """Group edges by row, in both directions.

    Returns:
        ``start``, shape (rows + 1,); ``neighbour`` and ``similarity``, shape (2 * edges,). The
        neighbours of row r are ``neighbour[start[r]:start[r + 1]]``, most similar first, ties by
        row.
    """
    source = np.concatenate([edges.left, edges.right])
    target = np.concatenate([edges.right, edges.left])
    value = np.concatenate([edges.similarity, edges.similarity])
    order = np.lexsort((target, -value, source))
    start = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(source, minlength=rows), out=start[1:])
    return start, target[order], value[order]


def nearest_kept(kept: NDArray[np.bool_], edges: Edges) -> tuple[Indices, Indices, Indices]:
    """Find the most similar kept neighbour of each dropped row that has one.

    Args:
        kept: whether each row is kept, shape (rows,).
        edges: pairs of rows.

    Returns:
        Three arrays of one length: dropped rows, ascending; the kept neighbour of each (ties go to
        the lower row); the number of the edge between the two.
    """
    mixed = np.flatnonzero(kept[edges.left] != kept[edges.right])
    left, right, similarity = (part[mixed] for part in (edges.left, edges.right, edges.similarity))
    dropped = np.where(kept[left], right, left)
    neighbour = np.where(kept[left], left, right)
    order = np.lexsort((neighbour, -similarity, dropped))
    rows, first = np.unique(dropped[order], return_index=True)
    best = order[first]
    return rows, neighbour[best], mixed[best]


def pair_codes(left: Indices, right: Indices, rows: int) -> Indices:
    """Encode pairs of rows, in any direction, as lower row * rows + higher row."""
    return np.asarray(np.minimum(left, right) * rows + np.maximum(left, right))


def contains_codes(codes: Indices, wanted: Indices) -> Bools:
    """Tell which of the wanted codes are in a list of ascending codes."""
    if not len(codes):
        return np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return np.asarray(codes[at] == wanted)
