"""Soft scores of chips: how much a chip differs from the rest of its pool.

The scores are columns of the decisions, for inspection; no rule uses them. ``entropy`` (bits of the
grey-level histogram, the measure by which GFM compares pretraining sets; Mendieta et al. 2023) is a
further column. No single score is a reason to keep a chip: noise has the highest entropy, and a
broken chip is novel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from data_catalog.storage.process import cores
from geofm.embeddings.neighbours import NEIGHBOUR, knn_radius
from geofm.embeddings.vectors import BLOCK, EmbeddingSpace
from geofm.types import Floats, Floats32, Indices

#: Smallest radius in the computation of the density: smaller radii are raised to this value.
LEAST_RADIUS = 1e-3
#: Largest number of chips with which the spectral moments of a chip are compared.
COMPARED_WITH = 20_000
#: Steps per standard deviation, and the largest deviation (in standard deviations).
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
    """Compute the soft scores of the rows of a pool.

    Args:
        space: space in which chips are compared.
        rows: rows of the pool, in the order of their chip ids, shape (n,).
        moments: spectral moments (band means, standard deviations) of each row.
        targets: embeddings of images of the tasks for which the model is trained, by the same
            encoder, shape (m, d).
        seed: seed of the samples.

    Returns:
        One row per row of the pool: ``novelty``, 1 - similarity to the 16th nearest chip (0..1);
        ``density``, median novelty of the pool / novelty of the chip (above 1: more similar chips
        than usual); ``spectral_rarity`` (see the function); with ``targets`` also ``affinity``, the
        mean similarity to the targets (-1..1).
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

    The centre of the space is subtracted from the targets as well.
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

    Moments are standardised over the pool and clipped at 8 standard deviations. Only chips with the
    same number of moments (the same sensor) are compared. More than 20,000 chips are compared with
    a random sample of 20,000. Deviations are rounded to 1/32, so distances are exact for any number
    of threads.

    Returns:
        Distances in standard deviations, shape (n,); 0 if there is no other chip to compare with.
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
    """Compute the distance of each point, shape (n, m), to the 16th nearest in a sample of them."""
    draw = np.random.default_rng([seed, len(points)])
    sample = np.sort(draw.permutation(len(points))[:COMPARED_WITH])
    k = min(NEIGHBOUR, len(sample) - 1)
    if k < 1:
        return np.zeros(len(points))
    distances, _ = cKDTree(points[sample]).query(points, k + 1, workers=cores())
    # a point of the sample finds itself: its distance 0 takes the place of one neighbour
    in_sample = np.zeros(len(points), np.bool_)
    in_sample[sample] = True
    kth = np.where(in_sample, distances[:, k], distances[:, k - 1])
    return np.asarray(kth / STEPS)
