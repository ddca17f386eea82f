"""Chips as an encoder sees them: unit RGB clipped to 0..1, resized, normalised.

Chips with twice the edge are the usual case. Bilinear halving with antialiasing weighs 1, 3, 3, 1
along each axis, so whole counts give whole sums: three times as fast as a resize in float32, and
the same bits on any processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.encoders import Encoder, normalise, resize
from geofm.raster.radiometry import clipped, rgb_index, to_rgb, unit_per_count
from geofm.raster.resample import binomial_downsample
from geofm.runtime.native import torch

#: What the sums of ``halve`` are multiples of: 8 along each axis, 7 at the rim.
WEIGHT, AT_RIM = 64, 8 / 7


def picture(
    pixels: NDArray[Any],
    bands: Sequence[str],
    scale: Sequence[float],
    encoder: Encoder,
    size_px: int,
) -> torch.Tensor:
    """The normalised picture [3, size_px, size_px] of a chip.

    What is halved is clipped at the whole count nearest to white.

    Args:
        pixels: [bands, height, width] as stored.
        bands: names of the bands.
        scale: reflectance per count, one per band.
        encoder: whose mean and standard deviation.
        size_px: edge to which the chip is resized.
    """
    whole = pixels.dtype in (np.uint8, np.uint16)
    if not whole or pixels.shape[1:] != (2 * size_px, 2 * size_px):
        rgb = torch.from_numpy(to_rgb(pixels, bands, scale)).unsqueeze(0)
        return normalise(encoder, resize(rgb, size_px))[0]
    factors = unit_per_count(pixels.dtype, tuple(scale))
    found = np.empty((3, size_px, size_px), dtype=np.float32)
    for image, band, std in zip(found, rgb_index(bands), encoder.std, strict=True):
        counts = np.ascontiguousarray(pixels[band], dtype=np.uint16)
        most, white = int(counts.max()), round(min(float(1 / factors[band]), 2**16 - 1))
        if most > white:
            counts, most = clipped(counts, white), white
        np.multiply(halve(counts, most), factors[band] / np.float32(std * WEIGHT), out=image)
    for rim in (found[:, 0], found[:, -1], found[:, :, 0], found[:, :, -1]):
        rim *= np.float32(AT_RIM)  # noqa: PLW2901  (in place)
    for image, mean, std in zip(found, encoder.mean, encoder.std, strict=True):
        np.subtract(image, np.float32(mean / std), out=image)
    return torch.from_numpy(found)


def halve(counts: NDArray[np.uint16], most: int) -> NDArray[np.float32]:
    """Sums [height / 2, width / 2] of 4 × 4 counts (``most`` or less), weighted 1, 3, 3, 1.

    ``WEIGHT`` times a mean, less at the rim, where weights are missing.
    """
    rows = binomial_downsample(counts, 0, np.uint16 if most < 2**13 else np.uint32)
    return binomial_downsample(rows, 1, np.uint32).astype(np.float32)  # exact: below 2^24
