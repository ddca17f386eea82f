"""Listing a STAC API completely, by splitting the search into slices that the server can answer.

Servers page only to a limited depth (Earth Search: 10,000 items) and time out on large queries. A
query that matches too many items, or that fails, is halved: by collection, then by time, then by
area. An item that lies in two slices counts once, so the result does not depend on the cuts.

The number of items in each slice is compared with the number of matches that its pages state. An
incomplete listing (items that come and go shift the pages; some servers end early) is repeated,
then halved, then an error.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from pystac_client import Client
from pystac_client.exceptions import APIError
from shapely.geometry import box

from data_catalog.errors import RunError, UsageError
from data_catalog.progress import tick
from geofm.runtime.timestamps import parse_time, parse_utc
from geofm.stac.api_client import API_ERRORS, StacRequests, short, status_of
from geofm.stac.canonical_item import CanonicalItem
from geofm.stac.query import Query, is_box, matches, meets_area, polygons_of, search_parameters
from geofm.types import Json

log = logging.getLogger("geofm.search")

PAGE_ITEMS = 100
#: Slices are not halved below this; an hour and 0.25 degrees hold about one scene.
MIN_SPAN = timedelta(hours=1)
MIN_DEGREES = 0.25
#: Most slices of a search: enough for 100 million items at 10,000 per slice.
MAX_SLICES = 10_000
#: How often a failing query is halved in a row before the search gives up.
MAX_FAILURES = 6
#: How often an incomplete slice is listed before it is halved, with growing pauses (seconds).
MAX_LISTINGS = 3
LISTING_PAUSE_S = 0.5
#: Ids in one request for items by id.
IDS_PER_REQUEST = 100
#: Start of the time axis if a collection states none.
DEFAULT_START = datetime(1970, 1, 1, tzinfo=UTC)
#: Statuses of servers that don't know ``intersects``, that page no deeper, or don't know ``ids``.
_NO_INTERSECTS = (400, 422, 501)
_TOO_DEEP = (400, 413, 422)
_NO_IDS = (400, 404, 405, 422, 501)

#: Collection, id and SHA-256 of an item.
VersionKey = tuple[str, str, str]


@dataclass
class SearchApi:
    """An API, its limits, and its abilities as they become known.

    Attributes:
        client: The client of the API, which builds searches.
        io: Sends requests to the API.
        collections: Raw JSON of the searched collections, by id.
        canonicalize: Brings an item into canonical form.
        filter_language: ``cql2-json`` or ``query``; empty if the API can't filter by ``updated``.
        max_matched: A query with this many matches is halved instead of paged through.
        max_items: Largest number of items of the search.
        check_counts: Compare each listing with the number of matches that its pages state.
        bbox_only: True once the API has turned out not to know ``intersects``.
        unreached: Items that the API counts, but that no slice holds because they lack a time or
            a geometry.
        extent: Earliest and latest time of the collections.
    """

    client: Client
    io: StacRequests
    collections: dict[str, Json]
    canonicalize: Callable[[Any], CanonicalItem]
    filter_language: str
    max_matched: int
    max_items: int
    check_counts: bool = True
    bbox_only: bool = False
    unreached: int = 0
    extent: tuple[datetime, datetime] = field(init=False)

    def __post_init__(self) -> None:
        self.extent = time_extent(self.collections)


class _TooManyMatches(Exception):
    """A query matches more items than are paged through; ``number`` of them, if known."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number


class _IncompleteListing(Exception):
    """A listing has fewer items than its pages state."""

    def __init__(self, listed: int, number: int) -> None:
        super().__init__(f"{listed} of {number} items were listed")


def time_extent(collections: dict[str, Json]) -> tuple[datetime, datetime]:
    """Return earliest and latest time of the collections; only a hint of where to halve."""
    starts, ends = [], []
    for collection in collections.values():
        try:
            first, last = collection["extent"]["temporal"]["interval"][0]
        except (KeyError, TypeError, IndexError, ValueError):
            continue
        starts.append(parse_utc(first))
        ends.append(parse_utc(last))
    known_starts = [time for time in starts if time]
    known_ends = [time for time in ends if time]
    start = min(known_starts) if known_starts and all(starts) else DEFAULT_START
    end = max(known_ends) if known_ends and all(ends) else datetime.now(UTC)
    return start, max(start, end)


