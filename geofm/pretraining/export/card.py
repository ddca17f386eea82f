"""The model's card: what it is, what it was made from, under which terms, and how to load it.

What a run cost is not in it: that differs from run to run, and an artifact's bytes may not.
``geofm export`` adds it, as it stands in the catalogue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
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

Bands in the order {bands}. *Unit* pixels are reflectance / {white} for 16-bit data (count x scale /
{white}, after the product's offset) and count / 255 for 8-bit data. `config.json` holds all of this
under `pretrained_cfg` and `geofm`.

This is the *final* feature: the mean over the normalised last map. The *distilled* feature is the
mean over stage {stage}, without a norm: of a Swin with the patch merging that follows it, of a ViT
after {stage} quarters of its depth. There the student was held against the teacher{pooled}; where
the reconstruction had no weight, what comes later has learned nothing. `geofm.pretraining.features`
gives both (for Hiera and ConvNeXt timm's own output norms the mean instead).

`objective.safetensors` holds what only pretraining needs: mask token, decoder, projector.
`metrics.parquet` has a row per training step.

## Lineage

| | digest |
|---|---|
{lineage}

`geofm trace` follows these to the source assets.

## Terms

The weights were learned from imagery under these terms: {terms}. They are listed, not interpreted:
whoever publishes the weights decides what follows from them.

{sources}
{weights}
## Limits

It has seen the places, seasons and sensors of its dataset, and no others; other sensors' values
need the same unit scale and the same bands. Judge it by the scores of its own evaluation beside
the frozen teacher and the untrained student, and not by one training seed. Training is repeated
bit for bit only on a processor with as many threads.
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
    for role, weights in facts["weights"].items():
        rows.append((f"{role} file ({weights['origin']})", weights["sha256"] or "none"))
        if "model" in weights:
            rows.append((f"{role} model", weights["model"]))
    told = {
        "epochs", "batch", "precision", "mask_ratio", "mask_patch_px", "size_px",
    }  # fmt: skip
    text = _CARD.format(
        **settings.model_dump(include=told),
        name=data.facts.get("name", dataset.digest[:12]),
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
        lineage="\n".join(f"| {role} | `{digest}` |" for role, digest in rows),
        terms=", ".join(sorted({str(s["licence"]) for s in facts["sources"]})) or "none named",
        sources=_sources(facts["sources"]),
        weights=_weights(facts["weights"]),
    )
    path.write_text(text, encoding="utf-8")


def _objective(settings: PretrainSettings) -> str:
    parts = []
    if settings.mim_weight:
        parts.append("masked image modelling")
    if settings.alpha:
        seen = "the same crop" if settings.teacher_features == "live" else "the whole chip"
        parts.append(f"the cosine distance to a frozen teacher that sees {seen} unmasked")
    return ", and ".join(parts)


def _loss(settings: PretrainSettings) -> str:
    terms = [f"{settings.mim_weight} x masked L1"] if settings.mim_weight else []
    if settings.alpha:
        weight = str(settings.alpha)
        if settings.alpha_end is not None:
            weight += f" (at the end {settings.alpha_end})"
        taught = settings.teacher_stage or settings.distill_stage
        between = (
            f"stage {settings.distill_stage} ({settings.projector}) and the teacher's {taught}"
        )
        terms.append(f"{weight} x negative cosine of {between}")
    return " + ".join(terms)


def _sources(sources: list[dict[str, Any]]) -> str:
    if not sources:
        return "The dataset's manifest names no source; see its own card.\n"
    lines = ["| licence | source | samples | attribution |", "|---|---|---:|---|"]
    for entry in sources:
        asked = " ".join(str(entry.get("attribution") or "").split()).replace("|", "\\|")
        lines.append(f"| {entry['licence']} | {entry['source']} | {entry['rows']} | {asked} |")
    return "\n".join(lines) + "\n"


def _weights(weights: dict[str, dict[str, Any]]) -> str:
    """The terms of the weights that training began with or looked at."""
    said = ""
    for role, found in weights.items():
        terms = found["licence"] or "terms that are not stated with them"
        if "model" in found:
            terms = f"the terms of geofm model {found['model'][:12]} (`geofm licences`)"
        said += f"The {role}'s {'first ' if role == 'student' else ''}weights are under {terms}.\n"
    return said
