"""All pairs of chips that are as similar as the threshold, found exactly.

Identical pixels are collapsed by digest before any search, and constant chips never reach it:
both would make a range search return a square number of pairs. The search itself is faiss' exact
inner product at a slightly lower threshold; every pair it proposes is decided in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import UsageError
from data_catalog.progress import tick
from geofm.curation.space import MARGIN, Floats, Indices, Space, use_threads

#: Queries per search; pairs beyond which a threshold is taken for a mistake (1.6 GB of edges).
QUERIES, MOST_EDGES = 512, 100_000_000


class TooManyPairs(UsageError):
    """The threshold makes nearly everything a duplicate of everything."""


@dataclass(frozen=True)
class Edges:
    """Pairs of rows ``left < right`` with their exact similarity, sorted by (left, right)."""

    left: Indices
    right: Indices
    similarity: Floats

    def __len__(self) -> int:
        return len(self.left)


def collapse_identical(groups: list[str], order: Indices) -> Indices:
    """The representative of each row: the first, in ``order``, of the rows of its group.

    Args:
        groups: the identity of each row's content.
        order: rows, best first.

    Returns:
        For each row, the row that stands for it (itself if it is the best of its group).
    """
    first: dict[str, int] = {}
    for row in order:
        first.setdefault(groups[row], int(row))
    return np.array([first[group] for group in groups], dtype=np.int64)


def find_edges(space: Space, threshold: float, most: int = MOST_EDGES) -> Edges:
    """Every pair of rows whose exact similarity is at least ``threshold``.

    Raises:
        TooManyPairs: beyond ``most`` pairs.
    """
    use_threads()
    index = faiss.IndexFlatIP(space.stored.shape[1])
    index.add(space.units)
    lefts: list[Indices] = []
    rights: list[Indices] = []
    values: list[Floats] = []
    found = 0
    for first in range(0, len(space), QUERIES):
        limits, _, hits = index.range_search(
            space.units[first : first + QUERIES], threshold - MARGIN
        )
        ends = limits.astype(np.int64)
        left = first + np.repeat(np.arange(len(ends) - 1), ends[1:] - ends[:-1])
        upper = left < hits
        left, right = left[upper], hits[upper].astype(np.int64)
        similarity = space.similarity(left, right)
        near = similarity >= threshold
        lefts.append(left[near])
        rights.append(right[near])
        values.append(similarity[near])
        found += int(near.sum())
        if found > most:
            raise TooManyPairs(
                f"curate.threshold: more than {most} pairs of chips are at least {threshold} "
                f"similar; raise it (e.g. to {min(1.0, threshold + 0.02):.2f}), or choose fewer "
                "scenes of the same kind"
            )
        tick("duplicates", min(first + QUERIES, len(space)), len(space), f"{found} pairs")
    if not lefts:
        return Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    edges = Edges(np.concatenate(lefts), np.concatenate(rights), np.concatenate(values))
    order = np.lexsort((edges.right, edges.left))
    return Edges(edges.left[order], edges.right[order], edges.similarity[order])


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
    start = np.searchsorted(source[order], np.arange(rows + 1)).astype(np.int64)
    return start, target[order], value[order]


def first_true(start: Indices, flags: NDArray[np.bool_]) -> Indices:
    """Position of the first true flag in each row's list, -1 where there is none."""
    positions = np.flatnonzero(flags)
    at = np.searchsorted(positions, start[:-1])
    found = np.full(len(start) - 1, -1, dtype=np.int64)
    inside = at < len(positions)
    candidates = positions[at[inside]]
    found[inside] = np.where(candidates < start[1:][inside], candidates, -1)
    return found
