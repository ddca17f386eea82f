"""What changed between two versions of a dataset: which samples came and went, and why.

Everything is computed from the tables of the two versions; only since when an item has been in its
state is taken from the catalogue. A sample is the same in both versions when its chip id is: same
item content, same cell, same bands. Each change has one reason, and the item is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.item_states import (
    CHIP_COLUMNS,
    DROPPED,
    ITEM_COLUMNS,
    OK,
    STAND_INS,
    STANDS_IN,
    SUPERSEDED,
    WITHDRAWN,
    ItemState,
    Key,
    item_states,
)
from data_catalog.database.items import read_items
from data_catalog.hashing import digest_of
from data_catalog.provenance.lineage import ancestor
from data_catalog.tables import records

SAMPLE_COLUMNS = ["chip_id", "collection", "item_id", "source", "cell", "licence"]
#: Changes of an item that leave its chips what they were.
SAME_CHIPS = ("licence changed", "stands in")
#: The card of a dataset names the digests of what it was made from; the samples do not.
CARD = "README.md"


@dataclass(frozen=True)
class Version:
    """The tables of one dataset version.

    Attributes:
        samples: what it holds: chip_id, collection, item_id, source, cell, licence.
        items: all that the search listed, columns ``ITEM_COLUMNS``.
        chips: all candidates, columns ``CHIP_COLUMNS``.
        decisions: all candidates that reached curation: chip_id, decision, rule.
        stand_ins: items that are not listed any more and whose chips are used.
        windows: reads why windows were not cut: item_sha256, x, y, reason.
        search: settings of the search.
        since: since when items are in the state that they have now, by collection and id.
    """

    samples: pd.DataFrame
    items: pd.DataFrame
    chips: pd.DataFrame
    decisions: pd.DataFrame
    stand_ins: pd.DataFrame | None = None
    windows: Callable[[], pd.DataFrame] | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    since: Mapping[Key, tuple[ItemState, str]] = field(default_factory=dict)

    def states(self) -> dict[Key, ItemState]:
        """The state of each item."""
        return item_states(self.items, self.chips, self.stand_ins)


@dataclass(frozen=True)
class Difference:
    """From one version to another.

    Attributes:
        added: chip ids of the samples that came, sorted.
        removed: chip ids of those that went, sorted.
        kept: how many samples are in both.
        why_added: number of samples by what brought them.
        why_removed: number of samples by what took them.
        items: items that changed: collection, item_id, change, by (the item that supersedes it or
            that it stands in for), reason, since (of items that wait), and samples (how many came
            or went with it, or have another licence now).
        by_source: added, removed and kept samples by source profile and collection.
        by_cell: added and removed samples by ground cell, the most changed first.
        notes: what else differs where no sample came or went.
    """

    added: list[str]
    removed: list[str]
    kept: int
    why_added: dict[str, int]
    why_removed: dict[str, int]
    items: list[dict[str, Any]]
    by_source: list[dict[str, Any]]
    by_cell: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

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
        told += self.notes
        why = f" ({', '.join(told)})" if told else ""
        return f"+{len(self.added):,} −{len(self.removed):,}{why}"


def read_version(catalogue: Catalogue, artifact: Artifact) -> Version:
    """The tables of the dataset that an artifact is or was made from."""
    dataset = ancestor(catalogue, artifact, "dataset")
    items, chips, decisions = (
        ancestor(catalogue, dataset, kind) for kind in ("items", "chips", "decisions")
    )
    names = [entry.path for entry in chips.manifest.files]
    entries = read_items(catalogue, record_of(items, chips))
    return Version(
        dataset.table("samples.parquet", SAMPLE_COLUMNS),
        items.table("items.parquet", ITEM_COLUMNS),
        chips.table("chips.parquet", CHIP_COLUMNS),
        decisions.table("decisions.parquet", ["chip_id", "decision", "rule"]),
        chips.table(STAND_INS, ITEM_COLUMNS) if STAND_INS in names else None,
        lambda: chips.table("windows.parquet", ["item_sha256", "x", "y", "reason"]),
        items.manifest.settings,
        {key: (one.state, one.since.strftime("%Y-%m-%d")) for key, one in entries.items()},
    )


def record_of(items: Artifact, chips: Artifact) -> str:
    """The record of items (``Job.record``) that the cut of a version wrote."""
    made = chips.manifest
    return digest_of([made.stage, made.settings, {"items": items.manifest.settings}])


def compare(old: Version, new: Version) -> Difference:
    """What changed from ``old`` to ``new``."""
    stayed = new.samples["chip_id"].isin(old.samples["chip_id"])
    came, both = new.samples[~stayed], new.samples[stayed]
    went = old.samples[~old.samples["chip_id"].isin(both["chip_id"])]
    changes = item_changes(old, new)
    added, removed = _why_added(came, changes), _why_removed(went, changes, new)
    return Difference(
        added=sorted(came["chip_id"]),
        removed=sorted(went["chip_id"]),
        kept=len(both),
        why_added=_totals(added),
        why_removed=_totals(removed),
        items=_item_rows(changes, added, removed, _relicensed(old, both)),
        by_source=_by_source(came, went, both),
        by_cell=_by_cell(came, went),
    )


def item_changes(old: Version, new: Version) -> dict[Key, dict[str, str]]:
    """Items whose state, content or licence is another one.

    Returns:
        ``change``, ``by``, ``reason`` and ``since`` by collection and id. Changes: ``added``,
        ``changed``, ``readable`` (it was waiting or out of reach), ``returned``, ``superseded``,
        ``superseded without samples``, ``stands in``, ``out of reach``, ``waiting``,
        ``withdrawn``, ``gone`` (by another search), ``licence changed``, or the reason for which
        the search dropped it (``cloud_cover``, ...).
    """
    before, after = old.states(), new.states()
    sampled = set(zip(new.samples["collection"], new.samples["item_id"], strict=True))
    absent = WITHDRAWN if old.search == new.search else "gone"
    found: dict[Key, dict[str, str]] = {}
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        change, reason = _change(was, now, absent)
        if not change:
            continue
        by = _by(was, now)
        if change == "superseded" and (key[0], by) not in sampled:
            change, reason = "superseded without samples", f"no sample of {by} was kept"
        if change == "stands in":
            newer = after.get((key[0], by))
            reason = f"{by}: {newer.reason if newer else reason}"
        found[key] = {"change": change, "by": by, "reason": reason, "since": ""}
        if now is not None and now.asked_again:
            state, since = new.since.get(key, (None, ""))
            found[key]["since"] = since if state == now else ""
    return found


def _by(was: ItemState | None, now: ItemState | None) -> str:
    """The newer item that supersedes one, or that it stands in for."""
    if now is None:
        return was.by if was is not None and was.state == STANDS_IN else ""
    return now.by if now.state in (SUPERSEDED, STANDS_IN) else ""


def _change(was: ItemState | None, now: ItemState | None, absent: str) -> tuple[str, str]:
    """What happened to an item, and the reason; empty where nothing did that counts."""
    used = was is not None and was.used
    if now is None:
        if was is not None and was.state == STANDS_IN:
            return "superseded", was.reason
        return (absent, "") if used else ("", "")
    if now.asked_again:
        return _change_to_waiting(was, now)
    if now.state == OK:
        return _change_to_ok(was, now)
    if now.state == STANDS_IN:
        stood = was is not None and was.state == STANDS_IN
        return ("", "") if stood else ("stands in", now.reason)
    if not used:
        return "", ""
    if now.state == SUPERSEDED:
        return "superseded", now.reason
    return now.reason or now.state, now.reason


def _change_to_waiting(was: ItemState | None, now: ItemState) -> tuple[str, str]:
    same = was is not None and was.asked_again and was.item_sha256 == now.item_sha256
    if same and was is not None and bool(was.stand_in) == bool(now.stand_in):
        return "", ""
    stands = "; the version before stands in" if now.stand_in else ""
    return now.state, f"{now.reason}{stands}"


def _change_to_ok(was: ItemState | None, now: ItemState) -> tuple[str, str]:
    if was is None:
        return "added", ""
    if was.asked_again:
        return "readable", f"was {was.state} ({was.reason})"
    if was.state in (SUPERSEDED, DROPPED) or not was.used:
        return "returned", f"was {was.reason or was.state}" + (f" by {was.by}" if was.by else "")
    if was.item_sha256 != now.item_sha256:
        return "changed", ""
    if was.licence != now.licence:
        return "licence changed", f"{was.licence} is {now.licence} now"
    return "", ""


#: Number of samples by item and reason.
_Reasons = dict[Key, Counter[str]]


def _totals(reasons: _Reasons) -> dict[str, int]:
    whole: Counter[str] = Counter()
    for counts in reasons.values():
        whole.update(counts)
    return dict(sorted(whole.items()))


def _why_added(came: pd.DataFrame, changes: Mapping[Key, Mapping[str, str]]) -> _Reasons:
    """Number of new samples by item and reason."""
    stands_for = {
        (key[0], change["by"]) for key, change in changes.items() if change["change"] == SUPERSEDED
    }
    reasons: _Reasons = {}
    for key, number in _item_sizes(came).items():
        change = changes.get(key, {}).get("change", "")
        if change in ("added", "readable") and key in stands_for:
            reason = "supersedes an item"
        elif change == "stands in":
            reason = "stands in for a newer version"
        elif change in ("added", "changed", "readable", "returned"):
            reason = f"item {change}"
        else:
            reason = "selected now"
        reasons[key] = Counter({reason: number})
    return reasons


def _why_removed(
    went: pd.DataFrame, changes: Mapping[Key, Mapping[str, str]], new: Version
) -> _Reasons:
    """Number of lost samples by item and reason: the item's, else what is now said of the chip."""
    reasons: _Reasons = {}
    same = []  # of items that are what they were
    for (collection, item), rows in went.groupby(["collection", "item_id"]):
        key = (str(collection), str(item))
        change = changes.get(key, {}).get("change")
        if change and change not in SAME_CHIPS:
            reasons[key] = Counter({f"item {change}": len(rows)})
        else:
            same.append(rows)
    if same:
        rows = pd.concat(same)
        for collection, item, reason in zip(
            rows["collection"], rows["item_id"], _chip_reasons(rows, new), strict=True
        ):
            reasons.setdefault((str(collection), str(item)), Counter())[str(reason)] += 1
    return reasons


