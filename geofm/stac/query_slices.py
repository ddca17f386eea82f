"""Listing what an API holds, however much that is: in slices that the server can answer.

Servers page only so deep (Earth Search: 10 000 items) and answer a large query with a timeout. A
query that matches too much, or that fails, is halved: by collection, then by time, then by ground.
An item in two slices counts once, so the result does not depend on where the cuts fall.

Each slice is held against the number of matches that its pages state: a listing that lacks items
(paging that shifts while items come and go, an early end) is repeated, then halved, then an error.
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
from geofm.runtime.text import instant
from geofm.stac.api_client import STRANGE, PatientIO, short, status_of
from geofm.stac.canonical_item import Frozen
from geofm.stac.query import Query, asked_for, in_area, is_box, parameters, pieces
from geofm.types import Json

log = logging.getLogger("geofm.search")

PAGE = 100
#: Slices are not made smaller than this: an hour of about a scene.
MIN_SPAN = timedelta(hours=1)
MIN_DEGREES = 0.25
#: No catalogue needs more: 100 million items at 10 000 a slice.
MAX_SLICES = 10_000
#: How often a slice that fails is halved, in a row, before the search gives up.
FAILURES = 6
#: How often an incomplete listing is asked for before it is halved, with growing pauses (seconds).
LISTINGS = 3
LISTING_PAUSE_S = 0.5
#: Items that are asked for by id in one request.
BY_ID = 100
#: Where no collection says when it begins.
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_NO_INTERSECTS = (400, 422, 501)
_TOO_DEEP = (400, 413, 422)
#: Answers of a server that does not know ``ids``.
_NO_IDS = (400, 404, 405, 422, 501)


@dataclass
class Api:
    """An API and how it is asked.

    Attributes:
        freeze: an item as it is kept.
        language: ``cql2-json`` or ``query``, whichever it filters by; empty for neither.
        max_matched: from this number of matches on a query is halved rather than paged through.
        max_items: more items than this are an error.
        check_counts: hold each listing against the number of matches that its pages state.
        boxed: True once it has turned out not to know ``intersects``.
        unreached: items that it counts but that no slice holds, lacking a time or a place.
    """

    client: Client
    io: PatientIO
    collections: dict[str, Json]
    freeze: Callable[[Any], Frozen]
    language: str
    max_matched: int
    max_items: int
    check_counts: bool = True
    boxed: bool = False
    unreached: int = 0
    extent: tuple[datetime, datetime] = field(init=False)

    def __post_init__(self) -> None:
        self.extent = extent_of(self.collections)


class _Deep(Exception):
    """The query matches more than is paged through: so many, where that is known."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number


class _Incomplete(Exception):
    """A listing has fewer items than its pages say that there are."""

    def __init__(self, listed: int, number: int) -> None:
        super().__init__(f"{listed} of {number} items were listed")


def extent_of(collections: dict[str, Json]) -> tuple[datetime, datetime]:
    """Earliest and latest time that the collections state; only a hint of where to halve."""
    starts, ends = [], []
    for collection in collections.values():
        try:
            first, last = collection["extent"]["temporal"]["interval"][0]
        except (KeyError, TypeError, IndexError, ValueError):
            continue
        starts.append(instant(first))
        ends.append(instant(last))
    known = [t.replace(tzinfo=t.tzinfo or UTC) for t in starts if t]
    late = [t.replace(tzinfo=t.tzinfo or UTC) for t in ends if t]
    start = min(known) if known and all(starts) else BEGINNING
    end = max(late) if late and all(ends) else datetime.now(UTC)
    return start, max(start, end)


def search_of(api: Api, query: Query, limit: int) -> Any:
    """pystac-client's search for a query."""
    found = parameters(query, api.boxed)
    tests = [(">=", "gte", query.since), ("<", "lt", query.before)]
    told = [(cql, word, time) for cql, word, time in tests if time]
    if told and api.language == "query":
        found["query"] = {"updated": {word: time for _, word, time in told}}
    elif told:
        parts = [{"op": cql, "args": [{"property": "updated"}, time]} for cql, _, time in told]
        found["filter"] = parts[0] if len(parts) == 1 else {"op": "and", "args": parts}
        found["filter_lang"] = "cql2-json"
    return api.client.search(limit=limit, **found)


def count(api: Api, query: Query) -> int | None:
    """How many items match, by one request; None where the API does not tell."""
    if query.area is not None and api.boxed and not is_box(query.area):
        return None
    search = search_of(api, query, 1)
    try:
        page = api.io.read_json(
            search.url, method=search.method, parameters=search.get_parameters()
        )
    except STRANGE as error:
        log.info("search: no count (%s)", short(error))
        return None
    return matched(page)


