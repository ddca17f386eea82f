"""Incremental search: list only what changed since the last search, if that is provably enough.

From an API that filters by ``updated``, geofm requests the items since the newest ``updated`` of
the last table, and two counts. If the counts show that no other item came or went, the remaining
items are taken from the last table. In any doubt the collection is listed completely. Both ways
give the same table.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from data_catalog.artifact import Artifact
from data_catalog.tables import records
from geofm.remote.quarantine import Quarantine
from geofm.runtime.timestamps import format_utc, parse_utc
from geofm.stac.api_listing import SearchApi, check_max_items, count_matches, list_items
from geofm.stac.canonical_item import CanonicalItem
from geofm.stac.query import Query
from geofm.types import Json

#: An item may appear in the API this long after the time in its ``updated``.
OVERLAP = timedelta(days=1)
_COLUMNS = ["item_id", "collection", "item_sha256", "item_json", "reason", "detail"]


def read_previous_items(previous: Artifact | None) -> list[CanonicalItem]:
    """Read the items that the last search listed; none without a last search."""
    if previous is None:
        return []
    return items_of_rows(records(previous.table("items.parquet", _COLUMNS)))


def items_of_rows(rows: Iterable[Json]) -> list[CanonicalItem]:
    """Rebuild the listed items from rows of ``items.parquet``."""
    return [_item_of_row(row) for row in rows]


def _item_of_row(row: Json) -> CanonicalItem:
    """Rebuild an item. A text whose digest differs is shortened, so the item had a problem."""
    text = row["item_json"]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    shortened = digest != row["item_sha256"]
    problem = Quarantine(row["reason"], row["detail"]) if shortened else None
    return CanonicalItem(row["item_id"], row["collection"], text, row["item_sha256"], problem)


def find_withdrawn(
    previous: Iterable[CanonicalItem], listed: Iterable[CanonicalItem]
) -> list[CanonicalItem]:
    """Find items of the last search that are no longer listed; items without an id don't count."""
    current = {item.key for item in listed}
    known = {item.key: item for item in previous}
    return [item for item in known.values() if item.item_id and item.key not in current]


def newest_versions(items: Iterable[CanonicalItem]) -> list[CanonicalItem]:
    """Leave out older versions of an item that was updated while it was listed.

    A listing of many pages takes time, so it may hold an item before and after an update. The
    version with the newest ``updated`` is kept. If a version has no ``updated``, all stay.
    """
    groups: dict[tuple[str, str], list[CanonicalItem]] = defaultdict(list)
    for item in items:
        groups[item.key].append(item)
    kept = []
    for group in groups.values():
        times = [updated_time(item) if item.item_id else None for item in group]
        known = [time for time in times if time is not None]
        if known and len(known) == len(times):
            newest = max(known)
            kept += [item for item, time in zip(group, times, strict=True) if time == newest]
        else:
            kept += group
    return kept


def list_incrementally(
    api: SearchApi, query: Query, previous: Sequence[CanonicalItem]
) -> tuple[list[CanonicalItem], list[str]]:
    """List all items that match, with as few requests as is safe.

    Args:
        api: The API.
        query: The search.
        previous: Items of the last search.

    Returns:
        The items, and the collections for which the changes were enough.

    Raises:
        RunError: The API does not answer.
        UsageError: There are more than ``max_items``.
    """
    items: list[CanonicalItem] = []
    complete: list[str] = []
    for name in query.collections:
        known = [item for item in previous if item.collection == name]
        updated = _list_changes(api, replace(query, collections=(name,)), known)
        items += updated or []
        if updated is None:
            complete.append(name)
    if complete:
        items += list_items(api, replace(query, collections=tuple(complete)))
    check_max_items(len(items), api)
    return items, [name for name in query.collections if name not in complete]


def _list_changes(
    api: SearchApi, query: Query, known: list[CanonicalItem]
) -> list[CanonicalItem] | None:
    """List one collection by its changes; None if it must be listed completely.

    The server divides its items at a mark, one day before the newest ``updated``. The result is
    used only if (1) the known items that the server does not send again are older than the mark,
    (2) their number is the server's count of items before the mark, and (3) both parts together
    are the server's count of all items. Then no item without ``updated`` came or went. Servers
    that compare times as texts may put an item of the mark's second in either part.
    """
    times = [updated_time(item) for item in known]
    stated = [time for time in times if time is not None]
    if not api.filter_language or not known or len(stated) < len(times):
        return None
    if max(stated) > datetime.now(UTC):  # a time in the future can't mark what is new
        return None
    edge = max(stated).replace(microsecond=0) - OVERLAP
    mark = format_utc(edge)
    total = count_matches(api, query)
    if total is None:
        return None
    changed = list_items(api, replace(query, since=mark))
    sent = {item.key for item in changed}
    rest = [(item, time) for item, time in zip(known, stated, strict=True) if item.key not in sent]
    enough = (
        all(item.collection == query.collections[0] for item in changed)
        and all(time < edge + timedelta(seconds=1) for _, time in rest)
        and total == len(rest) + len(changed)
        and count_matches(api, replace(query, before=mark)) == len(rest)
    )
    return [*changed, *(item for item, _ in rest)] if enough else None


def updated_time(item: CanonicalItem) -> datetime | None:
    """Return the item's own ``updated``; None without a plausible time."""
    content: Json = json.loads(item.text)
    properties = content.get("properties")
    when = parse_utc(properties.get("updated")) if isinstance(properties, dict) else None
    return None if when is None or when.year < 1970 else when
