"""Balanced k-means (Vo et al. 2024): a rank per chip from a hierarchy of clusters.

Clusters of level 1 (leaves) have about 20 chips. Each further level clusters the centres of the
level below, until at most 50 clusters are left. Repeated clustering evens out the density of the
pool. Each cluster divides its budget equally among its children; if a child has too few chips, its
siblings share the rest.

The rank gives the selection for every budget. A leaf ranks its chips by their similarity to its
centre. A cluster of a higher level takes the first chip of each child, then the second of each, and
so on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geofm.embeddings.clusters import cluster, divide_into_groups, rows_by_label
from geofm.embeddings.vectors import STEPS, EmbeddingSpace, Quantized
from geofm.runtime.threads import map_on_cores
from geofm.types import Floats, Indices

#: Chips per leaf, and children per cluster of a higher level.
LEAF_ROWS, CHILDREN = 20, 10
#: The hierarchy ends at the first level with at most this many clusters.
TOP = 50
#: Largest number of rows that are clustered at once.
GROUP_ROWS = 2048


def balanced_rank(space: EmbeddingSpace, rows: Indices, seed: int) -> Indices:
    """Compute the rank of each row within its cluster of the highest level.

    To fill a budget, keep the rows with the lowest ranks. All clusters of the highest level then
    give the same number of rows, as far as they have them.

    Returns:
        Ranks from 0, shape (rows,).
    """
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    ranked, centres = _cluster_by_group(space, rows, LEAF_ROWS, seed)
    count = len(rows)
    while TOP < len(centres) < count:
        count = len(centres)
        level = EmbeddingSpace((centres / STEPS).astype(np.float16), np.zeros(centres.shape[1]))
        parents, centres = _cluster_by_group(level, np.arange(count), CHILDREN, seed)
        ranked = [in_turn([ranked[child] for child in children]) for children in parents]
    rank = np.empty(len(rows), dtype=np.int64)
    for members in ranked:
        rank[members] = np.arange(len(members))
    return rank


def _cluster_by_group(
    space: EmbeddingSpace, rows: Indices, size: int, seed: int
) -> tuple[list[Indices], Quantized]:
    """Cluster rows, about ``size`` in each cluster, group by group: time is linear in the rows.

    Returns:
        Positions in ``rows`` of the members of each cluster, closest to the centre first; and the
        centres, shape (clusters, d).
    """
    clusters, cluster_centres = [], []
    groups = divide_into_groups(space, rows, GROUP_ROWS, seed)

    def cluster_group(group: Indices) -> tuple[Indices, Quantized, Floats]:
        return cluster(space, rows[group], -(-len(group) // size), seed)

    clustered = map_on_cores(cluster_group, groups)
    for group, (labels, centres, similarity) in zip(groups, clustered, strict=True):
        for number, members in enumerate(rows_by_label(labels, len(centres))):
            if len(members):
                closest_first = np.argsort(-similarity[members], kind="stable")
                clusters.append(group[members[closest_first]])
                cluster_centres.append(centres[number])
    return clusters, np.array(cluster_centres)


def in_turn(lists: Sequence[Indices]) -> Indices:
    """Merge lists: the first of each list, then the second of each, and so on."""
    turn = np.concatenate([np.arange(len(members)) for members in lists])
    return np.concatenate(lists)[np.argsort(turn, kind="stable")]
