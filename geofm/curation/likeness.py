"""How alike two thumbnails are once one is turned, shifted, and brought to the other's brightness.

A pair is aligned by phase correlation (Kuglin & Hines 1975) in each of the 8 orientations. Then
left is fitted by right over the ground they share, by least squares: five neighbouring pixels and a
constant, which absorb gain, haze, what is left of the shift and the blur of resampling. The
similarity is the correlation of left with its fit. Thumbnails are band-passed before: without
their fine grain, which aliases between odd shifts, and without the coarse shading, in which all
water and all haze are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from geofm.curation.hashing import turn

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

#: Standard deviations of the band-pass, in thumbnail pixels.
FINE, COARSE = 1.0, 3.0
#: Rim of the shared ground that is left out: filters see beyond it.
RIM = 3
#: Contrast (standard deviation of band-passed unit grey) below which nothing can be told: at all,
#: and as a share of what one step of a thumbnail's bytes stands for.
MIN_CONTRAST, MIN_STEPS = 3e-5, 0.25
#: Largest shift in thumbnail pixels that is considered, by the edge; pairs compared at once.
MAX_SHIFT, PAIRS = 0.3, 512
#: Gains beyond which one picture is no rendering of the other.
GAINS = (0.2, 5.0)


@dataclass(frozen=True)
class Likeness:
    """What is found per pair.

    Attributes:
        similarity: 0..1; 0 where nothing can be told.
        orientation: in which right matches left, see ``hashing.turn``.
        shift: [n, 2] thumbnail pixels (down, right) by which right then lies off left.
        iou: the ground they share, intersection over union.
    """

    similarity: NDArray[np.float64]
    orientation: NDArray[np.int8]
    shift: NDArray[np.int16]
    iou: NDArray[np.float64]


def band_pass(thumbnails: NDArray[np.uint8], low: Floats, high: Floats) -> Floats:
    """Unit grey of thumbnails [n, edge, edge] without fine grain and coarse shading."""
    unit = thumbnails.astype(np.float32)
    unit *= ((high - low) / 255).astype(np.float32)[:, None, None]
    smooth = gaussian_filter(unit, (0, FINE, FINE), mode="nearest")
    return np.asarray(smooth - gaussian_filter(smooth, (0, COARSE, COARSE), mode="nearest"))


def compare(
    thumbnails: NDArray[np.uint8], low: Floats, high: Floats, left: Indices, right: Indices
) -> Likeness:
    """Compare pairs of rows.

    Args:
        thumbnails: uint8 [n, edge, edge] (may be a memory map).
        low: unit grey of byte 0, one per thumbnail.
        high: unit grey of byte 255.
        left: rows; pairs that come sorted by it are read once.
        right: rows.
    """
    found = Likeness(
        np.zeros(len(left)), np.zeros(len(left), np.int8), np.zeros((len(left), 2), np.int16),
        np.zeros(len(left)),
    )  # fmt: skip
    for first in range(0, len(left), PAIRS):
        part = slice(first, first + PAIRS)
        rows, of = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        passed = band_pass(thumbnails[rows], low[rows], high[rows])
        count = len(left[part])
        least = np.maximum(MIN_CONTRAST, MIN_STEPS * (high[rows] - low[rows]) / 255)
        one = _compare(passed, least, of[:count], of[count:])
        found.similarity[part], found.orientation[part] = one.similarity, one.orientation
        found.shift[part], found.iou[part] = one.shift, one.iou
    return found


def _compare(passed: Floats, least: Floats, left: Indices, right: Indices) -> Likeness:
    """Compare pairs of band-passed thumbnails, whose contrasts are to be ``least`` or more."""
    half = passed.reshape(len(passed), passed.shape[1] // 2, 2, -1, 2).mean(axis=(2, 4))
    spectra = _spectra(half)
    best = np.full(len(left), -np.inf)
    orientation = np.zeros(len(left), np.int8)
    for which in range(8):
        turned = spectra if which == 0 else _spectra(turn(half, which))
        peak, _ = _peaks(spectra[left], turned[right], half.shape[-1])
        better = peak > best
        best[better], orientation[better] = peak[better], which
    view = np.empty((len(right), *passed.shape[1:]), np.float32)
    for which in range(8):
        mine = orientation == which
        view[mine] = turn(passed[right[mine]], which)
    _, shift = _peaks(_spectra(passed)[left], _spectra(view), passed.shape[-1])
    edge = passed.shape[-1]
    near = np.abs(shift).max(axis=1, initial=0) <= MAX_SHIFT * edge
    similarity = np.zeros(len(left))
    if near.any():
        share, own, other = _fit(passed[left[near]], view[near], shift[near])
        seen = (own >= least[left[near]]) & (other >= least[right[near]])
        similarity[near] = np.where(seen, share, 0)
    # the true shift may be half a pixel less than the whole one
    common = np.prod(edge - np.maximum(np.abs(shift) - 0.5, 0), axis=1)
    iou = np.where(near, common / (2 * edge * edge - common), 0)
    return Likeness(similarity, orientation, shift.astype(np.int16), iou)


def _spectra(pictures: NDArray[Any]) -> NDArray[np.complex64]:
    """Spectra of windowed pictures, every frequency of the same weight."""
    edge = pictures.shape[-1]
    window = np.hanning(edge + 2)[1:-1].astype(np.float32)
    spectra = fft.rfft2(pictures * np.outer(window, window))
    size = np.abs(spectra)
    floor = 0.03 * size.mean(axis=(1, 2), keepdims=True) + 1e-12
    return np.asarray(spectra / np.sqrt(size * np.maximum(size, floor) + 1e-30), dtype=np.complex64)


def _peaks(
    left: NDArray[np.complex64], right: NDArray[np.complex64], edge: int
) -> tuple[Floats, Indices]:
    """Height and place [n, 2] of the highest correlation: by how much right lies off left."""
    surface = fft.irfft2(left * right.conj(), s=(edge, edge)).reshape(len(left), -1)
    at = surface.argmax(axis=1) if len(left) else np.empty(0, np.int64)
    shift = np.stack([at // edge, at % edge], axis=1)
    return surface[np.arange(len(left)), at], (shift + edge // 2) % edge - edge // 2


def _fit(
    left: Floats, right: Floats, shift: Indices
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Correlation of left with its best fit by right, and the contrast of each, where they meet."""
    edge = left.shape[-1]
    pixels = np.arange(-1, edge + 1)
    rows = np.clip(pixels - shift[:, :1], 0, edge - 1)
    cols = np.clip(pixels - shift[:, 1:], 0, edge - 1)
    moved = right[np.arange(len(right))[:, None, None], rows[:, :, None], cols[:, None, :]]
    inside = [
        (pixels[1:-1] >= np.maximum(by, 0) + RIM) & (pixels[1:-1] < edge + np.minimum(by, 0) - RIM)
        for by in (shift[:, :1], shift[:, 1:])
    ]
    weight = (inside[0][:, :, None] & inside[1][:, None, :]).astype(np.float32)
    views = [left, moved[:, 1:-1, 1:-1], moved[:, 2:, 1:-1], moved[:, :-2, 1:-1],
             moved[:, 1:-1, 2:], moved[:, 1:-1, :-2], np.ones_like(left)]  # fmt: skip
    table = (np.stack(views, axis=1) * weight[:, None]).reshape(len(left), len(views), -1)
    sums = (table @ table.transpose(0, 2, 1)).astype(np.float64)
    counts = sums[:, -1, -1]
    means = sums[:, :-1, -1] / counts[:, None]
    moments = sums[:, :-1, :-1] / counts[:, None, None] - means[:, :, None] * means[:, None, :]
    own, across, inner = moments[:, 0, 0], moments[:, 1:, 0], moments[:, 1:, 1:]
    size = np.trace(inner, axis1=1, axis2=2) / inner.shape[-1]
    ridge = (1e-5 * size + 1e-30)[:, None, None] * np.eye(inner.shape[-1])
    taps = np.linalg.solve(inner + ridge, across[:, :, None])[:, :, 0]
    explained = np.einsum("ni,ni->n", taps, across)
    gain = taps.sum(axis=1)
    share = np.clip(explained / np.maximum(own, 1e-30), 0, 1)
    share[(gain < GAINS[0]) | (gain > GAINS[1])] = 0
    contrasts = [np.sqrt(np.maximum(size, 0)) for size in (own, inner[:, 0, 0])]
    return np.round(np.sqrt(share), 6), contrasts[0], contrasts[1]
