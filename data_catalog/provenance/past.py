"""Chips of earlier versions of a dataset: the last version with a chip, and why it was removed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from data_catalog.artifact import Artifact, NotInStore
from data_catalog.catalogue import Catalogue, UnknownReference
from data_catalog.database.schema import NameRow
from data_catalog.errors import CheckError
from data_catalog.provenance.diff import Version, compare, item_changes, read_version
from data_catalog.provenance.lineage import ancestor

if TYPE_CHECKING:
    import pandas as pd

#: Columns of ``chips.parquet`` that identify a chip and its status.
CHIP = ["chip_id", "collection", "item_id", "cell", "status", "reason"]


@dataclass(frozen=True)
class PastChip:
    """A chip in an earlier version of a dataset.

    Attributes:
        version: Last version with the chip among its candidates.
        following: Version after it, without the chip; None if that is the dataset in question,
            which was not published.
        chip: Row of the chip in the last version.
        was_kept: Whether the chip was a sample of the last version.
    """

    version: NameRow
    following: NameRow | None
    chip: dict[str, Any]
    was_kept: bool


def why_left(catalogue: Catalogue, artifact: Artifact, chip_id: str) -> dict[str, Any] | None:
    """Explain why a chip of an earlier version is not a candidate any more.

    Args:
        catalogue: The catalogue.
        artifact: A dataset without the chip, or an artifact made from such a dataset.
        chip_id: Id of the chip.

    Returns:
        The chip, its last version, the version in which it is missing, and the reason; None if no
        earlier version had the chip.
    """
    dataset = _dataset(catalogue, artifact)
    past = None if dataset is None else _last_version_with(catalogue, dataset, chip_id)
    if dataset is None or past is None:
        return None
    after = dataset if past.following is None else catalogue.get(past.following.digest)
    old = read_version(catalogue, catalogue.get(past.version.digest))
    reason, by = _reason(old, read_version(catalogue, after), past.chip)
    was = f"{past.version.name}@{past.version.version}"
    following = past.following
    left = f"{following.name}@{following.version}" if following else after.digest[:12]
    role = "a sample of" if past.was_kept else "a candidate in"
    return {
        "stage": "version",
        "artifact": past.version.digest,
        "chip_id": chip_id,
        "collection": past.chip["collection"],
        "item_id": past.chip["item_id"],
        "cell": past.chip["cell"],
        "decision": "left",
        "rule": reason,
        "was_in": was,
        "was_kept": past.was_kept,
        "left_in": left,
        "superseded_by": by,
        "reason": f"was {role} {was}; left in {left} because: {reason}"
        + (f" (by {by})" if by else ""),
    }


def last_sample_in(catalogue: Catalogue, artifact: Artifact, chip_id: str) -> str:
    """Find the last earlier version with a chip as a sample; empty if there is none."""
    dataset = _dataset(catalogue, artifact)
    for row in [] if dataset is None else _earlier(catalogue, dataset):
        samples = _table(catalogue, row, "dataset", "samples.parquet", ["chip_id"])
        if samples is not None and (samples["chip_id"] == chip_id).any():
            return f"{row.name}@{row.version}"
    return ""


def _dataset(catalogue: Catalogue, artifact: Artifact) -> Artifact | None:
    """Find the dataset in an artifact's lineage; None if the artifact is from an earlier stage."""
    try:
        return ancestor(catalogue, artifact, "dataset")
    except UnknownReference:
        return None


def _earlier(catalogue: Catalogue, dataset: Artifact) -> list[NameRow]:
    """List the published versions before a dataset, newest first.

    They are the versions of the dataset's names; of all names if it was not published.
    """
    names = [row for row in catalogue.names() if catalogue.kind(row.digest) == "dataset"]
    own = [row for row in names if row.digest == dataset.digest]
    if not own:
        return names
    last = {row.name: row.number for row in reversed(own)}  # the newest of each name
    return [row for row in names if row.number < last.get(row.name, 0)]


def _last_version_with(catalogue: Catalogue, dataset: Artifact, chip_id: str) -> PastChip | None:
    """Find the last version before a dataset that had a chip among its candidates."""
    later: dict[str, NameRow] = {
        row.name: row for row in catalogue.names() if row.digest == dataset.digest
    }
    for row in _earlier(catalogue, dataset):
        chips = _table(catalogue, row, "chips", "chips.parquet", CHIP)
        if chips is None:  # removed from the store: the version before it is tried
            continue
        if (chips["chip_id"] == chip_id).any():
            row_of_chip = chips[chips["chip_id"] == chip_id].to_dict("records")[0]
            chip = {str(name): value for name, value in row_of_chip.items()}
            samples = _table(catalogue, row, "dataset", "samples.parquet", ["chip_id"])
            kept = samples is not None and bool((samples["chip_id"] == chip_id).any())
            return PastChip(row, later.get(row.name), chip, kept)
        later[row.name] = row
    return None


def _table(
    catalogue: Catalogue, version: NameRow, kind: str, file: str, columns: list[str]
) -> pd.DataFrame | None:
    """Read a table in the lineage of a version; None if it is not in the store any more."""
    try:
        artifact = ancestor(catalogue, catalogue.get(version.digest), kind)
        return artifact.table(file, columns)
    except (CheckError, NotInStore, UnknownReference):
        return None


def _reason(old: Version, new: Version, chip: dict[str, Any]) -> tuple[str, str]:
    """Return the reason why a chip was removed, and the id of the item that supersedes its item.

    The reason is the one in the difference of the two versions, if the chip were the only sample.
    """
    import pandas as pd

    key = (str(chip["collection"]), str(chip["item_id"]))
    change = item_changes(old, new).get(key, {})
    sample = {name: chip[name] for name in CHIP[:4]} | {"source": "", "licence": ""}
    difference = compare(replace(old, samples=pd.DataFrame([sample])), new)
    return next(iter(difference.why_removed)), str(change.get("by", ""))
