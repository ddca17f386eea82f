"""Mosaics of parcels: irregular blocks, each divided into strips and plots of its own bearing.

The same construction gives fields on farms, and streets, lots and roofs in towns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.planet.scenery.noise import hash_ints, unit
from geofm.types import Floats, Floats32

Bits = NDArray[np.uint32]


@dataclass(frozen=True)
class Blocks:
    """Cells around scattered points: hash of the nearest point, metres to rim and point."""

    bits: Bits
    rim: Floats32
    near: Floats32


def blocks(key: int, x: Floats, y: Floats, edge: float) -> Blocks:
    """Compute Voronoi cells of points that are jittered on a grid of ``edge`` metres."""
    u, v = x / edge, y / edge
    left, low = np.floor(u - 0.5).astype(np.int32), np.floor(v - 0.5).astype(np.int32)
    west, south = left.min(), low.min()
    # The hash of each grid point, computed once.
    columns = np.arange(west, left.max() + 2)
    table = hash_ints(key, columns, np.arange(south, low.max() + 2)[:, None])
    # Each coordinate uses 16 bits of the hash.
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
        bits: Hash of the plot.
        edge: Metres to the plot's nearest side.
        along, across: Metres from the plot's corner, along and across its strip.
        length, width: Size of the plot in metres.
    """

    bits: Bits
    edge: Floats32
    along: Floats32
    across: Floats32
    length: Floats32
    width: Floats32


def _divide(
    position: Floats32, bits: Bits, use: int
) -> tuple[NDArray[np.int32], Floats32, Floats32]:
    """Divide a line into irregular intervals of mean length 1.

    Returns:
        Number of the interval, distance from its lower end, and its length.
    """
    base = np.floor(position).astype(np.int32)

    def border(number: NDArray[np.int32]) -> Floats32:
        return number.astype(np.float32) + 0.2 + 0.6 * unit(hash_ints(use, bits, number))

    border_here = border(base)
    above = position >= border_here
    other = border(base + np.where(above, np.int32(1), np.int32(-1)))
    low, high = np.where(above, border_here, other), np.where(above, other, border_here)
    number = base + above
    return number, (position - low).astype(np.float32), (high - low).astype(np.float32)


def plots(
    bits: Bits, x: Floats, y: Floats, width: Floats32, length: Floats32, angle: Floats32
) -> Plots:
    """Divide blocks into strips of about ``length``, and these into plots of about ``width``.

    Args:
        bits: Hash of the block in which a point lies.
        x: Eastings of the points.
        y: Northings of the points.
        width: Mean width of plots in metres, constant in a block.
        length: Mean length of plots in metres, constant in a block.
        angle: Bearing of the plots in radians, constant in a block.
    """
    # With coordinates relative to a near origin, single precision is exact to centimetres.
    fx = np.mod(x, 65_536.0).astype(np.float32)
    fy = np.mod(y, 65_536.0).astype(np.float32)
    c, s = np.cos(angle), np.sin(angle)
    across, along = fx * c + fy * s, fy * c - fx * s
    row, in_row, row_length = _divide(along / length, bits, 41)
    strip = hash_ints(43, bits, row)
    column, in_column, plot_width = _divide(across / width, strip, 47)
    a, b = in_row * length, (row_length - in_row) * length
    d, e = in_column * width, (plot_width - in_column) * width
    edge = np.minimum(np.minimum(a, b), np.minimum(d, e))
    return Plots(hash_ints(53, strip, column), edge, a, d, row_length * length, plot_width * width)


def bearing(bits: Bits, use: int) -> Floats32:
    """Choose a direction for each block, 0 to pi/2 radians."""
    return unit(bits, use) * np.float32(math.pi / 2)


def cover(half: Floats32 | float, distance: Floats32, gsd: float) -> Floats32:
    """Compute the share of a pixel within ``half`` metres of a line or centre, 0 to 1."""
    share: Floats32 = np.clip((half - distance) / np.float32(gsd) + np.float32(0.5), 0, 1)
    return share


def crowns(key: int, x: Floats, y: Floats, edge: float) -> tuple[Floats32, Bits]:
    """Compute tree crowns about ``edge`` metres apart: height (0 to 1) and hash of the tree."""
    trees = blocks(key, x, y, edge)
    radius = np.float32(edge) * (0.45 + 0.3 * unit(trees.bits, 3))
    dome = np.sqrt(np.clip(1 - (trees.near / radius) ** 2, 0, 1)) * (
        0.6 + 0.4 * unit(trees.bits, 4)
    )
    return dome.astype(np.float32), trees.bits
