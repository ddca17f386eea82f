"""The stage ``search``: which scenes there are, which of them count, and why the others do not."""

from __future__ import annotations

import logging
from collections import Counter
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
from geofm.stac.canonical_item import Frozen, frozen_item
from geofm.stac.geoparquet import write_items
from geofm.stac.incremental import Before, newest_versions, read_before, refresh, withdrawn
from geofm.stac.item_table import is_table, read_items
from geofm.stac.query import query_of
from geofm.stac.query_slices import Api, skipped_items
from geofm.stac.static_catalog import Walk, select, walk_catalogue
from geofm.stac.validate_items import judge, to_frame
from geofm.types import Json

# What a catalogue lists, whichever kind it is: an API, a static catalogue or a table of items.


@dataclass(frozen=True)
class Listing:
    """Everything that matches.

    Attributes:
        items: what is listed, in any order.
        collections: the collections searched, as raw JSON by id.
        own: scheme of hrefs in the catalogue itself.
        asked: how it was asked; of this run only.
    """

    items: list[Frozen]
    collections: dict[str, Json]
    own: str
    asked: dict[str, Any] = field(default_factory=dict)


def list_catalogue(settings: SearchSettings, before: Before) -> Listing:
    """All items that match now.

    Args:
        settings: the search.
        before: what was listed last time, which may save listing it again.

    Raises:
        RunError: the catalogue can't be read.
        UsageError: it has none of the collections, or too many items.
    """
    url, access = api_url(settings), catalogue_access(settings)
    if is_table(url):
        found = _static(read_items(url, access), settings)
    elif scheme_of(url) not in ("http", "https") or not is_api(read_root(url, access)):
        found = _static(walk_catalogue(url, settings.collections, access), settings)
    else:
        found = _api(open_api(url, access), url, settings, before)
    return replace(found, items=newest_versions(found.items))


def _static(walk: Walk, settings: SearchSettings) -> Listing:
    if not walk.collections:
        raise RunError(f"{settings.stac} holds no item and no collection; check search.stac")
    chosen = choose_collections(walk.collections, settings.collections, settings.stac)
    items = select(walk, query_of(settings, chosen), settings.max_items)
    own = SCHEME if is_local(settings.stac) else ""
    return Listing(
        items, {name: walk.collections[name] for name in chosen}, own, {"asked": "whole"}
    )


def _api(connection: ApiConnection, url: str, settings: SearchSettings, before: Before) -> Listing:
    client, io = connection.client, connection.io
    offered = list_collections(io, url)
    chosen = choose_collections(offered, settings.collections, url)
    own = "planet" if settings.stac == "planet" else ""
    api = Api(
        client=client,
        io=io,
        collections={name: offered[name] for name in chosen},
        freeze=partial(frozen_item, base=url if own else "", scheme=own),
        language=language_of(client) if settings.watermark else "",
        max_matched=settings.max_matched,
        max_items=settings.max_items,
        check_counts=settings.check_counts,
    )
    query = query_of(settings, chosen)
    items, renewed = refresh(api, query, before)
    items += skipped_items(api, query, withdrawn(before, items))
    asked = {
        "asked": "whole" if not renewed else "updated" if len(renewed) == len(chosen) else "both",
        "requests": io.asked,
        "unreached": api.unreached,
    }
    return Listing(items, api.collections, own, asked)


def language_of(client: Client) -> str:
    """How an API can be asked for what was updated: ``cql2-json``, ``query``, or empty."""
    conforms = client.to_dict().get("conformsTo")
    told = [str(uri) for uri in conforms] if isinstance(conforms, list) else []
    if any(uri.endswith("item-search#filter") for uri in told) and any(
        uri.endswith("cql2-json") for uri in told
    ):
        return "cql2-json"
    return "query" if any(uri.endswith("item-search#query") for uri in told) else ""


log = logging.getLogger("geofm.search")


def seal(job: Job, folders: list[Path], out: Path) -> Sealed:
    """List, judge every item listed, and write ``items.parquet`` and ``stac.parquet``."""
    settings: SearchSettings = job.settings
    before = read_before(job.previous)
    listing = list_catalogue(settings, before)
    chosen = sorted(listing.collections)
    if not listing.items:
        raise RunError(_nothing(settings, chosen))
    gone = withdrawn(before, listing.items)
    check_withdrawn(before, gone, settings)
    rows = judge(listing.items, settings, listing.collections, listing.own)
    if gone:
        log.info("search: %d items are withdrawn", len(gone))
    write_table(to_frame(rows), out / "items.parquet")
    good = [row for row in rows if row["status"] == "ok"]
    texts = [row["item_json"] for row in good]
    strict = write_items(texts, out / "stac.parquet")
    dropped = Counter(row["reason"] for row in rows if row["status"] != "ok")
    for reason, number in sorted(dropped.items()):
        log.info("search: %d items %s", number, reason)
    return Sealed(
        counts={"rows_in": len(rows), "rows_out": len(good)},
        dropped=dict(dropped),
        facts={
            "collections": chosen,
            "profiles": {
                name: frozen_profile(name) for name in sorted({row["source"] for row in rows})
            },
            "quarantined": sum(row["status"] == "quarantined" for row in rows),
            "sources": count_sources(good),
            "stac_parquet": strict,
        },
        metrics=listing.asked,
    )


def check_withdrawn(before: Before, gone: list[Frozen], settings: SearchSettings) -> None:
    """Stop when so much is gone at once that the catalogue itself seems to be in trouble.

    Raises:
        RunError: with the figures and the remedy.
    """
    known = {one.key for one in before.listed}
    lost = len(gone)
    if lost > settings.max_withdrawn * len(known):
        raise RunError(
            f"{lost} of {len(known)} items that {settings.stac} listed last time are gone; the "
            f"limit is search.max_withdrawn = {settings.max_withdrawn:g}: if the catalogue is "
            "right, raise it, else run again when it is whole"
        )


def frozen_profile(name: str) -> dict[str, Any]:
    """A source profile as the items keep it: it decides scales and cloud codes.

    Whatever is made of the items is made by this profile, wherever and whenever. The search runs
    every time, so a changed profile changes the items and all that follows from them.
    """
    return source_named(name).model_dump(mode="json")


def _nothing(settings: SearchSettings, collections: list[str]) -> str:
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
