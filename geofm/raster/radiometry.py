"""Unit pixels: the common scale of encoders, students and pictures.

Reflectance (uint16 with a scale from the asset's metadata) is divided by ``WHITE``, so that bright
soil and buildings are near 1.0. 8-bit imagery is rendered already and is divided by 255. Values
above 1 (cloud, snow, near infrared of dense vegetation) are kept; only pictures clip them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.types import Floats32

#: Reflectance that is shown as white, as in Sentinel-2 true colour images.
WHITE = 0.3


def to_unit(pixels: NDArray[np.generic], scale: Sequence[float]) -> Floats32:
    """Convert a chip to unit pixels.

    Args:
        pixels: Counts, uint8 or uint16, offset already applied, shape (bands, height, width).
        scale: Reflectance per count of each band; ignored for uint8.

    Returns:
        Unit pixels, shape (bands, height, width).
    """
    values = pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        return values / np.float32(255)
    factor = np.asarray(scale, dtype=np.float32) / np.float32(WHITE)
    return np.asarray(values * factor[:, None, None], dtype=np.float32)


@lru_cache(maxsize=64)
def unit_per_count(dtype: np.dtype[Any], scale: tuple[float, ...]) -> Floats32:
    """Return the factors from counts to unit pixels, shape (bands,)."""
    return to_unit(np.ones((len(scale), 1, 1), dtype), scale).ravel()


def clipped(counts: NDArray[Any], limit: float) -> NDArray[Any]:
    """Limit counts (height, width) from above."""
    height, width = counts.shape
    # numpy compares with an array of the limit three to four times as fast as with a scalar
    return np.asarray(np.minimum(counts, _limits(limit, height, width, counts.dtype)))


@lru_cache(maxsize=16)
def _limits(limit: float, height: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array filled with a limit."""
    return np.full((height, width), limit, dtype)


def rgb_index(bands: Sequence[str]) -> tuple[int, int, int]:
    """Return the positions of red, green and blue, else of the first three bands or one band."""
    if all(name in bands for name in ("red", "green", "blue")):
        return bands.index("red"), bands.index("green"), bands.index("blue")
    return (0, 1, 2) if len(bands) >= 3 else (0, 0, 0)


def to_rgb(pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]) -> Floats32:
    """Render a chip as a picture in 0..1, shape (3, height, width)."""
    red, green, blue = rgb_index(bands)
    unit = to_unit(pixels[[red, green, blue]], [scale[red], scale[green], scale[blue]])
    return np.clip(unit, 0, 1)
