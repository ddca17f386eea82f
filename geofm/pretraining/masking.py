"""Which patches of a picture the student does not see (SimMIM block masking, paper section 4)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def masked_patches(patches: int, ratio: float) -> int:
    """How many of ``patches`` are masked: the ceiling of the share (22 of 36 at 0.6).

    The product is rounded to 9 digits first, so that 0.7 of 10 is 7 and not 8.
    """
    return math.ceil(round(patches * ratio, 9))


def draw_mask(rng: np.random.Generator, grid: int, ratio: float) -> NDArray[np.bool_]:
    """A random mask [grid, grid], True where a patch is hidden; always the same number of them."""
    flat = np.zeros(grid * grid, dtype=np.bool_)
    flat[rng.permutation(grid * grid)[: masked_patches(grid * grid, ratio)]] = True
    return flat.reshape(grid, grid)


def spread(mask: Tensor, size: int) -> Tensor:
    """A mask [B, g, g] on a finer square grid: [B, size, size], each entry repeated.

    Raises:
        ValueError: when ``size`` is no multiple of g.
    """
    factor, rest = divmod(size, mask.shape[-1])
    if rest:
        raise ValueError(f"a mask of {mask.shape[-1]} patches cannot be spread over {size}")
    return torch.repeat_interleave(torch.repeat_interleave(mask, factor, dim=1), factor, dim=2)


def shown_places(mask: Tensor, shown: int) -> Tensor:
    """Flat positions [B, shown] where a mask [B, g, g] hides nothing, in their order."""
    return mask.flatten(1).byte().argsort(dim=1, stable=True)[:, :shown]
