"""The table of items in the catalogue: the state of each item, its reason, and since when.

A record holds the items of one search and one cut (``Job.record``). For a week, every run tries
again to read an item that is waiting or out of reach. After that the pause between two attempts is
an eighth of the time that the item has been waiting, at most a week. A nightly refresh therefore
tries every night for eight days, later every second, third, ... seventh night.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import delete, insert, select

from data_catalog.catalogue import Catalogue, now
from data_catalog.database.item_states import RETRIED, WITHDRAWN, ItemState, Key, VersionKey
from data_catalog.database.lease import aware
from data_catalog.database.schema import ItemRow

#: Time for which every run tries to read an item that waits.
EVERY_RUN = timedelta(days=7)
#: Later pause between two attempts, as a share of the time that the item has been waiting.
PAUSE_SHARE = 1 / 8
#: Longest pause between two attempts.
LONGEST_PAUSE = timedelta(days=7)
#: Longest collection or item id (characters) in the table.
LONGEST_NAME = 255


@dataclass(frozen=True)
class ItemEntry:
    """An item's state with its history.

    Attributes:
        since: Time at which the item came into the state (UTC).
        tried: Time of the last attempt to read it; None unless it is waiting or out of reach.
        tries: Number of attempts in this state.
    """

    state: ItemState
    since: datetime
    tried: datetime | None = None
    tries: int = 0

    @property
    def next_try(self) -> datetime | None:
        """Time from which a run tries to read the item again; None if it is not waiting."""
        if self.tried is None:
            return None
        waited = self.tried - self.since
        if waited < EVERY_RUN:
            return self.tried
        return self.tried + min(waited * PAUSE_SHARE, LONGEST_PAUSE)

    def is_due(self, moment: datetime) -> bool:
        """Return whether a run at this time tries to read the item; True if a clock went back."""
        following = self.next_try
        return self.tried is None or following is None or not self.tried <= moment < following


def read_items(catalogue: Catalogue, record: str) -> dict[Key, ItemEntry]:
    """Return all entries of a record by collection and item id."""
    with catalogue.session() as session:
        rows = list(session.scalars(select(ItemRow).where(ItemRow.record == record)))
    return {(row.collection, row.item_id): _entry(row) for row in rows}


def _entry(row: ItemRow) -> ItemEntry:
    """Convert a row of the table to an entry."""
    state = ItemState(
        state=row.state,
        reason=row.reason,
        detail=row.detail,
        by=row.by,
        item_sha256=row.item_sha256,
        stand_in=row.stand_in,
        licence=row.licence,
    )
    tried = None if row.tried is None else aware(row.tried)
    return ItemEntry(state, aware(row.since), tried, row.tries)


def postponed_items(catalogue: Catalogue, record: str) -> dict[VersionKey, tuple[str, str]]:
    """Find the item versions whose next attempt is not due, with reason and detail of the last."""
    moment = now()
    return {
        (*key, entry.state.item_sha256): (entry.state.reason, entry.state.detail)
        for key, entry in read_items(catalogue, record).items()
        if entry.state.is_retried and not entry.is_due(moment)
    }


def note_items(
    catalogue: Catalogue,
    record: str,
    states: Mapping[Key, ItemState],
    tried: bool,
    postponed: Collection[VersionKey] = (),
) -> None:
    """Enter the states of items into a record; unchanged entries are not written.

    Args:
        catalogue: The catalogue.
        record: Name of the record.
        states: State of every item that is listed or used.
        tried: Whether this run tried to read the items that were due when it began.
        postponed: Item versions that were not due then, so this run did not try to read them.
    """
    before, moment = read_items(catalogue, record), now()
    changed: dict[Key, ItemEntry] = {}
    for key, state in states.items():
        if not all(len(name) <= LONGEST_NAME and name.isprintable() for name in key):
            continue  # the search dropped such an item, and a database may refuse its name
        attempted = tried and (*key, state.item_sha256) not in postponed
        entry = _next_entry(before.get(key), state, moment, attempted)
        if entry != before.get(key):
            changed[key] = entry
    for key in before.keys() - states.keys():
        if before[key].state.state != WITHDRAWN:
            changed[key] = ItemEntry(
                replace(before[key].state, state=WITHDRAWN, reason="", detail=""), moment
            )
    _write(catalogue, record, changed, before.keys() & changed.keys())


def _next_entry(
    before: ItemEntry | None, state: ItemState, moment: datetime, tried: bool
) -> ItemEntry:
    """Return the new entry of an item.

    Args:
        before: Entry so far.
        state: State of the item now.
        moment: Time now.
        tried: Whether this run tried to read the item.
    """
    waits = state.state in RETRIED
    if before is None:
        return ItemEntry(state, moment, moment if waits else None, int(waits))
    same_wait = waits and before.state.is_retried
    same_version = before.state.item_sha256 == state.item_sha256
    if same_wait and same_version:
        if not tried:
            return replace(before, state=state)
        return ItemEntry(state, before.since, moment, before.tries + 1)
    if waits:
        return ItemEntry(state, moment, moment, 1)
    same = before.state.state == state.state and before.state.reason == state.reason
    return ItemEntry(state, before.since if same and same_version else moment)


def _write(
    catalogue: Catalogue, record: str, entries: Mapping[Key, ItemEntry], replaced: Set[Key]
) -> None:
    """Write entries in one transaction; entries of ``replaced`` items exist and are deleted."""
    if not entries:
        return
    with catalogue.session() as session:
        for collection, item in replaced:
            session.execute(
                delete(ItemRow).where(
                    ItemRow.record == record,
                    ItemRow.collection == collection,
                    ItemRow.item_id == item,
                )
            )
        session.execute(
            insert(ItemRow),
            [
                {
                    "record": record,
                    "collection": collection,
                    "item_id": item,
                    "state": entry.state.state,
                    "reason": entry.state.reason,
                    "detail": entry.state.detail,
                    "by": entry.state.by,
                    "item_sha256": entry.state.item_sha256,
                    "stand_in": entry.state.stand_in,
                    "licence": entry.state.licence,
                    "since": entry.since,
                    "tried": entry.tried,
                    "tries": entry.tries,
                }
                for (collection, item), entry in entries.items()
            ],
        )
