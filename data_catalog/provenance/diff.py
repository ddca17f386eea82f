"""The difference of two versions of a dataset: samples added and removed, with the reasons.

read_version     read the tables of a version
compare          the difference of two versions
item_changes     items whose state, content or licence changed
same_content     whether two datasets hold the same samples in the same files

The difference is computed from the tables of the two versions. Only the time since when an item is
in its state comes from the catalogue. A sample is the same in both versions if it has the same chip
id (same item content, cell and bands). Each change has one reason, and the item is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_COLUMNS = ["chip_id", "collection", "item_id", "source", "cell", "licence"]
#: Changes of an item that leave its chips unchanged.
SAME_CHIPS = ("licence changed", "stands in")
#: The card of a dataset names the digests of its inputs, which may change with the same samples.
CARD = "README.md"


@dataclass(frozen=True)
class Version:
    """The tables of one dataset version.

    Attributes:
        samples: Its samples, columns ``SAMPLE_COLUMNS``.
        items: All items that the search listed, columns ``ITEM_COLUMNS``.
        chips: All candidate chips, columns ``CHIP_COLUMNS``.
        decisions: Candidates that reached curation: chip_id, decision, rule.
        stand_ins: Items that are not listed any more and whose chips are used.
        windows: Reads the windows that were not cut: item_sha256, x, y, reason.
        search: Settings of the search.
        since: Present state of an item and the date since when, by collection and id.
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
        """Return the state of each item."""
        return item_states(self.items, self.chips, self.stand_ins)


