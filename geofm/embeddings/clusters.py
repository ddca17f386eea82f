"""Spherical k-means with exact sums: the same clusters for any number of threads.

Vectors and centres are on the lattice, so products, sums and with them every assignment are
whole numbers (ties go to the lower cluster). FAISS' k-means is as fast, but its centres differ in
their last bits with threads and BLAS, and near-ties then fall differently.
"""

from __future__ import annotations

import numpy as np

from geofm.embeddings.vectors import BLOCK, ONE, Lattice, Space, lattice, lattice_blocks, to_lattice
from geofm.types import Floats, Indices

#: Rows per centre that k-means trains on, and its iterations.
TRAINED_ON, ITERATIONS = 64, 10


def _first_centres(vectors: Lattice, count: int, draw: np.random.Generator) -> Indices:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is likely to be far away."""
    chosen = np.empty(count, dtype=np.int64)
    distance = np.full(len(vectors), float(ONE))
    for number in range(count):
        ends = np.cumsum(distance)
        if ends[-1] <= 0:  # fewer different vectors than centres
            return chosen[:number]
        at = np.searchsorted(ends, np.floor(draw.random() * ends[-1]), side="right")
        chosen[number] = at
        mine = ONE - vectors @ vectors[at]
        distance = np.clip(np.minimum(distance, mine), 0, None)
        distance[at] = 0
    return chosen


def nearest_centre(vectors: Lattice, centres: Lattice) -> tuple[Indices, Floats]:
    """The most similar centre of each vector, ties to the lower, and the similarity (× ONE)."""
    products = vectors @ centres.T
    best = products.argmax(axis=1)
    return best.astype(np.int64), products[np.arange(len(best)), best].astype(np.float64)


def train_centres(vectors: Lattice, count: int, seed: int) -> Lattice:
    """At most ``count`` centres [k, d] of some vectors; an empty cluster keeps its centre."""
    draw = np.random.default_rng(seed)
    centres = vectors[_first_centres(vectors, min(count, len(vectors)), draw)]
    before = np.empty(0, dtype=np.int64)
    for _ in range(ITERATIONS):
        parts = range(0, len(vectors), BLOCK)
        labels = np.concatenate([nearest_centre(vectors[p : p + BLOCK], centres)[0] for p in parts])
        if np.array_equal(labels, before):
            break
        before = labels
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        sums = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
        lengths = np.sqrt((sums * sums).sum(axis=1))
        real = lengths > 0
        centres[present[real]] = to_lattice(sums[real] / lengths[real, None])
    return centres


def cluster(space: Space, rows: Indices, count: int, seed: int) -> tuple[Indices, Lattice, Floats]:
    """Assign rows to at most ``count`` clusters.

    Args:
        space: where chips are compared.
        rows: rows to cluster, in an order that does not depend on anything but their ids.
        count: clusters at most.
        seed: of the sample that k-means is trained on.

    Returns:
        Cluster of each row, centres [k, d] on the lattice, and each row's similarity to its
        centre.
    """
    draw = np.random.default_rng([seed, len(rows)])
    sample = np.sort(draw.permutation(len(rows))[: count * TRAINED_ON])
    centres = train_centres(lattice(space, rows[sample]), count, seed)
    labels, similarity = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
    for part, vectors in lattice_blocks(space, rows):
        labels[part], similarity[part] = nearest_centre(vectors, centres)
    return labels, centres, similarity / ONE


def neighbourhoods(space: Space, rows: Indices, most: int, seed: int) -> list[Indices]:
    """Cut rows into groups of at most ``most``: clusters, cut again where they are too large.

    Returns:
        Positions in ``rows``, ascending in each group.
    """
    if len(rows) <= most:
        return [np.arange(len(rows))] if len(rows) else []
    # clusters of half the limit on average: few of them need a second cut
    labels, centres, _ = cluster(space, rows, -(-2 * len(rows) // most), seed)
    groups = members(labels, len(centres))
    if max(map(len, groups)) > 0.9 * len(rows):  # nearly all the same: any cut will do
        groups = np.array_split(np.arange(len(rows)), -(-len(rows) // most))
    return [
        group[part] for group in groups for part in neighbourhoods(space, rows[group], most, seed)
    ]


def members(labels: Indices, count: int) -> list[Indices]:
    """Positions of each label from 0 to count − 1, ascending."""
    ends = np.cumsum(np.bincount(labels, minlength=count))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])
