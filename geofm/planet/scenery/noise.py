"""Noise as a function of world coordinates: periodic fractal textures and hashes of integers.

A texture holds all octaves of a fractal at once (its spectrum falls as a power of the frequency),
so one look-up per point is enough. Every use of a texture is shifted and turned by its own key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from geofm.types import Floats32

Coords = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
#: Edge of a texture in texels, and how many of the longest waves fit into it.
TEXELS = 1024
WAVES = 10

_M1, _M2, _M3 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), np.uint32(0x9E3779B1)


def mix(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Scramble 32-bit integers (finaliser of MurmurHash3); changes ``value`` in place."""
    value ^= value >> np.uint32(16)
    value *= _M1
    value ^= value >> np.uint32(13)
    value *= _M2
    value ^= value >> np.uint32(16)
    return value


def hash_ints(key: int, *parts: NDArray[np.generic]) -> NDArray[np.uint32]:
    """A 32-bit hash of integer arrays that broadcast together."""
    total = _bits(parts[0]) ^ np.uint32(key * 40503 + 977)
    total = mix(total)
    for part in parts[1:]:
        total = mix(total * _M3 + _bits(part))
    return total


def _bits(numbers: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Integers modulo 2**32."""
    if numbers.dtype == np.uint32:
        return numbers  # type: ignore[return-value]
    if numbers.dtype == np.int32:
        return numbers.view(np.uint32)
    return numbers.astype(np.int64).astype(np.uint32)


def unit(bits: NDArray[np.uint32], use: int = 0) -> Floats32:
    """Hashes as numbers in 0..1; every ``use`` draws an independent one from the same hash."""
    drawn = mix(bits ^ np.uint32((use * 0x9E3779B1) & 0xFFFFFFFF)) if use else bits
    return np.asarray(drawn.astype(np.float32) * np.float32(2.0**-32))


@lru_cache(maxsize=16)
def texture(seed: int, power: float) -> Floats32:
    """A periodic texture, mean 0 and deviation 1, whose amplitude falls as frequency**-power."""
    rng = np.random.default_rng([seed, round(power * 1000)])
    white = rng.standard_normal((TEXELS, TEXELS), dtype=np.float32)
    fy = fft.fftfreq(TEXELS, 1 / TEXELS)[:, None]
    fx = fft.rfftfreq(TEXELS, 1 / TEXELS)[None, :]
    radius = np.hypot(fx, fy)
    gain = np.maximum(radius, 1.0) ** -power
    gain *= 1 / (1 + (WAVES / np.maximum(radius, 0.5)) ** 6)  # nothing longer than the waves wanted
    field = fft.irfft2(fft.rfft2(white) * gain.astype(np.float32), s=white.shape)
    field -= field.mean()
    result: Floats32 = np.asarray(field / field.std(), dtype=np.float32)
    result.setflags(write=False)
    return result


@dataclass(frozen=True)
class Noise:
    """Fractals of one world; all samples have mean 0 and deviation about 1."""

    seed: int

    def at(
        self, key: int, x: Coords, y: Coords, wave: float, power: float = 1.8, gsd: float = 0.0
    ) -> Floats32:
        """Fractal noise at world coordinates (metres), any shape.

        Args:
            key: which of the many independent fields.
            x: eastings.
            y: northings.
            wave: longest wavelength, metres.
            power: 1 is rough (white noise has 0), 2.5 smooth.
            gsd: distance of the points; texels finer than that need no interpolation.
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
    def _look_up(image: Floats32, v: Coords, u: Coords) -> Floats32:
        coords = np.stack([v.ravel(), u.ravel()])
        np.mod(coords, TEXELS, out=coords)
        found = ndimage.map_coordinates(image, coords, order=1, mode="grid-wrap", prefilter=False)
        return np.asarray(found.reshape(u.shape), dtype=np.float32)

    def grain(self, key: int, columns: Ints, rows: Ints) -> Floats32:
        """Gaussian noise of single pixels, deviation 1, by their integer position in a CRS.

        Args:
            key: which of the many independent grains.
            columns: [W].
            rows: [H].

        Returns:
            [H, W].
        """
        image = white(self.seed)
        dx, dy = np.random.default_rng([self.seed, key, 5]).integers(0, TEXELS, 2)
        found: Floats32 = image[np.ix_((rows + dy) % TEXELS, (columns + dx) % TEXELS)]
        return found


@lru_cache(maxsize=4)
def white(seed: int) -> Floats32:
    """Independent Gaussian numbers, [TEXELS, TEXELS]."""
    rng = np.random.default_rng([seed, 11])
    return rng.standard_normal((TEXELS, TEXELS), dtype=np.float32)


def smoothstep(low: float, high: float, value: Floats32) -> Floats32:
    """0 below ``low``, 1 above ``high``, smooth between; descending when low > high."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    result: Floats32 = t * t * (3 - 2 * t)
    return result
