"""Stand-ins: chips of the last run that are used while the newer version of an item can't be read.

An item that was updated or reprocessed may be out of reach for some nights. Until it can be read,
the chips that the last run cut of the version before stay in the dataset. They are planned like
those of any other item, but their pixels are copied from the last chips artifact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.database.item_states import STAND_INS, VersionKey
from data_catalog.errors import RunError
from data_catalog.sources import Source
from data_catalog.stage import Job
from data_catalog.tables import records, write_table
from geofm.chips.items import (
    Listed,
    best_of,
    every_item,
    identity_of,
    listed_from,
    superseded_items,
)
from geofm.chips.writer import CHIPS, Order, from_runs, tar_name, write_scene
from geofm.config.recipe import CutSettings
from geofm.formats.tar import read_range, write_tar
from geofm.raster.grid import Grid
from geofm.remote.quarantine import Quarantine
from geofm.stac.supersede import find_superseded
from geofm.stac.validate_items import COLUMNS
from geofm.types import Json


@dataclass(frozen=True)
class StandIn:
    """An item version whose chips the last run holds.

    Attributes:
        item: The item, numbered after the rows of the current ``items.parquet``.
        grid: Pixels that its chips cover.
        cells: Cells that it has chips of, shape (n, 2).
    """

    item: Listed
    grid: Grid
    cells: NDArray[np.int64]


def item_of(job: Job, number: int) -> Listed:
    """The item with a number: a row of ``items.parquet``, or a stand-in."""
    listed = every_item(job.inputs["items"]).get(number)
    return all_stand_ins(job)[number].item if listed is None else listed


def is_stand_in(job: Job, number: int) -> bool:
    """Whether a number is that of a stand-in."""
    return number not in every_item(job.inputs["items"])


def all_stand_ins(job: Job) -> dict[int, StandIn]:
    """Every item version that the last run has chips of, by number."""
    if job.previous is None:
        return {}
    return _stand_ins(job.previous, previous_items(job), job.inputs["items"], job.settings.anchor)


def previous_items(job: Job) -> Artifact | None:
    """The items artifact that the last run cut; None if it is gone from the store."""
    if job.previous is None:
        return None
    items = job.store.artifact("items", job.previous.manifest.inputs["items"])
    return items if job.store.has(items) else None


@lru_cache(maxsize=2)
def _stand_ins(
    chips: Artifact, before: Artifact | None, items: Artifact, anchor: str
) -> dict[int, StandIn]:
    frame = _good_chips(chips)
    known = {one.key: one for one in (every_item(before).values() if before else ())}
    known |= {one.key: one for one in unlisted_items(chips)}
    groups = frame.groupby(["collection", "item_id", "item_sha256"], sort=True)
    first = int(items.manifest.counts["rows_in"])
    found: dict[int, StandIn] = {}
    for (collection, item_id, sha256), rows in groups:
        one = known.get((str(collection), str(item_id), str(sha256)))
        if one is not None:
            number = first + len(found)
            grid, cells = _grid_of(rows, anchor == "scene"), _cells_of(rows)
            found[number] = StandIn(replace(one, number=number, superseded_by=""), grid, cells)
    return found


@lru_cache(maxsize=1)
def _good_chips(chips: Artifact) -> pd.DataFrame:
    frame = chips.table("chips.parquet")
    return frame[frame["status"] == "ok"]


def _cells_of(rows: pd.DataFrame) -> NDArray[np.int64]:
    cells = [name.rsplit("/", 2)[1:] for name in rows["cell"]]
    return np.array(cells, dtype=np.int64).reshape(-1, 2)


def _grid_of(rows: pd.DataFrame, anchored: bool) -> Grid:
    """The grid that chips lie on, as far as they reach."""
    row = records(rows.iloc[:1])[0]
    size, edge = int(row["width"]), float(row["transform"][0])
    return Grid(
        crs=row["crs"],
        gsd=edge,
        metres=float(row["gsd_m"]),
        west=float(row["transform"][2]) - int(row["col"]) * edge,
        north=float(row["transform"][5]) + int(row["row"]) * edge,
        height=int(rows["row"].max()) + size,
        width=int(rows["col"].max()) + size,
        size=size,
        anchored=anchored,
    )


def replacements(job: Job, planned: Sequence[Listed], bad: Collection[int]) -> list[Listed]:
    """Find the older versions that are planned in place of items that can't be used.

    These are superseded items of the listing, and versions that the last run has chips of. The
    best of each acquisition and tile is taken.

    Args:
        job: Of the stage ``cut``.
        planned: Items that are planned so far, the bad ones included.
        bad: Numbers of the items that can't be used.
    """
    if not bad:
        return []
    free = superseded_items(job.inputs["items"], bad)
    taken = {one.key for one in free}
    failed = [one for one in planned if one.number in bad]
    good = [one for one in planned if one.number not in bad]
    for one in _related(job, failed):
        if one.number in bad or one.key in taken:
            continue
        if _follows_any(failed, one) and not _follows_any(good, one):
            free.append(one)
    there = {one.number for one in planned}
    return [one for one in best_of(free) if one.number not in there]


def _related(job: Job, failed: Iterable[Listed]) -> Iterator[Listed]:
    """Stand-ins that may be older versions of failed items, by id or acquisition."""
    names = {one.key[:2] for one in failed}
    flights = {(one.collection, one.acquisition) for one in failed if one.acquisition}
    for stand_in in all_stand_ins(job).values():
        one = stand_in.item
        if one.key[:2] in names or (one.collection, one.acquisition) in flights:
            yield one


def _follows_any(items: Iterable[Listed], older: Listed) -> bool:
    """Whether one of the items is a newer version of ``older``, or that very version."""
    return any(_follows(one, older) for one in items)


def _follows(newer: Listed, older: Listed) -> bool:
    if newer.key[:2] == older.key[:2]:
        return True
    same = (newer.collection, newer.acquisition) == (older.collection, older.acquisition)
    if not same or not newer.acquisition:
        return False
    found = find_superseded([identity_of(newer), identity_of(older)])
    return 1 in found


def copy_chips(job: Job, number: int, order: Order, out: Path) -> None:
    """Write the part of a stand-in: its chips as the last run cut them."""
    stand_in, settings, before = all_stand_ins(job)[number], job.settings, job.previous
    if before is None:
        raise RunError(f"the last run of {job.stage} is gone, whose chips were to be copied")
    places = {stand_in.grid.name(cell): n for n, cell in enumerate(from_runs(order.runs))}
    rows = _rows_of(_good_chips(before), stand_in.item.key)
    chips = records(rows[rows["cell"].isin(places.keys())])
    chips.sort(key=lambda row: places[row["cell"]])
    tar = _copy_pixels(before, chips, stand_in.item, settings, order, out)
    assets = records(_rows_of(before.table("assets.parquet"), stand_in.item.key))
    write_scene(
        out, stand_in.item, "ok", chips, [row for row in assets if row["status"] == "ok"],
        stand_in.grid, order, tar=tar,
    )  # fmt: skip


def _rows_of(frame: pd.DataFrame, key: VersionKey) -> pd.DataFrame:
    names = ("collection", "item_id", "item_sha256")
    return frame[np.logical_and.reduce([frame[n] == v for n, v in zip(names, key, strict=True)])]


def _copy_pixels(
    before: Artifact,
    chips: list[Json],
    item: Listed,
    settings: CutSettings,
    order: Order,
    out: Path,
) -> str:
    """Copy the chips' members into a new tar; returns its name in the artifact."""
    if not chips:
        return ""
    tar = tar_name(item, settings, order.runs)
    members = (
        (f"{row['chip_id']}.npy", read_range(before.local(row["part"]), row["offset"], row["size"]))
        for row in chips
    )
    for row, member in zip(chips, write_tar(out / CHIPS, members, digests=False), strict=True):
        row.update(part=tar, offset=member.offset, size=member.size)
    return tar


