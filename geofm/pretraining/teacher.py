"""The frozen teacher: the same crop, unmasked, its red, green and blue alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geofm.encoders import Encoder, load_encoder, normalise, resize
from geofm.pretrain_settings import PretrainSettings
from geofm.pretraining.backbone import PAPERS_POOLING, Pooling, family, stage_width, walk
from geofm.weights import Weights


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder and the stage whose pooled feature is taught; ``width`` is its channels."""

    encoder: Encoder
    stage: int
    size_px: int
    width: int
    pooling: Pooling = PAPERS_POOLING
    walk: Callable[..., tuple[Tensor, Tensor | None]] = walk


def as_teacher(encoder: Encoder, stage: int, size_px: int | None = None) -> Teacher:
    """A teacher of an encoder that is already loaded.

    Args:
        encoder: any frozen encoder.
        stage: stage of a Swin or Hiera, quarter of a ViT's depth; other networks give their
            pooled features whatever it says.
        size_px: input edge; the encoder's own when not given or when it takes no other.

    Raises:
        NoSuchStage: the network has fewer stages.
    """
    staged = family(encoder.model) != "maps"
    width = stage_width(encoder.model, stage) if staged else encoder.width
    edge = size_px if size_px and encoder.any_size else encoder.size_px
    return Teacher(encoder, stage, edge, width)


def load_teacher(
    settings: PretrainSettings, device: str | torch.device, weights: Weights | None = None
) -> Teacher:
    """Load the frozen teacher onto a device; see ``geofm.encoders.load_encoder`` for names.

    Args:
        settings: the recipe's section.
        device: where the teacher runs.
        weights: the teacher's weights, if they are resolved already.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch: as ``load_encoder``.
        NoSuchStage: the network has fewer stages.
    """
    size = settings.teacher_size_px
    encoder = load_encoder(weights or settings.teacher, size_px=size)
    # Convolutions run a third faster when channels lie side by side.
    half = (settings.teacher_precision or settings.precision) == "bf16"
    model = encoder.model.to(device).to(memory_format=torch.channels_last)
    if half:  # it never learns: no full weights need to be kept beside
        model = model.to(torch.bfloat16)
    stage = settings.teacher_stage or settings.distill_stage
    teacher = as_teacher(replace(encoder, model=model), stage, size)
    teacher = replace(teacher, pooling=Pooling(settings.distill_pool, settings.distill_norm))
    if settings.compile:
        model.compile(dynamic=False)
        teacher = replace(teacher, walk=torch.compile(walk, dynamic=False))
    return teacher


def who_teaches(
    settings: PretrainSettings,
    device: str | torch.device,
    taught: NDArray[np.float32] | None,
    weights: Weights | None = None,
) -> tuple[Teacher | None, int | None]:
    """The teacher to ask, and the channels of what is taught; None where there is none of it.

    Nobody is asked where the features ``taught`` [N, C] are known beforehand.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch, NoSuchStage: as ``load_teacher``.
    """
    if taught is not None:
        return None, taught.shape[1]
    if settings.alpha == 0:
        return None, None
    teacher = load_teacher(settings, device, weights)
    return teacher, teacher.width


@torch.no_grad()
def teach(teacher: Teacher, rgb: Tensor) -> Tensor:
    """Pooled feature [B, C] of the taught stage for RGB [B, 3, H, W] in 0..1.

    In the arithmetic of the teacher's own weights, whatever the student's is. Networks without
    stages give the feature they pool themselves.
    """
    model = teacher.encoder.model
    images = normalise(teacher.encoder, enlarge(rgb.float(), teacher.size_px))
    images = images.to(next(model.parameters()).dtype)
    with torch.autocast(rgb.device.type, enabled=False):
        if family(model) != "maps":
            tapped, _ = teacher.walk(model, images, teacher.stage, whole=False)
            return teacher.pooling(tapped)
        features: Tensor = model(images.contiguous(memory_format=torch.channels_last))
    if teacher.pooling.norm:
        return nn.functional.layer_norm(features, features.shape[-1:])
    return features


def enlarge(rgb: Tensor, size_px: int) -> Tensor:
    """RGB at the teacher's size: corners on corners when larger, as the paper's code has it."""
    if rgb.shape[-1] >= size_px:
        return resize(rgb, size_px)
    return nn.functional.interpolate(
        rgb, size=(size_px, size_px), mode="bilinear", align_corners=True
    )
