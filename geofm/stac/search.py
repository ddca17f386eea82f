"""Stage `search`: a STAC catalogue -> the table of its items.

The stage runs on every run, because catalogues change. It has no parts; all steps are in `seal`:

list        an API (api_client.py, query_slices.py, incremental.py), a static catalogue
            (static_catalog.py) or a stac-geoparquet file (geoparquet.py)
canonical   bring each item into one form, which is hashed                    (canonical_item.py)
validate    decide on each item: ok, dropped or quarantined    (validate_items.py, supersede.py)
write       items.parquet (all items) and stac.parquet (good items, for other tools)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pystac_client import Client

from data_catalog.errors import RunError
from data_catalog.sources import count_sources, source_named
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.config.recipe import SearchSettings
from geofm.remote.assets import SCHEME, is_local
from geofm.remote.url_policy import catalogue_access, scheme_of
from geofm.stac.api_client import (
    ApiConnection,
    api_url,
    choose_collections,
    is_api,
    list_collections,
    open_api,
    read_root,
)
from geofm.stac.api_listing import SearchApi, find_skipped_items
from geofm.stac.canonical_item import CanonicalItem, canonicalize
from geofm.stac.geoparquet import is_table, read_table_catalogue, write_items
from geofm.stac.incremental import (
    find_withdrawn,
    list_incrementally,
    newest_versions,
    read_previous_items,
)
from geofm.stac.query import query_of
from geofm.stac.static_catalog import StaticCatalog, read_catalogue, select_items
from geofm.stac.validate_items import to_frame, validate_items
from geofm.types import Json

log = logging.getLogger("geofm.search")


def seal(job: Job, folders: list[Path], out: Path) -> Sealed:
    """List the catalogue, decide on every item, and write both tables."""
    settings: SearchSettings = job.settings
    previous = read_previous_items(job.previous)
    listing = list_catalogue(settings, previous)
    collections = sorted(listing.collections)
    if not listing.items:
        raise RunError(_no_match_message(settings, collections))
    gone = find_withdrawn(previous, listing.items)
    check_withdrawn(previous, gone, settings)
    rows = validate_items(listing.items, settings, listing.collections, listing.own)
    if gone:
        log.info("search: %d items are withdrawn", len(gone))
    write_table(to_frame(rows), out / "items.parquet")
    good = [row for row in rows if row["status"] == "ok"]
    written = write_items([row["item_json"] for row in good], out / "stac.parquet")
    dropped = Counter(row["reason"] for row in rows if row["status"] != "ok")
    for reason, number in sorted(dropped.items()):
        log.info("search: %d items %s", number, reason)
    return Sealed(
        counts={"rows_in": len(rows), "rows_out": len(good)},
        dropped=dict(dropped),
        facts={
            "collections": collections,
            "profiles": {
                name: frozen_profile(name) for name in sorted({row["source"] for row in rows})
            },
            "quarantined": sum(row["status"] == "quarantined" for row in rows),
            "sources": count_sources(good),
            "stac_parquet": written,
        },
        metrics=listing.metrics,
    )


@dataclass(frozen=True)
class Listing:
    """All items of a catalogue that match a search.

    Attributes:
        items: The items, in any order.
        collections: Raw JSON of the searched collections, by id.
        own: Scheme of hrefs inside the catalogue (``planet``, ``catalog`` or empty).
        metrics: How this run listed them: ``asked`` is ``whole``, ``updated`` (changes only) or
            ``both``; for an API also ``requests`` and ``unreached`` items.
    """

    items: list[CanonicalItem]
    collections: dict[str, Json]
    own: str
    metrics: dict[str, Any] = field(default_factory=dict)


def list_catalogue(settings: SearchSettings, previous: Sequence[CanonicalItem]) -> Listing:
    """List all items that match now.

    Args:
        settings: Settings of the search.
        previous: Items of the last search, which may save listing everything.

    Raises:
        RunError: The catalogue can't be read.
        UsageError: The catalogue has none of the collections, or too many items.
    """
    url, access = api_url(settings), catalogue_access(settings)
    if is_table(url):
        listing = _list_static(read_table_catalogue(url, access), settings)
    elif scheme_of(url) not in ("http", "https") or not is_api(read_root(url, access)):
        listing = _list_static(read_catalogue(url, settings.collections, access), settings)
    else:
        listing = _list_api(open_api(url, access), url, settings, previous)
    return replace(listing, items=newest_versions(listing.items))


def _list_static(catalogue: StaticCatalog, settings: SearchSettings) -> Listing:
    """List a static catalogue or a table, which were read completely."""
    if not catalogue.collections:
        raise RunError(f"{settings.stac} holds no item and no collection; check search.stac")
    names = choose_collections(catalogue.collections, settings.collections, settings.stac)
    items = select_items(catalogue, query_of(settings, names), settings.max_items)
    own = SCHEME if is_local(settings.stac) else ""
    collections = {name: catalogue.collections[name] for name in names}
    return Listing(items, collections, own, {"asked": "whole"})


def _list_api(
    connection: ApiConnection,
    url: str,
    settings: SearchSettings,
    previous: Sequence[CanonicalItem],
) -> Listing:
    """List an API, by its changes where that is enough."""
    offered = list_collections(connection.io, url)
    names = choose_collections(offered, settings.collections, url)
    own = "planet" if settings.stac == "planet" else ""
    api = SearchApi(
        client=connection.client,
        io=connection.io,
        collections={name: offered[name] for name in names},
        canonicalize=partial(canonicalize, base=url if own else "", scheme=own),
        filter_language=filter_language_of(connection.client) if settings.watermark else "",
        max_matched=settings.max_matched,
        max_items=settings.max_items,
        check_counts=settings.check_counts,
    )
    query = query_of(settings, names)
    items, by_changes = list_incrementally(api, query, previous)
    items += find_skipped_items(api, query, find_withdrawn(previous, items))
    metrics = {
        "asked": "both" if by_changes else "whole",
        "requests": connection.io.count,
        "unreached": api.unreached,
    }
    if len(by_changes) == len(names):
        metrics["asked"] = "updated"
    return Listing(items, api.collections, own, metrics)


def filter_language_of(client: Client) -> str:
    """Return how an API filters by properties: ``cql2-json``, ``query``, or empty."""
    conforms = client.to_dict().get("conformsTo")
    classes = [str(uri) for uri in conforms] if isinstance(conforms, list) else []
    has_filter = any(uri.endswith("item-search#filter") for uri in classes)
    if has_filter and any(uri.endswith("cql2-json") for uri in classes):
        return "cql2-json"
    return "query" if any(uri.endswith("item-search#query") for uri in classes) else ""


def check_withdrawn(
    previous: Sequence[CanonicalItem], gone: Sequence[CanonicalItem], settings: SearchSettings
) -> None:
    """Stop if so many items are gone that the catalogue itself is probably incomplete.

    Raises:
        RunError: With the figures and the remedy.
    """
    known = {item.key for item in previous}
    if len(gone) > settings.max_withdrawn * len(known):
        raise RunError(
            f"{len(gone)} of {len(known)} items that {settings.stac} listed last time are gone; "
            f"the limit is search.max_withdrawn = {settings.max_withdrawn:g}: if the catalogue is "
            "right, raise it, else run again when it is whole"
        )


def frozen_profile(name: str) -> dict[str, Any]:
    """Return a source profile as the manifest keeps it.

    The later stages use this copy, for example its scales and cloud codes. The search runs every
    time, so a changed profile changes the items and all artifacts that follow from them.
    """
    return source_named(name).model_dump(mode="json")


def _no_match_message(settings: SearchSettings, collections: list[str]) -> str:
    """Explain that no item matches, with the settings that limit the search."""
    box = "everywhere" if settings.bbox is None else ",".join(f"{v:g}" for v in settings.bbox)
    where = f"search.bbox {box}"
    if settings.area is not None:
        where = "search.area"
    elif settings.places:
        where = f"search.places {', '.join(settings.places)}"
    return (
        f"no item matches at {settings.stac}: search.collections {', '.join(collections)}, "
        f"{where}, search.datetime {settings.datetime or 'any'}; widen one of them"
    )


STAGE = Stage(
    name="search",
    version="4",
    kind="items",
    inputs=(),
    software=("pyarrow", "pystac", "pystac-client", "shapely", "stac-geoparquet"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    live=True,
)