def list_items(api: SearchApi, query: Query) -> list[CanonicalItem]:
    """List every item that matches; an item that a slice repeats is repeated.

    Raises:
        RunError: A slice can't be listed.
        UsageError: There are more than ``max_items``.
    """
    versions: dict[VersionKey, list[CanonicalItem]] = {}
    listed, slices = 0, 0
    for items in _list_slices(api, query, MAX_FAILURES):
        slices += 1
        if slices > MAX_SLICES:
            raise RunError(
                f"the search takes more than {MAX_SLICES} slices; raise search.max_matched, or "
                "narrow search.bbox, search.datetime or search.collections"
            )
        in_slice: dict[VersionKey, list[CanonicalItem]] = {}
        for item in items:
            in_slice.setdefault((*item.key, item.sha256), []).append(item)
        for key, copies in in_slice.items():
            if len(copies) > len(versions.get(key, [])):
                listed += len(copies) - len(versions.get(key, []))
                versions[key] = copies
        check_max_items(listed, api)
    if slices > 1:
        total = count_matches(api, query)
        api.unreached += max((total or 0) - listed, 0)
        log.info("search: listed in %d slices", slices)
    return [item for copies in versions.values() for item in copies]


def check_max_items(listed: int, api: SearchApi) -> None:
    """Stop a search that lists too many items.

    Raises:
        UsageError: There are more than ``max_items``.
    """
    if listed > api.max_items:
        raise UsageError(
            f"more than search.max_items = {api.max_items} items match; raise it, or "
            "narrow search.bbox, search.datetime or search.collections"
        )


def _list_slices(
    api: SearchApi, query: Query, failures: int, above: int | None = None
) -> Iterator[list[CanonicalItem]]:
    """Yield the items of each slice of a query.

    Args:
        api: The API.
        query: The query.
        failures: How often the query may be halved because it fails.
        above: Matches of the larger query from whose area this one was cut. If this one has as
            many, the footprints are larger than the slices and halving would never end.
    """
    if api.bbox_only and query.area is not None and len(polygons_of(query.area)) > 1:
        for polygon in polygons_of(query.area):
            yield from _list_slices(api, replace(query, area=polygon), failures)
        return
    halves = halve_query(query, api.extent)
    try:
        yield _list_completely(api, query, bool(halves), above)
        return
    except _TooManyMatches as error:
        failures = MAX_FAILURES
        above = error.number if halves[0].area is not query.area else None
    except _IncompleteListing as error:
        failures -= 1
        if not halves or failures < 0:
            raise RunError(
                f"{api.client.self_href or 'the STAC API'} lists incompletely: {error}, in each "
                f"of {MAX_LISTINGS} attempts; run again later, or set search.check_counts=false "
                "if its numberMatched is wrong"
            ) from error
        log.info("search: %s; listing half of the query", error)
    except API_ERRORS as error:
        if _refuses_intersects(api, query, error):
            api.bbox_only = True
            log.info("search: the API does not know intersects; the search is sent as boxes")
            yield from _list_slices(api, query, failures)
            return
        failures -= 1
        if not halves or failures < 0 or not _is_overload(error):
            raise RunError(
                f"the search failed ({short(error)}); run again, and if it fails again check "
                "search.bbox and search.datetime"
            ) from error
        log.info("search: a query failed (%s); listing half of it", short(error))
    for half in halves:
        yield from _list_slices(api, half, failures, above)


def _list_completely(
    api: SearchApi, query: Query, can_split: bool, above: int | None
) -> list[CanonicalItem]:
    """List all items of a query; an incomplete listing is repeated.

    Raises:
        _TooManyMatches: There are too many, and the query can be split.
        _IncompleteListing: The last attempt lacks items as well.
    """
    for attempt in range(MAX_LISTINGS):
        try:
            return _read_pages(api, query, can_split, above)
        except _IncompleteListing as error:
            if attempt == MAX_LISTINGS - 1:
                raise
            log.info("search: %s; listing again", error)
            time.sleep(LISTING_PAUSE_S * (attempt + 1))
    raise AssertionError("unreachable")


