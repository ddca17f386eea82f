"""The query of a search: its parameters for an API, and its filter for files without an API."""

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
from geofm.config.area import split_at_antimeridian
from geofm.config.recipe import SearchSettings
from geofm.remote.quarantine import Quarantine
from geofm.runtime.timestamps import format_utc, parse_utc
from geofm.stac.item import check_geometry
from geofm.types import Json

_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?")


@dataclass(frozen=True)
class Query:
    """The conditions on an item.

    Attributes:
        collections: Ids of collections.
        start: Earliest time; None for open.
        end: Latest time; None for open.
        area: Ground, EPSG:4326, longitudes -180 to 180; None for everywhere.
        since: Earliest ``updated`` (RFC 3339); empty for all.
        before: ``updated`` must be before this; empty for all.
    """

    collections: tuple[str, ...]
    start: datetime | None = None
    end: datetime | None = None
    area: BaseGeometry | None = None
    since: str = ""
    before: str = ""

    @property
    def times(self) -> str | None:
        """The interval as STAC writes it; None for any time."""
        if self.start is None and self.end is None:
            return None
        ends = [".." if end is None else format_utc(end) for end in (self.start, self.end)]
        return ends[0] if ends[0] == ends[1] else "/".join(ends)


def query_of(settings: SearchSettings, collections: list[str]) -> Query:
    """Build the query of the settings for the collections that exist.

    Raises:
        UsageError: ``search.datetime`` is no time and no interval.
    """
    start, end = parse_interval(settings.datetime)
    return Query(tuple(collections), start, end, settings.geometry())


def parse_interval(text: str | None) -> tuple[datetime | None, datetime | None]:
    """Parse ``search.datetime`` into first and last moment; 2024 or 2024-06 is the whole period.

    Raises:
        UsageError: The text is no time and no interval.
    """
    if not text:
        return None, None
    first, slash, last = text.partition("/")
    try:
        start = None if first in ("", "..") else _first_and_last_moment(first)[0]
        if not slash:
            return start, _first_and_last_moment(first)[1]
        return start, None if last in ("", "..") else _first_and_last_moment(last)[1]
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"search.datetime: {text!a:.60} is no time or interval; write e.g. 2024-06 or "
            "2024-01-01/2024-12-31"
        ) from error


def _first_and_last_moment(text: str) -> tuple[datetime, datetime]:
    """Return both ends of a year, month or day; a full time is its own first and last moment."""
    match = _DATE.fullmatch(text.strip())
    if match is None:
        when = datetime.fromisoformat(text.strip())
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return when, when
    year, month, day = (int(part) if part else 0 for part in match.groups())
    last = calendar.monthrange(year, month or 12)[1]
    return (
        datetime(year, month or 1, day or 1, tzinfo=UTC),
        datetime(year, month or 12, day or last, 23, 59, 59, 999_999, tzinfo=UTC),
    )


def search_parameters(query: Query, bbox_only: bool) -> Json:
    """Build the arguments of a search by pystac-client.

    Args:
        query: The search.
        bbox_only: Send the bounds of the area, because the API does not know ``intersects``.
    """
    parameters: Json = {"collections": list(query.collections), "datetime": query.times}
    if query.area is not None:
        if bbox_only or is_box(query.area):
            parameters["bbox"] = list(query.area.bounds)
        else:
            parameters["intersects"] = mapping(query.area)
    return parameters


def is_box(area: BaseGeometry) -> bool:
    """Check whether an area is its own bounding box."""
    bounds_area = box(*area.bounds).area
    return area.geom_type == "Polygon" and math.isclose(area.area, bounds_area, rel_tol=1e-12)


def polygons_of(area: BaseGeometry) -> list[BaseGeometry]:
    """Return the parts of an area; the bounds of each stay on one side of the antimeridian."""
    return list(getattr(area, "geoms", [area]))


def matches(item: Any, query: Query) -> bool:
    """Check whether an item lies in the time and area of a query.

    An item whose time or geometry can't be read matches, so that it becomes a quarantined row.
    """
    if not isinstance(item, dict):
        return True
    return _in_time(item.get("properties"), query) and meets_area(item, query.area)


def _in_time(properties: Any, query: Query) -> bool:
    """Check whether the time or period of an item meets the interval of a query."""
    if not isinstance(properties, dict) or (query.start is None and query.end is None):
        return True
    moment = parse_utc(properties.get("datetime"))
    first = moment or parse_utc(properties.get("start_datetime"))
    last = moment or parse_utc(properties.get("end_datetime"))
    if first is None or last is None:
        return True
    return (query.end is None or first <= query.end) and (
        query.start is None or last >= query.start
    )


def meets_area(item: Any, area: BaseGeometry | None) -> bool:
    """Check whether an item's footprint intersects an area; True if it can't be read."""
    if area is None or not isinstance(item, dict):
        return True
    try:
        ground = check_geometry(item.get("geometry"))
        return bool(split_at_antimeridian(ground).intersects(area))
    except (Quarantine, shapely.errors.GEOSException):
        return True
