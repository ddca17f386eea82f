"""Stand-ins: chips of the last run that stay while the newer version of an item can't be read.

An updated or reprocessed item may be unreachable for some nights. Until it can be read, the chips
of its previous version stay in the dataset. They are planned like those of any other item, but
their pixels are copied from the last chips artifact.
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
    ItemRecord,
    all_items,
    best_versions,
    identity_of,
    record_from_row,
    superseded_items,
)
from geofm.chips.writer import CHIPS_TAR, CutWindows, from_spans, tar_name, write_scene
from geofm.config.recipe import CutSettings
from geofm.formats.npy import SUFFIX
from geofm.formats.tar import read_range, write_tar
from geofm.raster.grid import Grid
from geofm.remote.quarantine import Quarantine
from geofm.stac.supersede import find_superseded
from geofm.stac.validate_items import COLUMNS
from geofm.types import Json


@dataclass(frozen=True)
class StandIn:
    """A version of an item whose chips exist in the last run.

    Attributes:
        item: The item, numbered after the rows of the current ``items.parquet``.
        grid: Grid of its chips, as far as they reach.
        cells: Cells of its chips, shape (n, 2).
    """

    item: ItemRecord
    grid: Grid
    cells: NDArray[np.int64]


def item_of(job: Job, number: int) -> ItemRecord:
    """Return the item with a number: a row of ``items.parquet``, or a stand-in."""
    listed = all_items(job.inputs["items"]).get(number)
    return all_stand_ins(job)[number].item if listed is None else listed


def is_stand_in(job: Job, number: int) -> bool:
    """Return whether a number is that of a stand-in."""
    return number not in all_items(job.inputs["items"])


def all_stand_ins(job: Job) -> dict[int, StandIn]:
    """Return every item version whose chips exist in the last run, by number."""
    if job.previous is None:
        return {}
    return _stand_ins(job.previous, previous_items(job), job.inputs["items"], job.settings.anchor)


def previous_items(job: Job) -> Artifact | None:
    """Return the items artifact that the last run cut; None if it is gone from the store."""
    if job.previous is None:
        return None
    items = job.store.artifact("items", job.previous.manifest.inputs["items"])
    return items if job.store.has(items) else None


@lru_cache(maxsize=2)
def _stand_ins(
    chips: Artifact, before: Artifact | None, items: Artifact, anchor: str
) -> dict[int, StandIn]:
    frame = _good_chips(chips)
    known = {item.key: item for item in (all_items(before).values() if before else ())}
    known |= {item.key: item for item in unlisted_items(chips)}
    groups = frame.groupby(["collection", "item_id", "item_sha256"], sort=True)
    first = int(items.manifest.counts["rows_in"])
    stand_ins: dict[int, StandIn] = {}
    for (collection, item_id, sha256), rows in groups:
        item = known.get((str(collection), str(item_id), str(sha256)))
        if item is not None:
            number = first + len(stand_ins)
            grid, cells = _grid_of(rows, anchor == "scene"), _cells_of(rows)
            item = replace(item, number=number, superseded_by="")
            stand_ins[number] = StandIn(item, grid, cells)
    return stand_ins


@lru_cache(maxsize=1)
def _good_chips(chips: Artifact) -> pd.DataFrame:
    frame = chips.table("chips.parquet")
    return frame[frame["status"] == "ok"]


def _cells_of(rows: pd.DataFrame) -> NDArray[np.int64]:
    cells = [name.rsplit("/", 2)[1:] for name in rows["cell"]]
    return np.array(cells, dtype=np.int64).reshape(-1, 2)


def _grid_of(rows: pd.DataFrame, anchored: bool) -> Grid:
    """Return the grid of chips, as far as they reach."""
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


def replacements(job: Job, planned: Sequence[ItemRecord], bad: Collection[int]) -> list[ItemRecord]:
    """Find the older versions that are planned in place of items that can't be used.

    These are superseded items of the listing, and versions that the last run has chips of. The
    best of each acquisition and tile is taken.

    Args:
        job: Job of the stage ``cut``.
        planned: Items that are planned so far, including the bad ones.
        bad: Numbers of the items that can't be used.
    """
    if not bad:
        return []
    free = superseded_items(job.inputs["items"], bad)
    taken = {item.key for item in free}
    failed = [item for item in planned if item.number in bad]
    good = [item for item in planned if item.number not in bad]
    for older in _related(job, failed):
        if older.number in bad or older.key in taken:
            continue
        if _follows_any(failed, older) and not _follows_any(good, older):
            free.append(older)
    numbers = {item.number for item in planned}
    return [item for item in best_versions(free) if item.number not in numbers]


def _related(job: Job, failed: Iterable[ItemRecord]) -> Iterator[ItemRecord]:
    """Yield stand-ins that may be older versions of failed items, by id or acquisition."""
    ids = {item.key[:2] for item in failed}
    acquisitions = {(item.collection, item.acquisition) for item in failed if item.acquisition}
    for stand_in in all_stand_ins(job).values():
        item = stand_in.item
        if item.key[:2] in ids or (item.collection, item.acquisition) in acquisitions:
            yield item


def _follows_any(items: Iterable[ItemRecord], older: ItemRecord) -> bool:
    """Return whether one of the items is a newer version of ``older``, or the same version."""
    return any(_follows(item, older) for item in items)


def _follows(newer: ItemRecord, older: ItemRecord) -> bool:
    if newer.key[:2] == older.key[:2]:
        return True
    same = (newer.collection, newer.acquisition) == (older.collection, older.acquisition)
    if not same or not newer.acquisition:
        return False
    return 1 in find_superseded([identity_of(newer), identity_of(older)])


def copy_chips(job: Job, number: int, windows: CutWindows, out: Path) -> None:
    """Write the part of a stand-in: its chips, copied from the last run."""
    stand_in, settings, before = all_stand_ins(job)[number], job.settings, job.previous
    if before is None:
        raise RunError(
            f"the chips of the last {job.stage} run are gone from the store, but item "
            f"{stand_in.item.item_id} needs them; run again to plan without them"
        )
    places = {stand_in.grid.name(cell): n for n, cell in enumerate(from_spans(windows.spans))}
    rows = _rows_of(_good_chips(before), stand_in.item.key)
    chips = records(rows[rows["cell"].isin(places.keys())])
    chips.sort(key=lambda row: places[row["cell"]])
    tar = _copy_pixels(before, chips, stand_in.item, settings, windows, out)
    assets = records(_rows_of(before.table("assets.parquet"), stand_in.item.key))
    good = [row for row in assets if row["status"] == "ok"]
    write_scene(out, stand_in.item, "ok", chips, good, stand_in.grid, windows, tar=tar)


def _rows_of(frame: pd.DataFrame, key: VersionKey) -> pd.DataFrame:
    names = ("collection", "item_id", "item_sha256")
    return frame[np.logical_and.reduce([frame[n] == v for n, v in zip(names, key, strict=True)])]


def _copy_pixels(
    before: Artifact,
    chips: list[Json],
    item: ItemRecord,
    settings: CutSettings,
    windows: CutWindows,
    out: Path,
) -> str:
    """Copy the chips' members into a new tar. Returns its name in the artifact."""
    if not chips:
        return ""
    tar = tar_name(item, settings, windows.spans)
    members = (
        (
            f"{row['chip_id']}{SUFFIX}",
            read_range(before.local(row["part"]), row["offset"], row["size"]),
        )
        for row in chips
    )
    for row, member in zip(chips, write_tar(out / CHIPS_TAR, members, digests=False), strict=True):
        row.update(part=tar, offset=member.offset, size=member.size)
    return tar


