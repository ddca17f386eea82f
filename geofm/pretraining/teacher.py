"""The frozen teacher: the same crop, unmasked, its red, green and blue alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geofm.encoders import Encoder, load_encoder, normalise, resize
from geofm.pretraining.backbone import (
    embed_patches,
    is_swin,
    is_vit,
    run_stages,
    stage_width,
    token_mean,
)


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder and the stage whose pooled feature is taught; ``width`` is its channels."""

    encoder: Encoder
    stage: int
    size_px: int
    width: int


def as_teacher(encoder: Encoder, stage: int, size_px: int | None = None) -> Teacher:
    """A teacher of an encoder that is already loaded.

    Args:
        encoder: any frozen encoder.
        stage: stage of a Swin, quarter of a ViT's depth; other networks give their pooled
            features whatever it says.
        size_px: input edge; the encoder's own when not given or when it takes no other.

    Raises:
        NoSuchStage: the network has fewer stages.
    """
    staged = is_swin(encoder.model) or is_vit(encoder.model)
    width = stage_width(encoder.model, stage) if staged else encoder.width
    edge = size_px if size_px and encoder.any_size else encoder.size_px
    return Teacher(encoder, stage, edge, width)


def load_teacher(name: str, stage: int, size_px: int, device: str) -> Teacher:
    """Load a frozen teacher onto a device; see ``geofm.encoders.load_encoder`` for names.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch: as ``load_encoder``.
        NoSuchStage: the network has fewer stages.
    """
    encoder = load_encoder(name, size_px=size_px)
    # Convolutions run a third faster when channels lie side by side.
    model = encoder.model.to(device).to(memory_format=torch.channels_last)
    return as_teacher(replace(encoder, model=model), stage, size_px)


@torch.no_grad()
def teach(teacher: Teacher, rgb: Tensor) -> Tensor:
    """Pooled feature [B, C] of the taught stage, without a norm, for RGB [B, 3, H, W] in 0..1."""
    model = teacher.encoder.model
    images = normalise(teacher.encoder, resize(rgb, teacher.size_px))
    if is_swin(model) or is_vit(model):
        tapped, _ = run_stages(model, embed_patches(model, images), teacher.stage, whole=False)
        return token_mean(tapped)
    features: Tensor = model(images.contiguous(memory_format=torch.channels_last))
    return features
