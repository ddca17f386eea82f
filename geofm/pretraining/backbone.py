"""Forward pass through any timm network, for students and teachers: stage L and the final map.

Stage L of a Swin ends *after* the patch merging that follows its blocks (GFM paper, section 4, and
its code: 1024 channels for Swin-B at L = 3). Since timm 0.9 that merging is the first layer of the
next stage, so it is called explicitly here. For other networks stage L means:

- ViT: the first L quarters of its depth, because it has no stages.
- Hiera: the blocks of stage L. The pooling is part of the first block of the next stage.
- Other networks with feature maps: the L-th map.

Masked patches are replaced by a token after the patch embedding (SimMIM). Networks without patches
get a learned colour instead. ViT and Hiera can also drop masked patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from timm.models.hiera import Hiera
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_catalog.errors import UsageError
from geofm.pretraining.masking import upsample_mask, visible_positions

#: Stages that a ViT's depth is divided into.
VIT_STAGES = 4

NetworkFamily = Literal["swin", "vit", "hiera", "maps"]
#: Families that can drop masked tokens.
TOKEN_DROPPING_FAMILIES: tuple[NetworkFamily, ...] = ("vit", "hiera")


class NoSuchStage(UsageError):
    """The network has fewer stages than the distilled stage."""


class MaskedInput(NamedTuple):
    """The mask of a batch, and how the network applies it.

    Attributes:
        mask: Patch mask, bool, shape (B, g, g), True where hidden.
        token: Replacement of hidden patches: shape (1, 1, 1, C) after the patch embedding, or
            (1, bands, 1, 1) for pixels. None: hidden patches are dropped.
        visible: Number of entries of each mask that are False. It is given, not counted, so that
            tensor shapes are known without looking at the data.
    """

    mask: Tensor
    token: Tensor | None
    visible: int


def network_family(model: nn.Module) -> NetworkFamily:
    """How a network is run: as a Swin, ViT, Hiera, or by timm's feature maps."""
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return "swin"
    if isinstance(model, VisionTransformer):
        return "vit"
    return "hiera" if isinstance(model, Hiera) else "maps"


def stage_width(model: Any, stage: int) -> int:
    """Channels of the distilled feature.

    Raises:
        NoSuchStage: The network has fewer stages.
    """
    if network_family(model) == "vit":
        return int(model.embed_dim)
    stages = len(model.feature_info)
    if stage > stages:
        raise NoSuchStage(
            f"pretrain.distill_stage is {stage}, but the network has {stages} stages; give at "
            f"most {stages}"
        )
    merged = network_family(model) == "swin" and stage < stages
    return int(model.feature_info[stage - (0 if merged else 1)]["num_chs"])


def final_width(model: Any) -> int:
    """Channels of the final feature map."""
    return int(model.num_features)


def patch_size(model: Any) -> int:
    """Edge of a patch in pixels; 1 for networks without patches, where pixels are masked."""
    family = network_family(model)
    if family == "maps":
        return 1
    return int(model.patch_stride[0] if family == "hiera" else model.patch_embed.patch_size[0])


def output_stride(model: Any) -> int:
    """Pixels per position of the final feature map, along an edge."""
    family = network_family(model)
    if family == "vit":
        return patch_size(model)
    if family == "swin":
        return int(patch_size(model) * 2 ** (len(model.layers) - 1))
    return int(model.feature_info[-1]["reduction"])


