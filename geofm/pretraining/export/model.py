"""The model artifact: weights and config that timm loads, and the features of a loaded model.

write_model      `model.safetensors`, `objective.safetensors`, `config.json`
load_model       the trained backbone;  random_model: the same network before training
features         pooled features of images, after the final map and the distilled stage
"""

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
from data_catalog.errors import CheckError, UsageError, first_line
from data_catalog.hashing import canonical
from geofm.config.recipe import PretrainSettings
from geofm.pretraining.backbone import final_width, forward_stages, stage_width, token_mean
from geofm.pretraining.data import Corpus
from geofm.pretraining.objective import Pretrainer
from geofm.pretraining.student import backbone_arguments, random_backbone
from geofm.raster.radiometry import WHITE
from geofm.raster.resample import resize_images
from geofm.runtime.threads import own_random_state

MODEL, OBJECTIVE, CONFIG = "model.safetensors", "objective.safetensors", "config.json"


class DamagedModel(CheckError):
    """The weights of a model artifact do not fit its config."""


class OldModel(UsageError):
    """A model artifact has a form that this version does not read."""


def model_config(
    settings: PretrainSettings, corpus: Corpus, licences: Sequence[str] = ()
) -> dict[str, Any]:
    """Make the content of ``config.json``: timm's own fields, and a section ``geofm``.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the backbone with its weights.
    Its input has shape (N, bands, size, size): unit pixels (``geofm.unit``) minus ``mean``, divided
    by ``std``, per band. For 8-bit imagery timm's own transforms do the same.

    Args:
        settings: The recipe's section ``pretrain``.
        corpus: The dataset.
        licences: Licences of its samples.
    """
    name = settings.student.partition("@")[0].partition(".")[0]
    default = timm.models.get_pretrained_cfg(name)
    first_conv = {"first_conv": default.first_conv} if default and default.first_conv else {}
    return {
        "architecture": name,
        "num_classes": 0,
        "model_args": backbone_arguments(settings, len(corpus.bands)),
        "pretrained_cfg": {
            "input_size": [len(corpus.bands), settings.size_px, settings.size_px],
            "fixed_input_size": default is not None and default.fixed_input_size,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # the whole image is resized, nothing is cut off
            "mean": list(corpus.mean),
            "std": list(corpus.std),
            "num_classes": 0,
            **first_conv,
            "license": " AND ".join(licences),
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
    """Write weights and config; equal weights give equal bytes."""
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
    objective = {
        name.removeprefix("student."): value
        for name, value in module.state_dict().items()
        if not name.startswith("student.backbone.")
    }
    for name, state in ((MODEL, backbone), (OBJECTIVE, objective)):
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_tensors(tensors, folder / name, metadata={"format": "pt"})
    (folder / CONFIG).write_bytes(canonical(config))


def read_model_config(artifact: Artifact) -> dict[str, Any]:
    """Read the config of a model artifact.

    Raises:
        OldModel: It was written before configs had timm's form.
    """
    config: dict[str, Any] = artifact.json(CONFIG)
    if "geofm" not in config:
        raise OldModel(
            f"model {artifact.digest[:12]} was made by an earlier geofm, in another form; run its "
            "recipe again to train it anew"
        )
    return config


def load_model(artifact: Artifact) -> tuple[nn.Module, dict[str, Any]]:
    """Load the trained backbone in evaluation mode, and its config.

    Raises:
        DamagedModel: The weights do not fit the config.
        OldModel: See ``read_model_config``.
    """
    config = read_model_config(artifact)
    with own_random_state():
        model: nn.Module = timm.create_model(
            config["architecture"], pretrained=False, **config["model_args"]
        )
    try:
        model.load_state_dict(load_tensors(artifact.local(MODEL)), strict=True)
    except RuntimeError as error:
        raise DamagedModel(
            f"model {artifact.digest[:12]}: its weights do not fit its config "
            f"({first_line(error)}); run `geofm verify {artifact.digest[:12]}`"
        ) from error
    return model.eval(), config


def random_model(config: dict[str, Any], seed: int) -> nn.Module:
    """Build the network that training with this seed started from, in evaluation mode."""
    return random_backbone(config["architecture"], config["model_args"], seed).eval()


@torch.no_grad()
def features(model: nn.Module, config: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
    """Compute pooled features of unmasked images, on the device of the images.

    Args:
        model: Network from ``load_model`` or ``random_model``.
        config: Config of the model.
        images: Images in unit space, shape (N, bands, H, W); resized to the size of pretraining.

    Returns:
        ``final``: mean over the normalised final map, shape (N, C). ``distilled``: mean over the
        distilled stage, for a Swin after the patch merging, shape (N, C').
    """
    timm_config = config["pretrained_cfg"]
    bands, size_px = int(timm_config["input_size"][0]), int(timm_config["input_size"][-1])
    mean, std = (
        torch.tensor(timm_config[name], device=images.device).reshape(1, bands, 1, 1)
        for name in ("mean", "std")
    )
    normalised = (resize_images(images.float(), size_px) - mean) / std
    tokens, final = forward_stages(model, normalised, int(config["geofm"]["distill_stage"]))
    if final is None:
        return {"distilled": token_mean(tokens)}
    return {"final": token_mean(final), "distilled": token_mean(tokens)}
