"""The sampling plan: which windows of which scenes are cut, chosen before anything is downloaded.

Everything here follows from metadata. A window falls for the first reason that applies, in the
order of ``REASONS``; what is left is the plan. Chances are drawn from digests, so that the same
scenes give the same plan, and one more scene changes little of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from geofm.chips.overlap import Cells, Claim, find_owners
from geofm.config.area import FULL_TURNS
from geofm.config.recipe import CutSettings
from geofm.raster.grid import all_cells, boxes, centres
from geofm.runtime.timestamps import epoch_seconds, parse_time

#: Why a window is not cut; empty for those that are.
REASONS = (
    "",
    "nodata_percent",
    "outside_area",
    "no_footprint",
    "overlap",
    "more_dates",
    "stratum_full",
    "over_budget",
)
_CODE = {reason: number for number, reason in enumerate(REASONS)}


@dataclass(frozen=True)
class Windows:
    """Every window of every claim; all arrays have one element per window.

    Attributes:
        claim: number of the claim.
        cells: [n, 2] cell numbers x, y.
        reason: position in ``REASONS``, 0 for what is cut.
        owner: claim that owns the ground where the reason is ``overlap``, else -1.
    """

    claim: NDArray[np.int64]
    cells: Cells
    reason: NDArray[np.int8]
    owner: NDArray[np.int64]

    def of(self, claim: int) -> slice:
        """Where the windows of a claim are: they follow each other."""
        first, end = np.searchsorted(self.claim, [claim, claim + 1])
        return slice(int(first), int(end))

    def chosen(self, claim: int) -> Cells:
        """The cells of a claim that are cut."""
        mine = self.of(claim)
        found: Cells = self.cells[mine][self.reason[mine] == 0]
        return found

    def lost(self, claim: int) -> list[tuple[tuple[int, int], int]]:
        """The cells of a claim that another owns, with that claim."""
        mine = self.of(claim)
        gone = self.reason[mine] == _CODE["overlap"]
        pairs = zip(self.cells[mine][gone].tolist(), self.owner[mine][gone].tolist(), strict=True)
        return [((x, y), owner) for (x, y), owner in pairs]

    def counts(self) -> dict[str, int]:
        """Windows by reason; the empty reason is what is cut."""
        number = np.bincount(self.reason, minlength=len(REASONS))
        return {reason: int(n) for reason, n in zip(REASONS, number, strict=True) if n}


def choose(claims: Sequence[Claim], settings: CutSettings, area: BaseGeometry | None) -> Windows:
    """The plan.

    Args:
        claims: the scenes.
        settings: limits and budgets.
        area: where to sample (EPSG:4326), None for everywhere.
    """
    cells = [all_cells(c.grid) if c.cells is None else c.cells for c in claims]
    reason = [gate(claim, some, settings, area) for claim, some in zip(claims, cells, strict=True)]
    open_ = [some[code == 0] for some, code in zip(cells, reason, strict=True)]
    owner = [np.full(len(some), -1, np.int64) for some in cells]
    for number, found in enumerate(find_owners(claims, open_, settings.max_overlap)):
        free = np.flatnonzero(reason[number] == 0)
        owner[number][free] = found
        reason[number][free[found >= 0]] = _CODE["overlap"]
    claim = np.repeat(np.arange(len(claims)), [len(some) for some in cells])
    empty = np.empty((0, 2), np.int64)
    windows = Windows(
        claim,
        np.concatenate([empty, *cells]),
        np.concatenate([np.empty(0, np.int8), *reason]),
        np.concatenate([np.empty(0, np.int64), *owner]),
    )
    limit(windows, claims, settings)
    return windows


def gate(
    claim: Claim, cells: Cells, settings: CutSettings, area: BaseGeometry | None
) -> NDArray[np.int8]:
    """What falls for reasons of its own: the scene's nodata, the area, the footprint."""
    if claim.nodata > settings.max_nodata_percent:
        return np.full(len(cells), _CODE["nodata_percent"], np.int8)
    reason = np.zeros(len(cells), np.int8)
    if not len(cells):
        return reason
    share = footprint_share(claim, cells)
    reason[(share < settings.min_footprint) & (settings.min_footprint > 0)] = _CODE["no_footprint"]
    if area is not None:
        reason[~in_area(claim, cells, area)] = _CODE["outside_area"]
    return reason


def footprint_share(claim: Claim, cells: Cells) -> NDArray[np.float64]:
    """Share of each cell that lies in the scene's footprint; 1 where the footprint says nothing."""
    share = np.ones(len(cells))
    if claim.data.is_empty:
        return share
    squares = boxes(claim.grid, cells)
    rim = ~shapely.contains_properly(claim.data, squares)
    parts = shapely.intersection(squares[rim], claim.data)
    share[rim] = shapely.area(parts) / shapely.area(squares[rim])
    return share


