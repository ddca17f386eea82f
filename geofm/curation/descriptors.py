"""What can be said about a chip's pixels without a network.

Large chips are halved first, to about the size at which encoders see them. Entropy, gradient energy
and saturation are those of the picture (unit RGB clipped to 0..1); moments are of unit pixels; the
thumbnail is unclipped grey made small, so that haze or another gain changes it linearly, with low
and high values of its own, so that dark water keeps its detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.imagery.radiometry import rgb_index, to_unit

Floats = NDArray[np.float64]
#: Rec. 601 luma weights of red, green and blue.
LUMA = np.array([0.299, 0.587, 0.114])
#: Edge of a thumbnail in pixels, whatever the size of the chip.
THUMBNAIL = 64
#: Contrast of a thumbnail (highest less lowest unit grey) below which a chip is monotone.
MONOTONE = 0.05
#: Chips with this edge (pixels) and more are halved before they are described.
HALVED_FROM = 256


def is_monotone(described: pd.DataFrame) -> NDArray[np.bool_]:
    """Which chips are monotone, such as open water or sand: their embeddings are all one."""
    contrast = described["thumbnail_high"] - described["thumbnail_low"]
    return np.asarray(contrast.to_numpy(np.float64) < MONOTONE)


def luminance(rgb: Sequence[NDArray[np.float32]] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey picture [height, width] of red, green and blue [height, width]."""
    weights = LUMA.astype(np.float32)
    grey = rgb[0] * weights[0]
    for band, weight in zip(rgb[1:], weights[1:], strict=True):
        grey += band * weight
    return np.asarray(grey, dtype=np.float32)


