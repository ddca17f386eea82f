"""A signature of thumbnails that hardly changes when a view is shifted, turned or mirrored.

It is the fine structure of the log spectrum. A shift changes phases only, so the amplitudes of two
views that overlap are alike. A turn by 90 degrees or a mirror permutes them. Gain and haze add a
constant to the log, blur and shading add a smooth surface, and both are removed. What remains are
the peaks and gaps of this very view: two views of the same kind of land have other ones. So
unrelated chips have a product near 0, and chips that share 60 % of their ground one above 0.4.

Values are whole numbers. Sums of their products are exact, and equal on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from geofm.raster.resample import binomial_downsample
from geofm.types import Bools, Floats32, Indices, Pairs

#: Spectral signatures, shape (n, ``WIDTH``).
Signatures = NDArray[np.int8]
#: Edge of the picture whose spectrum is computed, in pixels.
EDGE = 32
#: Highest frequency along an axis (periods per edge); higher ones are mostly grain. Up to LOWEST,
#: both axes, frequencies are shading.
HIGHEST, LOWEST = 13, 1
#: Standard deviation (pixels) of the shading that is removed before.
SHADING = 2.5
#: Structure of the log spectrum that is kept: wider than the first and narrower than the second
#: standard deviation, in frequencies.
STRUCTURE = (0.7, 2.0)
#: Share of the mean amplitude that is added to each, so that the log of a gap is not deep.
FLOOR = 0.1
#: Length of a signature. By Cauchy-Schwarz all sums stay below 2**24, where float32 is exact.
LENGTH = 800
#: Product from which two chips may share a view, as a share of ``LENGTH`` squared. Chosen on scenes
#: other than the benchmark's: 0.2 % of the pairs that share 59 % of their ground are below.
LEAST_PRODUCT = 0.35

_DOWN, _RIGHT = np.meshgrid(*2 * [np.fft.fftfreq(EDGE, 1 / EDGE).astype(np.int64)], indexing="ij")
_REACH = np.maximum(np.abs(_DOWN), np.abs(_RIGHT))
#: Used frequencies. Of a frequency and its opposite, which has the same amplitude, one is used.
_USED = (LOWEST < _REACH) & (_REACH <= HIGHEST) & ((_RIGHT > 0) | ((_RIGHT == 0) & (_DOWN > 0)))
#: Numbers of a signature.
WIDTH = int(_USED.sum())


def _permutations() -> Indices:
    """List, for each distinct orientation, the position from which each number is taken.

    Half a turn does not change amplitudes, so four of the eight orientations are distinct.
    """
    position = np.full((EDGE, EDGE), -1)
    position[_USED] = np.arange(WIDTH)
    down, right = _DOWN[_USED], _RIGHT[_USED]
    orders = []
    for y, x in ((down, right), (-down, right), (right, down), (-right, down)):
        at, opposite = position[y % EDGE, x % EDGE], position[-y % EDGE, -x % EDGE]
        orders.append(np.where(at >= 0, at, opposite))
    return np.stack(orders)


#: Permutations of a signature for the distinct orientations, shape (4, ``WIDTH``), and the one of
#: each of the eight orientations (``perceptual_hash.ORIENTATIONS``).
TURNS = _permutations()
TURN_OF = np.array([0, 3, 0, 3, 1, 2, 1, 2])


def _band(narrow: float, wide: float) -> Floats32:
    """Make the factors that keep structure between two widths (a difference of Gaussians)."""
    angle = 2 * np.pi * np.fft.fftfreq(EDGE)
    squared = angle[:, None] ** 2 + angle[None, : EDGE // 2 + 1] ** 2
    factors = np.exp(-(narrow**2) * squared / 2) - np.exp(-(wide**2) * squared / 2)
    return np.asarray(factors, dtype=np.float32)


_STRUCTURE = _band(*STRUCTURE)
_WINDOW = np.sqrt(np.hanning(EDGE + 2)[1:-1]).astype(np.float32)


def signatures(thumbnails: NDArray[np.uint8], contrast: Floats32) -> Signatures:
    """Compute the signatures of thumbnails.

    Args:
        thumbnails: shape (n, 64, 64).
        contrast: unit grey of byte 255 less that of byte 0, shape (n,).

    Returns:
        Shape (n, ``WIDTH``); zeros for a thumbnail without contrast.
    """
    halved = binomial_downsample(binomial_downsample(thumbnails.astype(np.float32), 1), 2)
    for rim in (halved[:, 0], halved[:, -1], halved[:, :, 0], halved[:, :, -1]):
        rim *= np.float32(8 / 7)  # noqa: PLW2901  (in place: a rim has less weight)
    halved *= (contrast / np.float32(64 * 255))[:, None, None]
    halved -= gaussian_filter(halved, (0, SHADING, SHADING), mode="nearest")
    amplitude = np.abs(fft.fft2(halved * np.outer(_WINDOW, _WINDOW)))
    floor = FLOOR * amplitude.mean(axis=(1, 2), keepdims=True)
    logs = np.log(amplitude + floor + np.float32(1e-12))
    fine = np.ascontiguousarray(fft.irfft2(fft.rfft2(logs) * _STRUCTURE, s=(EDGE, EDGE))[:, _USED])
    limit = 3 * fine.std(axis=1, keepdims=True)
    fine = np.clip(fine, -limit, limit)
    length = np.sqrt(np.einsum("ij,ij->i", fine, fine))
    # float32 leaves some rounding error in a spectrum without any structure
    scale = np.where((contrast > 0) & (length > 1e-3), LENGTH / np.maximum(length, 1e-3), 0)
    return np.ascontiguousarray(np.clip(np.rint(fine * scale[:, None]), -127, 127), dtype=np.int8)


def turned(of_chips: Signatures) -> Floats32:
    """Return the signatures of n chips in each distinct orientation, shape (4 n, ``WIDTH``)."""
    return of_chips[:, TURNS].transpose(1, 0, 2).reshape(-1, WIDTH).astype(np.float32)


def _best_products(left: Signatures, right: Signatures) -> Floats32:
    """Compute the largest product over the orientations of each pair, shape (n, m)."""
    products = turned(left) @ right.astype(np.float32).T
    return np.asarray(products.reshape(len(TURNS), len(left), len(right)).max(axis=0))


def best_agreeing(
    left: Signatures, right: Signatures, left_out: Bools, rank: Indices, most: int
) -> Pairs:
    """Find, for each chip of a list, the chips of another whose signatures agree with it best.

    Args:
        left: shape (n, ``WIDTH``).
        right: shape (m, ``WIDTH``).
        left_out: pairs that do not count, shape (n, m).
        rank: order of the chips of ``right`` with equal products, lowest first, shape (m,).
        most: largest number of chips for each.

    Returns:
        Positions in ``left`` and in ``right``, each of shape (pairs,).
    """
    best = _best_products(left, right)
    i, j = np.nonzero((best >= _least(LEAST_PRODUCT)) & ~left_out)
    order = np.lexsort((rank[j], -best[i, j], i))
    i, j = i[order], j[order]
    place = np.arange(len(i)) - np.searchsorted(i, i)
    return i[place < most], j[place < most]


def orientations_that_agree(left: Signatures, right: Signatures) -> Bools:
    """Tell for pairs in which orientations right may match left; all if no signatures agree.

    Args:
        left: shape (pairs, ``WIDTH``).
        right: shape (pairs, ``WIDTH``).

    Returns:
        By number of the orientation (``perceptual_hash.ORIENTATIONS``), shape (pairs, 8).
    """
    agreed = _products(left, right) >= _least(LEAST_PRODUCT)
    agreed[~agreed.any(axis=1)] = True
    return agreed[:, TURN_OF]


def _products(left: Signatures, right: Signatures) -> Floats32:
    """Compute the products of pairs in each distinct orientation, shape (pairs, 4)."""
    a, b = left.astype(np.float32), right.astype(np.float32)
    products = np.empty((len(left), len(TURNS)), np.float32)
    for number, turn in enumerate(TURNS):
        products[:, number] = np.einsum("ij,ij->i", a[:, turn], b)
    return products


def _least(share: float) -> np.float32:
    """Return the least product of two signatures that agree, a whole number."""
    return np.float32(np.ceil(share * LENGTH**2))