def _read_pages(
    api: SearchApi, query: Query, can_split: bool, above: int | None
) -> list[CanonicalItem]:
    """List all items of a query page by page; repetitions on later pages are left out.

    Raises:
        _TooManyMatches: There are too many, and the query can be split.
        _IncompleteListing: The pages have fewer items than they state. An item that is twice on
            one page counts twice, as servers count it; a repetition on a later page does not.
    """
    search = _start_search(api, query, min(PAGE_ITEMS, api.max_items))
    # The server was sent the bounds of the area, so its items are filtered here.
    area = query.area if api.bbox_only and query.area and not is_box(query.area) else None
    pages = api.io.get_pages(search.url, search.method, search.get_parameters())
    items: list[CanonicalItem] = []
    seen: set[tuple[str, ...]] = set()
    versions: set[VersionKey] = set()
    counted, number, stated = 0, 0, 0
    while True:
        try:
            page = next(pages, None)
        except APIError as error:
            if number and can_split and status_of(error) in _TOO_DEEP:
                raise _TooManyMatches from error
            raise
        if page is None:
            break
        number += 1
        total = matched_count(page) or 0
        stated = max(stated, total)
        fewer = above is None or total < above
        if number == 1 and can_split and fewer and total >= api.max_matched:
            raise _TooManyMatches(total)
        rows = [(api.canonicalize(feature), feature) for feature in page.get("features") or []]
        names = [item.key if item.item_id else (item.sha256,) for item, _ in rows]
        counted += sum(name not in seen for name in names)
        for item, feature in rows:
            repeated = (*item.key, item.sha256) in versions
            if not repeated and (area is None or meets_area(feature, area)):
                items.append(item)
        seen.update(names)
        versions.update((*item.key, item.sha256) for item, _ in rows)
        check_max_items(len(items), api)
        tick("search", len(items), max(api.max_items, len(items)), "items listed")
    if api.check_counts and counted < stated:
        raise _IncompleteListing(counted, stated)
    return items


def _start_search(api: SearchApi, query: Query, limit: int) -> Any:
    """Build pystac-client's search for a query."""
    parameters = search_parameters(query, api.bbox_only)
    bounds = [(">=", "gte", query.since), ("<", "lt", query.before)]
    bounds = [(operator, word, time) for operator, word, time in bounds if time]
    if bounds and api.filter_language == "query":
        parameters["query"] = {"updated": {word: time for _, word, time in bounds}}
    elif bounds:
        tests = [
            {"op": operator, "args": [{"property": "updated"}, time]}
            for operator, _, time in bounds
        ]
        parameters["filter"] = tests[0] if len(tests) == 1 else {"op": "and", "args": tests}
        parameters["filter_lang"] = "cql2-json"
    return api.client.search(limit=limit, **parameters)


def count_matches(api: SearchApi, query: Query) -> int | None:
    """Count the matching items by one request; None if the API does not state the number."""
    if query.area is not None and api.bbox_only and not is_box(query.area):
        return None
    search = _start_search(api, query, 1)
    try:
        page = api.io.read_json(
            search.url, method=search.method, parameters=search.get_parameters()
        )
    except API_ERRORS as error:
        log.info("search: no count (%s)", short(error))
        return None
    return matched_count(page)


def matched_count(page: Json) -> int | None:
    """Return the number of matches that a page states."""
    context = page.get("context")  # STAC API before 1.0
    old = context.get("matched") if isinstance(context, dict) else None
    number = page.get("numberMatched", old)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _refuses_intersects(api: SearchApi, query: Query, error: BaseException) -> bool:
    """Check whether a query failed because the API does not know ``intersects``."""
    return (
        isinstance(error, APIError)
        and status_of(error) in _NO_INTERSECTS
        and not api.bbox_only
        and query.area is not None
        and not is_box(query.area)
    )


