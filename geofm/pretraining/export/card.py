"""The model card: origin of the model, its terms, and how to load it.

The card does not contain the cost of the run, because that differs from run to run and the bytes of
an artifact must not. ``geofm export`` adds the cost from the catalogue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.provenance.licences import source_licences
from geofm.config.recipe import PretrainSettings
from geofm.raster.radiometry import WHITE

_CARD = """\
# {student}, pretrained on `{name}`

A backbone pretrained by geofm after Mendieta et al. (ICCV 2023): {objective}. It gives features; it
has no classes.

| | |
|---|---|
| student | {student}, {init}, {parameters:,} parameters |
| teacher | {teacher} |
| loss | {loss} |
| mask | {mask_ratio:.0%} of the patches of {mask_patch_px} px {masked}, images of {size_px} px |
| optimisation | AdamW, {epochs} epochs of {samples} samples, batch {batch}, seed {seed}{mean} |
| arithmetic | {precision} on {device} |
| input | {bands}; {size_px} x {size_px} px |

## Use

```python
import timm, torch

model = timm.create_model("local-dir:.", pretrained=True).eval()
mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
features = model((unit - mean) / std)  # unit: [N, {band_count}, {size_px}, {size_px}]
```

The bands are in the order {bands}. *Unit* pixels are reflectance / {white} for 16-bit data (count x
scale / {white}, after the product's offset) and count / 255 for 8-bit data. `config.json` contains
all of this under `pretrained_cfg` and `geofm`.

This code gives the *final* feature: the mean over the normalised last feature map. The *distilled*
feature is the mean over stage {stage}, before any norm. For a Swin, stage {stage} includes the
patch merging that follows it; for a ViT it ends after {stage} quarters of the depth. Training
compared this stage with the teacher{pooled}. If the reconstruction had no weight, later layers have
learned nothing. `geofm.pretraining.features` gives both features. (For Hiera and ConvNeXt the
output of timm itself is normalised after the mean instead.)

`objective.safetensors` contains the parts that only pretraining needs: mask token, decoder,
projector. `metrics.parquet` has one row per training step.

## Lineage

| | digest |
|---|---|
{lineage}

`geofm trace` follows these digests to the source assets.

## Terms

The weights were learned from imagery under these terms: {terms}. The terms are listed here without
interpretation; a publisher of the weights must decide what follows from them.

{sources}
{weights}
## Limits

The model has seen only the regions, seasons and sensors of its dataset. Data of other sensors needs
the same unit scale and the same bands. Judge the model by the scores of its own evaluation, beside
the frozen teacher and the untrained student, and from more than one training seed. Training repeats
bit for bit only on a CPU with the same number of threads.
"""

#: Settings that the card prints under their own names.
_PRINTED = {"epochs", "batch", "precision", "mask_ratio", "mask_patch_px", "size_px"}


def write_model_card(
    path: Path,
    settings: PretrainSettings,
    dataset: Artifact,
    facts: dict[str, Any],
    seed: int,
) -> None:
    """Write the card; its text does not depend on time or machine.

    Args:
        path: Path of ``README.md``.
        settings: The recipe's section ``pretrain``, with timm names for student and teacher.
        dataset: The dataset artifact.
        facts: Facts of the model's manifest.
        seed: Seed of the run.
    """
    manifest = dataset.manifest
    digests = [("dataset", dataset.digest), *sorted(manifest.inputs.items())]
    digests.append(("teacher weights", facts["teacher_weights_sha256"] or "none"))
    for role, weights in facts["weights"].items():
        digests.append((f"{role} file ({weights['origin']})", weights["sha256"] or "none"))
        if "model" in weights:
            digests.append((f"{role} model", weights["model"]))
    text = _CARD.format(
        **settings.model_dump(include=_PRINTED),
        name=manifest.facts.get("name", dataset.digest[:12]),
        objective=_objective(settings),
        loss=_loss(settings),
        student=facts["student"],
        init=f"{settings.student_init} weights",
        parameters=facts["parameters"],
        teacher=facts["teacher"] or "none",
        stage=settings.distill_stage,
        samples=facts["samples"],
        seed=seed,
        device=facts["arithmetic"],
        bands=", ".join(facts["bands"]),
        band_count=len(facts["bands"]),
        white=WHITE,
        masked="left out" if settings.masking == "drop" else "replaced by a token",
        mean=f", running mean of the weights ({settings.ema} a step)" if settings.ema else "",
        pooled=f" by its {settings.distill_pool}{', normalised' if settings.distill_norm else ''}",
        lineage="\n".join(f"| {role} | `{digest}` |" for role, digest in digests),
        terms=", ".join(source_licences(facts)) or "none named",
        sources=_source_table(facts["sources"]),
        weights=_weights_terms(facts["weights"]),
    )
    path.write_text(text, encoding="utf-8")


def _objective(settings: PretrainSettings) -> str:
    """The objective in words."""
    parts = []
    if settings.mim_weight:
        parts.append("masked image modelling")
    if settings.alpha:
        seen = "the same crop" if settings.teacher_features == "live" else "the whole chip"
        parts.append(f"the cosine distance to a frozen teacher that sees {seen} unmasked")
    return ", and ".join(parts)


def _loss(settings: PretrainSettings) -> str:
    """The loss as a sum of its weighted terms."""
    terms = [f"{settings.mim_weight} x masked L1"] if settings.mim_weight else []
    if settings.alpha:
        weight = str(settings.alpha)
        if settings.alpha_end is not None:
            weight += f" (at the end {settings.alpha_end})"
        student_stage = f"stage {settings.distill_stage} ({settings.projector})"
        teacher_stage = settings.teacher_stage or settings.distill_stage
        terms.append(
            f"{weight} x negative cosine of {student_stage} and the teacher's {teacher_stage}"
        )
    return " + ".join(terms)


def _source_table(sources: list[dict[str, Any]]) -> str:
    """Licence, source, samples and attribution as a Markdown table."""
    if not sources:
        return "The dataset's manifest names no source; see its own card.\n"
    lines = ["| licence | source | samples | attribution |", "|---|---|---:|---|"]
    for source in sources:
        attribution = " ".join(str(source.get("attribution") or "").split()).replace("|", "\\|")
        lines.append(
            f"| {source['licence']} | {source['source']} | {source['rows']} | {attribution} |"
        )
    return "\n".join(lines) + "\n"


def _weights_terms(weights: dict[str, dict[str, Any]]) -> str:
    """The terms of the teacher's weights and of the student's initial weights."""
    text = ""
    for role, facts in weights.items():
        terms = facts["licence"] or "terms that are not stated with them"
        if "model" in facts:
            terms = f"the terms of geofm model {facts['model'][:12]} (`geofm licences`)"
        subject = "student's first" if role == "student" else f"{role}'s"
        text += f"The {subject} weights are under {terms}.\n"
    return text
