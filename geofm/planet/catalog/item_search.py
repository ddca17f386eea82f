"""Item search of STAC API 1.0 over a list in memory: filter, sort and page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import shapely
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry

from geofm.runtime.timestamps import parse_utc
from geofm.types import Json

#: Default and largest number of items per page.
PAGE, MAX_PAGE = 10, 1000


class BadQuery(ValueError):
    """A query is malformed; becomes HTTP 400."""


@dataclass(frozen=True)
class ItemSearch:
    """The checked parameters of a search."""

    area: BaseGeometry | None = None
    start: datetime | None = None
    end: datetime | None = None
    ids: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    limit: int = PAGE
    offset: int = 0
    order: tuple[tuple[str, bool], ...] = field(default=())


def parse_search(parameters: Json) -> ItemSearch:
    """Parse a search from JSON or from query parameters (lists as comma-separated text).

    Raises:
        BadQuery: A parameter is malformed, or bbox and intersects are both given.
    """
    start, end = parse_datetimes(parameters.get("datetime"))
    if parameters.get("bbox") and parameters.get("intersects"):
        raise BadQuery("give bbox or intersects, not both")
    return ItemSearch(
        area=_area(parameters),
        start=start,
        end=end,
        ids=tuple(_texts(parameters.get("ids"))),
        collections=tuple(_texts(parameters.get("collections"))),
        limit=_limit(parameters.get("limit")),
        offset=_offset(parameters.get("token")),
        order=tuple(_order(parameters.get("sortby"))),
    )


def _texts(value: Any) -> list[str]:
    """Parse a list of texts."""
    if value in (None, ""):
        return []
    if isinstance(value, str):
        return value.split(",")
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    raise BadQuery("ids and collections are lists of texts")


def _limit(value: Any) -> int:
    """Parse the number of items per page."""
    try:
        limit = PAGE if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise BadQuery("limit is a number") from error
    if limit < 1:
        raise BadQuery("limit is at least 1")
    return min(limit, MAX_PAGE)


def _offset(token: Any) -> int:
    """Parse the token of a next page."""
    if token in (None, ""):
        return 0
    match = re.fullmatch(r"next:(\d{1,9})", str(token))
    if match is None:
        raise BadQuery("token is not from this API")
    return int(match[1])


def _area(parameters: Json) -> BaseGeometry | None:
    """Parse bbox or intersects."""
    corners, area = parameters.get("bbox"), parameters.get("intersects")
    if isinstance(corners, str):
        corners = corners.split(",")
    try:
        if corners:
            numbers = [float(number) for number in corners]
            if len(numbers) == 6:
                numbers = [*numbers[:2], *numbers[3:5]]
            west, south, east, north = numbers
            if not (south <= north and west <= east):
                raise BadQuery("bbox is west, south, east, north")
            return box(west, south, east, north)
        return shape(area) if area else None
    except (TypeError, ValueError, KeyError, AttributeError, shapely.errors.ShapelyError) as error:
        raise BadQuery(f"bbox or intersects can't be read: {error}"[:200]) from error


def _order(value: Any) -> list[tuple[str, bool]]:
    """Parse the fields to sort by; True means descending."""
    if value in (None, ""):
        return []
    if isinstance(value, str):
        words = value.split(",")
        return [(word.lstrip("+- "), word.startswith("-")) for word in words]
    try:
        return [(str(by["field"]), by.get("direction", "asc") == "desc") for by in value]
    except (TypeError, KeyError, AttributeError) as error:
        raise BadQuery("sortby is a list of field and direction") from error


def _moment(text: str) -> datetime:
    """Parse an RFC 3339 time; a time without a zone is UTC."""
    moment = parse_utc(text)
    if moment is None:
        raise BadQuery(f"{text!a:.60} is no RFC 3339 time")
    return moment


def parse_datetimes(value: Any) -> tuple[datetime | None, datetime | None]:
    """Parse ``a``, ``a/b``, ``../b`` or ``a/..`` into start and end; None is open."""
    if value in (None, ""):
        return None, None
    parts = str(value).split("/")
    if len(parts) > 2:
        raise BadQuery("datetime is a time or an interval a/b")
    ends = [None if part in ("", "..") else _moment(part) for part in parts]
    if len(ends) == 1:
        return ends[0], ends[0]
    if ends[0] and ends[1] and ends[0] > ends[1]:
        raise BadQuery("datetime: the interval ends before it starts")
    return ends[0], ends[1]


def search_items(items: Sequence[Json], query: ItemSearch) -> list[Json]:
    """Return all matching items, sorted; by default by time, newest first, then by id."""
    selected = [item for item in items if _matches(item, query)]
    order = query.order or (("datetime", True),)
    selected.sort(key=lambda item: str(item["id"]))
    for name, descending in reversed(order):
        selected.sort(key=lambda item, name=name: _sort_key(item, name), reverse=descending)  # type: ignore[misc]
    return selected


def _sort_key(item: Json, name: str) -> tuple[int, float, str]:
    """Make a sort key of any value: missing first, then numbers, then texts."""
    short = name.removeprefix("properties.")
    value = item.get(short) if short in ("id", "collection") else item["properties"].get(short)
    if isinstance(value, (int, float)):
        return 1, float(value), ""
    return (0, 0.0, "") if value is None else (2, 0.0, str(value))


def _matches(item: Json, query: ItemSearch) -> bool:
    """Check whether an item matches a search."""
    if query.ids and item["id"] not in query.ids:
        return False
    if query.collections and item["collection"] not in query.collections:
        return False
    when = _moment(item["properties"]["datetime"])
    if (query.start and when < query.start) or (query.end and when > query.end):
        return False
    return query.area is None or bool(query.area.intersects(shape(item["geometry"])))
