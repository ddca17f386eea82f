"""A dataset for others: a folder as Hugging Face lays them out, or its Croissant description."""

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
#: Hugging Face's classes of size.
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"),
         (1e7, "1M<n<10M"), (1e8, "10M<n<100M"), (1e9, "100M<n<1B"))  # fmt: skip


class NotADataset(UsageError):
    """Only datasets are exported like this."""


def require_dataset(dataset: Artifact) -> None:
    """Raises NotADataset for any other kind."""
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

    It appears in one step, after every file was found to be as sealed.

    Args:
        dataset: what is exported.
        folder: where; must not exist.
        title: name of the dataset.
        version: name of the version.
        published: ISO date.
        hard_links: link the files of a local store instead of copying them. They are then the
            very files of the store: do not change them in place.

    Raises:
        NotADataset: it is something else.
        TargetExists: the folder is there already.
        CheckError: a file is not as sealed.
    """
    require_dataset(dataset)
    with exported_copy(dataset, folder, hard_links, rewritten=(CARD,)) as beside:
        card = (beside / CARD).read_text(encoding="utf-8")
        write_card(beside, front_matter(dataset, title), card)
        export_croissant(dataset, beside / CROISSANT, title, version, published)


def front_matter(dataset: Artifact, title: str) -> dict[str, Any]:
    """What Hugging Face reads at the top of a dataset's card."""
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
        # one format in a repository: the tables are read by load_dataset("parquet", data_files=…)
        "configs": [{"config_name": "default", "data_files": shards}],
    }
