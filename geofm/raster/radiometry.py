"""From stored numbers to *unit* pixels: the one scale that encoders, students and pictures share.

Reflectance (uint16 with a scale from the asset's metadata) is divided by ``WHITE``, so that bright
soil and buildings come near 1.0; 8-bit imagery is already a picture and is divided by 255. Values
above 1 (cloud, snow, near infrared of dense vegetation) are kept; only pictures clip them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Reflectance shown as white. Sentinel-2 true colour saturates near it as well.
WHITE = 0.3


def to_unit(pixels: NDArray[np.generic], scale: Sequence[float]) -> NDArray[np.float32]:
    """Unit pixels of a chip.

    Args:
        pixels: [bands, height, width], uint8 or uint16, offset already applied.
        scale: reflectance per count, one per band; ignored for uint8.
    """
    values = pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        return values / np.float32(255)
    factor = np.asarray(scale, dtype=np.float32) / np.float32(WHITE)
    return np.asarray(values * factor[:, None, None], dtype=np.float32)


@lru_cache(maxsize=64)
def unit_per_count(dtype: np.dtype[Any], scale: tuple[float, ...]) -> NDArray[np.float32]:
    """What ``to_unit`` multiplies the counts of each band by, [bands]."""
    return to_unit(np.ones((len(scale), 1, 1), dtype), scale).ravel()


def clipped(counts: NDArray[Any], limit: float) -> NDArray[Any]:
    """Counts [height, width], none above a limit.

    Compared with a picture of that number: with the number itself it takes numpy three to four
    times as long.
    """
    height, width = counts.shape
    return np.asarray(np.minimum(counts, _limits(limit, height, width, counts.dtype)))


@lru_cache(maxsize=16)
def _limits(limit: float, height: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.full((height, width), limit, dtype)


def rgb_index(bands: Sequence[str]) -> tuple[int, int, int]:
    """Positions of red, green and blue; without them the first three bands, or one band thrice."""
    if all(name in bands for name in ("red", "green", "blue")):
        return bands.index("red"), bands.index("green"), bands.index("blue")
    return (0, 1, 2) if len(bands) >= 3 else (0, 0, 0)


def to_rgb(
    pixels: NDArray[np.generic], bands: Sequence[str], scale: Sequence[float]
) -> NDArray[np.float32]:
    """A picture of a chip: [3, height, width] in 0..1."""
    red, green, blue = rgb_index(bands)
    unit = to_unit(pixels[[red, green, blue]], [scale[red], scale[green], scale[blue]])
    return np.clip(unit, 0, 1)
