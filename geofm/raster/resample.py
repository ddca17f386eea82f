"""Resampling one band to the grid of another: separable, and the same for any window.

Weights depend on the position of a pixel in the scene alone and are summed in a fixed order, so a
chip cut by itself has the same bytes as one cut out of a long strip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.types import Floats

# Sums under a hat: what halves a picture without aliasing.


def hat_sums(even: NDArray[Any], odd: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums of four neighbours, weighted 1, 3, 3, 1 (three at the rim), two steps apart.

    What lies in steps is slow to add; in one piece neighbours can be added at once for all, from
    one row to the next as well, with zero at the rim.

    Args:
        even: every other value along ``axis``, from the first; a copy, which is used up.
        odd: the same from the second.
        axis: along which the neighbours lie.
    """
    found = np.asarray(even + odd)
    found *= found.dtype.type(3)
    before: tuple[Any, ...] = (slice(None),) * axis
    even[(*before, 0)] = odd[(*before, -1)] = 0
    near = math.prod(found.shape[axis + 1 :])
    found.reshape(-1)[near:] += odd.reshape(-1)[:-near]
    found.reshape(-1)[:-near] += even.reshape(-1)[near:]
    return found


#: A resampled pixel is valid when valid pixels carry more than this share of its weight.
MIN_WEIGHT = 0.5


@dataclass(frozen=True)
class Taps:
    """For each output pixel of an axis: which source pixels count, and how much.

    Attributes:
        index: [count, k] source pixels, inside the source.
        weight: [count, k], sums to 1 in each row.
        inside: [count], whether the pixel's centre lies in the source at all.
    """

    index: NDArray[np.int64]
    weight: Floats
    inside: NDArray[np.bool_]

    @cached_property
    def span(self) -> tuple[int, int]:
        """First source pixel and the one after the last."""
        return int(self.index.min()), int(self.index.max()) + 1


@lru_cache(maxsize=256)
def taps(start: int, count: int, ratio: float, shift: float, n: int, method: str) -> Taps:
    """Weights of ``count`` output pixels from ``start``; read only, since windows share them.

    Args:
        start: first output pixel of the axis.
        count: output pixels.
        ratio: edge of an output pixel in source pixels.
        shift: position of output pixel 0's outer edge in source pixels.
        n: source pixels of the axis.
        method: nearest, bilinear, cubic or average.
    """
    centre = (np.arange(start, start + count) + 0.5) * ratio + shift
    inside = (centre >= 0) & (centre <= n)
    if method == "nearest":
        index = np.floor(centre + 1e-9)[:, None]
        weight = np.ones_like(index)
    else:
        wide = max(1.0, ratio)
        reach = {"bilinear": wide, "cubic": 2 * wide, "average": max(ratio, 1e-9) / 2}[method]
        most = int(np.ceil(2 * reach)) + 2
        index = np.floor(centre - reach)[:, None] + np.arange(most)
        if method == "average":
            low, high = (centre - reach)[:, None], (centre + reach)[:, None]
            weight = np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None)
        else:
            weight = _kernel(np.abs(index + 0.5 - centre[:, None]) / wide, method)
    weight = weight / weight.sum(axis=1, keepdims=True)
    found = Taps(np.clip(index, 0, n - 1).astype(np.int64), weight, inside)
    for array in (found.index, found.weight, found.inside):
        array.flags.writeable = False
    return found


def _kernel(distance: Floats, method: str) -> Floats:
    """Triangle, or Keys' cubic convolution with a = -1/2."""
    d = distance
    if method == "bilinear":
        return np.clip(1 - d, 0, None)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def resample(
    pixels: NDArray[Any], valid: NDArray[np.bool_], rows: Taps, cols: Taps
) -> tuple[Floats, NDArray[np.bool_]]:
    """Resample a window of the source.

    Args:
        pixels: [h, w], the source between ``rows.span`` and ``cols.span``.
        valid: [h, w]; other pixels do not count.
        rows: taps of the vertical axis.
        cols: taps of the horizontal axis.

    Returns:
        Values [rows, cols] (not rounded, 0 where invalid) and where they are valid.
    """
    share = _apply(valid.astype(np.float64), rows, cols)
    total = _apply(np.where(valid, pixels, 0).astype(np.float64), rows, cols)
    good = (share > MIN_WEIGHT) & rows.inside[:, None] & cols.inside[None, :]
    return np.where(good, total / np.where(good, share, 1.0), 0.0), good


def pick(
    pixels: NDArray[Any], valid: NDArray[np.bool_], rows: Taps, cols: Taps
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """``resample`` for taps of one pixel each (nearest), in the pixels' own type."""
    down, over = rows.index[:, 0] - rows.span[0], cols.index[:, 0] - cols.span[0]
    # one axis after the other: many times as fast as both at once
    good = valid.take(over, axis=1).take(down, axis=0)
    good &= rows.inside[:, None]
    good &= cols.inside[None, :]
    found = pixels.take(over, axis=1).take(down, axis=0)
    found[~good] = 0
    return found, good


def _apply(values: Floats, rows: Taps, cols: Taps) -> Floats:
    """Both axes, one tap after the other."""
    left, top = cols.span[0], rows.span[0]
    wide = np.zeros((values.shape[0], cols.index.shape[0]))
    for k in range(cols.index.shape[1]):
        wide += values[:, cols.index[:, k] - left] * cols.weight[:, k]
    out = np.zeros((rows.index.shape[0], wide.shape[1]))
    for k in range(rows.index.shape[1]):
        out += wide[rows.index[:, k] - top] * rows.weight[:, k, None]
    return out
