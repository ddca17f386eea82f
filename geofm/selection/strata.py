"""Budgets, strata and quotas, and counts of the chips that survive in each stratum.

Chips are divided into strata by the configured columns (collection, ground region, season,
cluster), the coarsest first. If there are more strata than chips to keep, the last columns are left
out. A share of the budget (``min_share``) is divided among the strata, in proportion to their sizes
or equally, with at least one chip each, so that no stratum vanishes. Each stratum keeps its best
chips up to its quota. The rest of the budget goes to the best chips of any stratum. If
``min_share`` is 1, there is no rest.
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

#: Edge of a ground region: 100 km as in the military grid (MGRS), or one degree if the unit of the
#: CRS is degrees.
REGION_M, REGION_DEGREES = 100_000.0, 1.0
#: Meteorological seasons, named by the initials of their months, for both hemispheres.
SEASONS = ("DJF", "MAM", "JJA", "SON")


def budget_count(budget: float | None, pool: int) -> int:
    """Convert a budget to a number of chips.

    Args:
        budget: share (up to 1) or number of chips to keep; None keeps all.
        pool: number of chips to select from.

    Raises:
        UsageError: The number is larger than the pool, or not whole.
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


# Strata


@lru_cache(maxsize=1024)
def _is_geographic(crs: str) -> bool:
    """Return whether the coordinates of a CRS are degrees."""
    return bool(CRS.from_user_input(crs).is_geographic)


def ground_region(crs: str, transform: Sequence[float]) -> str:
    """Name the square (100 km, or one degree) of a CRS that contains the corner of a chip."""
    edge = REGION_DEGREES if _is_geographic(crs) else REGION_M
    x, y = (int(np.floor(transform[i] / edge)) for i in (2, 5))
    return f"{crs} {x} {y}"


def meteorological_season(datetime: str | None) -> str:
    """Return the season (DJF, MAM, JJA or SON) of an ISO 8601 time; empty without a time."""
    month = str(datetime or "")[5:7]
    return SEASONS[int(month) % 12 // 3] if month.isdigit() else ""


def divide_into_strata(
    columns: Mapping[str, Sequence[str]], most: int
) -> tuple[Indices, tuple[str, ...]]:
    """Divide rows into at most ``most`` strata by the first columns, as many as possible.

    Returns:
        The stratum of each row, numbered in the order of the labels; and the columns in use.
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


# Quotas


def take_best(
    priority: Floats, strata: Indices, count: int, min_share: float, equal: bool
) -> Indices:
    """Take the rows of highest priority, after each stratum has taken its guaranteed share.

    Args:
        priority: priority of each row, shape (n,); ties go to the earlier row.
        strata: number of each row's stratum, from 0, shape (n,); at most ``count`` strata.
        count: number of rows to take.
        min_share: share of ``count`` that is guaranteed to the strata, at least one row each.
        equal: whether that share is divided equally instead of by size.

    Returns:
        Positions, ascending, shape (min(count, n),).
    """
    if count >= len(priority):
        return np.arange(len(priority))
    sizes = np.bincount(strata)
    guaranteed = min(count, max(len(sizes), int(min_share * count + 0.5)))
    quota = np.array(quotas(sizes.tolist(), guaranteed, equal), dtype=np.int64)
    order = np.argsort(-priority, kind="stable")
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    rank_in_stratum = np.empty(len(order), dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    rank_in_stratum[by_stratum] = np.arange(len(order)) - starts[strata[by_stratum]]
    within_quota = rank_in_stratum < quota[strata]
    rest = order[~within_quota[order]][: count - guaranteed]
    return np.sort(np.concatenate([np.flatnonzero(within_quota), rest])).astype(np.int64)


def quotas(sizes: Sequence[int], budget: int, equal: bool = False) -> list[int]:
    """Divide a budget among strata in proportion, with at least 1 row and at most the size each.

    Rows that remain after rounding go to the largest remainders; ties go to the earlier stratum.

    Args:
        sizes: number of rows of each stratum.
        budget: rows to divide, with len(sizes) <= budget <= sum(sizes).
        equal: whether all shares are equal. If a stratum is smaller than its share, the other
            strata get the difference.
    """
    weights = [1] * len(sizes) if equal else list(sizes)
    total = sum(weights)
    shares = [
        min(size, max(1, budget * weight // total))
        for size, weight in zip(sizes, weights, strict=True)
    ]
    missing = budget - sum(shares)
    step = 1 if missing > 0 else -1

    def remainder(i: int) -> tuple[int, int]:
        return step * (shares[i] * total - budget * weights[i]), i

    waiting = [remainder(i) for i in range(len(sizes))]
    heapq.heapify(waiting)
    while missing:
        _, i = heapq.heappop(waiting)
        if 1 <= shares[i] + step <= sizes[i]:
            shares[i] += step
            missing -= step
            heapq.heappush(waiting, remainder(i))
    return shares


# Survivors


def count_survivors(
    columns: Mapping[str, Sequence[str]], steps: Mapping[str, NDArray[np.bool_]]
) -> pd.DataFrame:
    """Count the chips of each stratum that are left after each step, which shows a filter's bias.

    Args:
        columns: labels of all candidates, by column (``collection``, ``region``, ``season``, ...).
        steps: whether each candidate is left after a step, by name of the step (``passed``,
            ``distinct``, ``kept``, ...), in the order of the steps.

    Returns:
        One row per column and label: ``stratum_of``, ``stratum``, ``candidates``, a count per step,
        ``survival`` (last step / candidates) and ``representation`` (survival / survival of all
        candidates: 1 is unbiased; NaN if nothing survived).
    """
    tables = []
    last = list(steps)[-1]
    for name, labels in columns.items():
        table = pd.DataFrame({"stratum": np.array(labels, dtype=np.str_), "candidates": 1})
        for step, left in steps.items():
            table[step] = left.astype(np.int64)
        table = table.groupby("stratum", sort=True, as_index=False).sum()
        table.insert(0, "stratum_of", name)
        tables.append(table)
    survivors = pd.concat(tables, ignore_index=True)
    survivors["survival"] = (survivors[last] / survivors["candidates"]).round(6)
    overall = float(np.mean(steps[last])) if len(steps[last]) else 0.0
    ratio = survivors[last] / survivors["candidates"] / overall if overall else np.nan
    survivors["representation"] = np.round(ratio, 6)
    return survivors
