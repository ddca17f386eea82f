"""The state of each item of a dataset (in use, waiting, superseded, withdrawn, ...) and its reason.

The state follows from two tables of a version: ``items.parquet`` (decision of the search) and
``chips.parquet`` (result of the cut). The time since when an item is in its state is history, so it
is kept in the catalogue (``database.items``) and no digest depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_catalog.artifact import Artifact

if TYPE_CHECKING:
    import pandas as pd

#: Reasons of an item that another item of the same acquisition supersedes.
SUPERSEDED_REASONS = ("reprocessed", "second_station")
#: Reasons that come from the network, credentials or the host policy, not from the item.
OUT_OF_REACH_REASONS = ("unreachable", "forbidden", "host_refused")
#: State of an item that its catalogue does not list any more; older versions have rows of it.
WITHDRAWN = "withdrawn"
#: Table in a chips artifact with the stand-ins that the search does not list any more.
STAND_INS = "stand_ins.parquet"

OK, OUT_OF_REACH, WAITING = "ok", "out of reach", "waiting"
SUPERSEDED, STANDS_IN, DROPPED, UNUSABLE = "superseded", "stands in", "dropped", "unusable"
#: States of an item that a later run tries to read again.
RETRIED = (OUT_OF_REACH, WAITING)

ITEM_COLUMNS = [
    "collection",
    "item_id",
    "item_sha256",
    "status",
    "reason",
    "superseded_by",
    "licence",
]
CHIP_COLUMNS = ["chip_id", "collection", "item_id", "item_sha256", "status", "reason", "detail"]

#: Collection and id of an item.
Key = tuple[str, str]
#: Collection, id and sha256 of a version of an item.
VersionKey = tuple[str, str, str]


@dataclass(frozen=True)
class ItemState:
    """The state of one item.

    Attributes:
        state: ``ok``, ``out of reach`` or ``waiting`` (accepted by the search, but its files could
            not be read), ``superseded``, ``stands in`` (an older item whose newer version cannot be
            read), ``dropped`` or ``unusable`` (by the search), ``withdrawn``.
        reason: Reason in the table of the deciding stage (``not_found``, ``cloud_cover``, ...).
        detail: A sentence for people, if the item could not be cut.
        by: Id of the item that supersedes it.
        item_sha256: SHA-256 of the listed version of the item.
        stand_in: SHA-256 of the version whose chips are used in place of the listed one; empty if
            the listed version or none is used.
        licence: SPDX expression.
    """

    state: str
    reason: str = ""
    detail: str = ""
    by: str = ""
    item_sha256: str = ""
    stand_in: str = ""
    licence: str = ""

    @property
    def used(self) -> bool:
        """Whether the item may have chips in the version."""
        return self.state in (OK, STANDS_IN) or bool(self.stand_in)

    @property
    def is_retried(self) -> bool:
        """Whether a later run tries to read the item again."""
        return self.state in RETRIED


def read_states(items: Artifact, chips: Artifact) -> dict[Key, ItemState]:
    """Read the state of every item from the tables of a version."""
    names = [entry.path for entry in chips.manifest.files]
    return item_states(
        items.table("items.parquet", ITEM_COLUMNS),
        chips.table("chips.parquet", CHIP_COLUMNS),
        chips.table(STAND_INS, ITEM_COLUMNS) if STAND_INS in names else None,
    )


def item_states(
    items: pd.DataFrame, chips: pd.DataFrame, stand_ins: pd.DataFrame | None = None
) -> dict[Key, ItemState]:
    """Derive the state of every item.

    Args:
        items: Rows of the search, columns ``ITEM_COLUMNS``.
        chips: Rows of the cut, columns ``CHIP_COLUMNS``.
        stand_ins: Rows of items that are not listed any more and whose chips are used, columns
            ``ITEM_COLUMNS``.

    Returns:
        The states by collection and id, sorted.
    """
    failed, used = _cut_results(chips)
    states: dict[Key, ItemState] = {}
    for row in items.to_dict("records"):
        key = (str(row["collection"]), str(row["item_id"]))
        if key in states and row["status"] != "ok":
            continue
        states[key] = _state(row, failed, used.get(key, ""))
    for row in stand_ins.to_dict("records") if stand_ins is not None else []:
        key = (str(row["collection"]), str(row["item_id"]))
        state = ItemState(
            STANDS_IN,
            reason=str(row["reason"]),
            by=str(row["superseded_by"]),
            item_sha256=str(row["item_sha256"]),
            licence=str(row["licence"]),
        )
        states.setdefault(key, state)
    return dict(sorted(states.items()))


def _cut_results(
    chips: pd.DataFrame,
) -> tuple[dict[VersionKey, tuple[str, str]], dict[Key, str]]:
    """Read the results of the cut.

    Returns:
        Reason and detail of each item version that could not be cut, and the SHA-256 of the version
        of each item that has chips.
    """
    names = ["collection", "item_id", "item_sha256", "status", "reason", "detail"]
    failed: dict[VersionKey, tuple[str, str]] = {}
    used: dict[Key, str] = {}
    for row in chips[names].drop_duplicates().to_dict("records"):
        key = str(row["collection"]), str(row["item_id"])
        if row["status"] == "quarantined":
            failed[(*key, str(row["item_sha256"]))] = str(row["reason"]), str(row["detail"])
        elif row["status"] == "ok":
            used[key] = str(row["item_sha256"])
    return failed, used


def _state(row: dict[Any, Any], failed: dict[VersionKey, tuple[str, str]], used: str) -> ItemState:
    """Derive the state of an item from its row and the results of the cut."""
    collection, item, sha256 = (str(row[n]) for n in ("collection", "item_id", "item_sha256"))
    reason, by, licence = (str(row[n]) for n in ("reason", "superseded_by", "licence"))
    if row["status"] == "ok" or reason in SUPERSEDED_REASONS:
        problem, detail = failed.get((collection, item, sha256), ("", ""))
        if problem:
            state = OUT_OF_REACH if problem in OUT_OF_REACH_REASONS else WAITING
            return ItemState(state, problem, detail, by, sha256, used, licence)
        if row["status"] == "ok":
            return ItemState(OK, item_sha256=sha256, licence=licence)
        state = STANDS_IN if used else SUPERSEDED
        return ItemState(state, reason, "", by, sha256, licence=licence)
    if reason == WITHDRAWN:
        return ItemState(WITHDRAWN, item_sha256=sha256, licence=licence)
    state = DROPPED if row["status"] == "dropped" else UNUSABLE
    return ItemState(state, reason, "", by, sha256, licence=licence)
