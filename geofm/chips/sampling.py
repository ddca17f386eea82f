"""The sampling plan: the windows to cut, chosen from metadata before anything is downloaded.

A window is dropped for the first reason of ``REASONS`` that applies; the other windows are the
plan. Random numbers are derived from digests, so the same scenes give the same plan, and an
additional scene changes little of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from geofm.chips.overlap import Cells, SceneCandidate, find_owners
from geofm.config.area import FULL_TURNS
from geofm.config.recipe import CutSettings
from geofm.raster.grid import all_cells, boxes, centres
from geofm.runtime.timestamps import epoch_seconds, parse_time

#: Reasons why a window is not cut, in the order in which they apply; empty if it is cut.
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
    """Every window of every scene; the windows of a scene follow each other.

    Attributes:
        scene: Number of the scene, shape (n,).
        cells: Cell numbers x, y, shape (n, 2).
        reason: Position in ``REASONS``, shape (n,); 0 for windows that are cut.
        owner: Scene that owns the ground if the reason is ``overlap``, else -1, shape (n,).
    """

    scene: NDArray[np.int64]
    cells: Cells
    reason: NDArray[np.int8]
    owner: NDArray[np.int64]

    def of(self, scene: int) -> slice:
        """Return the slice of the windows of a scene."""
        first, end = np.searchsorted(self.scene, [scene, scene + 1])
        return slice(int(first), int(end))

    def chosen(self, scene: int) -> Cells:
        """Return the cells of a scene that are cut."""
        own = self.of(scene)
        cells: Cells = self.cells[own][self.reason[own] == 0]
        return cells

    def lost(self, scene: int) -> list[tuple[tuple[int, int], int]]:
        """Return the cells of a scene that another scene owns, with the number of that scene."""
        own = self.of(scene)
        gone = self.reason[own] == _CODE["overlap"]
        pairs = zip(self.cells[own][gone].tolist(), self.owner[own][gone].tolist(), strict=True)
        return [((x, y), owner) for (x, y), owner in pairs]

    def counts(self) -> dict[str, int]:
        """Return the number of windows by reason; windows that are cut have an empty reason."""
        number = np.bincount(self.reason, minlength=len(REASONS))
        return {reason: int(n) for reason, n in zip(REASONS, number, strict=True) if n}


def choose_windows(
    scenes: Sequence[SceneCandidate], settings: CutSettings, area: BaseGeometry | None
) -> Windows:
    """Choose the windows to cut.

    Args:
        scenes: The scenes.
        settings: Limits and budgets.
        area: Area to sample, EPSG:4326; None for everywhere.
    """
    cells = [all_cells(c.grid) if c.cells is None else c.cells for c in scenes]
    pairs = list(zip(scenes, cells, strict=True))
    reason = [apply_own_limits(scene, own, settings, area) for scene, own in pairs]
    remaining = [own[code == 0] for own, code in zip(cells, reason, strict=True)]
    owner = [np.full(len(own), -1, np.int64) for own in cells]
    for number, owners in enumerate(find_owners(scenes, remaining, settings.max_overlap)):
        free = np.flatnonzero(reason[number] == 0)
        owner[number][free] = owners
        reason[number][free[owners >= 0]] = _CODE["overlap"]
    number_of = np.repeat(np.arange(len(scenes)), [len(own) for own in cells])
    empty = np.empty((0, 2), np.int64)
    windows = Windows(
        number_of,
        np.concatenate([empty, *cells]),
        np.concatenate([np.empty(0, np.int8), *reason]),
        np.concatenate([np.empty(0, np.int64), *owner]),
    )
    apply_shared_limits(windows, scenes, settings)
    return windows


def apply_own_limits(
    scene: SceneCandidate, cells: Cells, settings: CutSettings, area: BaseGeometry | None
) -> NDArray[np.int8]:
    """Return the reason code of each cell by the scene's nodata, its footprint and the area."""
    if scene.nodata > settings.max_nodata_percent:
        return np.full(len(cells), _CODE["nodata_percent"], np.int8)
    reason = np.zeros(len(cells), np.int8)
    if not len(cells):
        return reason
    share = footprint_share(scene, cells)
    reason[(share < settings.min_footprint) & (settings.min_footprint > 0)] = _CODE["no_footprint"]
    if area is not None:
        reason[~in_area(scene, cells, area)] = _CODE["outside_area"]
    return reason


