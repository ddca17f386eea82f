"""What can be said about a chip's pixels without a network.

Entropy, gradient energy and saturation are those of the picture (unit RGB clipped to 0..1); moments
are of unit pixels; the thumbnail is an area mean of unclipped grey, so that haze or another gain
changes it linearly, with low and high values of its own, so that dark water keeps its detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.imagery.radiometry import rgb_index, to_rgb, to_unit

Floats = NDArray[np.float64]
#: Rec. 601 luma weights of red, green and blue.
LUMA = np.array([0.299, 0.587, 0.114])
#: Edge of a thumbnail in pixels, whatever the size of the chip.
THUMBNAIL = 64


def luminance(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey picture [height, width] in 0..1 of [3, height, width]."""
    weights = LUMA.astype(np.float32)
    grey = rgb[0] * weights[0]
    grey += rgb[1] * weights[1]
    grey += rgb[2] * weights[2]
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
    total = 0.0
    for axis in (0, 1):
        steps = np.diff(grey, axis=axis)
        np.square(steps, out=steps)
        total += float(steps.mean()) if steps.size else 0.0
    return total


def block_means(pixels: NDArray[np.generic], edge: int = THUMBNAIL) -> NDArray[np.float32]:
    """Area means [bands, edge, edge] of [bands, height, width]; exact sums for whole blocks."""
    bands, height, width = pixels.shape
    if height % edge or width % edge:
        down, across = _area_weights(height, edge), _area_weights(width, edge)
        means = np.einsum("ih,bhw->biw", down, pixels.astype(np.float64))
        return np.asarray(np.einsum("jw,biw->bij", across, means), dtype=np.float32)
    tall, wide = height // edge, width // edge
    kind = np.uint32 if pixels.dtype.kind == "u" else np.float32
    rows = pixels.reshape(bands, edge, tall, width).sum(axis=2, dtype=kind)
    blocks = rows.reshape(bands, edge, edge, wide).sum(axis=3, dtype=kind)
    return np.asarray(blocks / (tall * wide), dtype=np.float32)


def _area_weights(size: int, edge: int) -> Floats:
    """[edge, size]: how much of each source pixel lies in each of ``edge`` equal intervals."""
    starts = np.arange(edge)[:, None] * size / edge
    pixels = np.arange(size)[None, :]
    shared = np.minimum(pixels + 1, starts + size / edge) - np.maximum(pixels, starts)
    return np.asarray(np.maximum(shared, 0) * edge / size)


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
        white), ``constant`` (every band has a single value), ``band_means`` and ``band_stds`` (unit
        space, one per band), ``band_correlation`` (of the thumbnails of the bands, pairs in the
        order 0-1, 0-2, 1-2, 0-3, ...; 0 where a band has one value), ``thumbnail_low`` and
        ``thumbnail_high`` (unit grey that bytes 0 and 255 stand for);
        and the thumbnail, uint8 [64, 64].
    """
    factors = to_unit(np.ones((len(pixels), 1, 1), pixels.dtype), scale)
    blocks = block_means(pixels) * factors
    means = blocks.reshape(len(blocks), -1).mean(axis=1, dtype=np.float64)
    grey = luminance(to_rgb(pixels, bands, scale))
    counts = histogram(grey)
    thumbnail, low, high = stretch(luminance(blocks[list(rgb_index(bands))]))
    flat = pixels.reshape(len(pixels), -1)
    ends = flat[:, 0] == flat[:, -1]
    return {
        "entropy": _entropy(counts),
        "gradient": gradient_energy(grey),
        "saturation": float(counts[255] / counts.sum()),
        "constant": bool(ends.all() and np.all(flat == flat[:, :1])),
        "band_means": means.tolist(),
        "band_stds": _deviations(flat, means / factors.ravel(), factors.ravel()),
        "band_correlation": _correlations(blocks),
        "thumbnail_low": low,
        "thumbnail_high": high,
    }, thumbnail


def describe(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> dict[str, Any]:
    """The numbers of ``measure`` alone."""
    return measure(pixels, bands, scale)[0]


def _deviations(
    flat: NDArray[np.generic], means: Floats, factors: NDArray[np.float32]
) -> list[float]:
    """Standard deviation of each band (unit space) about its mean (counts)."""
    found = []
    for band, mean, factor in zip(flat, means, factors, strict=True):
        values = band - np.float32(mean)
        np.square(values, out=values)
        found.append(float(np.sqrt(values.mean()) * factor))
    return found


def _correlations(blocks: NDArray[np.float32]) -> list[float]:
    """Correlation of every two bands, rounded to 6 decimals."""
    values = blocks.reshape(len(blocks), -1).astype(np.float64)
    values -= values.mean(axis=1, keepdims=True)
    products = np.einsum("ip,jp->ij", values, values)
    lengths = np.sqrt(np.diag(products))
    scaled = products / np.maximum(np.outer(lengths, lengths), 1e-30)
    return [
        round(float(scaled[low, high]), 6) for high in range(len(blocks)) for low in range(high)
    ]
