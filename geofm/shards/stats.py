"""Mean and standard deviation of each band in unit space, over valid pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geofm.raster.radiometry import WHITE
from geofm.types import Json

#: Number of squared 16-bit values that a float64 adds up without rounding: 2**53 / 65535**2.
EXACT = 2**20


def unit_factors(dtype: str, scale: Sequence[float]) -> list[float]:
    """Return the factor from counts to unit space for each band (float64)."""
    if dtype == "uint8":
        return [1 / 255 for _ in scale]
    return [float(value) / WHITE for value in scale]


@dataclass
class BandSums:
    """Number, sums and sums of squares of pixels: integers, so their order does not matter.

    Attributes:
        samples: Number of chips.
        by_factors: Pixels, sums and squares by the factors from counts to unit space.
    """

    samples: int = 0
    by_factors: dict[tuple[float, ...], tuple[int, list[int], list[int]]] = field(
        default_factory=dict
    )

    def add(
        self, pixels: NDArray[np.generic], scale: Sequence[float], valid_fraction: float
    ) -> None:
        """Add a chip. If it is not fully valid, pixels that are zero in all bands are nodata.

        Args:
            pixels: Counts, shape (bands, height, width), uint8 or uint16.
            scale: Reflectance per count for each band.
            valid_fraction: Share of valid pixels when the chip was cut.
        """
        flat = pixels.reshape(len(pixels), -1)
        if valid_fraction < 1:
            flat = flat[:, flat.any(axis=0)]
        sums, squares = [0] * len(flat), [0] * len(flat)
        for band, counts in enumerate(flat):
            for start in range(0, len(counts), EXACT):
                values = counts[start : start + EXACT].astype(np.float64)
                sums[band] += int(values.sum())
                squares[band] += int(np.square(values, out=values).sum())  # no threads of a BLAS
        factors = tuple(unit_factors(pixels.dtype.name, scale))
        self._add(factors, flat.shape[1], sums, squares)
        self.samples += 1

    def _add(
        self, factors: tuple[float, ...], count: int, sums: list[int], squares: list[int]
    ) -> None:
        """Add sums to those with the same factors."""
        nothing = (0, [0] * len(sums), [0] * len(sums))
        before, more_sums, more_squares = self.by_factors.get(factors, nothing)
        self.by_factors[factors] = (
            before + count,
            [a + b for a, b in zip(more_sums, sums, strict=True)],
            [a + b for a, b in zip(more_squares, squares, strict=True)],
        )

    def merge(self, content: Json) -> None:
        """Add sums that ``to_json`` returned."""
        self.samples += content["samples"]
        for factors, count, sums, squares in content["by_factors"]:
            self._add(tuple(factors), count, sums, squares)

    def to_json(self) -> Json:
        """Return the sums as JSON."""
        return {
            "samples": self.samples,
            "by_factors": [[list(key), *value] for key, value in sorted(self.by_factors.items())],
        }


def merge_sums(parts: Iterable[Json]) -> BandSums:
    """Add up the sums of several shards."""
    total = BandSums()
    for part in parts:
        total.merge(part)
    return total


def finish_stats(bands: Sequence[str], dtype: str, scale: Sequence[float], total: BandSums) -> Json:
    """Compute the content of ``stats.json``.

    Returns:
        ``bands``, ``dtype``, ``scale`` (of the first sample), ``mean`` and ``std`` (population,
        unit space, one per band), ``count`` (valid pixels) and ``samples``.
    """
    count = sum(pixels for pixels, _, _ in total.by_factors.values())
    mean, std = [], []
    for band in range(len(bands)):
        groups = [(f[band], s[band], q[band]) for f, (_, s, q) in total.by_factors.items()]
        average = math.fsum(factor * sums for factor, sums, _ in groups) / max(count, 1)
        square = math.fsum(factor**2 * squares for factor, _, squares in groups) / max(count, 1)
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
        "samples": total.samples,
    }
