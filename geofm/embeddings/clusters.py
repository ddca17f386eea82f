"""Spherical k-means with exact sums: the same clusters for any number of threads.

Vectors and centres are quantized (``vectors.quantize``), so products, sums and every assignment are
whole numbers, and ties go to the lower cluster. The k-means of faiss is as fast, but the last bits
of its centres depend on threads and BLAS, and near-ties then fall differently.
"""

from __future__ import annotations

import numpy as np

from geofm.embeddings.vectors import (
    BLOCK,
    QUANTIZED_ONE,
    EmbeddingSpace,
    Quantized,
    quantize,
    quantize_units,
    quantized_blocks,
)
from geofm.types import Floats, Indices

#: Rows per centre that k-means is trained on, and its iterations.
TRAINED_ON, ITERATIONS = 64, 10
#: A clustering is useless if its largest cluster has more than this share of the rows.
LARGEST_SHARE = 0.9


def cluster(
    space: EmbeddingSpace, rows: Indices, count: int, seed: int
) -> tuple[Indices, Quantized, Floats]:
    """Assign rows to at most ``count`` clusters.

    Args:
        space: space in which chips are compared.
        rows: rows to cluster, shape (n,), in an order that depends on nothing but the chip ids.
        count: largest number of clusters.
        seed: seed of the sample that k-means is trained on.

    Returns:
        The cluster of each row, shape (n,); quantized centres, shape (k, d); the similarity of each
        row to its centre, shape (n,).
    """
    draw = np.random.default_rng([seed, len(rows)])
    sample = np.sort(draw.permutation(len(rows))[: count * TRAINED_ON])
    centres = train_centres(quantize(space, rows[sample]), count, seed)
    labels, similarity = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
    for part, vectors in quantized_blocks(space, rows):
        labels[part], similarity[part] = nearest_centre(vectors, centres)
    return labels, centres, similarity / QUANTIZED_ONE


def train_centres(vectors: Quantized, count: int, seed: int) -> Quantized:
    """Compute at most ``count`` centres, shape (k, d), of vectors, shape (n, d).

    A cluster that becomes empty keeps its centre.
    """
    draw = np.random.default_rng(seed)
    centres = vectors[_choose_first_centres(vectors, min(count, len(vectors)), draw)]
    previous = np.empty(0, dtype=np.int64)
    for _ in range(ITERATIONS):
        parts = range(0, len(vectors), BLOCK)
        labels = np.concatenate([nearest_centre(vectors[p : p + BLOCK], centres)[0] for p in parts])
        if np.array_equal(labels, previous):
            break
        previous = labels
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        sums = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
        lengths = np.sqrt((sums * sums).sum(axis=1))
        nonzero = lengths > 0
        centres[present[nonzero]] = quantize_units(sums[nonzero] / lengths[nonzero, None])
    return centres


def _choose_first_centres(vectors: Quantized, count: int, draw: np.random.Generator) -> Indices:
    """Choose vectors as first centres, each with probability proportional to its distance.

    Source: k-means++, Arthur and Vassilvitskii 2007, with 1 - cosine as the distance.
    """
    chosen = np.empty(count, dtype=np.int64)
    distance = np.full(len(vectors), float(QUANTIZED_ONE))
    for number in range(count):
        ends = np.cumsum(distance)
        if ends[-1] <= 0:  # there are fewer different vectors than centres
            return chosen[:number]
        row = np.searchsorted(ends, np.floor(draw.random() * ends[-1]), side="right")
        chosen[number] = row
        to_row = QUANTIZED_ONE - vectors @ vectors[row]
        distance = np.clip(np.minimum(distance, to_row), 0, None)
        distance[row] = 0
    return chosen


def nearest_centre(vectors: Quantized, centres: Quantized) -> tuple[Indices, Floats]:
    """Find the most similar centre of each vector; ties go to the lower centre.

    Returns:
        Centres, and products (similarity times ``QUANTIZED_ONE``), each of shape (n,).
    """
    products = vectors @ centres.T
    best = products.argmax(axis=1)
    return best.astype(np.int64), products[np.arange(len(best)), best].astype(np.float64)


def divide_into_groups(space: EmbeddingSpace, rows: Indices, most: int, seed: int) -> list[Indices]:
    """Divide rows into groups of at most ``most``, by clustering again what is too large.

    Returns:
        Positions in ``rows``, ascending within each group.
    """
    if len(rows) <= most:
        return [np.arange(len(rows))] if len(rows) else []
    # clusters have half the limit on average, so few of them have to be divided again
    labels, centres, _ = cluster(space, rows, -(-2 * len(rows) // most), seed)
    groups = rows_by_label(labels, len(centres))
    if max(map(len, groups)) > LARGEST_SHARE * len(rows):  # nearly equal vectors: cut anywhere
        groups = np.array_split(np.arange(len(rows)), -(-len(rows) // most))
    return [
        group[part]
        for group in groups
        for part in divide_into_groups(space, rows[group], most, seed)
    ]


def rows_by_label(labels: Indices, count: int) -> list[Indices]:
    """List the positions of each label from 0 to count - 1, ascending."""
    ends = np.cumsum(np.bincount(labels, minlength=count))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])
