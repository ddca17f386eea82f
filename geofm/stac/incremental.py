"""A refresh asks for what is new: what the last search found, and how it saves listing it again.

An API that filters is asked for the items updated since the newest ``updated`` of the last table,
and for two counts. Only if they say that nothing else came or went is the rest taken from that
table; in any doubt the collection is listed again. Both ways give the same table.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.tables import records
from geofm.remote.quarantine import Quarantine
from geofm.runtime.text import instant
from geofm.stac.canonical_item import Frozen
from geofm.stac.query import Query, rfc3339
from geofm.stac.query_slices import Api, bounded, count, list_items
from geofm.types import Json

#: How long (before the newest time) an item may have been updated and yet be seen only now.
OVERLAP = timedelta(days=1)
_COLUMNS = ["item_id", "collection", "item_sha256", "item_json", "reason", "detail"]


@dataclass(frozen=True)
class Before:
    """The last search: what was listed then."""

    listed: tuple[Frozen, ...] = ()


def read_before(previous: Artifact | None) -> Before:
    """The items of the last table; nothing where there is none."""
    if previous is None:
        return Before()
    return before_of(records(previous.table("items.parquet", _COLUMNS)))


def before_of(rows: list[dict[str, Any]]) -> Before:
    """The items of a table's rows."""
    return Before(tuple(_frozen(row) for row in rows))


def _frozen(row: dict[str, Any]) -> Frozen:
    """An item as it was frozen; where the text is only a stub of it, its problem is in the row."""
    text = row["item_json"]
    stub = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != row["item_sha256"]
    problem = Quarantine(row["reason"], row["detail"]) if stub else None
    return Frozen(row["item_id"], row["collection"], text, row["item_sha256"], problem)


def withdrawn(before: Before, listed: Iterable[Frozen]) -> list[Frozen]:
    """Items that were listed last time and are no longer; those without an id can't be told."""
    here = {one.key for one in listed}
    gone = {one.key: one for one in before.listed}
    return [one for one in gone.values() if one.item_id and one.key not in here]


def newest_versions(items: Iterable[Frozen]) -> list[Frozen]:
    """Leave out older versions of an item that was updated while it was listed.

    A listing of many pages takes time, so it may hold an item before and after an update. The
    version with the newest ``updated`` is kept. Versions that do not tell stay, all of them.
    """
    groups: dict[tuple[str, str], list[Frozen]] = defaultdict(list)
    for one in items:
        groups[one.key].append(one)
    kept = []
    for group in groups.values():
        times = [updated(one) if one.item_id else None for one in group]
        known = [time for time in times if time is not None]
        newest = max(known) if len(known) == len(times) else None
        kept += [one for one, time in zip(group, times, strict=True) if time == newest or not known
                 or newest is None]  # fmt: skip
    return kept


def refresh(api: Api, query: Query, before: Before) -> tuple[list[Frozen], list[str]]:
    """All items that match now, asking for as little as is safe.

    Returns:
        The items, and the collections of which only what is new was asked for.

    Raises:
        RunError: the API does not answer.
        UsageError: there are more than ``max_items``.
    """
    listed: list[Frozen] = []
    whole: list[str] = []
    for name in query.collections:
        old = [one for one in before.listed if one.collection == name]
        found = _since(api, replace(query, collections=(name,)), old)
        listed += found or []
        if found is None:
            whole.append(name)
    if whole:
        listed += list_items(api, replace(query, collections=tuple(whole)))
    bounded(len(listed), api)
    return listed, [name for name in query.collections if name not in whole]


def _since(api: Api, query: Query, old: list[Frozen]) -> list[Frozen] | None:
    """The items of one collection by what is new of it; None when it has to be listed again.

    The server's own comparison parts the items in two, at a day before the newest time. What was
    listed before and is not sent now must be all of the older part, and both parts all there is;
    then no item without a time came and none went. (Some servers compare times as texts, so which
    part the very second of the mark falls in is theirs to say.)
    """
    times = [updated(one) for one in old]
    known = [time for time in times if time is not None]
    if not api.language or not old or len(known) < len(times):
        return None
    if max(known) > datetime.now(UTC):  # that says nothing of what is new
        return None
    edge = max(known).replace(microsecond=0) - OVERLAP
    mark = rfc3339(edge)
    total = count(api, query)
    if total is None:
        return None
    new = list_items(api, replace(query, since=mark))
    sent = {one.key for one in new}
    rest = [(one, time) for one, time in zip(old, known, strict=True) if one.key not in sent]
    sound = (
        all(one.collection == query.collections[0] for one in new)
        and all(time < edge + timedelta(seconds=1) for _, time in rest)
        and total == len(rest) + len(new)
        and count(api, replace(query, before=mark)) == len(rest)
    )
    return [*new, *(one for one, _ in rest)] if sound else None


def updated(one: Frozen) -> datetime | None:
    """When an item was changed, by its own word."""
    item: Json = json.loads(one.text)
    properties = item.get("properties")
    when = instant(properties.get("updated")) if isinstance(properties, dict) else None
    if when is None or when.year < 1970:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
