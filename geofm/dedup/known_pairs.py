"""Pairs of chips whose metadata tell whether they show the same, and when.

Each function takes a table of chips (columns collection, item_id, cell, datetime, geometry) and
returns pairs of positions. Both chips of a pair are of one collection, and the number of pairs of
each collection is limited.
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

#: Positions of the left and of the right chip, each of shape (pairs,).
KnownPairs = tuple[Indices, Indices]

#: Intersection over union from which two footprints are the same view.
SAME_VIEW = 0.75
#: Distance in metres from which two chips are far from each other; mean radius of the Earth.
FAR_M, RADIUS_M = 100_000.0, 6_371_008.8
#: Dates of one cell that are paired: a long series gives pairs near in time, not all pairs.
MOST_DATES = 64


def overlapping(chips: pd.DataFrame, most: int) -> KnownPairs:
    """Pair chips of two scenes of one day whose footprints nearly coincide."""
    areas = np.asarray(chips["geometry"].to_numpy(), dtype=object)
    left, right = shapely.STRtree(areas).query(areas, predicate="intersects")
    day, item = _days(chips), chips["item_id"].astype(str).to_numpy()
    same_day = (left < right) & (day[left] == day[right]) & (item[left] != item[right])
    left, right = left[same_day], right[same_day]
    common = shapely.area(shapely.intersection(areas[left], areas[right]))
    union = shapely.area(areas[left]) + shapely.area(areas[right]) - common
    coincide = common >= SAME_VIEW * union
    return _limit(chips, left[coincide], right[coincide], most)


def other_dates(chips: pd.DataFrame, most: int) -> KnownPairs:
    """Pair chips of one cell on different days."""
    day = _days(chips)
    rows_of_cell: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(chips["collection"], chips["cell"], strict=True)):
        rows_of_cell[str(key[0]), str(key[1])].append(row)
    pairs: list[tuple[int, int]] = []
    for rows in rows_of_cell.values():
        earliest = sorted(rows, key=lambda row: (day[row], row))[:MOST_DATES]
        pairs += [(a, b) for a, b in combinations(earliest, 2) if day[a] != day[b]]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return _limit(chips, table[:, 0], table[:, 1], most)


def far_pairs(chips: pd.DataFrame, most: int) -> KnownPairs:
    """Pair chips of one collection that are more than 100 km apart (haversine distance).

    Chips are put into an order by a hash of their ids, and each is paired with those that follow
    it. So most pairs stay the same if a refresh adds a few chips.
    """
    bounds = shapely.bounds(np.asarray(chips["geometry"].to_numpy(), dtype=object)).reshape(-1, 4)
    lon, lat = np.radians((bounds[:, :2] + bounds[:, 2:]) / 2).T
    lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    collections, hashes = chips["collection"].astype(str).to_numpy(), _hashes(chips)
    for collection in sorted(set(collections)):
        rows = np.flatnonzero(collections == collection)
        rows = rows[np.argsort(hashes[rows], kind="stable")][: 3 * most]
        steps = range(1, min(len(rows), 1 + -(-3 * most // max(len(rows), 1))))
        left = np.concatenate([rows[:0], *(rows[:-step] for step in steps)])
        right = np.concatenate([rows[:0], *(rows[step:] for step in steps)])
        low, high = np.minimum(left, right), np.maximum(left, right)
        haversine = np.sin((lat[low] - lat[high]) / 2) ** 2 + (
            np.cos(lat[low]) * np.cos(lat[high]) * np.sin((lon[low] - lon[high]) / 2) ** 2
        )
        is_far = 2 * RADIUS_M * np.arcsin(np.sqrt(np.clip(haversine, 0, 1))) > FAR_M
        lefts.append(low[is_far])
        rights.append(high[is_far])
    return _limit(chips, np.concatenate(lefts), np.concatenate(rights), most)


def _days(chips: pd.DataFrame) -> NDArray[np.str_]:
    """Return the date of each chip."""
    return np.array([str(time)[:10] for time in chips["datetime"]])


def _hashes(chips: pd.DataFrame) -> NDArray[np.uint64]:
    """Return a hash of the id of each chip, which is the same in every run."""
    ids = chips["chip_id"].astype(str).to_numpy(dtype=object)
    return pd.util.hash_array(ids, categorize=False)


def _limit(chips: pd.DataFrame, left: NDArray[Any], right: NDArray[Any], most: int) -> KnownPairs:
    """Keep pairs within a collection, at most ``most`` of each: those with the lowest hashes.

    So most pairs stay the same if a refresh adds a few chips.
    """
    collections, hashes = chips["collection"].astype(str).to_numpy(), _hashes(chips)
    left, right = left.astype(np.int64), right.astype(np.int64)
    order = np.lexsort((right, left))
    left, right = left[order], right[order]
    low, high = np.minimum(hashes[left], hashes[right]), np.maximum(hashes[left], hashes[right])
    # an odd factor, so that the hash of a pair depends on all bits of both (Fibonacci hashing)
    mixed = (low ^ (high >> np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
    chosen: list[Indices] = [np.empty(0, np.int64)]
    for name in sorted(set(collections)):
        within = np.flatnonzero((collections[left] == name) & (collections[right] == name))
        if len(within) > most:
            within = np.sort(within[np.argsort(mixed[within], kind="stable")[:most]])
        chosen.append(within)
    rows = np.concatenate(chosen)
    return left[rows], right[rows]
