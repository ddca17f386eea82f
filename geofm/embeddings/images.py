"""Chips as an encoder sees them: unit RGB clipped to 0..1, resized, normalised.

Most chips have twice the edge of the encoder's input. Bilinear halving with antialiasing has the
weights 1, 3, 3, 1 along each axis, so sums of whole counts are whole numbers. That is three times
as fast as a resize in float32, and gives the same bits on every processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.encoders import Encoder, normalise
from geofm.raster.radiometry import clipped, rgb_index, to_rgb, unit_per_count
from geofm.raster.resample import binomial_downsample, resize_images
from geofm.runtime.native import torch
from geofm.types import Floats32

#: Total weight of a sum of 4 x 4 counts. At a rim, 7 of the 8 weights along the axis are present.
WEIGHT, AT_RIM = 64, 8 / 7
#: Largest count for which 8 counts, the weight along one axis, fit into 16 bits.
MOST_16_BIT = 2**13 - 1


def prepare_chip(
    pixels: NDArray[Any],
    bands: Sequence[str],
    scale: Sequence[float],
    encoder: Encoder,
    size_px: int,
) -> torch.Tensor:
    """Make the normalised image of a chip, shape (3, size_px, size_px).

    A chip that is halved is clipped at the whole count nearest to white.

    Args:
        pixels: pixels as stored, shape (bands, height, width).
        bands: names of the bands.
        scale: reflectance per count, one per band.
        encoder: encoder with the mean and the standard deviation.
        size_px: edge of the image.
    """
    is_whole = pixels.dtype in (np.uint8, np.uint16)
    if not is_whole or pixels.shape[1:] != (2 * size_px, 2 * size_px):
        rgb = torch.from_numpy(to_rgb(pixels, bands, scale)).unsqueeze(0)
        return normalise(encoder, resize_images(rgb, size_px))[0]
    factors = unit_per_count(pixels.dtype, tuple(scale))
    images = np.empty((3, size_px, size_px), dtype=np.float32)
    for image, band, std in zip(images, rgb_index(bands), encoder.std, strict=True):
        counts = np.ascontiguousarray(pixels[band], dtype=np.uint16)
        most, white = int(counts.max()), round(min(float(1 / factors[band]), 2**16 - 1))
        if most > white:
            counts, most = clipped(counts, white), white
        factor = factors[band] / np.float32(std * WEIGHT)
        np.multiply(_halve(counts, most), factor, out=image)
    for rim in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        rim *= np.float32(AT_RIM)  # noqa: PLW2901  (in place)
    for image, mean, std in zip(images, encoder.mean, encoder.std, strict=True):
        np.subtract(image, np.float32(mean / std), out=image)
    return torch.from_numpy(images)


def _halve(counts: NDArray[np.uint16], most: int) -> Floats32:
    """Sum 4 x 4 counts (``most`` or less) with the weights 1, 3, 3, 1 along each axis."""
    rows = binomial_downsample(counts, 0, np.uint16 if most <= MOST_16_BIT else np.uint32)
    return binomial_downsample(rows, 1, np.uint32).astype(np.float32)  # exact: below 2^24
