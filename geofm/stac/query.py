"""A search as a STAC API is asked it, and as we apply it ourselves where nobody else does."""

from __future__ import annotations

import calendar
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import shapely
from shapely.geometry import box, mapping
from shapely.geometry.base import BaseGeometry

from data_catalog.errors import UsageError
from geofm.config.area import split
from geofm.config.recipe import SearchSettings
from geofm.remote.quarantine import Quarantine
from geofm.runtime.text import instant
from geofm.stac.item import check_geometry
from geofm.types import Json

_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?")


@dataclass(frozen=True)
class Query:
    """What is asked for.

    Attributes:
        collections: ids.
        start: earliest time, None for open.
        end: latest time, None for open.
        area: ground, EPSG:4326 in -180..180; None for everywhere.
        since: only items whose ``updated`` is at or after this (RFC 3339); empty for all.
        before: only items whose ``updated`` is before this; empty for all.
    """

    collections: tuple[str, ...]
    start: datetime | None = None
    end: datetime | None = None
    area: BaseGeometry | None = None
    since: str = ""
    before: str = ""

    @property
    def times(self) -> str | None:
        """The interval as STAC writes it."""
        if self.start is None and self.end is None:
            return None
        ends = [".." if end is None else rfc3339(end) for end in (self.start, self.end)]
        return ends[0] if ends[0] == ends[1] else "/".join(ends)


def rfc3339(moment: datetime) -> str:
    """UTC with as many digits as are needed."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def query_of(settings: SearchSettings, collections: list[str]) -> Query:
    """The settings' query.

    Raises:
        UsageError: ``search.datetime`` is no time and no interval.
    """
    start, end = interval(settings.datetime)
    return Query(tuple(collections), start, end, settings.geometry())


def interval(text: str | None) -> tuple[datetime | None, datetime | None]:
    """Both ends of an interval; 2024 or 2024-06 mean the whole year or month."""
    if not text:
        return None, None
    first, slash, last = text.partition("/")
    try:
        start = None if first in ("", "..") else _span(first)[0]
        if not slash:
            return start, _span(first)[1]
        return start, None if last in ("", "..") else _span(last)[1]
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"search.datetime: {text!a:.60} is no time or interval; write e.g. 2024-06 or "
            "2024-01-01/2024-12-31"
        ) from error


def _span(text: str) -> tuple[datetime, datetime]:
    """First and last moment of a time; a year, month or day is not a moment."""
    found = _DATE.fullmatch(text.strip())
    if found is None:
        when = datetime.fromisoformat(text.strip())
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return when, when
    year, month, day = (int(part) if part else 0 for part in found.groups())
    last = calendar.monthrange(year, month or 12)[1]
    return (
        datetime(year, month or 1, day or 1, tzinfo=UTC),
        datetime(year, month or 12, day or last, 23, 59, 59, 999_999, tzinfo=UTC),
    )


def parameters(query: Query, boxed: bool) -> Json:
    """Arguments of a search by pystac-client.

    Args:
        query: what is asked for.
        boxed: the area's bounds stand for it, because the API knows no ``intersects``.
    """
    found: Json = {"collections": list(query.collections), "datetime": query.times}
    if query.area is not None:
        if boxed or is_box(query.area):
            found["bbox"] = list(query.area.bounds)
        else:
            found["intersects"] = mapping(query.area)
    return found


def is_box(area: BaseGeometry) -> bool:
    """Whether an area is its own bounding box."""
    whole = box(*area.bounds).area
    return area.geom_type == "Polygon" and math.isclose(area.area, whole, rel_tol=1e-12)


def pieces(area: BaseGeometry) -> list[BaseGeometry]:
    """The parts of an area, so that the box of each stays on its side of the antimeridian."""
    return list(getattr(area, "geoms", [area]))


def asked_for(item: Any, query: Query) -> bool:
    """Whether an item matches the time and area asked for; one that can't tell is not left out.

    It becomes a row that says what is wrong with it.
    """
    if not isinstance(item, dict):
        return True
    return _in_time(item.get("properties"), query) and in_area(item, query.area)


def _in_time(properties: Any, query: Query) -> bool:
    if not isinstance(properties, dict) or (query.start is None and query.end is None):
        return True
    one = _moment(properties.get("datetime"))
    first = one or _moment(properties.get("start_datetime"))
    last = one or _moment(properties.get("end_datetime"))
    if first is None or last is None:
        return True
    return (query.end is None or first <= query.end) and (
        query.start is None or last >= query.start
    )


def _moment(value: Any) -> datetime | None:
    when = instant(value)
    return when if when is None or when.tzinfo else when.replace(tzinfo=UTC)


def in_area(item: Any, area: BaseGeometry | None) -> bool:
    """Whether an item's footprint meets the area; True for one that has none that can be read."""
    if area is None or not isinstance(item, dict):
        return True
    try:
        ground = check_geometry(item.get("geometry"))
        return bool(split(ground).intersects(area))
    except (Quarantine, shapely.errors.GEOSException):
        return True
