"""Descriptors of a chip's pixels that need no network.

Large chips are halved first, to about the size at which encoders see them. Entropy, gradient energy
and saturation are those of the picture (unit RGB clipped to 0..1); band moments are of unit pixels.
The thumbnail is unclipped grey, so that haze or another gain changes it linearly. Its bytes range
from the lowest to the highest grey of the chip, so that dark water keeps its detail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.raster.radiometry import clipped, rgb_index, unit_per_count
from geofm.raster.resample import binomial_downsample
from geofm.raster.windows import is_constant
from geofm.types import Floats, Floats32

#: Luma weights of red, green and blue (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114])
#: Edge of a thumbnail in pixels, whatever the size of the chip.
THUMBNAIL = 64
#: Contrast of a thumbnail (highest less lowest unit grey) below which a chip is monotone.
MONOTONE = 0.05
#: Standard deviation of a band, as a share of its mean, up to which it is rounding error.
FLAT = 1e-6
#: Chips with edges of at least this many pixels are halved before they are described.
HALVED_FROM = 256


def is_monotone(descriptors: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell which chips are monotone, such as open water or sand: their embeddings are all equal.

    Args:
        descriptors: columns thumbnail_low and thumbnail_high, one row per chip.
    """
    contrast = descriptors["thumbnail_high"] - descriptors["thumbnail_low"]
    return np.asarray(contrast.to_numpy(np.float64) < MONOTONE)


