"""What can be said about a chip's pixels without a network: entropy, gradient, band means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.imagery.radiometry import to_rgb, to_unit

#: Rec. 601 luma weights of red, green and blue.
LUMA = np.array([0.299, 0.587, 0.114])


def luminance(rgb: NDArray[np.float32]) -> NDArray[np.float64]:
    """Grey picture [height, width] in 0..1 of [3, height, width]."""
    red, green, blue = rgb.astype(np.float64)
    return np.asarray(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)


def entropy_bits(grey: NDArray[np.float64]) -> float:
    """Shannon entropy of the 256-level histogram of a grey picture in 0..1, in bits (0..8)."""
    levels = np.rint(grey * 255).astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=256)
    shares = counts[counts > 0] / levels.size
    return float(abs(np.sum(shares * np.log2(shares))))


def gradient_energy(grey: NDArray[np.float64]) -> float:
    """Mean squared difference between neighbouring pixels, along rows plus along columns."""
    down, right = np.diff(grey, axis=0), np.diff(grey, axis=1)
    return float(np.mean(down * down) + np.mean(right * right))


def describe(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> dict[str, Any]:
    """Descriptors of one chip.

    Args:
        pixels: [bands, height, width] as stored.
        bands: names of the bands.
        scale: reflectance per count, one per band.

    Returns:
        ``entropy`` (bits), ``gradient`` (unit² per pixel), ``constant`` (every band has a
        single value) and ``band_means`` (unit space, one per band).
    """
    grey = luminance(to_rgb(pixels, bands, scale))
    flat = pixels.reshape(len(pixels), -1)
    means = to_unit(pixels, scale).reshape(len(pixels), -1).mean(axis=1, dtype=np.float64)
    return {
        "entropy": entropy_bits(grey),
        "gradient": gradient_energy(grey),
        "constant": bool(np.all(flat == flat[:, :1])),
        "band_means": [float(mean) for mean in means],
    }
