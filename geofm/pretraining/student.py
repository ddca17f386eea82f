"""The student: a timm backbone with masked input, and the decoder that reconstructs pixels.

``Student`` runs the backbone on masked images. A decoder turns the backbone's final feature map
into pixels. There are two, one for each way of masking:

- Masked patches are *replaced* by a token (SimMIM; GFM paper, section 4): the encoder infers the
  hidden content itself, and ``PixelDecoder``, one 1x1 convolution, reads it off.
- Masked patches are *dropped* (MAE; He et al. 2022, section 3): ``TransformerDecoder`` inserts mask
  tokens at their positions, and a few transformer blocks infer the hidden content.

``build_student`` builds a student at its first step and checks the sizes in the settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_catalog.errors import UsageError, first_line
from data_catalog.hashing import digest_of
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.encoders import check_model_name, load_file, pretrained_file
from geofm.embeddings.weights import Weights, verified_file
from geofm.pretraining.backbone import (
    TOKEN_DROPPING_FAMILIES,
    MaskedInput,
    final_width,
    forward_stages,
    network_family,
    output_stride,
    patch_size,
    run_blocks,
    stage_width,
)
from geofm.pretraining.masking import masked_patches, upsample_mask, visible_positions
from geofm.runtime.threads import own_random_state

#: Modules of timm whose networks are built for one size of input.
FIXED_SIZE_MODULES = tuple(
    f"timm.models.{name}"
    for name in ("swin_transformer", "swin_transformer_v2", "vision_transformer", "hiera")
)
VIT_MODULE = "timm.models.vision_transformer"
#: Model arguments that other settings or the dataset determine, with the reason.
RESERVED_ARGUMENTS = {
    "in_chans": "it is the number of cut.bands",
    "img_size": "set pretrain.size_px",
    "num_classes": "a backbone has none",
}
#: Channels per attention head of the transformer decoder.
HEAD_CHANNELS = 32


class BadStudent(UsageError):
    """The student cannot be built, or does not fit the sizes in the settings."""


class Student(nn.Module):
    """A backbone and its mask token.

    Args:
        backbone: timm network without a classifier.
        mask_token: Initial token that replaces masked patches, or None if they are dropped.
        bands: Number of input bands.
        visible_patches: Number of patches of a mask that are not hidden.
        stage: Distilled stage L, from 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mask_token: Tensor | None,
        bands: int,
        visible_patches: int,
        stage: int,
    ) -> None:
        super().__init__()
        self.backbone, self.bands = backbone, bands
        self.mask_token = None if mask_token is None else nn.Parameter(mask_token)
        self.visible_patches, self.stage = visible_patches, stage

    def forward(
        self, images: Tensor, mask: Tensor, *, with_final: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the distilled stage and the final map of masked images.

        Args:
            images: Normalised pixels, shape (B, bands, S, S).
            mask: Patch mask, bool, shape (B, g, g), True where hidden.
            with_final: Whether to compute the final map.

        Returns:
            See ``backbone.forward_stages``.
        """
        masked = MaskedInput(mask, self.mask_token, self.visible_patches)
        return forward_stages(
            self.backbone, images, self.stage, with_final=with_final, masked=masked
        )


class PixelDecoder(nn.Module):
    """A 1x1 convolution and a pixel shuffle, for replaced patches.

    Source: GFM paper, section 4; SimMIM.

    Args:
        width: Channels C of the final feature map.
        stride: Pixels per position of the map, along an edge.
        bands: Bands of the image.
    """

    def __init__(self, width: int, stride: int, bands: int) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(width, stride * stride * bands, kernel_size=1)
        self.shuffle = nn.PixelShuffle(stride)

    def forward(self, final: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct all pixels, hidden and visible.

        Args:
            final: Final feature map, shape (B, h, w, C).
            mask: Not used; both decoders have the same signature.

        Returns:
            Pixels, shape (B, bands, h * stride, w * stride).
        """
        pixels: Tensor = self.shuffle(self.pixels(final.permute(0, 3, 1, 2)))
        return pixels


class TransformerDecoder(nn.Module):
    """A small transformer over visible tokens and mask tokens, for dropped patches.

    Source: MAE (He et al. 2022), section 3.

    Args:
        width: Channels C of the encoder's tokens.
        grid: Positions along an edge.
        stride: Pixels per position, along an edge.
        bands: Bands of the image.
        inner: Channels of the blocks, a multiple of 32.
        depth: Number of blocks.
        checkpointed: Whether to recompute the blocks' activations in the backward pass instead of
            keeping them.
    """

    positions: Tensor

    def __init__(
        self,
        width: int,
        grid: int,
        stride: int,
        bands: int,
        inner: int,
        depth: int,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        # The names of the parameters are those in objective.safetensors.
        self.enter = nn.Linear(width, inner)
        self.hidden = nn.Parameter(nn.init.trunc_normal_(torch.empty(inner), std=0.02))
        self.blocks = nn.Sequential(
            *(Block(inner, inner // HEAD_CHANNELS, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, stride * stride * bands)
        self.shuffle = nn.PixelShuffle(stride)
        positions = build_sincos2d_pos_embed([grid, grid], dim=inner)
        self.register_buffer("positions", positions.reshape(grid, grid, inner), persistent=False)

    def forward(self, final: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct all pixels, hidden and visible (the loss ignores the visible ones).

        Args:
            final: Visible tokens in the order of their positions, shape (B, n, C).
            mask: Patch mask, bool, shape (B, g, g), True where hidden.

        Returns:
            Pixels, shape (B, bands, grid * stride, grid * stride).
        """
        visible = self.enter(final)
        grid, inner = self.positions.shape[0], self.positions.shape[-1]
        index = visible_positions(upsample_mask(mask, grid), visible.shape[1])
        index = index[..., None].expand(-1, -1, inner)
        mask_tokens = self.hidden.to(visible.dtype).expand(len(visible), grid * grid, inner)
        tokens = mask_tokens.scatter(1, index, visible)
        tokens = tokens + self.positions.to(visible.dtype).flatten(0, 1)
        tokens = run_blocks(self.blocks, tokens, self.checkpointed and self.training)
        tokens = self.leave(self.norm(tokens)).unflatten(1, (grid, grid))
        pixels: Tensor = self.shuffle(tokens.permute(0, 3, 1, 2))
        return pixels


def build_student(
    settings: PretrainSettings, bands: int, seed: int, weights: Weights | None = None
) -> Student:
    """Build a student at its first step.

    Args:
        settings: The recipe's section ``pretrain``; ``student`` is a timm name or ``NAME@FILE``.
        bands: Number of input bands.
        seed: Seed of random initial weights.
        weights: Resolved initial weights (``student_init: pretrained``).

    Raises:
        BadStudent: It cannot be built, or its grid does not fit size_px or mask_patch_px.
        WeightsMissing: ``student_init`` is pretrained and there are no weights.
        WeightsMismatch, WeightsChanged: The file holds another network, or was replaced.
    """
    backbone = _build_backbone(settings, bands, seed, weights)
    _check_sizes(backbone, settings)
    if network_family(backbone) == "maps":
        _check_feature_maps(backbone, settings, bands)
    if settings.activation_checkpointing:
        _checkpoint_activations(backbone, settings.student)
    patches = (settings.size_px // settings.mask_patch_px) ** 2
    visible = patches - masked_patches(patches, settings.mask_ratio)
    token = None if settings.masking == "drop" else _mask_token(backbone, bands, seed)
    return Student(backbone, token, bands, visible, settings.distill_stage)


def _build_backbone(
    settings: PretrainSettings, bands: int, seed: int, weights: Weights | None
) -> nn.Module:
    arguments = backbone_arguments(settings, bands)
    name, at, file = settings.student.partition("@")
    if settings.student_init == "random":
        if at:
            raise BadStudent(
                "pretrain.student names a file of weights, but pretrain.student_init is random; "
                "set it to pretrained, or leave out the file"
            )
        return random_backbone(name, arguments, seed)
    if weights is not None:
        with own_random_state(seed), verified_file(weights) as path:
            return load_file(name, path, channels=weights.channels or None, **arguments)
    with own_random_state(seed):
        return load_file(name, Path(file) if at else pretrained_file(name), **arguments)


def backbone_arguments(settings: PretrainSettings, bands: int) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that build the backbone.

    Raises:
        BadStudent: ``student_args`` has an argument that other settings determine.
        UnknownEncoder: timm has no such model.
    """
    name = settings.student.partition("@")[0]
    check_model_name(name)
    for reserved, reason in RESERVED_ARGUMENTS.items():
        if reserved in settings.student_args:
            raise BadStudent(f"pretrain.student_args: leave out {reserved}, {reason}")
    fixed = {"in_chans": bands, "num_classes": 0}
    module = timm.model_entrypoint(name.partition(".")[0]).__module__
    cfg = timm.models.get_pretrained_cfg(name)
    if module in FIXED_SIZE_MODULES or (cfg is not None and cfg.fixed_input_size):
        fixed["img_size"] = settings.size_px
    # The paper's code pretrains without drop path. A masked ViT learns through its patch tokens, so
    # its feature is their mean and not the class token.
    pooled = {"global_pool": "avg", "fc_norm": False} if module == VIT_MODULE else {}
    return {"drop_path_rate": 0.0, **pooled, **settings.student_args, **fixed}


def random_backbone(name: str, arguments: dict[str, Any], seed: int) -> nn.Module:
    """Build a timm model with the initial weights that ``torch.manual_seed(seed)`` gives.

    The caller's random state is restored.

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


def student_settings(settings: PretrainSettings, weights: Weights) -> PretrainSettings:
    """Settings whose student is the timm network of resolved weights.

    Arguments of a geofm model come from its own config, unless the settings give others.
    """
    arguments = weights.read_config()["model_args"] if weights.origin == "model" else {}
    own = {name: value for name, value in arguments.items() if name not in RESERVED_ARGUMENTS}
    update = {"student": weights.network, "student_args": {**own, **settings.student_args}}
    return settings.model_copy(update=update)


def derived_seed(seed: int, purpose: str) -> int:
    """Derive a seed for one purpose, so that the modules' initial weights are independent."""
    return int(digest_of([seed, purpose])[:15], 16)


def _mask_token(backbone: nn.Module, bands: int, seed: int) -> Tensor:
    """Initial mask token: SimMIM's distribution, or the dataset's mean for networks on pixels."""
    if network_family(backbone) == "maps":
        return torch.zeros(1, bands, 1, 1)
    generator = torch.Generator().manual_seed(derived_seed(seed, "mask token"))
    token = torch.empty(1, 1, 1, embed_width(backbone))
    return nn.init.trunc_normal_(token, std=0.02, generator=generator)


def embed_width(backbone: Any) -> int:
    """Channels of a token after the patch embedding."""
    return int(backbone.patch_embed.proj.out_channels)


def _check_sizes(backbone: Any, settings: PretrainSettings) -> None:
    """Check size_px, mask_patch_px, masking and distill_stage against the backbone.

    Raises:
        BadStudent, NoSuchStage: A setting does not fit; the message names it.
    """
    stage_width(backbone, settings.distill_stage)
    family, patch, stride = (
        network_family(backbone),
        patch_size(backbone),
        output_stride(backbone),
    )
    if settings.size_px % stride:
        raise BadStudent(
            f"pretrain.size_px is {settings.size_px}, but {settings.student} needs a multiple of "
            f"{stride}, e.g. {max(1, round(settings.size_px / stride)) * stride}"
        )
    if settings.masking == "drop":
        if family not in TOKEN_DROPPING_FAMILIES:
            raise BadStudent(
                f"pretrain.masking is drop, but {settings.student} cannot leave tokens out: set it "
                "to replace, or take a ViT or Hiera, e.g. vit_small_patch16_224, hiera_base_224"
            )
        if family == "hiera":
            # Hiera drops whole mask units, each of several patches.
            patch *= int(backbone.mask_unit_size[0])
    if settings.mask_patch_px % patch:
        raise BadStudent(
            f"pretrain.mask_patch_px is {settings.mask_patch_px}, but {settings.student} needs a "
            f"multiple of {patch} pixels, the size of its patches"
        )


def _check_feature_maps(backbone: nn.Module, settings: PretrainSettings, bands: int) -> None:
    """Run a network of no known family once, and compare its maps with timm's description.

    Raises:
        BadStudent: The maps have other shapes, or the network cannot give them.
    """
    edge, stage = settings.size_px, settings.distill_stage
    backbone.eval()
    try:
        with torch.no_grad():
            tokens, final = forward_stages(backbone, torch.zeros(1, bands, edge, edge), stage)
        side = edge // output_stride(backbone)
        expected = (1, side, side, final_width(backbone))
        fits = tokens.shape[-1] == stage_width(backbone, stage)
        fits = fits and final is not None and tuple(final.shape) == expected
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        fits, reason = False, f" ({first_line(error)})"
    else:
        reason = ""
    backbone.train()
    if not fits:
        raise BadStudent(
            f"pretrain.student: {settings.student} does not give timm's feature maps{reason}; "
            "take a Swin, ViT, Hiera, or a network with pyramids of maps, e.g. convnext_tiny"
        )


def _checkpoint_activations(backbone: Any, name: str) -> None:
    """Switch timm's activation checkpointing on.

    Raises:
        BadStudent: The network has no activation checkpointing.
    """
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise BadStudent(
            f"pretrain.activation_checkpointing: {name} has none; set it to false"
        ) from error