def forward_stages(
    model: Any,
    images: Tensor,
    stage: int,
    *,
    with_final: bool = True,
    masked: MaskedInput | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the distilled stage and the final feature map of images.

    Args:
        model: A timm network.
        images: Normalised images, shape (B, bands, H, W).
        stage: Distilled stage L, from 1.
        with_final: Whether to compute the layers after the distilled stage.
        masked: Mask of the images; None: nothing is masked.

    Returns:
        Tokens of stage L before any norm, shape (B, h', w', C'), and the normalised final map,
        shape (B, h'', w'', C''), or None without ``with_final``. If masked patches are dropped,
        both have shape (B, n, C): the n visible tokens in the order of their positions.

    Source: GFM paper, section 4.
    """
    forward = {
        "swin": _forward_swin,
        "vit": _forward_vit,
        "hiera": _forward_hiera,
        "maps": _forward_maps,
    }
    return forward[network_family(model)](model, images, stage, with_final, masked)


def token_mean(tokens: Tensor) -> Tensor:
    """Mean over all positions: shape (B, ..., C) to (B, C)."""
    return tokens.mean(dim=tuple(range(1, tokens.ndim - 1)))


class Pooling(NamedTuple):
    """How the tokens of a stage become one feature."""

    how: Literal["mean", "max"] = "mean"
    norm: bool = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Pool tokens of shape (B, ..., C) to (B, C)."""
        if self.norm:
            tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        if self.how == "mean":
            return token_mean(tokens)
        return tokens.amax(dim=tuple(range(1, tokens.ndim - 1)))


#: The pooling of the paper's code: mean, without a norm.
PAPER_POOLING = Pooling()


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointed: bool) -> Tensor:
    """Run blocks; ``checkpointed`` recomputes their activations in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x


def _replace_hidden(tokens: Tensor, masked: MaskedInput | None) -> Tensor:
    """Replace hidden tokens of shape (B, h, w, C) by the mask token, if there is one."""
    if masked is None or masked.token is None:
        return tokens
    hidden = upsample_mask(masked.mask, tokens.shape[1])[..., None]
    return torch.where(hidden, masked.token.to(tokens.dtype), tokens)


def _keep_visible(tokens: Tensor, masked: MaskedInput, grid: int) -> Tensor:
    """Select the visible ones of tokens (B, grid * grid, ...), in order; shape (B, n, ...)."""
    factor = grid // masked.mask.shape[-1]
    mask = upsample_mask(masked.mask, grid)
    index = visible_positions(mask, masked.visible * factor * factor)
    return torch.take_along_dim(
        tokens, index.reshape(*index.shape, *[1] * (tokens.ndim - 2)), dim=1
    )


def _forward_swin(
    model: Any, images: Tensor, stage: int, with_final: bool, masked: MaskedInput | None
) -> tuple[Tensor, Tensor | None]:
    distilled = x = _replace_hidden(model.patch_embed(images), masked)
    for number, layer in enumerate(model.layers):
        x = layer.downsample(x)
        if number == stage:
            distilled = x
            if not with_final:
                return distilled, None
        x = run_blocks(layer.blocks, x, layer.grad_checkpointing and model.training)
    if stage == len(model.layers):  # no patch merging follows the last stage
        distilled = x
    return distilled, model.norm(x) if with_final else None


def _forward_vit(
    model: Any, images: Tensor, stage: int, with_final: bool, masked: MaskedInput | None
) -> tuple[Tensor, Tensor | None]:
    x = model.patch_embed(images)
    if x.ndim == 3:
        x = x.unflatten(1, model.patch_embed.grid_size)
    grid: tuple[int, ...] = x.shape[1:3]
    x = _replace_hidden(x, masked)
    x = model._pos_embed(x if model.dynamic_img_size else x.flatten(1, 2))
    first = model.num_prefix_tokens
    if masked is not None and masked.token is None:
        visible = _keep_visible(x[:, first:], masked, grid[0])
        grid, x = visible.shape[1:2], torch.cat([x[:, :first], visible], dim=1)
    x = model.norm_pre(model.patch_drop(x))
    depth = max(1, round(len(model.blocks) * stage / VIT_STAGES))
    checkpointed = model.grad_checkpointing and model.training
    x = run_blocks(model.blocks[:depth], x, checkpointed)
    distilled = x[:, first:].reshape(len(x), *grid, -1)
    if not with_final:
        return distilled, None
    x = model.norm(run_blocks(model.blocks[depth:], x, checkpointed))
    return distilled, x[:, first:].reshape(len(x), *grid, -1)


def _forward_hiera(
    model: Any, images: Tensor, stage: int, with_final: bool, masked: MaskedInput | None
) -> tuple[Tensor, Tensor | None]:
    # Patches overlap, so hidden pixels are set to zero before the patch embedding.
    x = model.patch_embed(images, mask=None if masked is None else ~masked.mask[:, None])
    x = _replace_hidden(x.unflatten(1, model.tokens_spatial_shape), masked).flatten(1, 2)
    x = model.unroll(model._pos_embed(x))
    dropped = masked is not None and masked.token is None
    if masked is not None and dropped:
        # The unrolled order has the first token of each mask unit, then the second, and so on.
        units = x.unflatten(1, (model.mu_size, -1)).transpose(1, 2)
        visible = _keep_visible(units, masked, model.mask_spatial_shape[0])
        x = visible.transpose(1, 2).flatten(1, 2)
    checkpointed = model.grad_checkpointing and model.training
    end, last = model.stage_ends[stage - 1], len(model.blocks) - 1
    x = run_blocks(model.blocks[: end + 1], x, checkpointed)
    distilled = x if dropped else model.reroll(x, end)
    if not with_final:
        return distilled, None
    x = model.head.norm(run_blocks(model.blocks[end + 1 :], x, checkpointed))
    return distilled, x if dropped else model.reroll(x, last)


def _forward_maps(
    model: Any, images: Tensor, stage: int, with_final: bool, masked: MaskedInput | None
) -> tuple[Tensor, Tensor | None]:
    if masked is not None and masked.token is not None:
        hidden = upsample_mask(masked.mask, images.shape[-1])[:, None]
        images = torch.where(hidden, masked.token.to(images.dtype), images)
    if not with_final:
        (distilled,) = model.forward_intermediates(
            images, indices=[stage - 1], stop_early=True, intermediates_only=True
        )
        return distilled.permute(0, 2, 3, 1), None
    final, (distilled,) = model.forward_intermediates(images, indices=[stage - 1])
    return distilled.permute(0, 2, 3, 1), final.permute(0, 2, 3, 1)
