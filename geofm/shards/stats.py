"""Mean and standard deviation of each band in unit space, over valid pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.imagery.radiometry import WHITE

Json = dict[str, Any]


def unit_factors(dtype: str, scale: Sequence[float]) -> list[float]:
    """What counts are multiplied with to be in unit space, one factor per band (float64)."""
    if dtype == "uint8":
        return [1 / 255 for _ in scale]
    return [float(value) / WHITE for value in scale]


def band_sums(pixels: NDArray[np.generic], scale: Sequence[float], valid_fraction: float) -> Json:
    """Pixel count, sums and sums of squares (unit space, one per band) of one chip.

    Counts are added up as integers, so nothing is lost. In a chip that is not wholly valid, a
    pixel without any signal in any band is nodata.

    Args:
        pixels: [bands, height, width], uint8 or uint16.
        scale: reflectance per count, one per band.
        valid_fraction: share of valid pixels, as the chip was cut.
    """
    flat = pixels.reshape(len(pixels), -1).astype(np.uint64)
    if valid_fraction < 1:
        flat = flat[:, flat.any(axis=0)]
    factors = unit_factors(pixels.dtype.name, scale)
    totals, squares = flat.sum(axis=1), (flat * flat).sum(axis=1)
    return {
        "count": int(flat.shape[1]),
        "sum": [int(total) * f for total, f in zip(totals, factors, strict=True)],
        "squares": [int(square) * f * f for square, f in zip(squares, factors, strict=True)],
    }


def finish_stats(
    bands: Sequence[str], dtype: str, scale: Sequence[float], sums: Sequence[Json]
) -> Json:
    """The content of ``stats.json``; sums are exact whatever their order (``math.fsum``).

    Returns:
        ``bands``, ``dtype``, ``scale`` (of the first sample), ``mean`` and ``std`` (population,
        unit space, one per band), ``count`` (valid pixels) and ``samples``.
    """
    count = sum(chip["count"] for chip in sums)
    mean, std = [], []
    for band in range(len(bands)):
        average = math.fsum(chip["sum"][band] for chip in sums) / max(count, 1)
        square = math.fsum(chip["squares"][band] for chip in sums) / max(count, 1)
        mean.append(average)
        std.append(math.sqrt(max(0.0, square - average * average)))
    return {
        "bands": list(bands),
        "dtype": dtype,
        "scale": list(scale),
        "white": WHITE,
        "mean": mean,
        "std": std,
        "count": count,
        "samples": len(sums),
    }
