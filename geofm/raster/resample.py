"""Resampling: the one place for the filters that more than one room uses.

Bands to the grid   `axis_weights`, then `resample` or `resample_nearest` (stage `cut`)
Halving             `binomial_downsample` (chips for the encoder, thumbnails for descriptors)
Batches of images   `resize_images` (encoders, teacher, evaluation)

The weights of `axis_weights` depend only on the position of a pixel in the scene, and products are
summed in a fixed order. A chip cut by itself therefore has the same bytes as a chip cut out of a
long strip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from geofm.runtime.native import torch
from geofm.types import Bools, Floats, Indices

if TYPE_CHECKING:
    from torch import Tensor

#: A resampled pixel is valid if valid source pixels carry more than this share of its weight.
MIN_WEIGHT = 0.5


@dataclass(frozen=True)
class AxisWeights:
    """Source pixels and weights of each output pixel along one axis.

    Attributes:
        index: Source pixels, shape (count, k), clipped to the source.
        weight: Their weights, shape (count, k); each row sums to 1.
        inside: Whether the centre of the output pixel lies in the source, shape (count,).
    """

    index: Indices
    weight: Floats
    inside: Bools

    @cached_property
    def span(self) -> tuple[int, int]:
        """First source pixel that is needed, and the one after the last."""
        return int(self.index.min()), int(self.index.max()) + 1


@lru_cache(maxsize=256)
def axis_weights(
    start: int, count: int, ratio: float, shift: float, n: int, method: str
) -> AxisWeights:
    """Compute the weights of consecutive output pixels of one axis.

    Args:
        start: First output pixel.
        count: Number of output pixels.
        ratio: Edge of an output pixel, in source pixels.
        shift: Outer edge of output pixel 0, in source pixels from the source's first edge.
        n: Number of source pixels.
        method: ``nearest``, ``bilinear``, ``cubic`` or ``average``.

    Returns:
        The weights; their arrays are read-only because the cache shares them.
    """
    centre = (np.arange(start, start + count) + 0.5) * ratio + shift
    inside = (centre >= 0) & (centre <= n)
    if method == "nearest":
        index = np.floor(centre + 1e-9)[:, None]
        weight = np.ones_like(index)
    else:
        # When shrinking, the filter widens with the output pixel, which prevents aliasing.
        width = max(1.0, ratio)
        radius = {"bilinear": width, "cubic": 2 * width, "average": max(ratio, 1e-9) / 2}[method]
        support = int(np.ceil(2 * radius)) + 2
        index = np.floor(centre - radius)[:, None] + np.arange(support)
        if method == "average":
            low, high = (centre - radius)[:, None], (centre + radius)[:, None]
            weight = np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None)
        else:
            weight = _kernel(np.abs(index + 0.5 - centre[:, None]) / width, method)
    weight = weight / weight.sum(axis=1, keepdims=True)
    weights = AxisWeights(np.clip(index, 0, n - 1).astype(np.int64), weight, inside)
    for array in (weights.index, weights.weight, weights.inside):
        array.flags.writeable = False
    return weights


def _kernel(distance: Floats, method: str) -> Floats:
    """Evaluate the triangle filter, or Keys' cubic convolution (1981) with a = -1/2."""
    d = distance
    if method == "bilinear":
        return np.clip(1 - d, 0, None)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def resample(
    pixels: NDArray[Any], valid: Bools, rows: AxisWeights, cols: AxisWeights
) -> tuple[Floats, Bools]:
    """Resample a window of a band.

    Args:
        pixels: Source pixels between ``rows.span`` and ``cols.span``, shape (h, w).
        valid: Where the source has data, shape (h, w). Other pixels get no weight.
        rows: Weights along the vertical axis.
        cols: Weights along the horizontal axis.

    Returns:
        Values, not rounded and 0 where invalid, and their validity; both (rows, cols).
    """
    share = _weighted_sum(valid.astype(np.float64), rows, cols)
    total = _weighted_sum(np.where(valid, pixels, 0).astype(np.float64), rows, cols)
    good = (share > MIN_WEIGHT) & rows.inside[:, None] & cols.inside[None, :]
    return np.where(good, total / np.where(good, share, 1.0), 0.0), good


def resample_nearest(
    pixels: NDArray[Any], valid: Bools, rows: AxisWeights, cols: AxisWeights
) -> tuple[NDArray[Any], Bools]:
    """Resample a window with weights of method ``nearest``; the pixels keep their type."""
    row, col = rows.index[:, 0] - rows.span[0], cols.index[:, 0] - cols.span[0]
    # Indexing one axis after the other is many times as fast as indexing both at once.
    good = valid.take(col, axis=1).take(row, axis=0)
    good &= rows.inside[:, None]
    good &= cols.inside[None, :]
    values = pixels.take(col, axis=1).take(row, axis=0)
    values[~good] = 0
    return values, good


def _weighted_sum(values: Floats, rows: AxisWeights, cols: AxisWeights) -> Floats:
    """Apply the weights of both axes, one column of weights after the other."""
    top, left = rows.span[0], cols.span[0]
    wide = np.zeros((values.shape[0], cols.index.shape[0]))
    for k in range(cols.index.shape[1]):
        wide += values[:, cols.index[:, k] - left] * cols.weight[:, k]
    out = np.zeros((rows.index.shape[0], wide.shape[1]))
    for k in range(rows.index.shape[1]):
        out += wide[rows.index[:, k] - top] * rows.weight[:, k, None]
    return out


def binomial_downsample(
    values: NDArray[Any], axis: int, dtype: DTypeLike | None = None
) -> NDArray[Any]:
    """Halve an array along an axis by sums of four neighbours, weighted 1, 3, 3, 1.

    These are the weights of an antialiased bilinear resize to half the size, times 8. The first
    and the last output have three neighbours, with a total weight of 7. Integers give exact sums.

    Args:
        values: Array with an even length along the axis.
        axis: The axis to halve, counted from the first (not negative).
        dtype: Type of the sums, large enough for 8 times the largest value; by default the
            type of the values.

    Returns:
        The sums, half as long along the axis, contiguous.
    """
    outer: tuple[Any, ...] = (slice(None),) * axis
    kind = np.dtype(dtype or values.dtype)
    even = values[(*outer, slice(0, None, 2))].astype(kind, order="C")
    odd = values[(*outer, slice(1, None, 2))].astype(kind, order="C")
    sums = np.asarray(even + odd)
    sums *= kind.type(3)
    # The outer neighbours are added to flat arrays, shifted by one position along the axis: twice
    # as fast as slices. The zeros keep a row's last value out of the next row's first.
    even[(*outer, 0)] = odd[(*outer, -1)] = 0
    stride = math.prod(sums.shape[axis + 1 :])
    sums.reshape(-1)[stride:] += odd.reshape(-1)[:-stride]
    sums.reshape(-1)[:-stride] += even.reshape(-1)[stride:]
    return sums


def resize_images(images: Tensor, size_px: int) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, size_px, size_px), bilinear with antialiasing."""
    if tuple(images.shape[-2:]) == (size_px, size_px):
        return images
    resized: Tensor = torch.nn.functional.interpolate(
        images, size=(size_px, size_px), mode="bilinear", align_corners=False, antialias=True
    )
    return resized
