"""What a catalogue lists, whichever kind it is: an API, a static catalogue or a table of items."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pystac_client import Client

from data_catalog.errors import RunError
from geofm.imagery.catalogue_api import (
    PatientIO,
    api_url,
    choose_collections,
    is_api,
    list_collections,
    open_api,
    read_root,
)
from geofm.imagery.frozen import Frozen, frozen_item
from geofm.imagery.hosts import catalogue_access
from geofm.imagery.item_table import is_table, read_items
from geofm.imagery.items import Json, scheme_of
from geofm.imagery.local import SCHEME, is_local
from geofm.imagery.query import query_of
from geofm.imagery.slices import Api, skipped_items
from geofm.imagery.static_catalogue import Walk, select, walk_catalogue
from geofm.imagery.watermark import Before, newest_versions, refresh, withdrawn
from geofm.settings import SearchSettings


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


def _api(client: Client, url: str, settings: SearchSettings, before: Before) -> Listing:
    offered = list_collections(client, url)
    chosen = choose_collections(offered, settings.collections, url)
    own = "planet" if settings.stac == "planet" else ""
    api = Api(
        client=client,
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
    io = client._stac_io
    asked = {
        "asked": "whole" if not renewed else "updated" if len(renewed) == len(chosen) else "both",
        "requests": io.asked if isinstance(io, PatientIO) else 0,
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