def matched(page: Json) -> int | None:
    """The number of matches that a page states."""
    context = page.get("context")
    old = context.get("matched") if isinstance(context, dict) else None
    told = page.get("numberMatched", old)
    return told if isinstance(told, int) and not isinstance(told, bool) else None


def list_items(api: Api, query: Query) -> list[Frozen]:
    """Every item that matches; what one answer repeats is repeated.

    Raises:
        RunError: when a slice can't be had.
        UsageError: when there are more than ``max_items``.
    """
    found: dict[tuple[str, str, str], list[Frozen]] = {}
    listed, slices = 0, 0
    for items in _listings(api, query, FAILURES):
        slices += 1
        if slices > MAX_SLICES:
            raise RunError(
                f"the search takes more than {MAX_SLICES} slices; raise search.max_matched, or "
                "narrow search.bbox, search.datetime or search.collections"
            )
        here: dict[tuple[str, str, str], list[Frozen]] = {}
        for one in items:
            here.setdefault((*one.key, one.sha256), []).append(one)
        for key, same in here.items():
            if len(same) > len(found.get(key, [])):
                listed += len(same) - len(found.get(key, []))
                found[key] = same
        bounded(listed, api)
    if slices > 1:
        total = count(api, query)
        api.unreached += max((total or 0) - listed, 0)
        log.info("search: listed in %d slices", slices)
    return [one for same in found.values() for one in same]


def skipped_items(api: Api, query: Query, gone: Sequence[Frozen]) -> list[Frozen]:
    """Find items that the API still has though they are missing from its listing.

    Items that seem to be withdrawn are asked for by id. A server that does not know ``ids`` tells
    nothing, and its listing is believed. A server that is busy or down may still have the items.

    Args:
        api: The API.
        query: What was listed.
        gone: Items that were listed last time and are missing now.

    Raises:
        RunError: when the API fails to answer.
    """
    before = {one.key: one for one in gone}
    found: list[Frozen] = []
    for first in range(0, len(gone), BY_ID):
        part = gone[first : first + BY_ID]
        names = sorted({one.collection for one in part})
        search = api.client.search(
            ids=[one.item_id for one in part], collections=names, limit=BY_ID
        )
        try:
            pages = api.io.get_pages(search.url, search.method, search.get_parameters())
            rows = [
                (api.freeze(item), item)
                for page in islice(pages, BY_ID)
                for item in page["features"]
            ]
        except STRANGE as error:
            if _no_reply(error):
                raise RunError(
                    f"the STAC API does not say whether it still has {len(part)} items that its "
                    f"listing lacks ({short(error)}); nothing was withdrawn, run again later"
                ) from error
            log.info("search: items can't be asked for by id (%s)", short(error))
            return found
        for one, item in rows:
            old = before.pop(one.key, None)
            if old and (one.sha256 == old.sha256 or (_tells(item) and asked_for(item, query))):
                found.append(one)
    if found:
        log.warning(
            "search: the listing lacks %d items that the API still has, e.g. %s; they are kept",
            len(found), found[0].item_id,
        )  # fmt: skip
    return found


def _no_reply(error: BaseException) -> bool:
    """Whether a request by ids failed for a reason other than that the server knows no ``ids``."""
    if isinstance(error, APIError):
        return status_of(error) not in _NO_IDS
    return isinstance(error, json.JSONDecodeError)


def _tells(item: Any) -> bool:
    """Whether an item states a place and a time that a search can compare."""
    properties = item.get("properties")
    when = properties.get("datetime") if isinstance(properties, dict) else None
    return instant(when) is not None and isinstance(item.get("geometry"), dict)


def bounded(listed: int, api: Api) -> None:
    """Stop a search that finds more than is wanted.

    Raises:
        UsageError: there are more than ``max_items``.
    """
    if listed > api.max_items:
        raise UsageError(
            f"more than search.max_items = {api.max_items} items match; raise it, or "
            "narrow search.bbox, search.datetime or search.collections"
        )


