"""Where in a timm network the distilled stage ends: one walk for students and teachers.

Stage L of a Swin ends *after* the patch merging that follows its blocks (GFM paper, section 4, and
its code: 1024 channels for Swin-B at L = 3). Since timm 0.9 that merging is the first thing in the
next stage, so it is called explicitly here. A plain ViT has no stages: L counts quarters of
its depth.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_catalog.errors import UsageError

QUARTERS = 4


class NoSuchStage(UsageError):
    """The network has fewer stages than the one that is to be distilled."""


def is_swin(model: nn.Module) -> bool:
    """Whether the network has Swin's stages."""
    return isinstance(model, SwinTransformer | SwinTransformerV2)


def is_vit(model: nn.Module) -> bool:
    """Whether the network is a plain vision transformer."""
    return isinstance(model, VisionTransformer)


def stage_width(model: Any, stage: int) -> int:
    """Channels of the distilled feature of a Swin or ViT.

    Raises:
        NoSuchStage: the network has fewer stages.
    """
    if is_vit(model):
        return int(model.embed_dim)
    stages = len(model.layers)
    if stage > stages:
        raise NoSuchStage(
            f"pretrain.distill_stage is {stage}, but the network has {stages} stages; give at "
            f"most {stages}"
        )
    return int(model.feature_info[min(stage, stages - 1)]["num_chs"])


def final_width(model: Any) -> int:
    """Channels of the final feature map."""
    return int(model.num_features)


def patch_size(model: Any) -> int:
    """Edge in pixels of what one token sees first."""
    return int(model.patch_embed.patch_size[0])


def reduction(model: Any) -> int:
    """Pixels per position of the final feature map, along one edge."""
    return patch_size(model) * (2 ** (len(model.layers) - 1) if is_swin(model) else 1)


def embed_patches(model: Any, images: Tensor) -> Tensor:
    """Tokens [B, h, w, C] of images [B, bands, H, W], before any position or block."""
    tokens: Tensor = model.patch_embed(images)
    if tokens.ndim == 3:
        rows, columns = model.patch_embed.grid_size
        tokens = tokens.reshape(len(tokens), rows, columns, -1)
    return tokens


def run_stages(
    model: Any, tokens: Tensor, stage: int, *, whole: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The distilled stage and the final feature map, from tokens [B, h, w, C].

    Args:
        model: a Swin or ViT of timm.
        tokens: what ``embed_patches`` gave, masked or not.
        stage: L, from 1; Swin stages, or quarters of a ViT's depth.
        whole: compute what comes after the distilled stage as well.

    Returns:
        Tokens [B, h', w', C'] of stage L, its patch merging included and without a norm, and the
        normalised final map [B, h'', w'', C''], or None when not ``whole``.
    """
    return (_run_swin if is_swin(model) else _run_vit)(model, tokens, stage, whole)


def _run_swin(model: Any, x: Tensor, stage: int, whole: bool) -> tuple[Tensor, Tensor | None]:
    tapped = x
    for number, layer in enumerate(model.layers):
        x = layer.downsample(x)
        if number == stage:
            tapped = x
            if not whole:
                return tapped, None
        for block in layer.blocks:
            x = block(x)
    if stage == len(model.layers):  # nothing is merged after the last stage
        tapped = x
    return tapped, model.norm(x) if whole else None


def _run_vit(model: Any, x: Tensor, stage: int, whole: bool) -> tuple[Tensor, Tensor | None]:
    grid = x.shape[:3]
    x = model._pos_embed(x if model.dynamic_img_size else x.flatten(1, 2))
    x = model.norm_pre(model.patch_drop(x))
    last = max(1, round(len(model.blocks) * stage / QUARTERS))
    for block in model.blocks[:last]:
        x = block(x)
    tapped = x[:, model.num_prefix_tokens :].reshape(*grid, -1)
    if not whole:
        return tapped, None
    for block in model.blocks[last:]:
        x = block(x)
    return tapped, model.norm(x)[:, model.num_prefix_tokens :].reshape(*grid, -1)


def token_mean(tokens: Tensor) -> Tensor:
    """Mean over all positions: [B, h, w, C] to [B, C]."""
    return tokens.mean(dim=(1, 2))
