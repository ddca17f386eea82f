"""Pairs of chips of which metadata says whether they show the same, and when.

Every function takes chips (columns collection, item_id, cell, datetime, geometry) and gives pairs
of positions, both of one collection, at most so many of each.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from geofm.types import Indices

Pairs = tuple[Indices, Indices]

#: Intersection over union from which two footprints are one view; metres that are far.
SAME_VIEW, FAR_M = 0.75, 100_000.0
RADIUS_M = 6_371_008.8


def overlapping(chips: pd.DataFrame, most: int) -> Pairs:
    """Chips of two scenes of one day whose footprints nearly coincide."""
    areas = np.asarray(chips["geometry"].to_numpy(), dtype=object)
    left, right = shapely.STRtree(areas).query(areas, predicate="intersects")
    day, item = _days(chips), chips["item_id"].astype(str).to_numpy()
    same = (left < right) & (day[left] == day[right]) & (item[left] != item[right])
    left, right = left[same], right[same]
    common = shapely.area(shapely.intersection(areas[left], areas[right]))
    union = shapely.area(areas[left]) + shapely.area(areas[right]) - common
    near = common >= SAME_VIEW * union
    return _limit(chips, left[near], right[near], most)


def other_dates(chips: pd.DataFrame, most: int) -> Pairs:
    """The same cell on different days."""
    day = _days(chips)
    found: list[tuple[int, int]] = []
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(chips["collection"], chips["cell"], strict=True)):
        groups[str(key[0]), str(key[1])].append(row)
    for rows in groups.values():
        # a long series gives neighbours in time, not all pairs
        several = sorted(rows, key=lambda row: (day[row], row))[:64]
        found += [(a, b) for a, b in combinations(several, 2) if day[a] != day[b]]
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return _limit(chips, pairs[:, 0], pairs[:, 1], most)


def far_pairs(chips: pd.DataFrame, most: int) -> Pairs:
    """Random chips of one collection more than 100 km apart."""
    bounds = shapely.bounds(np.asarray(chips["geometry"].to_numpy(), dtype=object)).reshape(-1, 4)
    lon, lat = np.radians((bounds[:, :2] + bounds[:, 2:]) / 2).T
    lefts, rights = [], []
    names = chips["collection"].astype(str).to_numpy()
    for name in sorted(set(names)):
        rows = np.flatnonzero(names == name)
        draw = np.random.default_rng(len(rows))
        left, right = rows[draw.integers(0, len(rows), (2, 3 * most))]
        low, high = np.minimum(left, right), np.maximum(left, right)
        codes = np.unique(low * len(chips) + high)
        low, high = codes // len(chips), codes % len(chips)
        half = np.sin((lat[low] - lat[high]) / 2) ** 2 + (
            np.cos(lat[low]) * np.cos(lat[high]) * np.sin((lon[low] - lon[high]) / 2) ** 2
        )
        far = 2 * RADIUS_M * np.arcsin(np.sqrt(np.clip(half, 0, 1))) > FAR_M
        lefts.append(low[far])
        rights.append(high[far])
    nothing = np.empty(0, np.int64)
    return _limit(
        chips, np.concatenate([nothing, *lefts]), np.concatenate([nothing, *rights]), most
    )


def _days(chips: pd.DataFrame) -> NDArray[np.str_]:
    return np.array([str(when)[:10] for when in chips["datetime"]])


def _limit(chips: pd.DataFrame, left: NDArray[Any], right: NDArray[Any], most: int) -> Pairs:
    """Pairs within a collection, at most so many of each, evenly over their order."""
    names = chips["collection"].astype(str).to_numpy()
    left, right = left.astype(np.int64), right.astype(np.int64)
    order = np.lexsort((right, left))
    left, right = left[order], right[order]
    keep: list[Indices] = [np.empty(0, np.int64)]
    for name in sorted(set(names)):
        mine = np.flatnonzero((names[left] == name) & (names[right] == name))
        if len(mine) > most:
            mine = mine[np.linspace(0, len(mine) - 1, most).astype(np.int64)]
        keep.append(mine)
    chosen = np.concatenate(keep)
    return left[chosen], right[chosen]
