"""The table of items in the catalogue: the state of each, its reason, and since when.

One record holds the items of one search as one cut sees them (``Job.record``). An item that is
waiting or out of reach is asked again by every run for a week. Then the pause between two attempts
grows with the time that the item has been waiting: an eighth of it, at most a week. A nightly
refresh therefore asks every night for eight days, later every second, third, ... seventh night.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import delete, insert, select

from data_catalog.catalogue import Catalogue, now
from data_catalog.database.item_states import ASKED_AGAIN, WITHDRAWN, ItemState, Key, VersionKey
from data_catalog.database.lease import aware
from data_catalog.database.schema import ItemRow

#: For so long every run asks for an item that waits.
EVERY_RUN = timedelta(days=7)
#: Share of the time that an item has been waiting that passes before it is asked again.
PAUSE_SHARE = 1 / 8
#: Longest pause between two attempts.
LONGEST_PAUSE = timedelta(days=7)
#: Longest collection or item id (characters) that is entered.
LONGEST_NAME = 255


@dataclass(frozen=True)
class ItemEntry:
    """An item's state with its history.

    Attributes:
        since: when the item came into the state (UTC).
        tried: last attempt to read it; None unless it is waiting or out of reach.
        tries: number of attempts in this state.
    """

    state: ItemState
    since: datetime
    tried: datetime | None = None
    tries: int = 0

    @property
    def next_try(self) -> datetime | None:
        """The time from which a run asks for the item again; None if it is not waiting."""
        if self.tried is None:
            return None
        waited = self.tried - self.since
        if waited < EVERY_RUN:
            return self.tried
        return self.tried + min(waited * PAUSE_SHARE, LONGEST_PAUSE)

    def is_due(self, moment: datetime) -> bool:
        """Whether a run at this time asks for the item again; yes if the clock was set back."""
        following = self.next_try
        return self.tried is None or following is None or not self.tried <= moment < following


def read_items(catalogue: Catalogue, record: str) -> dict[Key, ItemEntry]:
    """Read all entries of a record by collection and item id."""
    with catalogue.session() as session:
        rows = list(session.scalars(select(ItemRow).where(ItemRow.record == record)))
    return {
        (row.collection, row.item_id): ItemEntry(
            ItemState(
                row.state, row.reason, row.detail, row.by, row.item_sha256, row.stand_in,
                row.licence,
            ),
            aware(row.since),
            None if row.tried is None else aware(row.tried),
            row.tries,
        )
        for row in rows
    }  # fmt: skip


def postponed_items(catalogue: Catalogue, record: str) -> dict[VersionKey, tuple[str, str]]:
    """Find the item versions that are not asked for yet, with why their last attempt failed."""
    moment = now()
    return {
        (*key, entry.state.item_sha256): (entry.state.reason, entry.state.detail)
        for key, entry in read_items(catalogue, record).items()
        if entry.state.asked_again and not entry.is_due(moment)
    }


def note_items(
    catalogue: Catalogue,
    record: str,
    states: Mapping[Key, ItemState],
    tried: bool,
    postponed: Collection[VersionKey] = (),
) -> None:
    """Enter the states that items have now; what did not change is not written.

    Args:
        catalogue: The catalogue.
        record: Name of the record.
        states: The state of every item that is listed or used.
        tried: Whether this run asked for the items that were due when it began.
        postponed: The item versions that were not due then, which it did not ask for.
    """
    before, moment = read_items(catalogue, record), now()
    changed: dict[Key, ItemEntry] = {}
    for key, state in states.items():
        if not all(len(name) <= LONGEST_NAME and name.isprintable() for name in key):
            continue  # the search refused such an item; a database may refuse its name
        asked = tried and (*key, state.item_sha256) not in postponed
        entry = _follow(before.get(key), state, moment, asked)
        if entry != before.get(key):
            changed[key] = entry
    for key in before.keys() - states.keys():
        if before[key].state.state != WITHDRAWN:
            changed[key] = ItemEntry(
                replace(before[key].state, state=WITHDRAWN, reason="", detail=""), moment
            )
    _write(catalogue, record, changed, before.keys() & changed.keys())


def _follow(before: ItemEntry | None, state: ItemState, moment: datetime, tried: bool) -> ItemEntry:
    """Return the entry that comes after another one of the same item.

    Args:
        before: The entry so far.
        state: The item's state now.
        moment: The time now.
        tried: Whether this run asked for the item.
    """
    waits = state.state in ASKED_AGAIN
    if before is None:
        return ItemEntry(state, moment, moment if waits else None, int(waits))
    same_wait = waits and before.state.asked_again
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
    """Write entries in one transaction; those of ``replaced`` items exist already."""
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
