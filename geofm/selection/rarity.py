"""Soft scores: how unlike the rest of its pool a chip is. They order and explain, they never drop.

Together with ``entropy`` (bits of the grey-level histogram, the measure by which GFM compares
pretraining sets; Mendieta et al. 2023) these are columns beside a decision. None is a reason to
keep a chip by itself: noise has the highest entropy, and a broken chip is novel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.embeddings.neighbours import NEIGHBOUR, knn_radius
from geofm.embeddings.vectors import BLOCK, Space, use_threads
from geofm.runtime.native import faiss
from geofm.types import Floats, Indices

#: Least radius that density is computed with: chips closer than this are as good as the same.
LEAST_RADIUS = 1e-3
#: Chips that spectra are compared with; steps per standard deviation; deviations that count.
COMPARED_WITH, STEPS, MOST_DEVIATIONS = 20_000, 32, 8
DECIMALS = 6


def soft_scores(
    space: Space,
    rows: Indices,
    moments: Sequence[Sequence[float]],
    targets: NDArray[np.floating] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of some rows among each other.

    Args:
        space: where chips are compared.
        rows: the pool, in the order of ids.
        moments: spectral moments (band means, standard deviations) of each of ``rows``.
        targets: embeddings [m, d] of images of the tasks aimed at, by the same encoder.
        seed: of the samples.

    Returns:
        One row per row of the pool: ``novelty``, 1 − similarity to the 16th nearest chip (0..1);
        ``density``, the pool's median novelty ÷ this chip's (1 is usual, more is crowded);
        ``spectral_rarity``, see there; and with ``targets`` ``affinity``, the mean similarity to
        them (−1..1).
    """
    novelty = knn_radius(space, rows, seed=seed)
    radius = np.maximum(novelty, LEAST_RADIUS)
    scores = {
        "novelty": novelty,
        "density": float(np.median(radius)) / radius if len(rows) else radius,
        "spectral_rarity": spectral_rarity(moments, seed),
    }
    if targets is not None:
        scores["affinity"] = affinity(space, rows, targets)
    return pd.DataFrame({name: np.round(values, DECIMALS) for name, values in scores.items()})


def affinity(space: Space, rows: Indices, targets: NDArray[np.floating]) -> Floats:
    """Mean cosine similarity of each row to target vectors [m, d], centred as the space is."""
    vectors = targets.astype(np.float64) - space.centre
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    mean = (vectors / np.where(lengths > 0, lengths, 1.0)[:, None]).mean(axis=0)
    found = np.empty(len(rows))
    for first in range(0, len(rows), BLOCK):
        part = rows[first : first + BLOCK]
        found[first : first + BLOCK] = np.einsum("ij,j->i", space.exact(part), mean)
    return found


def spectral_rarity(moments: Sequence[Sequence[float]], seed: int = 0) -> Floats:
    """How far, in standard deviations, the 16th nearest chip is in the space of band moments.

    Moments are standardised over the pool, at most 8 deviations either way. Chips with other
    numbers of moments (other sensors) are compared among themselves, beyond 20,000 with a random
    20,000 of them. Deviations are in whole 32nds, so that distances are exact for any thread
    count. 0 where there is no other chip.
    """
    found = np.zeros(len(moments))
    widths = np.array([len(one) for one in moments], dtype=np.int64)
    for width in np.unique(widths[widths > 0]):
        mine = np.flatnonzero(widths == width)
        table = np.array([list(moments[row]) for row in mine.tolist()], dtype=np.float64)
        spread = table.std(axis=0)
        scores = (table - table.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        steps = np.rint(np.clip(scores, -MOST_DEVIATIONS, MOST_DEVIATIONS) * STEPS)
        found[mine] = _radius(steps.astype(np.float32), seed)
    return found


def _radius(points: NDArray[np.float32], seed: int) -> Floats:
    """Distance of whole-number points [n, m] to the 16th nearest of a sample of them."""
    draw = np.random.default_rng([seed, len(points)])
    sample = np.sort(draw.permutation(len(points))[:COMPARED_WITH])
    k = min(NEIGHBOUR, len(sample) - 1)
    if k < 1:
        return np.zeros(len(points))
    use_threads()
    squares, at = faiss.knn(points, points[sample], k + 1, metric=faiss.METRIC_L2)
    itself = (sample[at[:, :k]] == np.arange(len(points))[:, None]).any(axis=1)
    kth = np.where(itself, squares[:, k], squares[:, k - 1])
    return np.asarray(np.sqrt(np.maximum(kth.astype(np.float64), 0)) / STEPS)
