"""From the final map of the student back to pixels: the paper's one convolution, or a few blocks.

With masked patches replaced, the encoder has done the filling in already and one 1x1 convolution
reads the pixels off (SimMIM; GFM paper, section 4). With masked patches left out, a small
transformer puts mask tokens into their places first (He et al. 2022, section 3).
"""

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from geofm.pretraining.backbone import run_blocks
from geofm.pretraining.masking import shown_places, spread

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
