"""Noise as a function of world coordinates: periodic fractal textures and hashes of integers.

A texture holds all octaves of a fractal (its spectrum falls as a power of the frequency), so each
point needs a single look-up. Every use of a texture is shifted and rotated by its own key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from geofm.types import Floats, Floats32, Indices

#: Edge of a texture in texels, and number of its longest waves per edge.
TEXELS = 1024
WAVES = 10

_M1, _M2, _M3 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), np.uint32(0x9E3779B1)


def mix(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Scramble 32-bit integers in place (finaliser of MurmurHash3)."""
    value ^= value >> np.uint32(16)
    value *= _M1
    value ^= value >> np.uint32(13)
    value *= _M2
    value ^= value >> np.uint32(16)
    return value


def hash_ints(key: int, *parts: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Hash integer arrays that broadcast together to 32 bits."""
    total = _bits(parts[0]) ^ np.uint32(key * 40503 + 977)
    total = mix(total)
    for part in parts[1:]:
        total = mix(total * _M3 + _bits(part))
    return total


def _bits(numbers: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Return integers modulo 2**32."""
    if numbers.dtype == np.uint32:
        return numbers  # type: ignore[return-value]
    if numbers.dtype == np.int32:
        return numbers.view(np.uint32)
    return numbers.astype(np.int64).astype(np.uint32)


def unit(bits: NDArray[np.uint32], use: int = 0) -> Floats32:
    """Map hashes to numbers in 0 to 1; each ``use`` gives an independent number."""
    drawn = mix(bits ^ np.uint32((use * 0x9E3779B1) & 0xFFFFFFFF)) if use else bits
    return np.asarray(drawn.astype(np.float32) * np.float32(2.0**-32))


@lru_cache(maxsize=16)
def texture(seed: int, power: float) -> Floats32:
    """Make a periodic texture, mean 0 and deviation 1, with amplitude frequency**-power."""
    rng = np.random.default_rng([seed, round(power * 1000)])
    white = rng.standard_normal((TEXELS, TEXELS), dtype=np.float32)
    fy = fft.fftfreq(TEXELS, 1 / TEXELS)[:, None]
    fx = fft.rfftfreq(TEXELS, 1 / TEXELS)[None, :]
    radius = np.hypot(fx, fy)
    gain = np.maximum(radius, 1.0) ** -power
    gain *= 1 / (1 + (WAVES / np.maximum(radius, 0.5)) ** 6)  # no waves longer than those of WAVES
    field = fft.irfft2(fft.rfft2(white) * gain.astype(np.float32), s=white.shape)
    field -= field.mean()
    result: Floats32 = np.asarray(field / field.std(), dtype=np.float32)
    result.setflags(write=False)
    return result


@dataclass(frozen=True)
class Noise:
    """The noise of a world; all samples have mean 0 and deviation about 1."""

    seed: int

    def at(
        self, key: int, x: Floats, y: Floats, wave: float, power: float = 1.8, gsd: float = 0.0
    ) -> Floats32:
        """Return fractal noise at points.

        Args:
            key: Key of the field; fields of different keys are independent.
            x: Eastings in metres, any shape.
            y: Northings in metres.
            wave: Longest wavelength in metres.
            power: Smoothness: white noise has 0, 1 is rough, 2.5 is smooth.
            gsd: Distance of the points in metres; if texels are finer, nothing is interpolated.
        """
        rng = np.random.default_rng([self.seed, key])
        angle, shift_x, shift_y = rng.random(3) * (2 * math.pi, TEXELS, TEXELS)
        scale = TEXELS / (WAVES * wave)
        c, s = math.cos(angle) * scale, math.sin(angle) * scale
        u = c * x + s * y + shift_x
        v = -s * x + c * y + shift_y
        image = texture(self.seed, power)
        if gsd * scale >= 1:
            column = np.floor(u).astype(np.int32) & np.int32(TEXELS - 1)
            row = np.floor(v).astype(np.int32) & np.int32(TEXELS - 1)
            near: Floats32 = image.ravel().take(row * np.int32(TEXELS) + column)
            return near
        return self._look_up(image, v, u)

    @staticmethod
    def _look_up(image: Floats32, v: Floats, u: Floats) -> Floats32:
        """Interpolate a periodic texture."""
        coords = np.stack([v.ravel(), u.ravel()])
        np.mod(coords, TEXELS, out=coords)
        values = ndimage.map_coordinates(image, coords, order=1, mode="grid-wrap", prefilter=False)
        return np.asarray(values.reshape(u.shape), dtype=np.float32)

    def grain(self, key: int, columns: Indices, rows: Indices) -> Floats32:
        """Return Gaussian noise of single pixels, deviation 1, shape (H, W).

        Args:
            key: Key of the noise; different keys are independent.
            columns: Column numbers of the pixels in their CRS, shape (W,).
            rows: Row numbers of the pixels in their CRS, shape (H,).
        """
        image = white(self.seed)
        dx, dy = np.random.default_rng([self.seed, key, 5]).integers(0, TEXELS, 2)
        grain: Floats32 = image[np.ix_((rows + dy) % TEXELS, (columns + dx) % TEXELS)]
        return grain


@lru_cache(maxsize=4)
def white(seed: int) -> Floats32:
    """Draw independent Gaussian numbers, shape (TEXELS, TEXELS)."""
    rng = np.random.default_rng([seed, 11])
    return rng.standard_normal((TEXELS, TEXELS), dtype=np.float32)


def smoothstep(low: float, high: float, value: Floats32) -> Floats32:
    """Map values to 0 below ``low`` and 1 above ``high``, smoothly; descending if low > high."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    result: Floats32 = t * t * (3 - 2 * t)
    return result