def in_area(claim: Claim, cells: Cells, area: BaseGeometry) -> NDArray[np.bool_]:
    """Whether the centre of each cell lies in an area, whose longitudes may pass 180."""
    shapely.prepare(area)
    lon, lat = centres(claim.grid, cells).T
    hits = [shapely.contains_xy(area, lon + turn, lat) for turn in FULL_TURNS]
    return np.asarray(np.any(hits, axis=0), dtype=np.bool_)


def limit(windows: Windows, claims: Sequence[Claim], settings: CutSettings) -> None:
    """Apply dates per cell, chips per stratum and the budgets, in place."""
    wanted = (settings.max_dates, settings.max_per_stratum, settings.max_chips, settings.max_gib)
    if all(number is None for number in wanted):
        return
    table = candidates(windows, claims, settings)
    if settings.max_dates is not None:
        place = ["collection", "grid", "x", "y", "season"]
        order = table.sort_values([*place, "cloud", "age", "item_id"], kind="stable")
        table = drop(windows, order, order.groupby(place).cumcount() >= settings.max_dates,
                     "more_dates")  # fmt: skip
    stratum = ["square", "season"]
    table = table.sort_values([*stratum, "draw", "item_id", "x", "y"], kind="stable")
    table = table.assign(rank=table.groupby(stratum).cumcount())
    if settings.max_per_stratum is not None:
        table = drop(windows, table, table["rank"] >= settings.max_per_stratum, "stratum_full")
    table = table.sort_values(["rank", "draw", "item_id", "x", "y"], kind="stable")
    over = np.zeros(len(table), np.bool_)
    if settings.max_chips is not None:
        over |= np.arange(len(table)) >= settings.max_chips
    if settings.max_gib is not None:
        paid = table["bytes"] + table["once"].where(~table.duplicated("claim"), 0.0)
        over |= (paid.cumsum() > settings.max_gib * 2**30).to_numpy()
    drop(windows, table, pd.Series(over, table.index), "over_budget")


def candidates(windows: Windows, claims: Sequence[Claim], settings: CutSettings) -> pd.DataFrame:
    """The windows that are still in the plan, with what limits are applied by."""
    left = np.flatnonzero(windows.reason == 0)
    texts = {
        "collection": [c.collection for c in claims],
        "grid": [c.grid.cell_system for c in claims],
        "season": [sampling_period(c.time, settings.season) for c in claims],
        "item_id": [c.item_id for c in claims],
    }
    # numbers in the order of the texts: a table of millions of windows has no room for texts
    scenes = pd.DataFrame({name: pd.factorize(np.array(some, dtype=object), sort=True)[0]
                           for name, some in texts.items()}, dtype=np.int32)  # fmt: skip
    scenes["cloud"] = [c.cloud for c in claims]
    scenes["age"] = [-epoch_seconds(c.time) for c in claims]
    scenes["bytes"] = [c.chip_bytes for c in claims]
    scenes["once"] = [c.scene_bytes for c in claims]
    table = scenes.iloc[windows.claim[left]].reset_index(drop=True)
    x, y = windows.cells[left].T
    table = table.assign(window=left, claim=windows.claim[left], x=x, y=y)
    chance = np.array([int(c.item_sha256[:16], 16) for c in claims], dtype=np.uint64)
    mixed = chance[table["claim"]] ^ (x.astype(np.uint64) << np.uint64(32)) ^ y.astype(np.uint64)
    table["draw"] = pd.util.hash_array(mixed)
    square = np.empty((len(left), 2), np.int64)
    for number, claim in enumerate(claims):
        first, end = np.searchsorted(windows.claim[left], [number, number + 1])
        if first < end:
            degrees = centres(claim.grid, windows.cells[left[first:end]])
            square[first:end] = np.floor(degrees / settings.stratum_deg).astype(np.int64)
    table["square"] = square[:, 0] * 100_000 + square[:, 1]
    return table


def drop(windows: Windows, table: pd.DataFrame, falls: pd.Series, reason: str) -> pd.DataFrame:
    """Take rows out of the plan for a reason; returns the rest of the table."""
    windows.reason[table.loc[falls, "window"].to_numpy()] = _CODE[reason]
    return table[~falls]


def sampling_period(time: str, kind: str) -> str:
    """Name the period of a time, e.g. ``2023-1`` for December 2022 to February 2023.

    A period is one month, quarter or year of one year, unlike the recurring seasons of selection.
    """
    when = parse_time(time)
    if when is None or kind == "all":
        return ""
    if kind == "year":
        return f"{when.year:04d}"
    if kind == "month":
        return f"{when.year:04d}-{when.month:02d}"
    return f"{when.year + when.month // 12:04d}-{when.month % 12 // 3 + 1}"
