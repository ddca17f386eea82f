"""One walk through a timm network for students and teachers: where the distilled stage ends.

Stage L of a Swin ends *after* the patch merging that follows its blocks (GFM paper, section 4, and
its code: 1024 channels for Swin-B at L = 3). Since timm 0.9 that merging is the first thing in the
next stage, so it is called explicitly here. A plain ViT has no stages: L counts quarters of its
depth. A Hiera pools inside the first block of the next stage, so its stage L ends with its own
blocks. Any other network that gives feature maps is asked for the L-th of them.

What is hidden is replaced by a token after the patch embedding (SimMIM), by a learned colour in
networks without patches, or left out of the network altogether where each token stands for itself
(ViT, Hiera).
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
from geofm.pretraining.masking import shown_places, spread

QUARTERS = 4

Family = Literal["swin", "vit", "hiera", "maps"]
#: Families whose hidden tokens can be left out.
DROPPING: tuple[Family, ...] = ("vit", "hiera")


class NoSuchStage(UsageError):
    """The network has fewer stages than the one that is to be distilled."""


class Masked(NamedTuple):
    """What a student does not see.

    ``mask`` is [B, g, g] bool, True where hidden. ``token`` stands in its place: [1, 1, 1, C]
    after the patch embedding, or [1, bands, 1, 1] in networks without one; None leaves it out.
    ``shown`` is how many entries of each mask are False: known beforehand, shapes stay fixed.
    """

    mask: Tensor
    token: Tensor | None
    shown: int


def family(model: nn.Module) -> Family:
    """How the network is walked through."""
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return "swin"
    if isinstance(model, VisionTransformer):
        return "vit"
    return "hiera" if isinstance(model, Hiera) else "maps"


def stage_width(model: Any, stage: int) -> int:
    """Channels of the distilled feature.

    Raises:
        NoSuchStage: the network has fewer stages.
    """
    if family(model) == "vit":
        return int(model.embed_dim)
    stages = len(model.feature_info)
    if stage > stages:
        raise NoSuchStage(
            f"pretrain.distill_stage is {stage}, but the network has {stages} stages; give at "
            f"most {stages}"
        )
    merged = family(model) == "swin" and stage < stages
    return int(model.feature_info[stage - (0 if merged else 1)]["num_chs"])


def final_width(model: Any) -> int:
    """Channels of the final feature map."""
    return int(model.num_features)


def patch_size(model: Any) -> int:
    """Edge in pixels of what one token sees first; 1 where pixels themselves are hidden."""
    kind = family(model)
    if kind == "maps":
        return 1
    return int(model.patch_stride[0] if kind == "hiera" else model.patch_embed.patch_size[0])


def reduction(model: Any) -> int:
    """Pixels per position of the final feature map, along one edge."""
    kind = family(model)
    if kind == "vit":
        return patch_size(model)
    if kind == "swin":
        return int(patch_size(model) * 2 ** (len(model.layers) - 1))
    return int(model.feature_info[-1]["reduction"])


def walk(
    model: Any, images: Tensor, stage: int, *, whole: bool = True, masked: Masked | None = None
) -> tuple[Tensor, Tensor | None]:
    """The distilled stage and the final feature map of images.

    Args:
        model: a timm network.
        images: [B, bands, H, W], normalised.
        stage: L, from 1.
        whole: compute what comes after the distilled stage as well.
        masked: what is hidden from the network.

    Returns:
        Tokens [B, h', w', C'] of stage L without a norm, and the normalised final map
        [B, h'', w'', C''], or None when not ``whole``. Where hidden tokens were left out both are
        [B, n, C] with the n visible tokens in the order of their positions.
    """
    steps = {"swin": _walk_swin, "vit": _walk_vit, "hiera": _walk_hiera, "maps": _walk_maps}
    return steps[family(model)](model, images, stage, whole, masked)


def token_mean(tokens: Tensor) -> Tensor:
    """Mean over all positions: [B, ..., C] to [B, C]."""
    return tokens.mean(dim=tuple(range(1, tokens.ndim - 1)))


class Pooling(NamedTuple):
    """How the tokens of a stage become one feature."""

    how: Literal["mean", "max"] = "mean"
    norm: bool = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [B, ..., C] to [B, C]; the paper's code: the mean, without a norm."""
        if self.norm:
            tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        if self.how == "mean":
            return token_mean(tokens)
        return tokens.amax(dim=tuple(range(1, tokens.ndim - 1)))


#: As the paper's code does it.
PAPERS_POOLING = Pooling()


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointed: bool) -> Tensor:
    """Run blocks; ``checkpointed`` ones keep no activations and are run again going back."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x


def _replace(tokens: Tensor, masked: Masked | None) -> Tensor:
    """Tokens [B, h, w, C] with the mask token where they are hidden."""
    if masked is None or masked.token is None:
        return tokens
    hidden = spread(masked.mask, tokens.shape[1])[..., None]
    return torch.where(hidden, masked.token.to(tokens.dtype), tokens)


def _visible(tokens: Tensor, masked: Masked, grid: int) -> Tensor:
    """Of tokens [B, grid * grid, ...] those that are shown, in their order: [B, n, ...]."""
    factor = grid // masked.mask.shape[-1]
    at = shown_places(spread(masked.mask, grid), masked.shown * factor * factor)
    return torch.take_along_dim(tokens, at.reshape(*at.shape, *[1] * (tokens.ndim - 2)), dim=1)


def _walk_swin(
    model: Any, images: Tensor, stage: int, whole: bool, masked: Masked | None
) -> tuple[Tensor, Tensor | None]:
    tapped = x = _replace(model.patch_embed(images), masked)
    for number, layer in enumerate(model.layers):
        x = layer.downsample(x)
        if number == stage:
            tapped = x
            if not whole:
                return tapped, None
        x = run_blocks(layer.blocks, x, layer.grad_checkpointing and model.training)
    if stage == len(model.layers):  # nothing is merged after the last stage
        tapped = x
    return tapped, model.norm(x) if whole else None


def _walk_vit(
    model: Any, images: Tensor, stage: int, whole: bool, masked: Masked | None
) -> tuple[Tensor, Tensor | None]:
    x = model.patch_embed(images)
    if x.ndim == 3:
        x = x.unflatten(1, model.patch_embed.grid_size)
    grid: tuple[int, ...] = x.shape[1:3]
    x = _replace(x, masked)
    x = model._pos_embed(x if model.dynamic_img_size else x.flatten(1, 2))
    first = model.num_prefix_tokens
    if masked is not None and masked.token is None:
        kept = _visible(x[:, first:], masked, grid[0])
        grid, x = kept.shape[1:2], torch.cat([x[:, :first], kept], dim=1)
    x = model.norm_pre(model.patch_drop(x))
    last = max(1, round(len(model.blocks) * stage / QUARTERS))
    checkpointed = model.grad_checkpointing and model.training
    x = run_blocks(model.blocks[:last], x, checkpointed)
    tapped = x[:, first:].reshape(len(x), *grid, -1)
    if not whole:
        return tapped, None
    x = model.norm(run_blocks(model.blocks[last:], x, checkpointed))
    return tapped, x[:, first:].reshape(len(x), *grid, -1)


def _walk_hiera(
    model: Any, images: Tensor, stage: int, whole: bool, masked: Masked | None
) -> tuple[Tensor, Tensor | None]:
    # the patches overlap: what is hidden is blanked before they are taken
    x = model.patch_embed(images, mask=None if masked is None else ~masked.mask[:, None])
    x = _replace(x.unflatten(1, model.tokens_spatial_shape), masked).flatten(1, 2)
    x = model.unroll(model._pos_embed(x))
    dropped = masked is not None and masked.token is None
    if masked is not None and dropped:
        # unrolled, the first tokens of all mask units come first, then all second ones, ...
        units = x.unflatten(1, (model.mu_size, -1)).transpose(1, 2)
        x = _visible(units, masked, model.mask_spatial_shape[0]).transpose(1, 2).flatten(1, 2)
    checkpointed = model.grad_checkpointing and model.training
    tap, end = model.stage_ends[stage - 1], len(model.blocks) - 1
    x = run_blocks(model.blocks[: tap + 1], x, checkpointed)
    tapped = x if dropped else model.reroll(x, tap)
    if not whole:
        return tapped, None
    x = model.head.norm(run_blocks(model.blocks[tap + 1 :], x, checkpointed))
    return tapped, x if dropped else model.reroll(x, end)


def _walk_maps(
    model: Any, images: Tensor, stage: int, whole: bool, masked: Masked | None
) -> tuple[Tensor, Tensor | None]:
    if masked is not None and masked.token is not None:
        hidden = spread(masked.mask, images.shape[-1])[:, None]
        images = torch.where(hidden, masked.token.to(images.dtype), images)
    if not whole:
        (tapped,) = model.forward_intermediates(
            images, indices=[stage - 1], stop_early=True, intermediates_only=True
        )
        return tapped.permute(0, 2, 3, 1), None
    final, (tapped,) = model.forward_intermediates(images, indices=[stage - 1])
    return tapped.permute(0, 2, 3, 1), final.permute(0, 2, 3, 1)
