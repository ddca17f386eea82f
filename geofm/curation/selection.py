"""Choosing to a budget: stratified facility location on a sparse similarity graph.

Facility location picks the set S that maximises the sum over all chips of the similarity to
their most similar chip in S. Lazy greedy reaches at least 1 − 1/e of the best value
(Nemhauser et al. 1978; Minoux 1978). Quotas per stratum keep one well-photographed region from
taking the budget. Similarities are whole millionths, so sums do not depend on their order.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from pyproj import CRS

from data_catalog.errors import UsageError
from data_catalog.progress import tick
from geofm.curation.space import Floats, Indices, Space, nearest

MILLION = 1_000_000
#: Edge of a ground region: 100 km as in the military grid, or one degree.
REGION_M, REGION_DEGREES = 100_000.0, 1.0


def budget_count(budget: float | None, pool: int) -> int:
    """How many of ``pool`` chips a budget means: all, a share (up to 1) or a number.

    Raises:
        UsageError: for a number larger than the pool, or one with a fraction.
    """
    if budget is None or pool == 0:
        return pool
    if budget <= 1:
        return max(1, int(budget * pool + 0.5))
    if budget != int(budget):
        raise UsageError(
            f"curate.budget is {budget}: give a share up to 1.0, or a whole number of chips"
        )
    if budget > pool:
        raise UsageError(
            f"curate.budget asks for {int(budget)} chips, but the pool has {pool} after gates and "
            f"duplicates; give at most {pool}, a share up to 1.0, or nothing to keep them all"
        )
    return int(budget)


@lru_cache(maxsize=1024)
def _is_geographic(crs: str) -> bool:
    return bool(CRS.from_user_input(crs).is_geographic)


def ground_region(crs: str, transform: Sequence[float]) -> str:
    """The 100 km square (or one-degree square) of its own CRS that a chip's corner is in."""
    edge = REGION_DEGREES if _is_geographic(crs) else REGION_M
    x, y = (int(np.floor(transform[i] / edge)) for i in (2, 5))
    return f"{crs} {x} {y}"


def make_strata(collections: Sequence[str], regions: Sequence[str], budget: int) -> list[str]:
    """The stratum of each chip: the finest division with no more strata than the budget."""
    fine = [f"{c} {r}" for c, r in zip(collections, regions, strict=True)]
    for division in (fine, list(collections)):
        if len(set(division)) <= budget:
            return division
    return [""] * len(fine)


def quotas(sizes: Sequence[int], budget: int) -> list[int]:
    """Shares of a budget in proportion to ``sizes``: at least 1 each, at most the size.

    Needs len(sizes) <= budget <= sum(sizes). Largest remainders first, ties by position.
    """
    total = sum(sizes)
    given = [min(size, max(1, budget * size // total)) for size in sizes]
    missing = budget - sum(given)
    step = 1 if missing > 0 else -1
    lack = [(step * (g * total - budget * s), i) for i, (s, g) in enumerate(zip(sizes, given))]  # noqa: B905
    heapq.heapify(lack)
    while missing:
        _, i = heapq.heappop(lack)
        if 1 <= given[i] + step <= sizes[i]:
            given[i] += step
            missing -= step
            heapq.heappush(lack, (step * (given[i] * total - budget * sizes[i]), i))
    return given


def facility_location(space: Space, rows: Indices, count: int, neighbours: int) -> Indices:
    """Lazy-greedy choice of ``count`` of ``rows``, in the order they were chosen.

    A row can stand for itself and for the rows that have it among their ``neighbours`` nearest.
    Ties go to the earlier row.
    """
    if count >= len(rows):
        return rows
    near, similarity = nearest(space, rows, rows, neighbours)
    position = np.full(int(rows.max()) + 1, -1, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    stands, served = near.ravel(), np.repeat(np.arange(len(rows)), near.shape[1])
    worth = np.rint(np.maximum(similarity.ravel(), 0) * MILLION).astype(np.int64)
    real = stands >= 0
    own = np.arange(len(rows))
    stands = np.concatenate([position[stands[real]], own])
    served = np.concatenate([served[real], own])
    worth = np.concatenate([worth[real], np.full(len(rows), MILLION, dtype=np.int64)])
    order = np.lexsort((served, stands))
    stands, served, worth = stands[order], served[order], worth[order]
    start = np.searchsorted(stands, np.arange(len(rows) + 1))
    gains = np.add.reduceat(worth, start[:-1])
    reached = np.zeros(len(rows), dtype=np.int64)
    heap = [(-int(gain), i) for i, gain in enumerate(gains)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < count:
        bound, i = heapq.heappop(heap)
        mine = slice(start[i], start[i + 1])
        gain = int(np.maximum(worth[mine] - reached[served[mine]], 0).sum())
        if gain < -bound:
            heapq.heappush(heap, (-gain, i))
            continue
        chosen.append(i)
        reached[served[mine]] = np.maximum(reached[served[mine]], worth[mine])
    return rows[chosen]


def random_choice(chip_ids: Sequence[str], rows: Indices, count: int, seed: int) -> Indices:
    """``count`` of ``rows``, equally likely, decided by a hash of seed and id."""
    keys = [hashlib.sha256(f"{seed} select {chip_ids[row]}".encode()).digest() for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    return rows[np.array(order[:count], dtype=np.int64)]


def stratified(
    space: Space, rows: Indices, strata: Sequence[str], count: int, neighbours: int
) -> Indices:
    """Facility location within each stratum, to quotas; returns the chosen rows, sorted.

    Args:
        space: where chips are compared.
        rows: rows to choose from, ascending.
        strata: stratum of each of ``rows``; no more different ones than ``count``.
        count: how many to choose.
        neighbours: neighbours per chip in the graph.
    """
    names = sorted(set(strata))
    of = np.array(strata, dtype=np.str_)
    members = [rows[of == name] for name in names]
    shares = quotas([len(group) for group in members], count)
    chosen = []
    for number, (group, share) in enumerate(zip(members, shares, strict=True)):
        chosen.append(facility_location(space, group, share, neighbours))
        tick("selection", number + 1, len(names), names[number])
    return np.sort(np.concatenate(chosen)) if chosen else rows[:0]


def coverage(space: Space, pool: Indices, chosen: Indices) -> Floats:
    """Similarity of each row of ``pool`` to its most similar chosen row (1 for a chosen row)."""
    if not len(pool) or not len(chosen):
        return np.zeros(len(pool))
    _, best = nearest(space, pool, chosen, 1, slack=0)
    found = best[:, 0]
    found[np.isin(pool, chosen)] = 1.0
    return np.asarray(found)
