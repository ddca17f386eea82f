"""What changed between two versions of a dataset: which samples came and went, and why.

Everything is computed from the tables of the two versions alone. A sample is the same in both when
its chip id is: same item content, same cell, same bands.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.lineage import ancestor
from data_catalog.tables import records

#: Reasons of an item that a better one of the same acquisition stands for.
SUPERSEDED = ("reprocessed", "second_station")
WITHDRAWN = "withdrawn"

Key = tuple[str, str]


@dataclass(frozen=True)
class Version:
    """The tables of one dataset version.

    Attributes:
        samples: what it holds: chip_id, collection, item_id, source, cell.
        items: all that the search listed: collection, item_id, item_sha256, status, reason,
            superseded_by.
        chips: all candidates: chip_id, status, reason.
        decisions: all candidates that reached curation: chip_id, decision, rule.
    """

    samples: pd.DataFrame
    items: pd.DataFrame
    chips: pd.DataFrame
    decisions: pd.DataFrame


@dataclass(frozen=True)
class Difference:
    """From one version to another.

    Attributes:
        added: chip ids of the samples that came, sorted.
        removed: chip ids of those that went, sorted.
        kept: how many samples are in both.
        why_added: number of samples by what brought them.
        why_removed: number of samples by what took them.
        items: items that changed: collection, item_id, change, by (for superseded ones, the item
            that stands for it now) and samples (how many came or went with it).
        by_source: added, removed and kept samples by source profile and collection.
        by_cell: added and removed samples by ground cell, the most changed first.
    """

    added: list[str]
    removed: list[str]
    kept: int
    why_added: dict[str, int]
    why_removed: dict[str, int]
    items: list[dict[str, Any]]
    by_source: list[dict[str, Any]]
    by_cell: list[dict[str, Any]]

    @property
    def item_counts(self) -> dict[str, int]:
        """How many items were added, superseded, withdrawn, ..."""
        return dict(sorted(Counter(str(item["change"]) for item in self.items).items()))

    def summary(self, most: int = 20) -> dict[str, Any]:
        """The difference in numbers, with at most so many items and cells named."""
        whole = asdict(self)
        return {
            **whole,
            "added": len(self.added),
            "removed": len(self.removed),
            "item_counts": self.item_counts,
            "items": self.items[:most],
            "by_cell": self.by_cell[:most],
            "cells": len(self.by_cell),
        }

    def headline(self) -> str:
        """``+12 −3 (2 items superseded, 1 withdrawn)``."""
        told = [f"{number:,} {change}" for change, number in self.item_counts.items()]
        if told:
            one = next(iter(self.item_counts.values())) == 1
            told[0] = told[0].replace(" ", " item " if one else " items ", 1)
        why = f" ({', '.join(told)})" if told else ""
        return f"+{len(self.added):,} −{len(self.removed):,}{why}"


def read_version(catalogue: Catalogue, artifact: Artifact) -> Version:
    """The tables of the dataset that an artifact is or was made from."""
    dataset = ancestor(catalogue, artifact, "dataset")
    items, chips, decisions = (
        ancestor(catalogue, dataset, kind) for kind in ("items", "chips", "decisions")
    )
    samples = ["chip_id", "collection", "item_id", "source", "cell"]
    scenes = ["collection", "item_id", "item_sha256", "status", "reason", "superseded_by"]
    return Version(
        dataset.table("samples.parquet", samples),
        items.table("items.parquet", scenes),
        chips.table("chips.parquet", ["chip_id", "status", "reason"]),
        decisions.table("decisions.parquet", ["chip_id", "decision", "rule"]),
    )


def compare(old: Version, new: Version) -> Difference:
    """What changed from ``old`` to ``new``."""
    stayed = new.samples["chip_id"].isin(old.samples["chip_id"])
    came, both = new.samples[~stayed], new.samples[stayed]
    went = old.samples[~old.samples["chip_id"].isin(both["chip_id"])]
    changes = item_changes(old.items, new.items)
    return Difference(
        added=sorted(came["chip_id"]),
        removed=sorted(went["chip_id"]),
        kept=len(both),
        why_added=_why_added(came, changes),
        why_removed=_why_removed(went, changes, new),
        items=_with_samples(changes, came, went),
        by_source=_by_source(came, went, both),
        by_cell=_by_cell(came, went),
    )


def item_changes(old: pd.DataFrame, new: pd.DataFrame) -> dict[Key, dict[str, str]]:
    """Items that count in one of two versions and not in the other, or with other content.

    Returns:
        ``change`` and ``by`` by collection and id. Changes: ``added``, ``changed``,
        ``superseded``, ``withdrawn``, ``gone`` (not listed any more, such as by a narrower
        search), or the reason for which the search dropped it (``cloud_cover``, ...).
    """
    before, after = _by_key(old), _by_key(new)
    found: dict[Key, dict[str, str]] = {}
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        used, uses = was is not None and _counts(was), now is not None and _counts(now)
        if uses and not used:
            found[key] = {"change": "added", "by": ""}
        elif used and now is None:
            found[key] = {"change": "gone", "by": ""}
        elif used and now is not None and not uses:
            replaced = now["reason"] in SUPERSEDED
            change = "superseded" if replaced else str(now["reason"])
            found[key] = {"change": change, "by": str(now["superseded_by"]) if replaced else ""}
        elif used and was and now and was["item_sha256"] != now["item_sha256"]:
            found[key] = {"change": "changed", "by": ""}
    return found


def _by_key(items: pd.DataFrame) -> dict[Key, dict[str, Any]]:
    """An item's row by collection and id: where an id is there twice, the one that counts."""
    found: dict[Key, dict[str, Any]] = {}
    for row in records(items):
        key = (row["collection"], row["item_id"])
        if key not in found or _counts(row):
            found[key] = row
    return found


