"""Soft scores: how unlike the rest of its pool a chip is. They explain and order; they never drop.

Together with ``entropy`` (bits of the grey-level histogram, the measure by which GFM compares
pretraining sets; Mendieta et al. 2023) they are columns of the decisions. None is a reason to keep
a chip by itself: noise has the highest entropy, and a broken chip is novel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.embeddings.neighbours import NEIGHBOUR, knn_radius
from geofm.embeddings.vectors import BLOCK, EmbeddingSpace, use_all_cores
from geofm.runtime.native import faiss
from geofm.types import Floats, Floats32, Indices

#: Least radius from which density is computed: chips closer than this count as equal.
LEAST_RADIUS = 1e-3
#: Chips that spectra are compared with.
COMPARED_WITH = 20_000
#: Steps per standard deviation, and largest deviation.
STEPS, MOST_DEVIATIONS = 32, 8
#: Decimals of the scores.
DECIMALS = 6


def soft_scores(
    space: EmbeddingSpace,
    rows: Indices,
    moments: Sequence[Sequence[float]],
    targets: NDArray[np.floating] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the scores of some rows among each other.

    Args:
        space: space in which chips are compared.
        rows: rows of the pool, in the order of their chip ids, shape (n,).
        moments: spectral moments (band means, standard deviations) of each row.
        targets: embeddings, by the same encoder, of images of the tasks that the model is for,
            shape (m, d).
        seed: seed of the samples.

    Returns:
        One row per row of the pool: ``novelty``, 1 - similarity to the 16th nearest chip (0..1);
        ``density``, median novelty of the pool / novelty of the chip (1 is usual, more is crowded);
        ``spectral_rarity`` (see there); with ``targets`` also ``affinity``, the mean similarity to
        them (-1..1).
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


def affinity(space: EmbeddingSpace, rows: Indices, targets: NDArray[np.floating]) -> Floats:
    """Compute the mean cosine similarity of each row to target vectors, shape (m, d).

    The targets are centred as the space is.
    """
    vectors = targets.astype(np.float64) - space.centre
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    mean = (vectors / np.where(lengths > 0, lengths, 1.0)[:, None]).mean(axis=0)
    similarity = np.empty(len(rows))
    for first in range(0, len(rows), BLOCK):
        units = space.exact_units(rows[first : first + BLOCK])
        similarity[first : first + BLOCK] = np.einsum("ij,j->i", units, mean)
    return similarity


def spectral_rarity(moments: Sequence[Sequence[float]], seed: int = 0) -> Floats:
    """Compute the distance to the 16th nearest chip in the space of band moments.

    Moments are standardised over the pool, with at most 8 deviations either way. Chips with another
    number of moments (other sensors) are compared among themselves, and a pool of more than 20,000
    with a random 20,000 of them. Deviations are in whole 32nds, so that distances are exact for any
    number of threads.

    Returns:
        Distances in standard deviations, shape (n,); 0 where there is no other chip.
    """
    rarity = np.zeros(len(moments))
    widths = np.array([len(values) for values in moments], dtype=np.int64)
    for width in np.unique(widths[widths > 0]):
        rows = np.flatnonzero(widths == width)
        table = np.array([list(moments[row]) for row in rows.tolist()], dtype=np.float64)
        deviation = table.std(axis=0)
        scores = (table - table.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        steps = np.rint(np.clip(scores, -MOST_DEVIATIONS, MOST_DEVIATIONS) * STEPS)
        rarity[rows] = _knn_distance(steps.astype(np.float32), seed)
    return rarity


def _knn_distance(points: Floats32, seed: int) -> Floats:
    """Compute the distance of points, shape (n, m), to the 16th nearest of a sample of them."""
    draw = np.random.default_rng([seed, len(points)])
    sample = np.sort(draw.permutation(len(points))[:COMPARED_WITH])
    k = min(NEIGHBOUR, len(sample) - 1)
    if k < 1:
        return np.zeros(len(points))
    use_all_cores()
    squares, position = faiss.knn(points, points[sample], k + 1, metric=faiss.METRIC_L2)
    found_itself = (sample[position[:, :k]] == np.arange(len(points))[:, None]).any(axis=1)
    kth = np.where(found_itself, squares[:, k], squares[:, k - 1])
    return np.asarray(np.sqrt(np.maximum(kth.astype(np.float64), 0)) / STEPS)