def unlisted_items(chips: Artifact) -> list[Listed]:
    """The items of ``stand_ins.parquet``: versions that the search does not list any more."""
    if not any(entry.path == STAND_INS for entry in chips.manifest.files):
        return []
    return [
        listed_from(-1, row, Source.model_validate_json(row["profile"]))
        for row in records(chips.table(STAND_INS))
    ]


def unlisted_stand_ins(
    job: Job, stand_ins: Iterable[Listed], bad: Mapping[int, Quarantine]
) -> list[tuple[Listed, str, str]]:
    """The stand-ins that the listing has no row of, with their newer item and its problem."""
    listed = {one.key for one in every_item(job.inputs["items"]).values()}
    failed = [(item_of(job, number), problem) for number, problem in bad.items()]
    found = []
    for older in stand_ins:
        if older.key not in listed:
            newer, problem = next(pair for pair in failed if _follows(pair[0], older))
            found.append((older, newer.item_id, problem.reason))
    return found


def write_unlisted(used: Sequence[tuple[Listed, str, str]], path: Path) -> None:
    """Write ``stand_ins.parquet``: rows like those of ``items.parquet``, each with its profile.

    Args:
        used: Items, with the id of the newer item and why that can't be used.
        path: Of the file.
    """
    rows: list[dict[str, Any]] = []
    for one, newer, reason in sorted(used, key=lambda entry: entry[0].key):
        scene = identity_of(one)
        rows.append(
            {
                **one.facts,
                "geometry": one.geometry,
                "item_json": one.text,
                "status": "stands in",
                "reason": reason,
                "detail": "",
                "superseded_by": newer,
                "acquisition": one.acquisition,
                "tile": scene.tile,
                "baseline": one.baseline,
                "cloud_cover": one.cloud_cover,
                "profile": one.profile.model_dump_json(),
            }
        )
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "profile"])
    write_table(gpd.GeoDataFrame(frame, geometry="geometry", crs=4326), path)
