"""Random block masks: which patches are hidden from the student (SimMIM; GFM paper, section 4)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def masked_patches(patches: int, ratio: float) -> int:
    """Number of masked patches: the ceiling of ``patches * ratio``, e.g. 22 of 36 at 0.6.

    The product is rounded to 9 digits first, so that 0.7 of 10 gives 7 and not 8.
    """
    return math.ceil(round(patches * ratio, 9))


def draw_mask(rng: np.random.Generator, grid: int, ratio: float) -> NDArray[np.bool_]:
    """Draw a mask with ``masked_patches`` hidden patches, bool, shape (grid, grid)."""
    flat = np.zeros(grid * grid, dtype=np.bool_)
    flat[rng.permutation(grid * grid)[: masked_patches(grid * grid, ratio)]] = True
    return flat.reshape(grid, grid)


def upsample_mask(mask: Tensor, size: int) -> Tensor:
    """Repeat the entries of a mask on a finer grid.

    Args:
        mask: Patch mask, shape (B, g, g).
        size: Edge of the finer grid, a multiple of g.

    Returns:
        Mask, shape (B, size, size).

    Raises:
        ValueError: ``size`` is not a multiple of g.
    """
    factor, rest = divmod(size, mask.shape[-1])
    if rest:
        raise ValueError(f"a mask of {mask.shape[-1]} patches cannot be spread over {size}")
    return torch.repeat_interleave(torch.repeat_interleave(mask, factor, dim=1), factor, dim=2)


def visible_positions(mask: Tensor, visible: int) -> Tensor:
    """Flat positions that are not hidden, in ascending order.

    Args:
        mask: Mask, shape (B, g, g), True where hidden.
        visible: Number of entries of each mask that are False.

    Returns:
        Positions in the flattened grid, int64, shape (B, visible).
    """
    return mask.flatten(1).byte().argsort(dim=1, stable=True)[:, :visible]
