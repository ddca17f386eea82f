"""The network that is pretrained: a timm backbone that does not see what is masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_catalog.errors import UsageError
from data_catalog.hashing import digest_of
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.encoders import check_model_name, load_file, pretrained_file
from geofm.embeddings.weights import Weights, unchanged
from geofm.pretraining.backbone import (
    DROPPING,
    Masked,
    family,
    final_width,
    patch_size,
    reduction,
    run_blocks,
    stage_width,
    walk,
)
from geofm.pretraining.masking import masked_patches, shown_places, spread
from geofm.runtime.threads import own_random_state

# From the final map of the student back to pixels: the paper's one convolution, or a few blocks.
# With masked patches replaced, the encoder has done the filling in already and one 1x1 convolution
# reads the pixels off (SimMIM; GFM paper, section 4). With masked patches left out, a small
# transformer puts mask tokens into their places first (He et al. 2022, section 3).

#: Channels per head of the small transformer.
HEAD = 32


class PixelDecoder(nn.Module):
    """A 1x1 convolution and a pixel shuffle: [B, h, w, C] to [B, bands, h * stride, ...]."""

    def __init__(self, width: int, stride: int, bands: int) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(width, stride * stride * bands, kernel_size=1)
        self.shuffle = nn.PixelShuffle(stride)

    def forward(self, final: Tensor, mask: Tensor) -> Tensor:
        """Pixels of every position; which of them were hidden does not matter here."""
        pixels: Tensor = self.shuffle(self.pixels(final.permute(0, 3, 1, 2)))
        return pixels


class FillingDecoder(nn.Module):
    """Visible tokens [B, n, C] and a mask to pixels [B, bands, S, S].

    Args:
        width: C of the encoder.
        grid: positions along one edge.
        stride: pixels per position along one edge.
        bands: of the picture.
        inner: channels of the blocks, a multiple of 32.
        depth: number of blocks.
        checkpointed: keep no activations of the blocks, and compute them twice.
    """

    place: Tensor

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
        self.enter = nn.Linear(width, inner)
        self.hidden = nn.Parameter(nn.init.trunc_normal_(torch.empty(inner), std=0.02))
        self.blocks = nn.Sequential(
            *(Block(inner, inner // HEAD, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, stride * stride * bands)
        self.shuffle = nn.PixelShuffle(stride)
        place = build_sincos2d_pos_embed([grid, grid], dim=inner)
        self.register_buffer("place", place.reshape(grid, grid, inner), persistent=False)

    def forward(self, final: Tensor, mask: Tensor) -> Tensor:
        """Pixels of every position, the visible ones too (the loss leaves those out)."""
        seen = self.enter(final)
        grid, inner = self.place.shape[0], self.place.shape[-1]
        at = shown_places(spread(mask, grid), seen.shape[1])[..., None].expand(-1, -1, inner)
        empty = self.hidden.to(seen.dtype).expand(len(seen), grid * grid, inner)
        tokens = empty.scatter(1, at, seen) + self.place.to(seen.dtype).flatten(0, 1)
        tokens = run_blocks(self.blocks, tokens, self.checkpointed and self.training)
        tokens = self.leave(self.norm(tokens)).unflatten(1, (grid, grid))
        pixels: Tensor = self.shuffle(tokens.permute(0, 3, 1, 2))
        return pixels


#: timm modules whose networks are built for one size of input.
SIZED = tuple(
    f"timm.models.{name}"
    for name in ("swin_transformer", "swin_transformer_v2", "vision_transformer", "hiera")
)
VIT = "timm.models.vision_transformer"
#: What other settings and the dataset decide.
RESERVED = {
    "in_chans": "it is the number of cut.bands",
    "img_size": "set pretrain.size_px",
    "num_classes": "a backbone has none",
}


class BadStudent(UsageError):
    """The student cannot be built, or does not fit the sizes that were set."""


class Student(nn.Module):
    """A backbone, and the token that stands for what is masked (none where it is left out).

    ``shown`` is the number of patches of a mask that are not hidden.
    """

    def __init__(
        self, backbone: nn.Module, mask_token: Tensor | None, bands: int, shown: int, stage: int
    ) -> None:
        super().__init__()
        self.backbone, self.bands = backbone, bands
        self.mask_token = None if mask_token is None else nn.Parameter(mask_token)
        self.shown, self.stage = shown, stage

    def forward(
        self, images: Tensor, mask: Tensor, *, whole: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Distilled stage and final map of masked images; see ``backbone.walk``.

        Args:
            images: [B, bands, S, S], normalised.
            mask: [B, g, g] bool, True where hidden.
            whole: compute the final map as well.
        """
        masked = Masked(mask, self.mask_token, self.shown)
        return walk(self.backbone, images, self.stage, whole=whole, masked=masked)


def derived_seed(seed: int, what: str) -> int:
    """A seed of its own for each module, so that none disturbs how another one starts."""
    return int(digest_of([seed, what])[:15], 16)


