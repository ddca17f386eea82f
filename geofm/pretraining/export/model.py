"""The model artifact: weights that timm loads, the settings to build it again, and its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, UsageError
from data_catalog.hashing import canonical
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.encoders import resize
from geofm.pretraining.backbone import final_width, stage_width, token_mean, walk
from geofm.pretraining.data import Corpus
from geofm.pretraining.objective import Pretrainer
from geofm.pretraining.student import backbone_arguments, random_backbone
from geofm.raster.radiometry import WHITE
from geofm.runtime.threads import own_random_state

MODEL, OBJECTIVE, CONFIG = "model.safetensors", "objective.safetensors", "config.json"


class DamagedModel(CheckError):
    """The weights of a model artifact do not fit its own config."""


class OldModel(UsageError):
    """A model artifact in a form that is not read any more."""


def describe(
    settings: PretrainSettings, corpus: Corpus, terms: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of ``config.json``: a config as timm writes and reads it, and a section of ours.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the backbone with its weights.
    Its input is [N, bands, size, size]: unit pixels (``geofm.unit``) less ``mean``, divided by
    ``std``, per band. For 8-bit imagery that is what timm's own transforms do.

    Args:
        settings: the recipe's section.
        corpus: the dataset.
        terms: licences of its samples.
    """
    name = settings.student.partition("@")[0].partition(".")[0]
    usual = timm.models.get_pretrained_cfg(name)
    return {
        "architecture": name,
        "num_classes": 0,
        "model_args": backbone_arguments(settings, len(corpus.bands)),
        "pretrained_cfg": {
            "input_size": [len(corpus.bands), settings.size_px, settings.size_px],
            "fixed_input_size": usual is not None and usual.fixed_input_size,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # resized as it is, nothing cut off
            "mean": list(corpus.mean),
            "std": list(corpus.std),
            "num_classes": 0,
            **({"first_conv": usual.first_conv} if usual is not None and usual.first_conv else {}),
            "license": " AND ".join(terms),
        },
        "geofm": {
            "bands": list(corpus.bands),
            "unit": {"uint8": "count / 255", "uint16": f"count * scale / {WHITE}"},
            "distill_stage": settings.distill_stage,
            "mask_patch_px": settings.mask_patch_px,
            "dataset": corpus.digest,
        },
    }


def write_model(module: Pretrainer, config: dict[str, Any], folder: Path) -> None:
    """Write the weights and the config; the same bytes for the same weights."""
    network = module.student.backbone
    widths = {
        "final": final_width(network),
        "distilled": stage_width(network, int(config["geofm"]["distill_stage"])),
    }
    config = {
        **config,
        "num_features": widths["final"],
        "geofm": {**config["geofm"], "features": widths},
    }
    backbone = network.state_dict()
    kept = {
        name.removeprefix("student."): value
        for name, value in module.state_dict().items()
        if not name.startswith("student.backbone.")
    }
    for name, state in ((MODEL, backbone), (OBJECTIVE, kept)):
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_tensors(tensors, folder / name, metadata={"format": "pt"})
    (folder / CONFIG).write_bytes(canonical(config))


def read_config(artifact: Artifact) -> dict[str, Any]:
    """The config of a model artifact, as ``describe`` and ``write_model`` made it.

    Raises:
        OldModel: it was made before configs had timm's form.
    """
    config: dict[str, Any] = artifact.json(CONFIG)
    if "geofm" not in config:
        raise OldModel(
            f"model {artifact.digest[:12]} was made by an earlier geofm, in another form; run its "
            "recipe again to train it anew"
        )
    return config


def load_model(artifact: Artifact) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained backbone in evaluation mode, and its config.

    Raises:
        DamagedModel: weights and config do not belong together.
        OldModel: see ``read_config``.
    """
    config = read_config(artifact)
    with own_random_state():
        model: nn.Module = timm.create_model(
            config["architecture"], pretrained=False, **config["model_args"]
        )
    try:
        model.load_state_dict(load_tensors(artifact.local(MODEL)), strict=True)
    except RuntimeError as error:
        raise DamagedModel(
            f"model {artifact.digest[:12]}: its weights do not fit its config "
            f"({str(error).splitlines()[0]}); run `geofm verify {artifact.digest[:12]}`"
        ) from error
    return model.eval(), config


def random_model(config: dict[str, Any], seed: int) -> nn.Module:
    """The very network that training with this seed started from, in evaluation mode."""
    return random_backbone(config["architecture"], config["model_args"], seed).eval()


@torch.no_grad()
def features(model: nn.Module, config: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
    """Pooled features of images, unmasked, on the device of the images.

    Args:
        model: from ``load_model`` or ``random_model``.
        config: the model's own.
        images: [N, bands, H, W] in unit space; resized to the size of pretraining.

    Returns:
        ``final``: mean over the normalised final map, [N, C]; ``distilled``: mean over the
        distilled stage, its patch merging included, [N, C'].
    """
    given = config["pretrained_cfg"]
    bands, size_px = int(given["input_size"][0]), int(given["input_size"][-1])
    mean, std = (
        torch.tensor(given[name], device=images.device).reshape(1, bands, 1, 1)
        for name in ("mean", "std")
    )
    normalised = (resize(images.float(), size_px) - mean) / std
    tapped, final = walk(model, normalised, int(config["geofm"]["distill_stage"]))
    if final is None:
        return {"distilled": token_mean(tapped)}
    return {"final": token_mean(final), "distilled": token_mean(tapped)}
