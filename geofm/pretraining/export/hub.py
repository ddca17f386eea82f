"""A model for others: a folder as Hugging Face lays models out, which timm loads as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.provenance.costs import Cost
from data_catalog.storage.export import copied
from geofm.formats.cards import CARD, terms_of_use, write_card
from geofm.pretraining.export.mlm import mlm_item, to_text
from geofm.pretraining.export.model import CONFIG, read_config
from geofm.runtime.cost import as_markdown
from geofm.shards.croissant import licences

ITEM = "item.json"

_MORE = """
## Cost

All stages of the lineage, each with the runs that made it.

{cost}

## Digest

Model `{digest}`: the SHA-256 of `manifest.json`, which has that of every file as it was sealed.
This card's head, cost and digest, and `geofm.digest` in `config.json`, were added at export.
"""


def export_model(
    model: Artifact,
    dataset: Artifact,
    folder: Path,
    title: str,
    costs: Sequence[Cost],
    hard_links: bool = False,
) -> None:
    """Write a folder that can be pushed to a model repository: weights, config, card, STAC item.

    Args:
        model: an artifact of kind ``model``.
        dataset: what it was trained on.
        folder: where; must not exist.
        title: name of the model.
        costs: of the model and of all it was made from.
        hard_links: link the files of a local store instead of copying them.

    Raises:
        TargetExists: the folder is there already.
        CheckError: a file is not as sealed.
    """
    with copied(model, folder, hard_links, rewritten=(CARD, CONFIG)) as made:
        config = read_config(model)
        config["geofm"]["digest"] = model.digest
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (made / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        more = _MORE.format(cost=as_markdown(costs), digest=model.digest)
        card = (made / CARD).read_text(encoding="utf-8")
        write_card(made, front_matter(model, dataset), card + more)
        item = mlm_item(model, dataset, title, made)
        (made / ITEM).write_text(to_text(item), encoding="utf-8")


def front_matter(model: Artifact, dataset: Artifact) -> dict[str, Any]:
    """What Hugging Face reads at the top of a model's card."""
    return {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        **terms_of_use(licences(model)),
        "datasets": [str(dataset.manifest.facts.get("name", dataset.digest[:12]))],
        "tags": ["remote-sensing", "earth-observation", "geospatial", "masked-image-modeling",
                 "knowledge-distillation"],
    }  # fmt: skip