def _counts(row: dict[str, Any]) -> bool:
    return bool(row["status"] == "ok")


def _why_added(came: pd.DataFrame, changes: dict[Key, dict[str, str]]) -> dict[str, int]:
    """Number of new samples by reason."""
    stands_for = {(key[0], change["by"]) for key, change in changes.items() if change["by"]}
    reasons: Counter[str] = Counter()
    for key, number in _item_sizes(came).items():
        change = changes.get(key, {}).get("change", "")
        if change == "added":
            reason = "supersedes an item" if key in stands_for else "item added"
        else:
            reason = "item changed" if change == "changed" else "selected now"
        reasons[reason] += number
    return dict(sorted(reasons.items()))


def _why_removed(
    went: pd.DataFrame, changes: dict[Key, dict[str, str]], new: Version
) -> dict[str, int]:
    """Number of lost samples by reason: their item's, else what is now said of the chip."""
    reasons: Counter[str] = Counter()
    same = []  # of items that are what they were
    for (collection, item), chips in went.groupby(["collection", "item_id"])["chip_id"]:
        change = changes.get((str(collection), str(item)), {}).get("change")
        if change:
            reasons[f"item {change}"] += len(chips)
        else:
            same.append(chips)
    if same:
        fallen = new.chips[new.chips["status"] != "ok"].set_index("chip_id")["reason"]
        rules = new.decisions.set_index("chip_id")["rule"]
        chips = pd.concat(same)
        own = chips.map(rules[~rules.index.duplicated()])
        own = own.fillna(chips.map(fallen[~fallen.index.duplicated()])).fillna("not cut any more")
        reasons.update({str(reason): int(n) for reason, n in own.value_counts().items()})
    return dict(sorted(reasons.items()))


def _item_sizes(samples: pd.DataFrame) -> dict[Key, int]:
    """Number of samples by item."""
    groups = samples.groupby(["collection", "item_id"])
    return {(str(collection), str(item)): len(rows) for (collection, item), rows in groups}


def _with_samples(
    changes: dict[Key, dict[str, str]], came: pd.DataFrame, went: pd.DataFrame
) -> list[dict[str, Any]]:
    """The changes as rows, with how many samples came and went with each."""
    more, less = _item_sizes(came), _item_sizes(went)
    return [
        {"collection": key[0], "item_id": key[1], **change,
         "samples": more.get(key, 0) + less.get(key, 0)}
        for key, change in changes.items()
    ]  # fmt: skip


def _by_source(came: pd.DataFrame, went: pd.DataFrame, both: pd.DataFrame) -> list[dict[str, Any]]:
    """Samples added, removed and kept by source profile and collection."""
    counts: dict[Key, dict[str, int]] = {}
    for frame, what in ((came, "added"), (went, "removed"), (both, "kept")):
        for (source, collection), rows in frame.groupby(["source", "collection"]):
            none = {"added": 0, "removed": 0, "kept": 0}
            counts.setdefault((str(source), str(collection)), none)[what] = len(rows)
    return [{"source": key[0], "collection": key[1], **counts[key]} for key in sorted(counts)]


def _by_cell(came: pd.DataFrame, went: pd.DataFrame) -> list[dict[str, Any]]:
    """Samples added and removed by ground cell, most changed first."""
    more, less = Counter(came["cell"]), Counter(went["cell"])
    rows = [
        {"cell": str(cell), "added": more[cell], "removed": less[cell]}
        for cell in more.keys() | less.keys()
    ]
    return sorted(rows, key=lambda row: (-row["added"] - row["removed"], row["cell"]))
