"""Export a dataset: a folder for the Hugging Face hub, or its Croissant description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from data_catalog.provenance.licences import card_licence, source_licences
from data_catalog.storage.export import exported_copy
from geofm.formats.cards import CARD, write_card
from geofm.shards.croissant import croissant
from geofm.shards.split import HOLDOUT, TRAIN

CROISSANT = "croissant.json"
#: Size categories of Hugging Face.
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"),
         (1e7, "1M<n<10M"), (1e8, "10M<n<100M"), (1e9, "100M<n<1B"))  # fmt: skip


class NotADataset(UsageError):
    """The artifact is not a dataset."""


def require_dataset(dataset: Artifact) -> None:
    """Raise NotADataset for an artifact of another kind."""
    if dataset.kind != "dataset":
        raise NotADataset(
            f"{dataset.digest[:12]} is of kind {dataset.kind}: name a dataset (`geofm list`)"
        )


def export_croissant(
    dataset: Artifact, path: Path, title: str, version: str = "", published: str = ""
) -> None:
    """Write the Croissant 1.1 description of a dataset."""
    require_dataset(dataset)
    text = json.dumps(croissant(dataset, title, version, published), indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def export_huggingface(
    dataset: Artifact, folder: Path, title: str, version: str = "", published: str = "",
    hard_links: bool = False,
) -> None:  # fmt: skip
    """Write a folder that can be pushed to a dataset repository: files, card and Croissant.

    The folder appears in one step, after the digest of each file was checked.

    Args:
        dataset: Dataset to export.
        folder: Target folder; it must not exist.
        title: Name of the dataset.
        version: Name of the version.
        published: Date of publication (ISO 8601).
        hard_links: Link the files of a local store instead of copying them. They stay files of
            the store, so they must not be changed in place.

    Raises:
        NotADataset: The artifact is of another kind.
        TargetExists: The folder exists already.
        CheckError: A file differs from the sealed one.
    """
    require_dataset(dataset)
    with exported_copy(dataset, folder, hard_links, rewritten=(CARD,)) as beside:
        card = (beside / CARD).read_text(encoding="utf-8")
        write_card(beside, front_matter(dataset, title), card)
        export_croissant(dataset, beside / CROISSANT, title, version, published)


def front_matter(dataset: Artifact, title: str) -> dict[str, Any]:
    """Return the YAML head of a dataset's card for Hugging Face."""
    manifest = dataset.manifest
    name, count = manifest.facts["name"], manifest.counts["rows_out"]
    shards = [
        {"split": split, "path": f"shards/{name}-{split}-*.tar"}
        for split in (TRAIN, HOLDOUT)
        if manifest.counts.get(split)
    ]
    return {
        **card_licence(source_licences(dataset.manifest.facts)),
        "pretty_name": title,
        "size_categories": [next((label for most, label in SIZES if count < most), "n>1T")],
        "task_categories": ["image-feature-extraction"],
        "tags": ["remote-sensing", "earth-observation", "geospatial", "webdataset"],
        # A configuration has one format; load_dataset("parquet", data_files=…) reads the tables.
        "configs": [{"config_name": "default", "data_files": shards}],
    }
