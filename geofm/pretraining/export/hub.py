"""A trained model as a folder for Hugging Face, which timm loads as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.provenance.costs import ArtifactCost
from data_catalog.provenance.licences import card_licence, source_licences
from data_catalog.storage.export import exported_copy
from geofm.formats.cards import CARD, write_card
from geofm.pretraining.export.mlm import item_json, mlm_item
from geofm.pretraining.export.model import CONFIG, read_model_config
from geofm.runtime.cost import as_markdown

ITEM = "item.json"

_ADDED_SECTIONS = """
## Cost

All stages of the lineage, with the runs that made each.

{cost}

## Digest

Model `{digest}`: the SHA-256 of `manifest.json`, which contains the SHA-256 of every sealed file.
The export added the head, the cost and the digest of this card, and `geofm.digest` in
`config.json`.
"""


def export_model(
    model: Artifact,
    dataset: Artifact,
    folder: Path,
    title: str,
    costs: Sequence[ArtifactCost],
    hard_links: bool = False,
) -> None:
    """Write a folder for a model repository: weights, config, card and STAC item.

    Args:
        model: An artifact of kind ``model``.
        dataset: The dataset that the model was trained on.
        folder: Folder to create.
        title: Name of the model.
        costs: Costs of the model and of its lineage.
        hard_links: Whether to link the files of a local store instead of copying them.

    Raises:
        TargetExists: The folder exists.
        CheckError: A file does not have its sealed digest.
    """
    with exported_copy(model, folder, hard_links, rewritten=(CARD, CONFIG)) as target:
        config = read_model_config(model)
        config["geofm"]["digest"] = model.digest
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (target / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        added = _ADDED_SECTIONS.format(cost=as_markdown(costs), digest=model.digest)
        card = (target / CARD).read_text(encoding="utf-8")
        write_card(target, model_front_matter(model, dataset), card + added)
        item = mlm_item(model, dataset, title, target)
        (target / ITEM).write_text(item_json(item), encoding="utf-8")


def model_front_matter(model: Artifact, dataset: Artifact) -> dict[str, Any]:
    """The YAML head of a model card, as Hugging Face reads it."""
    return {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        **card_licence(source_licences(model.manifest.facts)),
        "datasets": [str(dataset.manifest.facts.get("name", dataset.digest[:12]))],
        "tags": [
            "remote-sensing",
            "earth-observation",
            "geospatial",
            "masked-image-modeling",
            "knowledge-distillation",
        ],
    }
