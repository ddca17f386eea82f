"""The verdict on every item listed: ok, dropped or quarantined, each with its reason."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

import geopandas as gpd
from shapely.geometry.base import BaseGeometry

from data_catalog.sources import Source, source_for, spdx_licence
from geofm.config.credentials import base_address
from geofm.config.recipe import SearchSettings
from geofm.remote.quarantine import Quarantine
from geofm.stac.canonical_item import Frozen, plain
from geofm.stac.item import check_item, is_number
from geofm.stac.supersede import Scene, scene_of, superseded
from geofm.types import Json

COLUMNS = [
    "item_id",
    "collection",
    "datetime",
    "geometry",
    "item_sha256",
    "item_json",
    "licence",
    "source",
    "status",
    "reason",
    "detail",
    "superseded_by",
    "acquisition",
    "tile",
    "baseline",
    "cloud_cover",
]


def judge(
    listed: Iterable[Frozen],
    settings: SearchSettings,
    collections: dict[str, Json],
    own: str = "",
) -> list[Json]:
    """One row per item: ok, dropped or quarantined, each with its reason.

    Args:
        listed: items as they were listed, in any order.
        settings: the search.
        collections: the collections searched, as raw JSON.
        own: scheme of hrefs in the catalogue itself (``planet``, ``catalog`` or empty).
    """
    api = base_address(settings.stac)
    rows = [judge_alone(one, api, collections, own) for one in listed]
    rows.sort(key=_order)
    mark_doubles(rows)
    # before the versions are compared: a scene too cloudy to be used stands for no other
    for row in rows:
        if row["status"] == "ok" and (row["cloud_cover"] or 0.0) > settings.max_cloud_percent:
            row.update(status="dropped", reason="cloud_cover")
    mark_superseded(rows)
    return rows


def _order(row: Json) -> tuple[str, str, str]:
    return row["collection"], row["item_id"], row["item_sha256"]


def judge_alone(one: Frozen, api: str, collections: dict[str, Json], own: str) -> Json:
    """The row of one item, looked at by itself."""
    source = source_for(api, one.collection)
    area: BaseGeometry | None = None
    scene: Scene | None = None
    frozen: Json = json.loads(one.text)
    problem = one.problem
    if problem is None:
        try:
            area = check_item(frozen, list(collections), own)
            scene = scene_of(frozen, source.identity, area)
        except Quarantine as error:
            problem = error
    properties = frozen.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    cover = properties.get("eo:cloud_cover")
    return {
        "item_id": one.item_id,
        "collection": one.collection,
        "datetime": _time(properties),
        "geometry": area,
        "item_sha256": one.sha256,
        "item_json": one.text,
        "licence": licence_of(properties, collections.get(one.collection, {}), source),
        "source": source.name,
        "status": "ok" if problem is None else "quarantined",
        "reason": "" if problem is None else problem.reason,
        "detail": "" if problem is None else problem.detail,
        "superseded_by": "",
        "acquisition": scene.acquisition if scene else "",
        "tile": scene.tile if scene else "",
        "baseline": scene.version if scene else "",
        "cloud_cover": float(cover) if is_number(cover) and cover is not None else None,
        "scene": scene,
    }


def _time(properties: Json) -> str | None:
    """``datetime``, else the start of the period, as it is written."""
    for name in ("datetime", "start_datetime"):
        if isinstance(properties.get(name), str):
            return plain(properties[name])[:40]
    return None


def licence_of(properties: Json, collection: Json, source: Source) -> str:
    """Licence of an item: its own, else its collection's, else what the source profile knows."""
    own = (properties.get("license"), collection.get("license"))
    return next((spdx for text in own if (spdx := spdx_licence(text))), source.licence)


def mark_doubles(rows: list[Json]) -> None:
    """The same item listed twice counts once; two items with one id are both refused."""
    groups: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for row in rows:
        groups[row["collection"], row["item_id"]].append(row)
    for group in groups.values():
        seen: set[str] = set()
        for row in group:
            if row["item_sha256"] in seen and row["status"] == "ok":
                row.update(status="dropped", reason="listed_twice", superseded_by=row["item_id"])
            seen.add(row["item_sha256"])
        if len(seen) > 1 and group[0]["item_id"]:
            for row in group:
                if row["status"] == "ok":
                    row.update(
                        status="quarantined",
                        reason="duplicate_id",
                        detail=f"{len(seen)} different items have this id",
                    )


def mark_superseded(rows: list[Json]) -> None:
    """Drop what a better item of the same acquisition and tile stands for."""
    good = [row for row in rows if row["status"] == "ok"]
    for number, verdict in superseded([row["scene"] for row in good]).items():
        good[number].update(status="dropped", reason=verdict.reason, superseded_by=verdict.by)


def to_frame(rows: list[Json]) -> gpd.GeoDataFrame:
    """The rows as a table with the columns and types of ``items.parquet``."""
    frame = gpd.GeoDataFrame(
        {name: [row[name] for row in rows] for name in COLUMNS}, geometry="geometry", crs=4326
    )
    frame["cloud_cover"] = frame["cloud_cover"].astype("float64")
    for name in COLUMNS:
        if name not in ("geometry", "cloud_cover"):
            frame[name] = frame[name].astype("str" if name != "datetime" else "object")
    return frame