def footprint_share(scene: SceneCandidate, cells: Cells) -> NDArray[np.float64]:
    """Return the share of each cell inside the footprint, shape (n,); 1 if it is empty."""
    share = np.ones(len(cells))
    if scene.data.is_empty:
        return share
    squares = boxes(scene.grid, cells)
    partial = ~shapely.contains_properly(scene.data, squares)
    parts = shapely.intersection(squares[partial], scene.data)
    share[partial] = shapely.area(parts) / shapely.area(squares[partial])
    return share


def in_area(scene: SceneCandidate, cells: Cells, area: BaseGeometry) -> NDArray[np.bool_]:
    """Return whether each cell's centre lies in an area, whose longitudes may pass 180."""
    shapely.prepare(area)
    lon, lat = centres(scene.grid, cells).T
    hits = [shapely.contains_xy(area, lon + turn, lat) for turn in FULL_TURNS]
    return np.asarray(np.any(hits, axis=0), dtype=np.bool_)


def apply_shared_limits(
    windows: Windows, scenes: Sequence[SceneCandidate], settings: CutSettings
) -> None:
    """Apply the limits on dates per cell, chips per stratum, chips and bytes, in place."""
    limits = (settings.max_dates, settings.max_per_stratum, settings.max_chips, settings.max_gib)
    if all(value is None for value in limits):
        return
    table = remaining_windows(windows, scenes, settings)
    if settings.max_dates is not None:
        cell = ["collection", "grid", "x", "y", "season"]
        order = table.sort_values([*cell, "cloud", "age", "item_id"], kind="stable")
        later = order.groupby(cell).cumcount() >= settings.max_dates
        table = drop(windows, order, later, "more_dates")
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
        cost = table["bytes"] + table["once"].where(~table.duplicated("scene"), 0.0)
        over |= (cost.cumsum() > settings.max_gib * 2**30).to_numpy()
    drop(windows, table, pd.Series(over, table.index), "over_budget")


def remaining_windows(
    windows: Windows, scenes: Sequence[SceneCandidate], settings: CutSettings
) -> pd.DataFrame:
    """Return the windows that are still in the plan, with the columns that limits use."""
    left = np.flatnonzero(windows.reason == 0)
    texts = {
        "collection": [c.collection for c in scenes],
        "grid": [c.grid.cell_system for c in scenes],
        "season": [sampling_period(c.time, settings.season) for c in scenes],
        "item_id": [c.item_id for c in scenes],
    }
    # codes in the order of the texts: the texts of millions of windows would not fit into memory
    codes = {
        name: pd.factorize(np.array(values, dtype=object), sort=True)[0]
        for name, values in texts.items()
    }
    columns = pd.DataFrame(codes, dtype=np.int32)
    columns["cloud"] = [c.cloud for c in scenes]
    columns["age"] = [-epoch_seconds(c.time) for c in scenes]
    columns["bytes"] = [c.chip_bytes for c in scenes]
    columns["once"] = [c.scene_bytes for c in scenes]
    table = columns.iloc[windows.scene[left]].reset_index(drop=True)
    x, y = windows.cells[left].T
    table = table.assign(window=left, scene=windows.scene[left], x=x, y=y)
    seeds = np.array([int(c.item_sha256[:16], 16) for c in scenes], dtype=np.uint64)
    mixed = seeds[table["scene"]] ^ (x.astype(np.uint64) << np.uint64(32)) ^ y.astype(np.uint64)
    table["draw"] = pd.util.hash_array(mixed)
    square = np.empty((len(left), 2), np.int64)
    for number, scene in enumerate(scenes):
        first, end = np.searchsorted(windows.scene[left], [number, number + 1])
        if first < end:
            degrees = centres(scene.grid, windows.cells[left[first:end]])
            square[first:end] = np.floor(degrees / settings.stratum_deg).astype(np.int64)
    table["square"] = square[:, 0] * 100_000 + square[:, 1]
    return table


def drop(windows: Windows, table: pd.DataFrame, dropped: pd.Series, reason: str) -> pd.DataFrame:
    """Take rows out of the plan for a reason; returns the other rows."""
    windows.reason[table.loc[dropped, "window"].to_numpy()] = _CODE[reason]
    return table[~dropped]


def sampling_period(time: str, kind: str) -> str:
    """Name the period of a time; ``2023-1`` is December 2022 to February 2023.

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
