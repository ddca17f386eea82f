"""The model artifact: weights that timm loads, the settings to build it again, and its features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

from data_catalog.artifact import Artifact
from data_catalog.canonical import canonical
from data_catalog.errors import CheckError
from geofm.encoders import resize
from geofm.pretrain_settings import PretrainSettings
from geofm.pretraining.backbone import token_mean, walk
from geofm.pretraining.data import Corpus
from geofm.pretraining.objective import Pretrainer
from geofm.pretraining.student import backbone_arguments, random_backbone
from geofm.threads import own_random_state

MODEL, OBJECTIVE, CONFIG = "model.safetensors", "objective.safetensors", "config.json"


class DamagedModel(CheckError):
    """The weights of a model artifact do not fit its own config."""


def describe(settings: PretrainSettings, corpus: Corpus) -> dict[str, Any]:
    """The content of ``config.json``.

    ``timm.create_model(config["timm"], **config["args"])`` builds the backbone. Its input is
    [N, bands, size_px, size_px]: unit pixels less ``mean``, divided by ``std``, per band.
    """
    return {
        "timm": settings.student.partition("@")[0],
        "args": backbone_arguments(settings, len(corpus.bands)),
        "bands": list(corpus.bands),
        "mean": list(corpus.mean),
        "std": list(corpus.std),
        "size_px": settings.size_px,
        "distill_stage": settings.distill_stage,
        "mask_patch_px": settings.mask_patch_px,
    }


def write_model(module: Pretrainer, config: dict[str, Any], folder: Path) -> None:
    """Write the weights and the config; the same bytes for the same weights."""
    backbone = module.student.backbone.state_dict()
    kept = {
        name.removeprefix("student."): value
        for name, value in module.state_dict().items()
        if not name.startswith("student.backbone.")
    }
    for name, state in ((MODEL, backbone), (OBJECTIVE, kept)):
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_tensors(tensors, folder / name, metadata={"format": "pt"})
    (folder / CONFIG).write_bytes(canonical(config))


def load_model(artifact: Artifact) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained backbone in evaluation mode, and its config.

    Raises:
        DamagedModel: weights and config do not belong together.
    """
    config = artifact.json(CONFIG)
    with own_random_state():
        model: nn.Module = timm.create_model(config["timm"], pretrained=False, **config["args"])
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
    return random_backbone(config["timm"], config["args"], seed).eval()


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
    shape = (1, len(config["bands"]), 1, 1)
    mean = torch.tensor(config["mean"], device=images.device).reshape(shape)
    std = torch.tensor(config["std"], device=images.device).reshape(shape)
    normalised = (resize(images.float(), int(config["size_px"])) - mean) / std
    tapped, final = walk(model, normalised, int(config["distill_stage"]))
    if final is None:
        return {"distilled": token_mean(tapped)}
    return {"final": token_mean(final), "distilled": token_mean(tapped)}
