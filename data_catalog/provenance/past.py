"""Chips of earlier versions: in which version a chip was last, and why it left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from data_catalog.artifact import Artifact, NotInStore
from data_catalog.catalogue import Catalogue, UnknownReference
from data_catalog.database.schema import NameRow
from data_catalog.errors import CheckError
from data_catalog.provenance.diff import Version, compare, item_changes, read_version
from data_catalog.provenance.lineage import ancestor
from data_catalog.tables import records

#: Columns of ``chips.parquet`` that say which chip it is.
CHIP = ["chip_id", "collection", "item_id", "cell", "status", "reason"]


@dataclass(frozen=True)
class Found:
    """A chip in an earlier version of a dataset.

    Attributes:
        version: The last version that had the chip among its candidates.
        following: The version after it, in which the chip is no candidate any more; None where
            that is the dataset in question itself, which was not published.
        chip: The chip's row in that version.
        was_kept: Whether it was a sample of that version.
    """

    version: NameRow
    following: NameRow | None
    chip: dict[str, Any]
    was_kept: bool


def why_left(catalogue: Catalogue, artifact: Artifact, chip_id: str) -> dict[str, Any] | None:
    """Explain why a chip that an earlier version had is no candidate any more.

    Args:
        catalogue: the record.
        artifact: a dataset, or something made from one, that does not have the chip.
        chip_id: of the chip.

    Returns:
        The chip, the version it was in, the version in which it left, and why; None if no earlier
        version had it.
    """
    dataset = _dataset(catalogue, artifact)
    found = None if dataset is None else _last_version_with(catalogue, dataset, chip_id)
    if dataset is None or found is None:
        return None
    after = dataset if found.following is None else catalogue.get(found.following.digest)
    old = read_version(catalogue, catalogue.get(found.version.digest))
    reason, by = _reason(old, read_version(catalogue, after), found.chip)
    was = f"{found.version.name}@{found.version.version}"
    following = found.following
    left = f"{following.name}@{following.version}" if following else after.digest[:12]
    role = "a sample of" if found.was_kept else "a candidate in"
    return {
        "stage": "version",
        "artifact": found.version.digest,
        "chip_id": chip_id,
        "collection": found.chip["collection"],
        "item_id": found.chip["item_id"],
        "cell": found.chip["cell"],
        "decision": "left",
        "rule": reason,
        "was_in": was,
        "was_kept": found.was_kept,
        "left_in": left,
        "superseded_by": by,
        "reason": f"was {role} {was}; left in {left} because: {reason}"
        + (f" (by {by})" if by else ""),
    }


def last_sample_in(catalogue: Catalogue, artifact: Artifact, chip_id: str) -> str:
    """Find the last earlier version that had a chip as a sample; empty if none had."""
    dataset = _dataset(catalogue, artifact)
    for row in [] if dataset is None else _earlier(catalogue, dataset):
        samples = _table(catalogue, row, "dataset", "samples.parquet", ["chip_id"])
        if samples is not None and (samples["chip_id"] == chip_id).any():
            return f"{row.name}@{row.version}"
    return ""


def _dataset(catalogue: Catalogue, artifact: Artifact) -> Artifact | None:
    """Find the dataset that an artifact is or was made from; None for earlier stages."""
    try:
        return ancestor(catalogue, artifact, "dataset")
    except UnknownReference:
        return None


def _earlier(catalogue: Catalogue, dataset: Artifact) -> list[NameRow]:
    """List the published versions before a dataset, newest first.

    They are those of the names that the dataset has; of all names if it was not published.
    """
    names = [row for row in catalogue.names() if catalogue.kind(row.digest) == "dataset"]
    own = [row for row in names if row.digest == dataset.digest]
    if not own:
        return names
    last = {row.name: row.number for row in reversed(own)}  # the newest of each name
    return [row for row in names if row.number < last.get(row.name, 0)]


def _last_version_with(catalogue: Catalogue, dataset: Artifact, chip_id: str) -> Found | None:
    later: dict[str, NameRow] = {
        row.name: row for row in catalogue.names() if row.digest == dataset.digest
    }
    for row in _earlier(catalogue, dataset):
        chips = _table(catalogue, row, "chips", "chips.parquet", CHIP)
        if chips is None:  # removed from the store: the version after it is compared instead
            continue
        if (chips["chip_id"] == chip_id).any():
            chip = records(pd.DataFrame(chips[chips["chip_id"] == chip_id]))[0]
            samples = _table(catalogue, row, "dataset", "samples.parquet", ["chip_id"])
            kept = samples is not None and bool((samples["chip_id"] == chip_id).any())
            return Found(row, later.get(row.name), chip, kept)
        later[row.name] = row
    return None


def _table(
    catalogue: Catalogue, version: NameRow, kind: str, file: str, columns: list[str]
) -> pd.DataFrame | None:
    """Read a table of a version's lineage; None if that is not in the store any more."""
    try:
        artifact = ancestor(catalogue, catalogue.get(version.digest), kind)
        return artifact.table(file, columns)
    except (CheckError, NotInStore, UnknownReference):
        return None


def _reason(old: Version, new: Version, chip: dict[str, Any]) -> tuple[str, str]:
    """Why a chip left, in the words of the difference of two versions; and what stands for it."""
    key = (str(chip["collection"]), str(chip["item_id"]))
    change = item_changes(old, new).get(key, {})
    one = pd.DataFrame([{name: chip[name] for name in CHIP[:4]} | {"source": "", "licence": ""}])
    found = compare(replace(old, samples=one), new)
    return next(iter(found.why_removed)), str(change.get("by", ""))