def measure(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Compute the descriptors and the thumbnail, shape (64, 64), of one chip (``measure_all``)."""
    columns, thumbnails = measure_all([pixels], bands, scale)
    return {name: values[0] for name, values in columns.items()}, thumbnails[0]


def measure_all(
    chips: Iterable[NDArray[np.generic]], bands: Sequence[str], scale: Sequence[float]
) -> tuple[dict[str, list[Any]], NDArray[np.uint8]]:
    """Compute descriptors, as columns, and thumbnails of chips.

    The work on full pictures is done chip by chip, while each is in the processor's cache; the rest
    is done for all chips together.

    Args:
        chips: at least one chip, pixels as stored, shape (bands, height, width).
        bands: names of the bands.
        scale: reflectance per count, one per band.

    Returns:
        Columns: ``entropy`` (bits), ``gradient`` (unit² per pixel), ``saturation`` (share of white
        pixels), ``constant`` (every band has a single value), ``band_means`` (unit space); and of
        the thumbnails of the bands ``band_stds``, ``band_correlation`` (pairs in the order 0-1,
        0-2, 1-2, 0-3, ...; 0 where a band has one value), ``thumbnail_low`` and
        ``thumbnail_high`` (unit grey of bytes 0 and 255).
        The thumbnails, uint8, shape (n, 64, 64).
    """
    visible = rgb_index(bands)
    small, histograms, gradients, means, constant = [], [], [], [], []
    for pixels in chips:
        counts = halve_large(pixels)
        factors = unit_per_count(pixels.dtype, tuple(scale))
        small.append(shrink(counts) * factors[:, None, None])
        grey = _grey_picture(counts, visible, factors)
        histograms.append(_histogram(grey))
        gradients.append(gradient_energy(grey) / 255**2)
        means.append(_means(counts) * factors)
        constant.append(is_constant(pixels))
    levels, band_thumbnails = np.stack(histograms), np.stack(small)
    grey_thumbnails = luminance([band_thumbnails[:, band] for band in visible])
    thumbnails, low, high = _stretch_to_bytes(grey_thumbnails)
    deviations, correlations = _band_statistics(band_thumbnails)
    columns: dict[str, list[Any]] = {
        "entropy": _entropy(levels).tolist(),
        "gradient": gradients,
        "saturation": (levels[:, 255] / levels.sum(axis=1)).tolist(),
        "constant": constant,
        "band_means": np.stack(means).tolist(),
        "band_stds": deviations.tolist(),
        "band_correlation": correlations.tolist(),
        "thumbnail_low": low.tolist(),
        "thumbnail_high": high.tolist(),
    }
    return columns, thumbnails


# The picture of a chip.


def halve_large(pixels: NDArray[Any]) -> Floats32:
    """Average 2 x 2 pixels until an edge is shorter than ``HALVED_FROM``, or odd."""
    counts = pixels
    while min(counts.shape[1:]) >= HALVED_FROM and not any(n % 2 for n in counts.shape[1:]):
        kind = np.float32 if counts.dtype.kind == "f" else np.int32
        rows = np.add(counts[:, ::2], counts[:, 1::2], dtype=kind)
        counts = (rows[:, :, ::2] + rows[:, :, 1::2]).astype(np.float32)
        counts *= np.float32(0.25)
    return counts.astype(np.float32, copy=False)


def _grey_picture(counts: Floats32, visible: Sequence[int], factors: Floats32) -> Floats32:
    """Compute the grey of unit RGB clipped to 1, in 0..255, shape (height, width)."""
    grey = np.zeros(counts.shape[1:], np.float32)
    for band, weight in zip(visible, LUMA, strict=True):
        shown = clipped(counts[band], float(1 / factors[band]))
        shown *= np.float32(255 * weight) * factors[band]
        grey += shown
    return grey


def luminance(rgb: Sequence[Floats32] | Floats32) -> Floats32:
    """Compute grey pictures, shape (..., height, width), of red, green and blue ones."""
    weights = LUMA.astype(np.float32)
    grey = rgb[0] * weights[0]
    for band, weight in zip(rgb[1:], weights[1:], strict=True):
        grey += band * weight
    return np.asarray(grey, dtype=np.float32)


def entropy_bits(grey: NDArray[np.floating[Any]]) -> float:
    """Compute the Shannon entropy of the 256-level histogram of a grey picture in 0..1, in bits."""
    return float(_entropy(_histogram(grey * 255)))


def _histogram(grey: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Count the pixels of each of the 256 levels of a grey picture in 0..255."""
    return np.bincount((grey + grey.dtype.type(0.5)).astype(np.uint8).ravel(), minlength=256)


def _entropy(levels: NDArray[np.int64]) -> Floats:
    """Compute the entropy in bits of histograms, shape (..., 256)."""
    shares = levels / levels.sum(axis=-1, keepdims=True)
    return np.asarray(np.abs(np.sum(shares * np.log2(np.where(levels, shares, 1)), axis=-1)))


def gradient_energy(grey: NDArray[np.floating[Any]]) -> float:
    """Compute the mean squared difference of neighbours, along rows plus along columns."""
    height, width = grey.shape
    flat = np.ascontiguousarray(grey).reshape(-1)
    down = flat[width:] - flat[:-width]
    right = np.zeros_like(flat)
    np.subtract(flat[1:], flat[:-1], out=right[:-1])
    right[width - 1 :: width] = 0  # the step from the end of a row to the next row
    energy = 0.0
    for steps, count in ((down, down.size), (right, height * (width - 1))):
        if count:
            rows = steps.reshape(-1, width)
            sums = np.einsum("ij,ij->i", rows, rows)
            energy += float(np.add.reduce(sums, dtype=np.float64) / count)
    return energy


def _means(values: Floats32) -> Floats:
    """Compute means over the last two axes: sums of rows, which are added in float64."""
    sums = np.einsum("...ij->...i", values)
    pixels = values.shape[-2] * values.shape[-1]
    return np.asarray(np.add.reduce(sums, axis=-1, dtype=np.float64) / pixels)


# The thumbnail.


def shrink(values: Floats32, edge: int = THUMBNAIL) -> Floats32:
    """Shrink bands, shape (bands, height, width), to thumbnails, shape (bands, edge, edge).

    Each value is a mean under a triangle as wide as two thumbnail pixels (less at the rim). So
    detail too fine for a thumbnail vanishes, and does not alias between odd shifts.
    """
    weights = _mean_weights(*values.shape[1:], edge)
    for axis in (1, 2):
        size = values.shape[axis]
        if size % (2 * edge):
            weighted = np.tensordot(_triangles(size, edge), values, (1, axis))
            values = np.moveaxis(weighted, 0, axis)
        else:
            values = binomial_downsample(_sum_steps(values, size // (2 * edge), axis), axis)
    return np.ascontiguousarray(values * weights)


def _sum_steps(values: Floats32, step: int, axis: int) -> Floats32:
    """Sum ``step`` neighbours along an axis."""
    outer = (slice(None),) * axis
    if step == 1:
        return values
    sums = values[(*outer, slice(0, None, step))] + values[(*outer, slice(1, None, step))]
    for offset in range(2, step):
        sums += values[(*outer, slice(offset, None, step))]
    return sums


@lru_cache(maxsize=8)
def _mean_weights(height: int, width: int, edge: int) -> Floats32:
    """Compute the factors that turn binomial sums into means, shape (edge, edge).

    The factor is 1 along an axis that ``_triangles`` shrank. At the rim a sum has 7 of 8 weights.
    """
    weights = np.ones((edge, edge))
    for size, along_axis in ((height, weights), (width, weights.T)):
        if size % (2 * edge) == 0:
            np.multiply(along_axis, edge / (4 * size), out=along_axis)
            along_axis[[0, -1]] *= 8 / 7
    return weights.astype(np.float32)


@lru_cache(maxsize=8)
def _triangles(size: int, edge: int) -> Floats32:
    """Compute the weights of ``size`` pixels in each of ``edge`` steps, shape (edge, size)."""
    step = size / edge
    centres = (np.arange(edge)[:, None] + 0.5) * step
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres)
    weights = np.maximum(1 - distance / max(step, 1.0), 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def _stretch_to_bytes(grey: Floats32) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Convert grey pictures, shape (n, height, width), to bytes between their extremes.

    Returns:
        Bytes, and the lowest and the highest grey of each picture, shape (n,).
    """
    low, high = grey.min(axis=(1, 2)), grey.max(axis=(1, 2))
    span = high.astype(np.float64) - low
    factors = np.divide(255, span, out=np.zeros_like(span), where=span > 0).astype(np.float32)
    stretched = grey - low[:, None, None]
    stretched *= factors[:, None, None]
    return np.rint(stretched).astype(np.uint8), low.astype(np.float64), high.astype(np.float64)


def _band_statistics(thumbnails: Floats32) -> tuple[Floats, Floats]:
    """Compute the deviation of each band, and the correlation of every two bands.

    Args:
        thumbnails: unit pixels, shape (n, bands, edge, edge).

    Returns:
        Deviations, shape (n, bands), and correlations, shape (n, pairs), rounded to 4 decimals.
    """
    means = _means(thumbnails)
    values = thumbnails - means.astype(np.float32)[..., None, None]
    values = values.reshape(*thumbnails.shape[:2], -1)
    products = (values @ values.transpose(0, 2, 1)).astype(np.float64)
    lengths = np.sqrt(np.einsum("nbb->nb", products))
    lengths[lengths <= FLAT * np.abs(means) * np.sqrt(values.shape[2])] = 0
    both = lengths[:, :, None] * lengths[:, None]
    correlation = np.divide(products, both, out=np.zeros_like(both), where=both > 0)
    high, low = np.tril_indices(thumbnails.shape[1], -1)
    return lengths / np.sqrt(values.shape[2]), np.round(correlation[:, low, high], 4)
