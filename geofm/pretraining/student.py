"""The network that is pretrained: a timm Swin or ViT that sees a mask token instead of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from data_catalog.canonical import digest_of
from data_catalog.errors import UsageError
from geofm.encoders import check_model_name, load_file, pretrained_file
from geofm.pretraining.backbone import (
    embed_patches,
    patch_size,
    reduction,
    run_stages,
    stage_width,
)
from geofm.pretraining.masking import spread
from geofm.settings import PretrainSettings
from geofm.threads import own_random_state

#: timm modules whose networks can be students.
SWIN_MODULES = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2")
VIT_MODULES = ("timm.models.vision_transformer",)
#: What other settings and the dataset decide.
RESERVED = {
    "in_chans": "it is the number of cut.bands",
    "img_size": "set pretrain.size_px",
    "num_classes": "a backbone has none",
}


class BadStudent(UsageError):
    """The student cannot be built, or does not fit the sizes that were set."""


class Student(nn.Module):
    """A backbone and the token that stands for what is masked."""

    def __init__(self, backbone: nn.Module, mask_token: Tensor, stage: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(mask_token)
        self.stage = stage

    def forward(
        self, images: Tensor, mask: Tensor, *, whole: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Distilled stage and final map of masked images.

        Args:
            images: [B, bands, S, S], normalised.
            mask: [B, g, g] bool, True where hidden.
            whole: compute the final map as well.
        """
        tokens = embed_patches(self.backbone, images)
        hidden = spread(mask, tokens.shape[1])[..., None]
        tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        return run_stages(self.backbone, tokens, self.stage, whole=whole)


def derived_seed(seed: int, what: str) -> int:
    """A seed of its own for each module, so that none disturbs how another one starts."""
    return int(digest_of([seed, what])[:15], 16)


def backbone_arguments(settings: PretrainSettings, bands: int) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that build the backbone again.

    Raises:
        BadStudent: not a Swin or ViT of timm, or an argument that other settings decide.
        UnknownEncoder: timm has no such model.
    """
    name = settings.student.partition("@")[0]
    check_model_name(name)
    for reserved, why in RESERVED.items():
        if reserved in settings.student_args:
            raise BadStudent(f"pretrain.student_args: leave out {reserved}, {why}")
    module = timm.model_entrypoint(name.partition(".")[0]).__module__
    if module not in SWIN_MODULES + VIT_MODULES:
        raise BadStudent(
            f"pretrain.student: {name} is neither Swin nor a plain ViT; give one of those, "
            "e.g. swin_tiny_patch4_window7_224 or vit_small_patch16_224"
        )
    # The paper's code drops no paths in pretraining; a masked ViT learns through its patch tokens.
    pooled = {"global_pool": "avg", "fc_norm": False} if module in VIT_MODULES else {}
    fixed = {"in_chans": bands, "img_size": settings.size_px, "num_classes": 0}
    return {"drop_path_rate": 0.0, **pooled, **settings.student_args, **fixed}


def random_backbone(name: str, arguments: dict[str, Any], seed: int) -> nn.Module:
    """The timm model that ``torch.manual_seed(seed)`` gives; the caller's state is left alone.

    Raises:
        BadStudent: timm refuses the arguments.
    """
    with own_random_state(seed):
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
            raise BadStudent(
                f"timm cannot build pretrain.student {name} with pretrain.student_args "
                f"({arguments}): {error}"
            ) from error
    return model


def build_student(settings: PretrainSettings, bands: int, seed: int) -> Student:
    """A student at its first step.

    Raises:
        BadStudent: it cannot be built, or its grid does not fit size_px or mask_patch_px.
        WeightsMissing: ``student_init: pretrained`` and no weights.
    """
    arguments = backbone_arguments(settings, bands)
    name, at, file = settings.student.partition("@")
    if settings.student_init == "random":
        if at:
            raise BadStudent(
                "pretrain.student names a file of weights, but pretrain.student_init is random; "
                "set it to pretrained, or leave out the file"
            )
        backbone = random_backbone(name, arguments, seed)
    else:
        with own_random_state(seed):
            backbone = load_file(name, Path(file) if at else pretrained_file(name), **arguments)
    _check_sizes(backbone, settings)
    width = embed_width(backbone)
    generator = torch.Generator().manual_seed(derived_seed(seed, "mask token"))
    token = torch.empty(1, 1, 1, width)
    nn.init.trunc_normal_(token, std=0.02, generator=generator)
    return Student(backbone, token, settings.distill_stage)


def embed_width(backbone: Any) -> int:
    """Channels of a token right after the patch embedding."""
    return int(backbone.patch_embed.proj.out_channels)


def _check_sizes(backbone: nn.Module, settings: PretrainSettings) -> None:
    stage_width(backbone, settings.distill_stage)
    patch, coarse = patch_size(backbone), reduction(backbone)
    if settings.size_px % coarse:
        raise BadStudent(
            f"pretrain.size_px is {settings.size_px}, but {settings.student} needs a multiple of "
            f"{coarse}, e.g. {max(1, round(settings.size_px / coarse)) * coarse}"
        )
    if settings.mask_patch_px % patch:
        raise BadStudent(
            f"pretrain.mask_patch_px is {settings.mask_patch_px}, but {settings.student} needs a "
            f"multiple of its patches of {patch} pixels"
        )