def _chip_reasons(rows: pd.DataFrame, new: Version) -> pd.Series:
    """Why each chip of an unchanged item is not kept: by curation, by the cut, or by the plan."""
    fallen = new.chips[new.chips["status"] != "ok"].set_index("chip_id")["reason"]
    rules = new.decisions.set_index("chip_id")["rule"]
    own = rows["chip_id"].map(rules[~rules.index.duplicated()])
    own = own.fillna(rows["chip_id"].map(fallen[~fallen.index.duplicated()]))
    if own.isna().any() and new.windows is not None:
        listed = new.items.set_index(["collection", "item_id"])["item_sha256"]
        listed = listed[~listed.index.duplicated()]
        windows = new.windows()
        windows = windows[windows["reason"].astype(str) != ""]
        plan = {
            (str(sha), int(x), int(y)): str(reason)
            for sha, x, y, reason in windows.itertuples(index=False)
        }
        reasons = []
        for row, reason in zip(records(rows), own, strict=True):
            x, y = (int(part) for part in str(row["cell"]).rsplit("/", 2)[1:])
            sha = str(listed.get((row["collection"], row["item_id"]), ""))
            reasons.append(reason if isinstance(reason, str) else plan.get((sha, x, y)))
        own = pd.Series(reasons, rows.index, dtype=object)
    return own.fillna("not cut any more")


