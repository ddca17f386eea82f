"""The state of each item of a dataset: in use, waiting, superseded, withdrawn, and why.

The state follows from two tables of a version: ``items.parquet`` (the verdict of the search) and
``chips.parquet`` (what became of an item when it was cut). Since when an item is in its state is
history; the catalogue keeps it (``item_record``), so that no digest depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.tables import records

#: Reasons of an item that a better item of the same acquisition replaces.
SUPERSEDED_REASONS = ("reprocessed", "second_station")
#: Reasons that lie with the network, credentials or the host policy rather than with the item.
OUT_OF_REACH_REASONS = ("unreachable", "forbidden", "host_refused")
#: Items that are not in the catalogue any more; tables of older versions have rows of them.
WITHDRAWN = "withdrawn"
#: Rows of ``stand_ins.parquet`` in a chips artifact: items that the search does not list any more.
STAND_INS = "stand_ins.parquet"

OK, OUT_OF_REACH, WAITING = "ok", "out of reach", "waiting"
SUPERSEDED, STANDS_IN, DROPPED, UNUSABLE = "superseded", "stands in", "dropped", "unusable"
#: States of an item that another night may read.
ASKED_AGAIN = (OUT_OF_REACH, WAITING)

ITEM_COLUMNS = [
    "collection", "item_id", "item_sha256", "status", "reason", "superseded_by", "licence",
]  # fmt: skip
CHIP_COLUMNS = ["chip_id", "collection", "item_id", "item_sha256", "status", "reason", "detail"]

#: Collection and id of an item.
Key = tuple[str, str]
#: Collection, id and sha256 of a version of an item.
VersionKey = tuple[str, str, str]


@dataclass(frozen=True)
class ItemState:
    """The state of one item.

    Attributes:
        state: ``ok``, ``out of reach`` or ``waiting`` (the search accepts it, its files could not
            be used), ``superseded``, ``stands in`` (an older item whose newer version can't be
            read), ``dropped`` or ``unusable`` (by the search), ``withdrawn``.
        reason: machine word of the stage that decided (``not_found``, ``cloud_cover``, ...).
        detail: one sentence for people, where the item could not be cut.
        by: id of the item that supersedes it.
        item_sha256: the version of the item that is listed.
        stand_in: sha256 of the version whose chips are used in place of the listed one; empty
            where the listed one is used, or none.
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
    def asked_again(self) -> bool:
        """Whether another night may read the item."""
        return self.state in ASKED_AGAIN


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
        stand_ins: Items that are not listed any more and whose chips are used.

    Returns:
        The states by collection and id, sorted.
    """
    failed, used = _cut(chips)
    found: dict[Key, ItemState] = {}
    for row in records(items):
        key = (str(row["collection"]), str(row["item_id"]))
        if key in found and row["status"] != "ok":
            continue
        found[key] = _state(row, failed, used.get(key, ""))
    for row in records(stand_ins) if stand_ins is not None else []:
        key = (str(row["collection"]), str(row["item_id"]))
        state = ItemState(
            STANDS_IN, str(row["reason"]), "", str(row["superseded_by"]),
            str(row["item_sha256"]), licence=str(row["licence"]),
        )  # fmt: skip
        found.setdefault(key, state)
    return dict(sorted(found.items()))


def _cut(
    chips: pd.DataFrame,
) -> tuple[dict[VersionKey, tuple[str, str]], dict[Key, str]]:
    """Why versions of items could not be cut, and which version of each item has chips."""
    names = ["collection", "item_id", "item_sha256", "status", "reason", "detail"]
    failed: dict[VersionKey, tuple[str, str]] = {}
    used: dict[Key, str] = {}
    for row in records(chips[names].drop_duplicates()):
        key = str(row["collection"]), str(row["item_id"])
        if row["status"] == "quarantined":
            failed[(*key, str(row["item_sha256"]))] = str(row["reason"]), str(row["detail"])
        elif row["status"] == "ok":
            used[key] = str(row["item_sha256"])
    return failed, used


def _state(
    row: dict[str, object], failed: dict[VersionKey, tuple[str, str]], used: str
) -> ItemState:
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
