"""What can be said about a chip's pixels without a network.

Large chips are halved first, to about the size at which encoders see them. Entropy, gradient energy
and saturation are those of the picture (unit RGB clipped to 0..1); moments are of unit pixels; the
thumbnail is unclipped grey made small, so that haze or another gain changes it linearly, with low
and high values of its own, so that dark water keeps its detail.
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
from geofm.types import Floats

#: Rec. 601 luma weights of red, green and blue.
LUMA = np.array([0.299, 0.587, 0.114])
#: Edge of a thumbnail in pixels, whatever the size of the chip.
THUMBNAIL = 64
#: Contrast of a thumbnail (highest less lowest unit grey) below which a chip is monotone.
MONOTONE = 0.05
#: Share of its mean below which the deviation of a band is rounding, and the band flat.
FLAT = 1e-6
#: Chips with this edge (pixels) and more are halved before they are described.
HALVED_FROM = 256


def is_monotone(described: pd.DataFrame) -> NDArray[np.bool_]:
    """Which chips are monotone, such as open water or sand: their embeddings are all one."""
    contrast = described["thumbnail_high"] - described["thumbnail_low"]
    return np.asarray(contrast.to_numpy(np.float64) < MONOTONE)


def luminance(rgb: Sequence[NDArray[np.float32]] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey pictures [..., height, width] of red, green and blue [..., height, width]."""
    weights = LUMA.astype(np.float32)
    grey = rgb[0] * weights[0]
    for band, weight in zip(rgb[1:], weights[1:], strict=True):
        grey += band * weight
    return np.asarray(grey, dtype=np.float32)


def entropy_bits(grey: NDArray[np.floating[Any]]) -> float:
    """Shannon entropy of the 256-level histogram of a grey picture in 0..1, in bits (0..8)."""
    return float(_entropy(_levels(grey * 255)))


