"""Budgets, strata and quotas: who is sure of a share of what is kept, and who survived.

The rule. Chips are divided into strata by the columns asked for (collection, ground region,
season, cluster), the coarsest first; columns are left out from the end until there are no more
strata than chips to keep. A share of the budget (``min_share``) is divided among the strata, in
proportion to their sizes or equally, at least one chip each, so that no stratum vanishes: each
stratum keeps its best chips by that many. The rest of the budget goes to the best chips wherever
they are. With ``min_share`` 1 every stratum gets its quota and no more.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyproj import CRS

from data_catalog.errors import UsageError
from geofm.types import Floats, Indices

#: Edge of a ground region: 100 km as in the military grid, or one degree.
REGION_M, REGION_DEGREES = 100_000.0, 1.0
#: Meteorological seasons by month, named by their months: right on both hemispheres.
SEASONS = ("DJF", "MAM", "JJA", "SON")


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


def meteorological_season(datetime: str | None) -> str:
    """Return the season of an ISO 8601 time (DJF, MAM, JJA or SON); empty without a month."""
    month = str(datetime or "")[5:7]
    return SEASONS[int(month) % 12 // 3] if month.isdigit() else ""


def divide(columns: Mapping[str, Sequence[str]], most: int) -> tuple[Indices, tuple[str, ...]]:
    """Strata by as many of the columns, in their order, as make no more than ``most`` of them.

    Returns:
        A number per row (strata in the order of their names), and the columns that were used.
    """
    names = tuple(columns)
    rows = len(columns[names[0]]) if names else 0
    codes, used = np.zeros(rows, dtype=np.int64), 0
    for name in names:
        _, values = np.unique(np.array(columns[name], dtype=np.str_), return_inverse=True)
        finer = codes * (int(values.max(initial=0)) + 1) + values
        strata, finer = np.unique(finer, return_inverse=True)
        if len(strata) > most:
            break
        codes, used = finer.astype(np.int64), used + 1
    return codes, names[:used]


def quotas(sizes: Sequence[int], budget: int, equal: bool = False) -> list[int]:
    """Shares of a budget: at least 1 each, at most the size, else in proportion to the sizes.

    Needs len(sizes) <= budget <= sum(sizes). With ``equal`` all shares are the same, except that
    what a small stratum cannot use goes to the others. Largest remainders first, ties by position.
    """
    weights = [1] * len(sizes) if equal else list(sizes)
    total = sum(weights)
    given = [
        min(size, max(1, budget * weight // total))
        for size, weight in zip(sizes, weights, strict=True)
    ]
    missing = budget - sum(given)
    step = 1 if missing > 0 else -1

    def lack(i: int) -> tuple[int, int]:
        return step * (given[i] * total - budget * weights[i]), i

    waiting = [lack(i) for i in range(len(sizes))]
    heapq.heapify(waiting)
    while missing:
        _, i = heapq.heappop(waiting)
        if 1 <= given[i] + step <= sizes[i]:
            given[i] += step
            missing -= step
            heapq.heappush(waiting, lack(i))
    return given


def take(priority: Floats, strata: Indices, count: int, min_share: float, equal: bool) -> Indices:
    """The ``count`` rows of highest priority, after each stratum took what it is sure of.

    Args:
        priority: per row; ties go to the earlier row.
        strata: number per row from 0, no more different ones than ``count``.
        count: rows to take, at most ``len(priority)``.
        min_share: share of ``count`` that strata are sure of (at least one row each).
        equal: divide it equally instead of by size.

    Returns:
        Positions, ascending.
    """
    if count >= len(priority):
        return np.arange(len(priority))
    sizes = np.bincount(strata)
    promised = min(count, max(len(sizes), int(min_share * count + 0.5)))
    sure = np.array(quotas(sizes.tolist(), promised, equal), dtype=np.int64)
    order = np.argsort(-priority, kind="stable")
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    rank = np.empty(len(order), dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    rank[by_stratum] = np.arange(len(order)) - starts[strata[by_stratum]]
    first = rank < sure[strata]
    rest = order[~first[order]][: count - promised]
    return np.sort(np.concatenate([np.flatnonzero(first), rest])).astype(np.int64)


def survival(
    columns: Mapping[str, Sequence[str]], stages: Mapping[str, NDArray[np.bool_]]
) -> pd.DataFrame:
    """How many chips of each stratum were left after each stage: the bias of a filter, in a table.

    Args:
        columns: labels of all candidates, by name (``collection``, ``region``, ``season``, …).
        stages: who was left, by name and in order (``passed``, ``distinct``, ``kept``, …).

    Returns:
        A row per column and label: ``stratum_of``, ``stratum``, ``candidates``, a count per
        stage, ``survival`` (last stage ÷ candidates) and ``representation`` (survival ÷ that
        of all candidates: 1 is unbiased; NaN when nothing survived).
    """
    frames = []
    last = list(stages)[-1]
    for name, labels in columns.items():
        table = pd.DataFrame({"stratum": np.array(labels, dtype=np.str_), "candidates": 1})
        for stage, left in stages.items():
            table[stage] = left.astype(np.int64)
        table = table.groupby("stratum", sort=True, as_index=False).sum()
        table.insert(0, "stratum_of", name)
        frames.append(table)
    found = pd.concat(frames, ignore_index=True)
    found["survival"] = (found[last] / found["candidates"]).round(6)
    overall = float(np.mean(stages[last])) if len(stages[last]) else 0.0
    ratio = found[last] / found["candidates"] / overall if overall else np.nan
    found["representation"] = np.round(ratio, 6)
    return found
