"""Item search as STAC API 1.0 describes it, over a list in memory: filter, sort, page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import shapely
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry

from geofm.types import Json

#: Items per page by default and at most.
PAGE, MOST = 10, 1000


class BadQuery(ValueError):
    """A query that cannot be answered; becomes HTTP 400."""


@dataclass(frozen=True)
class Query:
    """A checked search."""

    area: BaseGeometry | None = None
    start: datetime | None = None
    end: datetime | None = None
    ids: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    limit: int = PAGE
    offset: int = 0
    order: tuple[tuple[str, bool], ...] = field(default=())


def parse_query(given: Json) -> Query:
    """A query from JSON or from query parameters (lists as comma-separated text).

    Raises:
        BadQuery: a parameter is malformed, or bbox and intersects are both given.
    """
    start, end = parse_interval(given.get("datetime"))
    if given.get("bbox") and given.get("intersects"):
        raise BadQuery("give bbox or intersects, not both")
    return Query(
        area=_area(given), start=start, end=end,
        ids=tuple(_texts(given.get("ids"))), collections=tuple(_texts(given.get("collections"))),
        limit=_limit(given.get("limit")), offset=_offset(given.get("token")),
        order=tuple(_order(given.get("sortby"))),
    )  # fmt: skip


def _texts(value: Any) -> list[str]:
    if value in (None, ""):
        return []
    if isinstance(value, str):
        return value.split(",")
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    raise BadQuery("ids and collections are lists of texts")


def _limit(value: Any) -> int:
    try:
        limit = PAGE if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise BadQuery("limit is a number") from error
    if limit < 1:
        raise BadQuery("limit is at least 1")
    return min(limit, MOST)


def _offset(token: Any) -> int:
    if token in (None, ""):
        return 0
    found = re.fullmatch(r"next:(\d{1,9})", str(token))
    if found is None:
        raise BadQuery("token is not one of this API")
    return int(found[1])


def _area(given: Json) -> BaseGeometry | None:
    corners, area = given.get("bbox"), given.get("intersects")
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
    """Fields to sort by and whether downwards."""
    if value in (None, ""):
        return []
    if isinstance(value, str):
        words = value.split(",")
        return [(word.lstrip("+- "), word.startswith("-")) for word in words]
    try:
        return [(str(by["field"]), by.get("direction", "asc") == "desc") for by in value]
    except (TypeError, KeyError, AttributeError) as error:
        raise BadQuery("sortby is a list of field and direction") from error


def instant(text: str) -> datetime:
    """An RFC 3339 time; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadQuery(f"{text!a:.60} is no RFC 3339 time") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def parse_interval(value: Any) -> tuple[datetime | None, datetime | None]:
    """``a``, ``a/b``, ``../b`` or ``a/..``."""
    if value in (None, ""):
        return None, None
    parts = str(value).split("/")
    if len(parts) > 2:
        raise BadQuery("datetime is an instant or an interval a/b")
    ends = [None if part in ("", "..") else instant(part) for part in parts]
    if len(ends) == 1:
        return ends[0], ends[0]
    if ends[0] and ends[1] and ends[0] > ends[1]:
        raise BadQuery("datetime: the interval ends before it starts")
    return ends[0], ends[1]


def search(items: Sequence[Json], query: Query) -> list[Json]:
    """All items that match, in order; by default by time, newest first, then by id."""
    found = [item for item in items if matches(item, query)]
    order = query.order or (("datetime", True),)
    found.sort(key=lambda item: str(item["id"]))
    for name, down in reversed(order):
        found.sort(key=lambda item, name=name: _sortable(item, name), reverse=down)  # type: ignore[misc]
    return found


def _sortable(item: Json, name: str) -> tuple[int, float, str]:
    """A key that any value has: missing first, then numbers, then texts."""
    short = name.removeprefix("properties.")
    value = item.get(short) if short in ("id", "collection") else item["properties"].get(short)
    if isinstance(value, (int, float)):
        return 1, float(value), ""
    return (0, 0.0, "") if value is None else (2, 0.0, str(value))


def matches(item: Json, query: Query) -> bool:
    """Whether an item is asked for."""
    if query.ids and item["id"] not in query.ids:
        return False
    if query.collections and item["collection"] not in query.collections:
        return False
    when = instant(item["properties"]["datetime"])
    if (query.start and when < query.start) or (query.end and when > query.end):
        return False
    return query.area is None or bool(query.area.intersects(shape(item["geometry"])))
