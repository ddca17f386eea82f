"""Balanced k-means (Vo et al. 2024): a rank per chip from a hierarchy of clusters.

Clusters of level 1 have about 20 chips. Each further level clusters the centres of the level below,
which evens out the density of the pool, until few clusters are left. Going down, a budget is shared
equally among the children of a cluster, and what a small child cannot use goes to its siblings. The
rank serves all budgets at once: a leaf ranks its chips by their similarity to the centre, and a
cluster takes the chips of its children in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geofm.embeddings.clusters import cluster, divide_into_groups, rows_by_label
from geofm.embeddings.vectors import STEPS, EmbeddingSpace, Quantized
from geofm.types import Indices

#: Chips per leaf, and children per cluster of a higher level.
LEAF_ROWS, CHILDREN = 20, 10
#: Number of clusters at which the hierarchy ends.
TOP = 50
#: Largest number of rows that are clustered at once.
GROUP_ROWS = 2048


def balanced_rank(space: EmbeddingSpace, rows: Indices, seed: int) -> Indices:
    """Compute the turn in which each row is taken from its top cluster; 0 for the first.

    To keep the rows of lowest rank is the same as to search the cap per top cluster that fills a
    budget.

    Returns:
        Ranks, shape (rows,).
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
    """Make clusters of about ``size`` rows, group by group, so that time is linear in the rows.

    Returns:
        The positions in ``rows`` of each cluster, closest to the centre first; the centres, shape
        (clusters, d).
    """
    clusters, cluster_centres = [], []
    for group in divide_into_groups(space, rows, GROUP_ROWS, seed):
        labels, centres, similarity = cluster(space, rows[group], -(-len(group) // size), seed)
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