def histogram(grey: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Pixels of each of the 256 levels of a grey picture in 0..1."""
    levels = (grey * 255 + 0.5).astype(np.uint8)
    return np.bincount(levels.ravel(), minlength=256)


def entropy_bits(grey: NDArray[np.floating[Any]]) -> float:
    """Shannon entropy of the 256-level histogram of a grey picture in 0..1, in bits (0..8)."""
    return _entropy(histogram(grey))


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(abs(np.sum(shares * np.log2(shares))))


def gradient_energy(grey: NDArray[np.floating[Any]]) -> float:
    """Mean squared difference between neighbouring pixels, along rows plus along columns."""
    down, right = grey[1:] - grey[:-1], grey[:, 1:] - grey[:, :-1]
    return float(_mean_square(down) + _mean_square(right))


def _mean_square(values: NDArray[np.floating[Any]]) -> Any:
    """Mean square of [..., rows, columns] over the last two axes: row sums, then in float64."""
    sums = np.einsum("...ij,...ij->...i", values, values)
    pixels = values.shape[-2] * values.shape[-1]
    return np.add.reduce(sums, axis=-1, dtype=np.float64) / pixels if pixels else 0.0


def small_enough(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Means of 2 × 2 pixels until an edge is shorter than ``HALVED_FROM``, or odd."""
    counts = pixels
    while min(counts.shape[1:]) >= HALVED_FROM and not any(n % 2 for n in counts.shape[1:]):
        counts = _sums_of_four(counts).astype(np.float32)
        counts *= np.float32(0.25)
    return counts.astype(np.float32, copy=False)


def _sums_of_four(counts: NDArray[Any]) -> NDArray[Any]:
    """Sums of 2 × 2 pixels [bands, height / 2, width / 2]; of whole numbers in uint32."""
    if counts.dtype != np.uint16 or not counts.flags.c_contiguous or counts.max() >= 2**15:
        kind = np.float32 if counts.dtype.kind == "f" else np.uint32
        rows = np.add(counts[:, ::2], counts[:, 1::2], dtype=kind)
        return np.asarray(rows[:, :, ::2] + rows[:, :, 1::2])
    # two neighbours as one number: several times as fast as to step over every other
    both = counts.view(np.uint32)
    rows = both[:, ::2] + both[:, 1::2]
    odd = rows >> np.uint32(16)
    rows &= np.uint32(0xFFFF)
    rows += odd
    return rows


def shrink(values: NDArray[np.float32], edge: int = THUMBNAIL) -> NDArray[np.float32]:
    """Thumbnails [bands, edge, edge] of [bands, height, width].

    Each value is a mean under a hat as wide as two of its pixels (less at the rim), so that detail
    too fine for a thumbnail vanishes instead of aliasing between odd shifts.
    """
    for axis in (1, 2):
        size = values.shape[axis]
        if size % (2 * edge):
            weights = _hats(size, edge)
            values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
        else:
            values = _hat_means(values, edge, axis)
    return np.ascontiguousarray(values, dtype=np.float32)


def _hat_means(values: NDArray[np.float32], edge: int, axis: int) -> NDArray[np.float32]:
    """The same for whole half steps, by sums of strided slices: weights 1, 3, 3, 1 of each."""

    def some(of: NDArray[np.float32], first: int, step: int) -> NDArray[np.float32]:
        return of[(slice(None),) * axis + (slice(first, None, step),)]

    step = values.shape[axis] // (2 * edge)
    halves = values if step == 1 else some(values, 0, step) + some(values, 1, step)
    for more in range(2, step):
        halves += some(values, more, step)
    # in one piece each: to step over every other number of a row takes several times as long
    even, odd = (np.ascontiguousarray(some(halves, first, 2)) for first in (0, 1))
    found = even + odd
    found *= np.float32(3)
    inner, outer = (slice(None),) * axis + (slice(1, None),), (slice(None),) * axis + (slice(-1),)
    found[inner] += odd[outer]
    found[outer] += even[inner]
    found *= np.float32(1 / (8 * step))
    for rim in (0, -1):
        found[(slice(None),) * axis + (rim,)] *= np.float32(8 / 7)
    return found


@lru_cache(maxsize=8)
def _hats(size: int, edge: int) -> NDArray[np.float32]:
    """[edge, size]: weights of the source pixels in each of ``edge`` equal steps, summing to 1."""
    step = size / edge
    centres = (np.arange(edge)[:, None] + 0.5) * step
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres)
    weights = np.maximum(1 - distance / max(step, 1.0), 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def stretch(grey: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float, float]:
    """A grey thumbnail as bytes between its own lowest and highest value (returned as well)."""
    low, high = float(grey.min()), float(grey.max())
    if high <= low:
        return np.zeros(grey.shape, np.uint8), low, high
    return np.rint((grey - low) * (255 / (high - low))).astype(np.uint8), low, high


def measure(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Descriptors of one chip, and its thumbnail.

    Args:
        pixels: [bands, height, width] as stored.
        bands: names of the bands.
        scale: reflectance per count, one per band.

    Returns:
        ``entropy`` (bits), ``gradient`` (unit² per pixel), ``saturation`` (share of pixels shown
        white), ``constant`` (every band has a single value), ``band_means`` (unit space), and of
        the thumbnails of the bands ``band_stds`` and ``band_correlation`` (pairs in the order 0-1,
        0-2, 1-2, 0-3, ...; 0 where a band has one value), ``thumbnail_low`` and
        ``thumbnail_high`` (unit grey that bytes 0 and 255 stand for);
        and the thumbnail, uint8 [64, 64].
    """
    counts = small_enough(pixels)
    factors = to_unit(np.ones((len(pixels), 1, 1), pixels.dtype), scale)
    visible = list(rgb_index(bands))
    small = shrink(counts) * factors
    thumbnail, low, high = stretch(luminance(small[visible]))
    grey = _picture(counts, visible, factors.ravel())
    levels = histogram(grey)
    flat = pixels.reshape(len(pixels), -1)
    ends = flat[:, 0] == flat[:, -1]
    deviations, correlations = _spread(small)
    return {
        "entropy": _entropy(levels),
        "gradient": gradient_energy(grey),
        "saturation": float(levels[255] / levels.sum()),
        "constant": bool(ends.all() and np.all(flat == flat[:, :1])),
        "band_means": (_means(counts)[:, 0] * factors.ravel()).astype(np.float64).tolist(),
        "band_stds": deviations,
        "band_correlation": correlations,
        "thumbnail_low": low,
        "thumbnail_high": high,
    }, thumbnail


def describe(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> dict[str, Any]:
    """The numbers of ``measure`` alone."""
    return measure(pixels, bands, scale)[0]


def _means(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of the bands, [bands, 1]; as ``numpy.mean``, without what it takes to call that."""
    flat = values.reshape(len(values), -1)
    sums = np.add.reduce(flat, axis=1, keepdims=True)
    return np.asarray(sums / np.float32(flat.shape[1]))


def _picture(
    counts: NDArray[np.float32], visible: list[int], factors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Grey of unit RGB clipped to 1, in one buffer: [height, width]."""
    grey, clipped = np.zeros(counts.shape[1:], np.float32), np.empty(counts.shape[1:], np.float32)
    for band, weight in zip(visible, LUMA, strict=True):
        np.minimum(counts[band], 1 / factors[band], out=clipped)
        clipped *= np.float32(weight) * factors[band]
        grey += clipped
    return np.minimum(grey, 1, out=grey)


def _spread(small: NDArray[np.float32]) -> tuple[list[float], list[float]]:
    """Deviation of each band, and correlation of every two, rounded to 4 decimals."""
    values = small.reshape(len(small), -1) - _means(small)
    products = (values @ values.T).astype(np.float64)
    lengths = np.sqrt(np.diag(products))
    scaled = products / np.maximum(lengths[:, None] * lengths, 1e-30)
    pairs = [(low, high) for high in range(len(small)) for low in range(high)]
    deviations = lengths / np.sqrt(values.shape[1])
    return deviations.tolist(), [round(float(scaled[pair]), 4) for pair in pairs]
