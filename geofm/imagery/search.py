"""The stage ``search``: which scenes there are, which of them count, and why the others do not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import geopandas as gpd
from shapely.geometry.base import BaseGeometry

from data_catalog.canonical import digest_of
from data_catalog.errors import RunError
from data_catalog.progress import tick
from data_catalog.sources import (
    Source,
    count_sources,
    source_for,
    source_named,
    spdx_licence,
)
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.imagery.catalogue_api import (
    Json,
    api_url,
    choose_collections,
    list_collections,
    list_items,
    open_api,
)
from geofm.imagery.identity import Scene, scene_of, superseded
from geofm.imagery.items import check_item, freeze, is_number, lasting, stub
from geofm.imagery.quarantine import Quarantine
from geofm.settings import SearchSettings

log = logging.getLogger("geofm.search")

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


def seal(job: Job, folders: list[Path], out: Path) -> Sealed:
    """Ask the API, judge every item listed, and write ``items.parquet``."""
    settings: SearchSettings = job.settings
    url = api_url(settings)
    client = open_api(url)
    offered = list_collections(client, url)
    chosen = choose_collections(offered, settings.collections, url)
    listed: list[Any] = []
    for item in list_items(client, settings, chosen):
        listed.append(item)
        if len(listed) % 100 == 0:
            tick("search", len(listed), max(settings.max_items, len(listed)), "items listed")
    if not listed:
        raise RunError(_nothing(settings, chosen, url))
    rows = judge(listed, settings, {name: offered[name] for name in chosen}, url)
    write_table(to_frame(rows), out / "items.parquet")
    dropped = Counter(row["reason"] for row in rows if row["status"] != "ok")
    kept = sum(row["status"] == "ok" for row in rows)
    for reason, number in sorted(dropped.items()):
        log.info("search: %d items %s", number, reason)
    return Sealed(
        counts={"rows_in": len(listed), "rows_out": kept},
        dropped=dict(dropped),
        facts={
            "collections": chosen,
            "profiles": {
                name: profile_digest(name) for name in sorted({row["source"] for row in rows})
            },
            "quarantined": sum(row["status"] == "quarantined" for row in rows),
            "sources": count_sources(row for row in rows if row["status"] == "ok"),
        },
    )


def profile_digest(name: str) -> str:
    """SHA-256 of a source profile: it decides scales and cloud codes, so it belongs to the items.

    The search runs every time, so a changed profile changes the items and all that is made of them.
    """
    return digest_of(source_named(name).model_dump(mode="json"))


def _nothing(settings: SearchSettings, collections: list[str], url: str) -> str:
    box = "everywhere" if settings.bbox is None else ",".join(f"{v:g}" for v in settings.bbox)
    return (
        f"no item matches at {url}: search.collections {', '.join(collections)}, search.bbox "
        f"{box}, search.datetime {settings.datetime or 'any'}; widen one of them"
    )


def judge(
    listed: list[Any], settings: SearchSettings, collections: dict[str, Json], url: str
) -> list[Json]:
    """One row per item listed: ok, dropped or quarantined, each with its reason.

    Args:
        listed: items as the API gave them, in any order.
        settings: the search.
        collections: the collections searched, as raw JSON.
        url: the API's address, the planet's own one included.
    """
    planet = url if settings.stac == "planet" else ""
    rows = [judge_alone(item, settings.stac, collections, planet) for item in listed]
    rows.sort(key=lambda r: (r["collection"], r["item_id"], r["item_sha256"]))
    mark_doubles(rows)
    # before the versions are compared: a scene too cloudy to be used stands for no other
    for row in rows:
        if row["status"] == "ok" and (row["cloud_cover"] or 0.0) > settings.max_cloud_percent:
            row.update(status="dropped", reason="cloud_cover")
    mark_superseded(rows)
    return rows


def judge_alone(item: Any, api: str, collections: dict[str, Json], planet: str) -> Json:
    """The row of one item, looked at by itself."""
    if not isinstance(item, dict):
        item, text = {"": item}, "{}"
        problem: Quarantine | None = Quarantine("wrong_types", "the item is no JSON object")
    else:
        text, problem = _frozen(item, planet)
    whole = problem is None
    name, collection = _text(item.get("id")), _text(item.get("collection"))
    source = source_for(api, collection)
    area: BaseGeometry | None = None
    scene: Scene | None = None
    frozen: Json = json.loads(text)
    if problem is None:
        try:
            area = check_item(frozen, list(collections), bool(planet))
            scene = scene_of(frozen, source.identity, area)
        except Quarantine as error:
            problem = error
    properties = frozen.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    cover = properties.get("eo:cloud_cover")
    return {
        "item_id": name,
        "collection": collection,
        "datetime": _time(properties),
        "geometry": area,
        "item_sha256": _sha256(item, text, whole, planet),
        "item_json": text,
        "licence": licence_of(properties, collections.get(collection, {}), source),
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


def _frozen(item: Json, planet: str) -> tuple[str, Quarantine | None]:
    """The item's canonical text, or a stub of it and what is wrong."""
    try:
        return freeze(item, planet), None
    except Quarantine as error:
        return stub(item), error


def _sha256(item: Json, text: str, whole: bool, planet: str) -> str:
    """Digest of the frozen text; of all that lasts of the item where only a stub of it is kept."""
    if not whole:
        try:
            text = json.dumps(lasting(item, planet), sort_keys=True)
        except RecursionError:
            log.info("search: an item is nested too deeply; it is told apart by its id alone")
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _text(value: Any) -> str:
    """A text that Parquet can hold; nothing else is turned into one."""
    if not isinstance(value, str):
        return ""
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _time(properties: Json) -> str | None:
    """``datetime``, else the start of the period, as it is written."""
    for name in ("datetime", "start_datetime"):
        if isinstance(properties.get(name), str):
            return _text(properties[name])[:40]
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


STAGE = Stage(
    name="search",
    version="2",
    kind="items",
    inputs=(),
    software=("pystac", "pystac-client", "shapely"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    live=True,
)
