"""Random resized crops and flips as two matrix products, which any device does in a batch.

A crop with resize is separable: rows and columns of the output are weighted means of rows and
columns of the chip. The weights are those of an antialiased bilinear resize of the crop; a flip
reverses the order of the column weights. What is random is drawn from a generator per sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Aspect ratios of a crop, width to height (the paper's code keeps the usual ones).
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


class Window(NamedTuple):
    """A crop in pixels of the chip, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of one sample in one epoch: no other sample or worker can disturb it."""
    return np.random.Generator(np.random.PCG64([seed, epoch, sample]))


def draw_window(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> Window:
    """A crop whose share of the area is uniform in ``scale`` and whose log ratio is uniform.

    When ten attempts do not fit into the chip, the largest centred crop with a ratio in bounds.
    """
    flip = bool(rng.random() < 0.5)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int(rng.integers(height - h + 1))
            left = int(rng.integers(width - w + 1))
            return Window(top, left, h, w, flip)
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return Window((height - h) // 2, (width - w) // 2, h, w, flip)


def resize_weights(starts: Tensor, lengths: Tensor, size: int, full: int) -> Tensor:
    """Weights [B, size, full] that take ``lengths`` pixels from ``starts`` to ``size`` pixels.

    Triangle filter as wide as the reduction, cut off at the crop's edge; each row sums to 1.
    """
    starts, lengths = (values[:, None, None].float() for values in (starts, lengths))
    step = lengths / size
    out = torch.arange(size, device=starts.device, dtype=torch.float32)[None, :, None]
    pixel = torch.arange(full, device=starts.device, dtype=torch.float32)[None, None, :]
    centre = starts + (out + 0.5) * step
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= starts) & (pixel < starts + lengths))
    return weight / weight.sum(dim=2, keepdim=True)


def crop(images: Tensor, windows: Tensor, size: int) -> Tensor:
    """Crops [B, C, size, size] of images [B, C, H, W], on their device.

    Args:
        images: the whole chips.
        windows: [B, 5] int64: top, left, height, width, and 1 where mirrored.
        size: edge of the crops (pixels).
    """
    top, left, height, width, flip = windows.unbind(dim=1)
    rows = resize_weights(top, height, size, images.shape[-2])
    columns = resize_weights(left, width, size, images.shape[-1])
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    return torch.matmul(torch.matmul(rows[:, None], images), columns[:, None].transpose(2, 3))
