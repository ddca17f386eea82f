"""The decision on every listed item: ok, dropped or quarantined, with its reason.

The rows become ``items.parquet``. Each item is checked alone first, then doubles are marked, then
scenes that are too cloudy, then items that a better item of the same acquisition supersedes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

import geopandas as gpd
from shapely.geometry.base import BaseGeometry

from data_catalog.provenance.licences import item_licence
from data_catalog.sources import source_for
from geofm.config.credentials import base_address
from geofm.config.recipe import SearchSettings
from geofm.remote.quarantine import Quarantine
from geofm.stac.canonical_item import CanonicalItem, storable_text
from geofm.stac.item import check_item, is_number
from geofm.stac.supersede import Acquisition, find_superseded, read_acquisition
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


def validate_items(
    items: Iterable[CanonicalItem],
    settings: SearchSettings,
    collections: dict[str, Json],
    own: str = "",
) -> list[Json]:
    """Decide on each item of a listing.

    Args:
        items: The listed items, in any order.
        settings: Settings of the search.
        collections: Raw JSON of the searched collections, by id.
        own: Scheme of hrefs inside the catalogue (``planet``, ``catalog`` or empty).

    Returns:
        One row per item, sorted by collection, id and digest: the columns of ``items.parquet``
        and ``identity``, the item's :class:`Acquisition` (None without one).
    """
    api = base_address(settings.stac)
    rows = [_validate_item(item, api, collections, own) for item in items]
    rows.sort(key=lambda row: (row["collection"], row["item_id"], row["item_sha256"]))
    _mark_doubles(rows)
    # Clouds come before superseding: a scene that is too cloudy must not supersede another.
    for row in rows:
        if row["status"] == "ok" and (row["cloud_cover"] or 0.0) > settings.max_cloud_percent:
            row.update(status="dropped", reason="cloud_cover")
    _mark_superseded(rows)
    return rows


def _validate_item(item: CanonicalItem, api: str, collections: dict[str, Json], own: str) -> Json:
    """Make the row of an item without regard to the others."""
    source = source_for(api, item.collection)
    area: BaseGeometry | None = None
    identity: Acquisition | None = None
    content: Json = json.loads(item.text)
    problem = item.problem
    if problem is None:
        try:
            area = check_item(content, list(collections), own)
            identity = read_acquisition(content, source.identity, area)
        except Quarantine as error:
            problem = error
    properties = content.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    cover = properties.get("eo:cloud_cover")
    return {
        "item_id": item.item_id,
        "collection": item.collection,
        "datetime": _datetime(properties),
        "geometry": area,
        "item_sha256": item.sha256,
        "item_json": item.text,
        "licence": item_licence(
            properties.get("license"),
            collections.get(item.collection, {}).get("license"),
            source.licence,
        ),
        "source": source.name,
        "status": "ok" if problem is None else "quarantined",
        "reason": "" if problem is None else problem.reason,
        "detail": "" if problem is None else problem.detail,
        "superseded_by": "",
        "acquisition": identity.acquisition if identity else "",
        "tile": identity.tile if identity else "",
        "baseline": identity.version if identity else "",
        "cloud_cover": float(cover) if is_number(cover) and cover is not None else None,
        "identity": identity,
    }


def _datetime(properties: Json) -> str | None:
    """Return ``datetime``, or the start of the period, as the item writes it."""
    for name in ("datetime", "start_datetime"):
        if isinstance(properties.get(name), str):
            return storable_text(properties[name])[:40]
    return None


def _mark_doubles(rows: list[Json]) -> None:
    """Drop repetitions of an item; quarantine different items that share an id."""
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


def _mark_superseded(rows: list[Json]) -> None:
    """Drop items that a better item of the same acquisition and tile supersedes."""
    good = [row for row in rows if row["status"] == "ok"]
    for number, finding in find_superseded([row["identity"] for row in good]).items():
        good[number].update(status="dropped", reason=finding.reason, superseded_by=finding.by)


def to_frame(rows: list[Json]) -> gpd.GeoDataFrame:
    """Build the table with the columns and types of ``items.parquet``."""
    frame = gpd.GeoDataFrame(
        {name: [row[name] for row in rows] for name in COLUMNS}, geometry="geometry", crs=4326
    )
    frame["cloud_cover"] = frame["cloud_cover"].astype("float64")
    for name in COLUMNS:
        if name not in ("geometry", "cloud_cover"):
            frame[name] = frame[name].astype("str" if name != "datetime" else "object")
    return frame
