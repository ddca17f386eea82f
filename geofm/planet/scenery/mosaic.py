"""Mosaics of parcels: irregular blocks of land, each cut into strips and plots of its own bearing.

The same construction gives fields at farm scale and streets, lots and roofs at town scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.planet.scenery.noise import Coords, hash_ints, unit
from geofm.types import Floats32

Bits = NDArray[np.uint32]


@dataclass(frozen=True)
class Blocks:
    """Cells around scattered points: the hash of the nearest, distance to the cell's rim (m)."""

    bits: Bits
    rim: Floats32
    near: Floats32


def blocks(key: int, x: Coords, y: Coords, edge: float) -> Blocks:
    """Voronoi cells of points jittered on a grid of ``edge`` metres."""
    u, v = x / edge, y / edge
    left, low = np.floor(u - 0.5).astype(np.int32), np.floor(v - 0.5).astype(np.int32)
    west, south = left.min(), low.min()
    # the points of the lattice, drawn once each
    columns = np.arange(west, left.max() + 2)
    table = hash_ints(key, columns, np.arange(south, low.max() + 2)[:, None])
    # 16 bits of the hash for each coordinate
    jitter_x = (table & np.uint32(0xFFFF)).astype(np.float32) * np.float32(0.6 / 65536)
    jitter_y = (table >> np.uint32(16)).astype(np.float32) * np.float32(0.6 / 65536)
    jitter_x, jitter_y = (jitter_x + np.float32(0.2)).ravel(), (jitter_y + np.float32(0.2)).ravel()
    index = (low - south) * np.int32(columns.size) + (left - west)
    fx, fy = (left - u).astype(np.float32), (low - v).astype(np.float32)
    first = np.full(u.shape, 99, dtype=np.float32)
    second = first.copy()
    best = index
    for dy in (0, 1):
        for dx in (0, 1):
            at = index + np.int32(dy * columns.size + dx)
            ax, ay = jitter_x.take(at), jitter_y.take(at)
            ax += fx + np.float32(dx)
            ay += fy + np.float32(dy)
            far = ax * ax + ay * ay
            closer = far < first
            second = np.where(closer, first, np.minimum(second, far))
            first = np.where(closer, far, first)
            best = np.where(closer, at, best)
    first, second, bits = np.sqrt(first), np.sqrt(second), table.ravel().take(best)
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
    edge: Floats32
    along: Floats32
    across: Floats32
    length: Floats32
    width: Floats32


def _cut(place: Floats32, bits: Bits, use: int) -> tuple[NDArray[np.int32], Floats32, Floats32]:
    """Irregular intervals of mean length 1: number, distance from the lower end, length."""
    base = np.floor(place).astype(np.int32)

    def border(number: NDArray[np.int32]) -> Floats32:
        return number.astype(np.float32) + 0.2 + 0.6 * unit(hash_ints(use, bits, number))

    here = border(base)
    above = place >= here
    other = border(base + np.where(above, np.int32(1), np.int32(-1)))
    low, high = np.where(above, here, other), np.where(above, other, here)
    number = base + above
    return number, (place - low).astype(np.float32), (high - low).astype(np.float32)


def plots(
    bits: Bits, x: Coords, y: Coords, width: Floats32, length: Floats32, angle: Floats32
) -> Plots:
    """Strips of about ``length``, each cut into plots of about ``width`` (metres).

    Args:
        bits: hash of the block that a point lies in.
        x: easting of the point.
        y: northing.
        width: of the block's plots, constant inside a block.
        length: likewise.
        angle: likewise, radians.
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


def bearing(bits: Bits, use: int) -> Floats32:
    """A direction for each block, radians in 0..pi/2."""
    return unit(bits, use) * np.float32(math.pi / 2)


def cover(half: Floats32 | float, distance: Floats32, gsd: float) -> Floats32:
    """Share of a pixel inside ``half`` metres of a line or centre: 0..1, soft over one pixel."""
    found: Floats32 = np.clip((half - distance) / np.float32(gsd) + np.float32(0.5), 0, 1)
    return found


def crowns(key: int, x: Coords, y: Coords, edge: float) -> tuple[Floats32, Bits]:
    """Tree crowns about ``edge`` metres apart: dome height 0..1 and the hash of the tree."""
    trees = blocks(key, x, y, edge)
    radius = np.float32(edge) * (0.45 + 0.3 * unit(trees.bits, 3))
    dome = np.sqrt(np.clip(1 - (trees.near / radius) ** 2, 0, 1)) * (
        0.6 + 0.4 * unit(trees.bits, 4)
    )
    return dome.astype(np.float32), trees.bits
