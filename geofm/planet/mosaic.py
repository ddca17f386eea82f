"""Mosaics of parcels: irregular blocks of land, each cut into strips and plots of its own bearing.

The same construction gives fields at farm scale and streets, lots and roofs at town scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.planet.noise import Coords, Floats, Mask, hash_ints, unit

Bits = NDArray[np.uint32]


@dataclass(frozen=True)
class Blocks:
    """Cells around scattered points: the hash of the nearest, distance to the cell's rim (m)."""

    bits: Bits
    rim: Floats
    near: Floats


def blocks(key: int, x: Coords, y: Coords, edge: float) -> Blocks:
    """Voronoi cells of points jittered on a grid of ``edge`` metres."""
    u, v = x / edge, y / edge
    left, low = np.floor(u - 0.5).astype(np.int64), np.floor(v - 0.5).astype(np.int64)
    first = np.full(u.shape, 9, dtype=np.float32)
    second = first.copy()
    bits = np.zeros(u.shape, dtype=np.uint32)
    for dy in (0, 1):
        for dx in (0, 1):
            found = hash_ints(key, left + dx, low + dy)
            # 16 bits of the hash for each coordinate
            jx = (found & np.uint32(0xFFFF)).astype(np.float32) * np.float32(0.6 / 65536) + 0.2
            jy = (found >> np.uint32(16)).astype(np.float32) * np.float32(0.6 / 65536) + 0.2
            far = np.hypot(
                (left + dx - u).astype(np.float32) + jx, (low + dy - v).astype(np.float32) + jy
            )
            closer = far < first
            second = np.where(closer, first, np.minimum(second, far))
            first = np.where(closer, far, first)
            bits = np.where(closer, found, bits)
    return Blocks(bits, (second - first) * np.float32(edge / 2), first * np.float32(edge))


@dataclass(frozen=True)
class Plots:
    """Plots of a mosaic.

    Attributes:
        bits: hash of the plot.
        edge: metres to the plot's nearest side.
        along, across: metres from the plot's corner, along and across its strip.
        length, width: of the plot in metres.
    """

    bits: Bits
    edge: Floats
    along: Floats
    across: Floats
    length: Floats
    width: Floats


def _cut(place: Floats, bits: Bits, use: int) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Irregular intervals of mean length 1: number, distance from the lower end, length."""
    base = np.floor(place).astype(np.int64)

    def border(shift: int) -> Floats:
        drawn = hash_ints(use, bits, base + shift)
        return (base + shift).astype(np.float32) + 0.2 + 0.6 * unit(drawn)

    here = border(0)
    above = place >= here
    low = np.where(above, here, border(-1))
    high = np.where(above, border(1), here)
    number = base + above
    return number, (place - low).astype(np.float32), (high - low).astype(np.float32)


def plots(bits: Bits, x: Coords, y: Coords, width: Floats, length: Floats, angle: Floats) -> Plots:
    """Strips of about ``length``, each cut into plots of about ``width`` (metres).

    Args:
        bits: hash of the block that a point lies in.
        x, y: coordinates of the point.
        width, length, angle: of the block's plots, constant inside a block.
    """
    # coordinates relative to a near origin keep single precision exact to centimetres
    fx = np.mod(x, 65_536.0).astype(np.float32)
    fy = np.mod(y, 65_536.0).astype(np.float32)
    c, s = np.cos(angle), np.sin(angle)
    across, along = fx * c + fy * s, fy * c - fx * s
    row, in_row, row_length = _cut(along / length, bits, 41)
    strip = hash_ints(43, bits, row)
    column, in_column, plot_width = _cut(across / width, strip, 47)
    a, b = in_row * length, (row_length - in_row) * length
    d, e = in_column * width, (plot_width - in_column) * width
    edge = np.minimum(np.minimum(a, b), np.minimum(d, e))
    return Plots(hash_ints(53, strip, column), edge, a, d, row_length * length, plot_width * width)


def bearing(bits: Bits, use: int) -> Floats:
    """A direction for each block, radians in 0..pi/2."""
    return unit(bits, use) * np.float32(math.pi / 2)


def cover(half: Floats | float, distance: Floats, gsd: float) -> Floats:
    """Share of a pixel inside ``half`` metres of a line or centre: 0..1, soft over one pixel."""
    found: Floats = np.clip((half - distance) / np.float32(gsd) + np.float32(0.5), 0, 1)
    return found


def crowns(key: int, x: Coords, y: Coords, edge: float) -> tuple[Floats, Bits]:
    """Tree crowns about ``edge`` metres apart: dome height 0..1 and the hash of the tree."""
    trees = blocks(key, x, y, edge)
    radius = np.float32(edge) * (0.45 + 0.3 * unit(trees.bits, 3))
    dome = np.sqrt(np.clip(1 - (trees.near / radius) ** 2, 0, 1)) * (
        0.6 + 0.4 * unit(trees.bits, 4)
    )
    return dome.astype(np.float32), trees.bits


def mask_of(values: NDArray[np.generic]) -> Mask:
    """A boolean array of the same shape, all false."""
    return np.zeros(values.shape, dtype=bool)