def unlisted_items(chips: Artifact) -> list[ItemRecord]:
    """Return the items of ``stand_ins.parquet``, versions that the search no longer lists."""
    if not any(entry.path == STAND_INS for entry in chips.manifest.files):
        return []
    return [
        record_from_row(-1, row, Source.model_validate_json(row["profile"]))
        for row in records(chips.table(STAND_INS))
    ]


def unlisted_stand_ins(
    job: Job, stand_ins: Iterable[ItemRecord], bad: Mapping[int, Quarantine]
) -> list[tuple[ItemRecord, str, str]]:
    """Return stand-ins without a row in the listing, with the newer item's id and its problem."""
    listed = {item.key for item in all_items(job.inputs["items"]).values()}
    failed = [(item_of(job, number), problem) for number, problem in bad.items()]
    unlisted = []
    for older in stand_ins:
        if older.key not in listed:
            newer, problem = next(pair for pair in failed if _follows(pair[0], older))
            unlisted.append((older, newer.item_id, problem.reason))
    return unlisted


def write_unlisted(used: Sequence[tuple[ItemRecord, str, str]], path: Path) -> None:
    """Write ``stand_ins.parquet``: rows like those of ``items.parquet``, each with its profile.

    Args:
        used: Items, with the newer item's id and the reason why it can't be used.
        path: Path of the file.
    """
    rows: list[dict[str, Any]] = []
    for item, newer, reason in sorted(used, key=lambda entry: entry[0].key):
        scene = identity_of(item)
        rows.append(
            {
                **item.facts,
                "geometry": item.geometry,
                "item_json": item.text,
                "status": "stands in",
                "reason": reason,
                "detail": "",
                "superseded_by": newer,
                "acquisition": item.acquisition,
                "tile": scene.tile,
                "baseline": item.baseline,
                "cloud_cover": item.cloud_cover,
                "profile": item.profile.model_dump_json(),
            }
        )
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "profile"])
    write_table(gpd.GeoDataFrame(frame, geometry="geometry", crs=4326), path)