def _is_overload(error: BaseException) -> bool:
    """Check whether half of the query may succeed: the server failed, or took too long."""
    if not isinstance(error, APIError):
        return False
    status = status_of(error)
    return "timed out" in str(error) if status is None else status >= 500


def halve_query(query: Query, extent: tuple[datetime, datetime]) -> list[Query]:
    """Split a query into two that together match the same items; empty if it is small enough.

    Open ends of the interval stay open. The extent of the collections only places the cut.
    """
    names = query.collections
    if len(names) > 1:
        middle = len(names) // 2
        return [replace(query, collections=part) for part in (names[:middle], names[middle:])]
    start = query.start or min(extent[0], query.end or extent[0])
    end = query.end or max(extent[1], start)
    if end - start > MIN_SPAN:
        noon = (start + (end - start) / 2).replace(microsecond=0)
        return [replace(query, end=noon), replace(query, start=noon)]
    area = query.area or box(-180.0, -90.0, 180.0, 90.0)
    west, south, east, north = area.bounds
    if max(east - west, north - south) <= MIN_DEGREES:
        return []
    if east - west >= north - south:
        edge = (west + east) / 2
        boxes = [box(west, south, edge, north), box(edge, south, east, north)]
    else:
        edge = (south + north) / 2
        boxes = [box(west, south, east, edge), box(west, edge, east, north)]
    parts = [area.intersection(half) for half in boxes]
    return [replace(query, area=part) for part in parts if part.area > 0]


def find_skipped_items(
    api: SearchApi, query: Query, gone: Sequence[CanonicalItem]
) -> list[CanonicalItem]:
    """Find items that the API still has although its listing lacks them.

    Items that seem to be withdrawn are requested by id. If the server does not know ``ids``, the
    listing counts. A server that is busy or down may still have the items, so that is an error.

    Args:
        api: The API.
        query: The query that was listed.
        gone: Items that the last search listed and this one did not.

    Raises:
        RunError: The API does not answer.
    """
    missing = {item.key: item for item in gone}
    skipped: list[CanonicalItem] = []
    for first in range(0, len(gone), IDS_PER_REQUEST):
        part = gone[first : first + IDS_PER_REQUEST]
        collections = sorted({item.collection for item in part})
        search = api.client.search(
            ids=[item.item_id for item in part], collections=collections, limit=IDS_PER_REQUEST
        )
        try:
            pages = api.io.get_pages(search.url, search.method, search.get_parameters())
            rows = [
                (api.canonicalize(feature), feature)
                for page in islice(pages, IDS_PER_REQUEST)
                for feature in page["features"]
            ]
        except API_ERRORS as error:
            if _is_failure(error):
                raise RunError(
                    f"the STAC API does not say whether it still has {len(part)} items that its "
                    f"listing lacks ({short(error)}); nothing was withdrawn, run again later"
                ) from error
            log.info("search: items can't be requested by id (%s)", short(error))
            return skipped
        for item, feature in rows:
            old = missing.pop(item.key, None)
            if old is None:
                continue
            unchanged = item.sha256 == old.sha256
            if unchanged or (_has_time_and_place(feature) and matches(feature, query)):
                skipped.append(item)
    if skipped:
        log.warning(
            "search: the listing lacks %d items that the API still has, e.g. %s; they are kept",
            len(skipped),
            skipped[0].item_id,
        )
    return skipped


def _is_failure(error: BaseException) -> bool:
    """Check whether a request by ids failed for another reason than an unknown ``ids``."""
    if isinstance(error, APIError):
        return status_of(error) not in _NO_IDS
    return isinstance(error, json.JSONDecodeError)


def _has_time_and_place(feature: Any) -> bool:
    """Check whether an item states a time and a geometry that a query can be compared with."""
    properties = feature.get("properties")
    when = properties.get("datetime") if isinstance(properties, dict) else None
    return parse_time(when) is not None and isinstance(feature.get("geometry"), dict)
