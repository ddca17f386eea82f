"""The model's card: what it is, what it was made from, under which terms, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from geofm.pretrain_settings import PretrainSettings

_CARD = """\
---
library_name: timm
tags: [remote-sensing, masked-image-modeling, knowledge-distillation]
---
# {student}, pretrained on `{name}`

A backbone pretrained by geofm with the objective of Mendieta et al. (ICCV 2023): masked image
modelling, and the cosine distance to a frozen teacher that sees the same crop unmasked.

| | |
|---|---|
| student | {student}, {init}, {parameters:,} parameters |
| teacher | {teacher} |
| loss | {mim_weight} x masked L1 + {alpha} x negative cosine at stage {stage} |
| mask | {mask_ratio:.0%} of the patches of {mask_patch_px} px, images of {size_px} px |
| optimisation | AdamW, {epochs} epochs of {samples} samples, batch {batch}, seed {seed} |
| arithmetic | {precision} on {device} |
| input | {bands}; unit pixels (reflectance / 0.3, or 8-bit / 255) less mean, over std, per band |

## Lineage

| | digest |
|---|---|
{lineage}

`geofm trace` follows these to the source assets.

## Terms

The weights were learned from imagery under these terms. They are listed, not interpreted: whoever
publishes the weights decides what follows from them.

{terms}

## Use

```python
import json, timm
from safetensors.torch import load_file

config = json.load(open("config.json"))
model = timm.create_model(config["timm"], **config["args"])
model.load_state_dict(load_file("model.safetensors"))
```

`objective.safetensors` holds what only pretraining needs: mask token, decoder, projector.
`metrics.parquet` has a row per training step.

## Limits

Judge it by the scores of its own evaluation beside the frozen teacher and the untrained student.
It has seen the places, seasons and sensors of its dataset and no others.
"""


def write_card(
    path: Path,
    settings: PretrainSettings,
    dataset: Artifact,
    facts: dict[str, Any],
    seed: int,
) -> None:
    """Write ``README.md``; nothing in it depends on when or where."""
    data = dataset.manifest
    rows = [("dataset", dataset.digest), *sorted(data.inputs.items())]
    rows.append(("teacher weights", facts["teacher_weights_sha256"] or "none"))
    text = _CARD.format(
        **{
            **settings.model_dump(include={"epochs", "batch", "precision", "mim_weight", "alpha"}),
            **settings.model_dump(include={"mask_ratio", "mask_patch_px", "size_px"}),
        },
        name=data.facts.get("name", dataset.digest[:12]),
        student=facts["student"],
        init=f"{settings.student_init} weights",
        parameters=facts["parameters"],
        teacher=facts["teacher"] or "none",
        stage=settings.distill_stage,
        samples=facts["samples"],
        seed=seed,
        device=facts["arithmetic"],
        bands=", ".join(facts["bands"]),
        lineage="\n".join(f"| {role} | `{digest}` |" for role, digest in rows),
        terms=_terms(data.facts.get("sources", [])),
    )
    path.write_text(text, encoding="utf-8")


def _terms(sources: list[dict[str, Any]]) -> str:
    if not sources:
        return "The dataset's manifest names no source; see its own card."
    lines = ["| source | licence | samples | attribution |", "|---|---|---|---|"]
    for entry in sources:
        asked = entry.get("attribution") or ""
        lines.append(f"| {entry['source']} | {entry['licence']} | {entry['rows']} | {asked} |")
    return "\n".join(lines)