def _listings(
    api: Api, query: Query, failures: int, above: int | None = None
) -> Iterator[list[Frozen]]:
    """The items of each slice of a query, one list a slice.

    Args:
        api: the API.
        query: what to list.
        failures: how often it may be halved because it fails.
        above: matches of the query whose ground was halved to this. Where there are not fewer,
            the footprints are larger than the slices, and halving on would never end.
    """
    if api.boxed and query.area is not None and len(pieces(query.area)) > 1:
        for piece in pieces(query.area):
            yield from _listings(api, replace(query, area=piece), failures)
        return
    parts = halves(query, api.extent)
    try:
        yield _complete_pages(api, query, bool(parts), above)
        return
    except _Deep as deep:
        failures = FAILURES
        above = deep.number if parts[0].area is not query.area else None
    except _Incomplete as error:
        failures -= 1
        if not parts or failures < 0:
            raise RunError(
                f"{api.client.self_href or 'the STAC API'} lists incompletely: {error}, each time "
                "it was asked; run again later, or set search.check_counts=false if its "
                "numberMatched is wrong"
            ) from error
        log.info("search: %s; asking for half of the query", error)
    except STRANGE as error:
        if _refuses_intersects(api, query, error):
            api.boxed = True
            log.info("search: the API knows no intersects; it is asked by boxes")
            yield from _listings(api, query, failures)
            return
        failures -= 1
        if not parts or failures < 0 or not _passing(error):
            raise _failed(0, error) from error
        log.info("search: a query failed (%s); asking for half of it", short(error))
    for part in parts:
        yield from _listings(api, part, failures, above)


def _complete_pages(api: Api, query: Query, can_split: bool, above: int | None) -> list[Frozen]:
    """All items of one query; an incomplete listing is repeated.

    Raises:
        _Deep: there are too many and the query can be split.
        _Incomplete: the last listing lacks items as well.
    """
    for attempt in range(LISTINGS):
        try:
            return _pages(api, query, can_split, above)
        except _Incomplete as error:
            if attempt == LISTINGS - 1:
                raise
            log.info("search: %s; asking again", error)
            time.sleep(LISTING_PAUSE_S * (attempt + 1))
    raise AssertionError("unreachable")


def _pages(api: Api, query: Query, can_split: bool, above: int | None) -> list[Frozen]:
    """All items of one query, page by page; what a later page repeats is left out.

    Raises:
        _Deep: there are too many and the query can be split.
        _Incomplete: the pages have fewer items than they say that there are. An item that is
            twice on one page counts twice; what a later page repeats does not count.
    """
    search = search_of(api, query, min(PAGE, api.max_items))
    local = query.area if api.boxed and query.area and not is_box(query.area) else None
    pages = api.io.get_pages(search.url, search.method, search.get_parameters())
    found: list[Frozen] = []
    seen: set[tuple[str, ...]] = set()
    versions: set[tuple[str, ...]] = set()
    counted, number, most = 0, 0, 0
    while True:
        try:
            page = next(pages, None)
        except APIError as error:
            if number and can_split and status_of(error) in _TOO_DEEP:
                raise _Deep from error
            raise
        if page is None:
            break
        number += 1
        total = matched(page) or 0
        most = max(most, total)
        fewer = above is None or total < above
        if number == 1 and can_split and fewer and total >= api.max_matched:
            raise _Deep(total)
        rows = [(api.freeze(item), item) for item in page.get("features") or []]
        names = [one.key if one.item_id else (one.sha256,) for one, _ in rows]
        counted += sum(name not in seen for name in names)
        found += [
            one for one, item in rows
            if (*one.key, one.sha256) not in versions and (local is None or in_area(item, local))
        ]  # fmt: skip
        seen.update(names)
        versions.update((*one.key, one.sha256) for one, _ in rows)
        bounded(len(found), api)
        tick("search", len(found), max(api.max_items, len(found)), "items listed")
    if api.check_counts and counted < most:
        raise _Incomplete(counted, most)
    return found


def _refuses_intersects(api: Api, query: Query, error: BaseException) -> bool:
    return (
        isinstance(error, APIError)
        and status_of(error) in _NO_INTERSECTS
        and not api.boxed
        and query.area is not None
        and not is_box(query.area)
    )


def _passing(error: BaseException) -> bool:
    """Whether half of the query may fare better: the server gave up, or took too long."""
    if not isinstance(error, APIError):
        return False
    status = status_of(error)
    return "timed out" in str(error) if status is None else status >= 500


def _failed(listed: int, error: BaseException) -> RunError:
    return RunError(
        f"the search failed after {listed} items ({short(error)}); run again, and if it "
        "stays so check search.bbox and search.datetime"
    )


def halves(query: Query, extent: tuple[datetime, datetime]) -> list[Query]:
    """Two queries that together match what one does; none where it is small enough.

    Open ends stay open: what the collections say of their extent only tells where the middle is.
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
    parts = [area.intersection(one) for one in boxes]
    return [replace(query, area=part) for part in parts if part.area > 0]