def backbone_arguments(settings: PretrainSettings, bands: int) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that build the backbone again.

    Raises:
        BadStudent: an argument that other settings decide.
        UnknownEncoder: timm has no such model.
    """
    name = settings.student.partition("@")[0]
    check_model_name(name)
    for reserved, why in RESERVED.items():
        if reserved in settings.student_args:
            raise BadStudent(f"pretrain.student_args: leave out {reserved}, {why}")
    fixed = {"in_chans": bands, "num_classes": 0}
    module = timm.model_entrypoint(name.partition(".")[0]).__module__
    cfg = timm.models.get_pretrained_cfg(name)
    if module in SIZED or (cfg is not None and cfg.fixed_input_size):
        fixed["img_size"] = settings.size_px
    # The paper's code drops no paths in pretraining; a masked ViT learns through its patch tokens.
    pooled = {"global_pool": "avg", "fc_norm": False} if module == VIT else {}
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


def as_timm_student(settings: PretrainSettings, weights: Weights) -> PretrainSettings:
    """The settings with a timm network in place of resolved weights of the student.

    The arguments of a geofm model are those of its own config, where the settings give no other.
    """
    arguments = weights.about()["model_args"] if weights.origin == "model" else {}
    decided = {name: value for name, value in arguments.items() if name not in RESERVED}
    update = {
        "student": weights.network,
        "student_args": {**decided, **settings.student_args},
    }
    return settings.model_copy(update=update)


def build_student(
    settings: PretrainSettings, bands: int, seed: int, weights: Weights | None = None
) -> Student:
    """A student at its first step.

    Args:
        settings: the recipe's section; ``student`` is a timm name, or ``NAME@FILE``.
        bands: number of input bands.
        seed: seed of a random student.
        weights: what it starts from, if that is resolved already (``student_init: pretrained``).

    Raises:
        BadStudent: it cannot be built, or its grid does not fit size_px or mask_patch_px.
        WeightsMissing: ``student_init: pretrained`` and no weights.
        WeightsMismatch, WeightsChanged: the weights are of another network, or were replaced.
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
    elif weights is not None:
        with own_random_state(seed), unchanged(weights) as found:
            channels = weights.channels or None
            backbone = load_file(name, found, channels=channels, **arguments)
    else:
        with own_random_state(seed):
            backbone = load_file(name, Path(file) if at else pretrained_file(name), **arguments)
    _check_sizes(backbone, settings)
    if family(backbone) == "maps":
        _check_maps(backbone, settings, bands)
    if settings.activation_checkpointing:
        _keep_few_activations(backbone, settings.student)
    cells = (settings.size_px // settings.mask_patch_px) ** 2
    shown = cells - masked_patches(cells, settings.mask_ratio)
    token = None if settings.masking == "drop" else _mask_token(backbone, bands, seed)
    return Student(backbone, token, bands, shown, settings.distill_stage)


def _mask_token(backbone: nn.Module, bands: int, seed: int) -> Tensor:
    """Drawn as SimMIM's; pixels that have no patch embedding start at the mean of the dataset."""
    if family(backbone) == "maps":
        return torch.zeros(1, bands, 1, 1)
    generator = torch.Generator().manual_seed(derived_seed(seed, "mask token"))
    token = torch.empty(1, 1, 1, embed_width(backbone))
    return nn.init.trunc_normal_(token, std=0.02, generator=generator)


def embed_width(backbone: Any) -> int:
    """Channels of a token right after the patch embedding."""
    return int(backbone.patch_embed.proj.out_channels)


def _check_sizes(backbone: Any, settings: PretrainSettings) -> None:
    stage_width(backbone, settings.distill_stage)
    kind, patch, coarse = family(backbone), patch_size(backbone), reduction(backbone)
    if settings.size_px % coarse:
        raise BadStudent(
            f"pretrain.size_px is {settings.size_px}, but {settings.student} needs a multiple of "
            f"{coarse}, e.g. {max(1, round(settings.size_px / coarse)) * coarse}"
        )
    if settings.masking == "drop":
        if kind not in DROPPING:
            raise BadStudent(
                f"pretrain.masking is drop, but {settings.student} cannot leave tokens out: set it "
                "to replace, or take a ViT or Hiera, e.g. vit_small_patch16_224, hiera_base_224"
            )
        if kind == "hiera":  # its mask units stay whole
            patch *= int(backbone.mask_unit_size[0])
    if settings.mask_patch_px % patch:
        raise BadStudent(
            f"pretrain.mask_patch_px is {settings.mask_patch_px}, but {settings.student} needs a "
            f"multiple of {patch} pixels, the size of its patches"
        )


def _check_maps(backbone: nn.Module, settings: PretrainSettings, bands: int) -> None:
    """Try a network of no known family once: its maps must be where timm says they are."""
    edge, stage = settings.size_px, settings.distill_stage
    backbone.eval()
    try:
        with torch.no_grad():
            tapped, final = walk(backbone, torch.zeros(1, bands, edge, edge), stage)
        side = edge // reduction(backbone)
        expected = (1, side, side, final_width(backbone))
        fits = tapped.shape[-1] == stage_width(backbone, stage)
        fits = fits and final is not None and tuple(final.shape) == expected
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        fits, reason = False, f" ({str(error).splitlines()[0]})"
    else:
        reason = ""
    backbone.train()
    if not fits:
        raise BadStudent(
            f"pretrain.student: {settings.student} does not give timm's feature maps{reason}; "
            "take a Swin, ViT, Hiera, or a network with pyramids of maps, e.g. convnext_tiny"
        )


def _keep_few_activations(backbone: Any, name: str) -> None:
    """Switch timm's activation checkpointing on.

    Raises:
        BadStudent: the network has none.
    """
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise BadStudent(
            f"pretrain.activation_checkpointing: {name} has none; set it to false"
        ) from error