@dataclass(frozen=True)
class Difference:
    """The difference from an old version to a new one.

    Attributes:
        added: Chip ids of the samples in the new version only, sorted.
        removed: Chip ids of the samples in the old version only, sorted.
        kept: Number of samples in both.
        why_added: Number of added samples by reason.
        why_removed: Number of removed samples by reason.
        items: Changed items: collection, item_id, change, by (the item that supersedes it or that
            it stands in for), reason, since (of items that wait), and samples (number added or
            removed with it, or with another licence now).
        by_source: Added, removed and kept samples by source profile and collection.
        by_cell: Added and removed samples by ground cell, the most changed first.
        notes: Other differences, if no sample was added or removed.
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
        """Number of items by change (added, superseded, withdrawn, ...)."""
        return dict(sorted(Counter(str(item["change"]) for item in self.items).items()))

    def summary(self, most: int = 20) -> dict[str, Any]:
        """Return the difference in numbers, with at most ``most`` items and cells named."""
        return {
            **asdict(self),
            "added": len(self.added),
            "removed": len(self.removed),
            "item_counts": self.item_counts,
            "items": self.items[:most],
            "by_cell": self.by_cell[:most],
            "cells": len(self.by_cell),
        }

    def headline(self) -> str:
        """Return one line for people: ``+12 −3 (2 items superseded, 1 withdrawn)``."""
        changes = [f"{number:,} {change}" for change, number in self.item_counts.items()]
        if changes:
            noun = "item" if next(iter(self.item_counts.values())) == 1 else "items"
            changes[0] = changes[0].replace(" ", f" {noun} ", 1)
        changes += self.notes
        reasons = f" ({', '.join(changes)})" if changes else ""
        return f"+{len(self.added):,} −{len(self.removed):,}{reasons}"


def read_version(catalogue: Catalogue, artifact: Artifact) -> Version:
    """Read the tables of a dataset, or of the dataset that an artifact was made from."""
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
        {key: (entry.state, f"{entry.since:%Y-%m-%d}") for key, entry in entries.items()},
    )


def record_of(items: Artifact, chips: Artifact) -> str:
    """Return the name of the record of items (``Job.record``) that the cut of a version wrote."""
    cut = chips.manifest
    return digest_of([cut.stage, cut.settings, {"items": items.manifest.settings}])


def compare(old: Version, new: Version) -> Difference:
    """Compute the difference from ``old`` to ``new``."""
    in_both = new.samples["chip_id"].isin(old.samples["chip_id"])
    added, kept = new.samples[~in_both], new.samples[in_both]
    removed = old.samples[~old.samples["chip_id"].isin(kept["chip_id"])]
    changes = item_changes(old, new)
    why_added, why_removed = _why_added(added, changes), _why_removed(removed, changes, new)
    return Difference(
        added=sorted(added["chip_id"]),
        removed=sorted(removed["chip_id"]),
        kept=len(kept),
        why_added=_totals(why_added),
        why_removed=_totals(why_removed),
        items=_item_rows(changes, why_added, why_removed, _relicensed(old, kept)),
        by_source=_by_source(added, removed, kept),
        by_cell=_by_cell(added, removed),
    )


def item_changes(old: Version, new: Version) -> dict[Key, dict[str, str]]:
    """Find the items whose state, content or licence changed.

    Returns:
        ``change``, ``by``, ``reason`` and ``since`` by collection and id. Changes: ``added``,
        ``changed``, ``readable`` (it was waiting or out of reach), ``returned``, ``superseded``,
        ``superseded without samples``, ``stands in``, ``out of reach``, ``waiting``,
        ``withdrawn``, ``gone`` (not listed by another search), ``licence changed``, or the reason
        for which the search dropped it (``cloud_cover``, ...).
    """
    before, after = old.states(), new.states()
    sampled = set(zip(new.samples["collection"], new.samples["item_id"], strict=True))
    absent = WITHDRAWN if old.search == new.search else "gone"
    changes: dict[Key, dict[str, str]] = {}
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        change, reason = _change(was, now, absent)
        if not change:
            continue
        by = _successor(was, now)
        if change == "superseded" and (key[0], by) not in sampled:
            change, reason = "superseded without samples", f"no sample of {by} was kept"
        if change == "stands in":
            newer = after.get((key[0], by))
            reason = f"{by}: {newer.reason if newer else reason}"
        changes[key] = {"change": change, "by": by, "reason": reason, "since": ""}
        if now is not None and now.is_retried:
            state, since = new.since.get(key, (None, ""))
            changes[key]["since"] = since if state == now else ""
    return changes


def _successor(was: ItemState | None, now: ItemState | None) -> str:
    """Return the id of the newer item that supersedes an item, or that it stands in for."""
    if now is None:
        return was.by if was is not None and was.state == STANDS_IN else ""
    return now.by if now.state in (SUPERSEDED, STANDS_IN) else ""


def _change(was: ItemState | None, now: ItemState | None, absent: str) -> tuple[str, str]:
    """Return the change of an item and the reason; both empty if nothing relevant changed.

    Args:
        was: Old state; None if the item was not listed.
        now: New state; None if the item is not listed.
        absent: Change of an item that was used and is not listed.
    """
    used = was is not None and was.used
    if now is None:
        if was is not None and was.state == STANDS_IN:
            return "superseded", was.reason
        return (absent, "") if used else ("", "")
    if now.is_retried:
        return _change_to_waiting(was, now)
    if now.state == OK:
        return _change_to_ok(was, now)
    if now.state == STANDS_IN:
        stood_in = was is not None and was.state == STANDS_IN
        return ("", "") if stood_in else ("stands in", now.reason)
    if not used:
        return "", ""
    if now.state == SUPERSEDED:
        return "superseded", now.reason
    return now.reason or now.state, now.reason


def _change_to_waiting(was: ItemState | None, now: ItemState) -> tuple[str, str]:
    """Return the change of an item that cannot be read now."""
    same = was is not None and was.is_retried and was.item_sha256 == now.item_sha256
    if same and was is not None and bool(was.stand_in) == bool(now.stand_in):
        return "", ""
    stand_in = "; the version before stands in" if now.stand_in else ""
    return now.state, f"{now.reason}{stand_in}"


def _change_to_ok(was: ItemState | None, now: ItemState) -> tuple[str, str]:
    """Return the change of an item that is in use now."""
    if was is None:
        return "added", ""
    if was.is_retried:
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
    """Sum the numbers of samples over items, by reason."""
    total: Counter[str] = Counter()
    for counts in reasons.values():
        total.update(counts)
    return dict(sorted(total.items()))


def _why_added(added: pd.DataFrame, changes: Mapping[Key, Mapping[str, str]]) -> _Reasons:
    """Count the added samples by item and reason."""
    successors = {
        (key[0], change["by"]) for key, change in changes.items() if change["change"] == SUPERSEDED
    }
    reasons: _Reasons = {}
    for key, number in _item_sizes(added).items():
        change = changes.get(key, {}).get("change", "")
        if change in ("added", "readable") and key in successors:
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
    removed: pd.DataFrame, changes: Mapping[Key, Mapping[str, str]], new: Version
) -> _Reasons:
    """Count the removed samples by item and reason.

    The reason is the change of the item, or else the decision on the chip in the new version.
    """
    import pandas as pd

    reasons: _Reasons = {}
    unchanged = []  # samples of items that did not change
    for (collection, item), rows in removed.groupby(["collection", "item_id"]):
        key = (str(collection), str(item))
        change = changes.get(key, {}).get("change")
        if change and change not in SAME_CHIPS:
            reasons[key] = Counter({f"item {change}": len(rows)})
        else:
            unchanged.append(rows)
    if unchanged:
        rows = pd.concat(unchanged)
        for collection, item, reason in zip(
            rows["collection"], rows["item_id"], _chip_reasons(rows, new), strict=True
        ):
            reasons.setdefault((str(collection), str(item)), Counter())[str(reason)] += 1
    return reasons


def _chip_reasons(rows: pd.DataFrame, new: Version) -> pd.Series:
    """Return the reason why each chip of an unchanged item is not kept.

    It is the rule of curation, else the reason of the cut, else the reason of the sampling plan.
    """
    import pandas as pd

    dropped = new.chips[new.chips["status"] != "ok"].set_index("chip_id")["reason"]
    rules = new.decisions.set_index("chip_id")["rule"]
    reasons = rows["chip_id"].map(rules[~rules.index.duplicated()])
    reasons = reasons.fillna(rows["chip_id"].map(dropped[~dropped.index.duplicated()]))
    if reasons.isna().any() and new.windows is not None:
        listed = new.items.set_index(["collection", "item_id"])["item_sha256"]
        listed = listed[~listed.index.duplicated()]
        windows = new.windows()
        windows = windows[windows["reason"].astype(str) != ""]
        not_planned = {
            (str(sha256), int(x), int(y)): str(reason)
            for sha256, x, y, reason in windows.itertuples(index=False)
        }
        completed = []
        for row, reason in zip(rows.to_dict("records"), reasons, strict=True):
            x, y = (int(part) for part in str(row["cell"]).rsplit("/", 2)[1:])
            sha256 = str(listed.get((row["collection"], row["item_id"]), ""))
            known = isinstance(reason, str)
            completed.append(reason if known else not_planned.get((sha256, x, y)))
        reasons = pd.Series(completed, rows.index, dtype=object)
    return reasons.fillna("not cut any more")


def _relicensed(old: Version, kept: pd.DataFrame) -> dict[Key, int]:
    """Count the samples in both versions whose licence changed, by item."""
    before = old.samples.set_index("chip_id")["licence"]
    changed = kept[kept["licence"].to_numpy() != kept["chip_id"].map(before).to_numpy()]
    return _item_sizes(changed)


def _item_sizes(samples: pd.DataFrame) -> dict[Key, int]:
    """Count samples by item."""
    groups = samples.groupby(["collection", "item_id"])
    return {(str(collection), str(item)): len(rows) for (collection, item), rows in groups}


def _item_rows(
    changes: Mapping[Key, dict[str, str]],
    added: _Reasons,
    removed: _Reasons,
    relicensed: Mapping[Key, int],
) -> list[dict[str, Any]]:
    """Return the changes as rows, each with the number of its samples.

    An unchanged item whose kept chips differ has the change ``selected``.
    """
    all_changes = {**changes}
    for key in sorted(added.keys() | removed.keys()):
        rules = removed.get(key, Counter()) + added.get(key, Counter())
        if key not in all_changes:
            reason = ", ".join(f"{rule} {number}" for rule, number in sorted(rules.items()))
            all_changes[key] = {"change": "selected", "by": "", "reason": reason, "since": ""}
    rows = []
    for key, change in sorted(all_changes.items()):
        number = added.get(key, Counter()).total() + removed.get(key, Counter()).total()
        if change["change"] == "licence changed":
            number += relicensed.get(key, 0)
        rows.append({"collection": key[0], "item_id": key[1], **change, "samples": number})
    return rows


def _by_source(
    added: pd.DataFrame, removed: pd.DataFrame, kept: pd.DataFrame
) -> list[dict[str, Any]]:
    """Count added, removed and kept samples by source profile and collection."""
    counts: dict[Key, dict[str, int]] = {}
    for frame, name in ((added, "added"), (removed, "removed"), (kept, "kept")):
        for (source, collection), rows in frame.groupby(["source", "collection"]):
            zeros = {"added": 0, "removed": 0, "kept": 0}
            counts.setdefault((str(source), str(collection)), zeros)[name] = len(rows)
    return [{"source": key[0], "collection": key[1], **counts[key]} for key in sorted(counts)]


def _by_cell(added: pd.DataFrame, removed: pd.DataFrame) -> list[dict[str, Any]]:
    """Count added and removed samples by ground cell, most changed first."""
    more, less = Counter(added["cell"]), Counter(removed["cell"])
    rows = [
        {"cell": str(cell), "added": more[cell], "removed": less[cell]}
        for cell in more.keys() | less.keys()
    ]
    return sorted(rows, key=lambda row: (-row["added"] - row["removed"], row["cell"]))


def same_content(old: Artifact, new: Artifact) -> bool:
    """Return whether two datasets hold the same samples with the same licences and files.

    Items that were listed, waited or were dropped in between may differ: such a dataset is not a
    new version.
    """
    return _content(old) == _content(new)


def _content(dataset: Artifact) -> list[Any]:
    """Return the parts of a manifest that make a new version."""
    manifest = dataset.manifest
    files = {entry.path: entry.sha256 for entry in manifest.files if entry.path != CARD}
    return [manifest.counts, manifest.dropped, manifest.facts, files]


def other_changes(old: Artifact, new: Artifact) -> list[str]:
    """Describe the differences of two datasets with the same samples."""
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
    return notes or ["files written again"]
