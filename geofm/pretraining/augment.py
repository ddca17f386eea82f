"""Random resized crop with a horizontal flip, as two matrix products per batch.

Resizing is separable: each row of the output is a weighted mean of rows of the chip, and each
column one of columns. The weights are those of an antialiased bilinear resize of the crop, and a
flip reverses the order of the column weights. So a batch of different crops is two matrix products
on any device, where an ordinary resize would need one call per chip.

Random numbers come from one generator per sample, so they do not depend on other samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Bounds of a crop's aspect ratio (width to height), as in the paper's code.
RATIO = (3 / 4, 4 / 3)
#: Number of random crops tried before the fallback.
ATTEMPTS = 10


class CropWindow(NamedTuple):
    """A crop in pixels of the chip, and whether it is flipped left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Random generator of one sample in one epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch, sample]))


def draw_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> CropWindow:
    """Draw a random crop of a chip.

    The share of the area is uniform in ``scale``, the logarithm of the aspect ratio is uniform in
    ``RATIO``. If ten attempts do not fit into the chip, the crop is the largest centred one whose
    ratio is in bounds.

    Args:
        rng: Random generator of the sample.
        height: Height of the chip, in pixels.
        width: Width of the chip, in pixels.
        scale: Smallest and largest share of the chip's area.
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
            return CropWindow(top, left, h, w, flip)
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return CropWindow((height - h) // 2, (width - w) // 2, h, w, flip)


def crop_and_resize(images: Tensor, windows: Tensor, size: int) -> Tensor:
    """Crop, resize and flip a batch of chips, on their device.

    Args:
        images: Whole chips, shape (B, C, H, W).
        windows: Crops, int64, shape (B, 5): the fields of ``CropWindow``.
        size: Edge of the output, in pixels.

    Returns:
        Crops, shape (B, C, size, size).
    """
    top, left, height, width, flip = windows.unbind(dim=1)
    rows = resize_weights(top, height, size, images.shape[-2])
    columns = resize_weights(left, width, size, images.shape[-1])
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    return torch.matmul(torch.matmul(rows[:, None], images), columns[:, None].transpose(2, 3))


def resize_weights(starts: Tensor, lengths: Tensor, size: int, full: int) -> Tensor:
    """Weights that resize one axis of a batch of crops.

    The filter is a triangle as wide as the reduction, cut off at the edge of the crop.

    Args:
        starts: First pixel of each crop, shape (B,).
        lengths: Pixels of each crop, shape (B,).
        size: Pixels of the output.
        full: Pixels of the whole chip.

    Returns:
        Weights, float32, shape (B, size, full); each row sums to 1.
    """
    starts, lengths = (values[:, None, None].float() for values in (starts, lengths))
    step = lengths / size
    output = torch.arange(size, device=starts.device, dtype=torch.float32)[None, :, None]
    pixel = torch.arange(full, device=starts.device, dtype=torch.float32)[None, None, :]
    centre = starts + (output + 0.5) * step
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= starts) & (pixel < starts + lengths))
    return weight / weight.sum(dim=2, keepdim=True)