def _relicensed(old: Version, both: pd.DataFrame) -> dict[Key, int]:
    """Number of samples in both versions whose licence is another one, by item."""
    before = old.samples.set_index("chip_id")["licence"]
    changed = both[both["licence"].to_numpy() != both["chip_id"].map(before).to_numpy()]
    return _item_sizes(changed)


def _item_sizes(samples: pd.DataFrame) -> dict[Key, int]:
    """Number of samples by item."""
    groups = samples.groupby(["collection", "item_id"])
    return {(str(collection), str(item)): len(rows) for (collection, item), rows in groups}


def _item_rows(
    changes: Mapping[Key, dict[str, str]],
    added: _Reasons,
    removed: _Reasons,
    relicensed: Mapping[Key, int],
) -> list[dict[str, Any]]:
    """The changes as rows, each with the number of its samples.

    An item that is what it was, but of which other chips are kept, is ``selected`` anew.
    """
    found = {**changes}
    for key in sorted(added.keys() | removed.keys()):
        rules = removed.get(key, Counter()) + added.get(key, Counter())
        if key not in found:
            told = ", ".join(f"{reason} {number}" for reason, number in sorted(rules.items()))
            found[key] = {"change": "selected", "by": "", "reason": told, "since": ""}
    rows = []
    for key, change in sorted(found.items()):
        number = added.get(key, Counter()).total() + removed.get(key, Counter()).total()
        if change["change"] == "licence changed":
            number += relicensed.get(key, 0)
        rows.append({"collection": key[0], "item_id": key[1], **change, "samples": number})
    return rows


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


def same_content(old: Artifact, new: Artifact) -> bool:
    """Whether two datasets hold the same samples with the same licences, in the same files.

    What was listed, waited or fell in between may differ: that is no new version.
    """
    return _content(old) == _content(new)


def _content(dataset: Artifact) -> list[Any]:
    manifest = dataset.manifest
    files = {entry.path: entry.sha256 for entry in manifest.files if entry.path != CARD}
    return [manifest.counts, manifest.dropped, manifest.facts, files]


def other_changes(old: Artifact, new: Artifact) -> list[str]:
    """What differs between two datasets of the same samples, in words."""
    notes = []
    before, after = (a.table("samples.parquet").set_index("chip_id") for a in (old, new))
    for name in after.columns:
        if name not in before.columns:
            notes.append(f"new column {name}")
        elif [str(v) for v in after[name]] != [str(v) for v in before[name].reindex(after.index)]:
            notes.append(f"{name} of samples changed")
    for name in sorted(old.manifest.facts.keys() | new.manifest.facts.keys()):
        if old.manifest.facts.get(name) != new.manifest.facts.get(name):
            notes.append(f"{name} changed")
    if old.manifest.settings != new.manifest.settings:
        notes.append("settings of pack changed")
    return notes or ["files written anew"]