def _levels(grey: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Pixels of each of the 256 levels of a grey picture in 0..255."""
    return np.bincount((grey + grey.dtype.type(0.5)).astype(np.uint8).ravel(), minlength=256)


def _entropy(levels: NDArray[np.int64]) -> Floats:
    """Bits of histograms [..., 256]."""
    shares = levels / levels.sum(axis=-1, keepdims=True)
    return np.asarray(np.abs(np.sum(shares * np.log2(np.where(levels, shares, 1)), axis=-1)))


def gradient_energy(grey: NDArray[np.floating[Any]]) -> float:
    """Mean squared difference between neighbouring pixels, along rows plus along columns."""
    height, width = grey.shape
    flat = np.ascontiguousarray(grey).reshape(-1)
    down = flat[width:] - flat[:-width]
    right = np.zeros_like(flat)  # taken in one piece: what lies in steps is slow to subtract
    np.subtract(flat[1:], flat[:-1], out=right[:-1])
    right[width - 1 :: width] = 0  # from the end of a row to the next
    found = 0.0
    for steps, count in ((down, down.size), (right, height * (width - 1))):
        if count:  # sums of rows, then in float64
            rows = steps.reshape(-1, width)
            sums = np.einsum("ij,ij->i", rows, rows)
            found += float(np.add.reduce(sums, dtype=np.float64) / count)
    return found


def small_enough(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Means of 2 × 2 pixels until an edge is shorter than ``HALVED_FROM``, or odd."""
    counts = pixels
    while min(counts.shape[1:]) >= HALVED_FROM and not any(n % 2 for n in counts.shape[1:]):
        counts = _sums_of_four(counts).astype(np.float32)
        counts *= np.float32(0.25)
    return counts.astype(np.float32, copy=False)


def _sums_of_four(counts: NDArray[Any]) -> NDArray[Any]:
    """Sums of 2 × 2 pixels [bands, height / 2, width / 2]; of whole numbers in int32."""
    if counts.dtype != np.uint16 or not counts.flags.c_contiguous or counts.max() >= 2**14:
        kind = np.float32 if counts.dtype.kind == "f" else np.int32
        rows = np.add(counts[:, ::2], counts[:, 1::2], dtype=kind)
        return np.asarray(rows[:, :, ::2] + rows[:, :, 1::2])
    # two neighbours as one number: several times as fast as to step over every other
    both = counts.view(np.uint32)
    pairs = both[:, ::2] + both[:, 1::2]
    pairs *= np.uint32(2**16 + 1)  # the upper 16 bits are now the sum of both
    pairs >>= np.uint32(16)
    return pairs.view(np.int32)


def shrink(values: NDArray[np.float32], edge: int = THUMBNAIL) -> NDArray[np.float32]:
    """Thumbnails [bands, edge, edge] of [bands, height, width].

    Each value is a mean under a hat as wide as two of its pixels (less at the rim), so that detail
    too fine for a thumbnail vanishes instead of aliasing between odd shifts.
    """
    weights = _weights(*values.shape[1:], edge)
    for axis in (1, 2):
        size = values.shape[axis]
        if size % (2 * edge):
            values = np.moveaxis(np.tensordot(_hats(size, edge), values, (1, axis)), 0, axis)
        else:
            values = _hat_sums(values, size // (2 * edge), axis)
    return np.ascontiguousarray(values * weights)


@lru_cache(maxsize=8)
def _weights(height: int, width: int, edge: int) -> NDArray[np.float32]:
    """[edge, edge]: what makes sums under a hat means; 1 along an axis where they are already."""
    found = np.ones((edge, edge))
    for size, here in ((height, found), (width, found.T)):
        if size % (2 * edge) == 0:
            np.multiply(here, edge / (4 * size), out=here)
            here[[0, -1]] *= 8 / 7
    return found.astype(np.float32)


def _hat_sums(values: NDArray[np.float32], step: int, axis: int) -> NDArray[np.float32]:
    """Sums under a hat that is four half steps wide (at the rim three), weighted 1, 3, 3, 1."""

    def some(of: NDArray[np.float32], first: int, every: int) -> NDArray[np.float32]:
        return of[(slice(None),) * axis + (slice(first, None, every),)]

    halves = values if step == 1 else some(values, 0, step) + some(values, 1, step)
    for more in range(2, step):
        halves += some(values, more, step)
    return binomial_downsample(halves, axis)


@lru_cache(maxsize=8)
def _hats(size: int, edge: int) -> NDArray[np.float32]:
    """[edge, size]: weights of the source pixels in each of ``edge`` equal steps, summing to 1."""
    step = size / edge
    centres = (np.arange(edge)[:, None] + 0.5) * step
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres)
    weights = np.maximum(1 - distance / max(step, 1.0), 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def _stretch(grey: NDArray[np.float32]) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Grey pictures [n, height, width] as bytes between the lowest and highest value of each."""
    low, high = grey.min(axis=(1, 2)), grey.max(axis=(1, 2))
    span = high.astype(np.float64) - low
    factors = np.divide(255, span, out=np.zeros_like(span), where=span > 0).astype(np.float32)
    found = grey - low[:, None, None]
    found *= factors[:, None, None]
    return np.rint(found).astype(np.uint8), low.astype(np.float64), high.astype(np.float64)


def measure(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Descriptors and thumbnail (uint8 [64, 64]) of one chip; as ``measure_all`` makes them."""
    measured, thumbnails = measure_all([pixels], bands, scale)
    return {name: values[0] for name, values in measured.items()}, thumbnails[0]


def measure_all(
    chips: Iterable[NDArray[np.generic]], bands: Sequence[str], scale: Sequence[float]
) -> tuple[dict[str, list[Any]], NDArray[np.uint8]]:
    """Descriptors of chips as columns, and the thumbnails.

    What a picture is large for is done chip by chip, while it lies in the processor's cache; the
    small rest for all of them together.

    Args:
        chips: at least one; pixels [bands, height, width] as stored.
        bands: names of the bands of all.
        scale: reflectance per count, one per band.

    Returns:
        ``entropy`` (bits), ``gradient`` (unit² per pixel), ``saturation`` (share of pixels shown
        white), ``constant`` (every band has a single value), ``band_means`` (unit space), and of
        the thumbnails of the bands ``band_stds`` and ``band_correlation`` (pairs in the order 0-1,
        0-2, 1-2, 0-3, ...; 0 where a band has one value), ``thumbnail_low`` and
        ``thumbnail_high`` (unit grey that bytes 0 and 255 stand for);
        and the thumbnails, uint8 [n, 64, 64].
    """
    visible = rgb_index(bands)
    small, levels, gradients, means, constant = [], [], [], [], []
    for pixels in chips:
        counts = small_enough(pixels)
        factors = unit_per_count(pixels.dtype, tuple(scale))
        small.append(shrink(counts) * factors[:, None, None])
        grey = _picture(counts, visible, factors)
        levels.append(_levels(grey))
        gradients.append(gradient_energy(grey) / 255**2)
        means.append(_means(counts) * factors)
        constant.append(is_constant(pixels))
    shown, thumbs = np.stack(levels), np.stack(small)
    thumbnails, low, high = _stretch(luminance([thumbs[:, band] for band in visible]))
    deviations, correlations = _spread(thumbs)
    measured: dict[str, list[Any]] = {
        "entropy": _entropy(shown).tolist(),
        "gradient": gradients,
        "saturation": (shown[:, 255] / shown.sum(axis=1)).tolist(),
        "constant": constant,
        "band_means": np.stack(means).tolist(),
        "band_stds": deviations.tolist(),
        "band_correlation": correlations.tolist(),
        "thumbnail_low": low.tolist(),
        "thumbnail_high": high.tolist(),
    }
    return measured, thumbnails


def _means(values: NDArray[np.float32]) -> Floats:
    """Means of [..., rows, columns] over the last two axes: sums of rows, then in float64."""
    sums = np.einsum("...ij->...i", values)
    pixels = values.shape[-2] * values.shape[-1]
    return np.asarray(np.add.reduce(sums, axis=-1, dtype=np.float64) / pixels)


def _picture(
    counts: NDArray[np.float32], visible: Sequence[int], factors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Grey of unit RGB clipped to 1, in 0..255: [height, width]."""
    grey = np.zeros(counts.shape[1:], np.float32)
    for band, weight in zip(visible, LUMA, strict=True):
        shown = clipped(counts[band], float(1 / factors[band]))
        shown *= np.float32(255 * weight) * factors[band]
        grey += shown
    return grey


def _spread(small: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Of thumbnails [n, bands, edge, edge] the deviation of each band and correlation of every two.

    [n, bands], and [n, pairs] rounded to 4 decimals.
    """
    means = _means(small)
    values = small - means.astype(np.float32)[..., None, None]
    values = values.reshape(*small.shape[:2], -1)
    products = (values @ values.transpose(0, 2, 1)).astype(np.float64)
    lengths = np.sqrt(np.einsum("nbb->nb", products))
    lengths[lengths <= FLAT * np.abs(means) * np.sqrt(values.shape[2])] = 0
    both = lengths[:, :, None] * lengths[:, None]
    scaled = np.divide(products, both, out=np.zeros_like(both), where=both > 0)
    high, low = np.tril_indices(small.shape[1], -1)
    return lengths / np.sqrt(values.shape[2]), np.round(scaled[:, low, high], 4)
