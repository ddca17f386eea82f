"""Random resized crops and flips as two matrix products, which any device does in a batch.

A crop with resize is separable: rows and columns of the output are weighted means of rows and
columns of the chip. The weights are those of an antialiased bilinear resize of the crop; a flip
reverses the order of the column weights. What is random is drawn from a generator per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Aspect ratios of a crop, width to height (the paper's code keeps the usual ones).
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


@dataclass(frozen=True)
class Window:
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


def resize_weights(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], size: int, full: int
) -> NDArray[np.float32]:
    """Weights [B, size, full] that take ``lengths`` pixels from ``starts`` to ``size`` pixels.

    Triangle filter as wide as the reduction, cut off at the crop's edge; each row sums to 1.
    """
    step = (lengths / size)[:, None, None]
    centre = starts[:, None, None] + (np.arange(size)[None, :, None] + 0.5) * step
    pixel = np.arange(full)[None, None, :]
    weight = np.maximum(0.0, 1.0 - np.abs(pixel + 0.5 - centre) / np.maximum(step, 1.0))
    inside = (pixel >= starts[:, None, None]) & (pixel < (starts + lengths)[:, None, None])
    weight = weight * inside
    return np.asarray(weight / weight.sum(axis=2, keepdims=True), dtype=np.float32)


def crop_weights(
    windows: list[Window], size: int, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Row weights [B, size, height] and column weights [B, size, width] of a batch of crops."""
    tops, lefts, heights, widths, flips = (
        np.array([getattr(window, field) for window in windows])
        for field in ("top", "left", "height", "width", "flip")
    )
    rows = resize_weights(tops, heights, size, height)
    columns = resize_weights(lefts, widths, size, width)
    columns[flips] = columns[flips, ::-1]
    return rows, columns


def crop(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Crops [B, C, size, size] of images [B, C, H, W] by the weights of ``crop_weights``."""
    return torch.matmul(torch.matmul(rows[:, None], images), columns[:, None].transpose(2, 3))
