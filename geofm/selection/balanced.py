"""Balanced choice from a hierarchy of clusters (Vo et al. 2024), as a rank per chip.

Level 1 are clusters of about 20 chips; each further level clusters the centres of the one below,
which evens out how dense the pool is, until there are few. Going down, a budget is shared equally
among the children of a cluster, and what a small child cannot use goes to its siblings. All
budgets at once: the chips of a leaf are taken closest to its centre first, children in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geofm.embeddings.clusters import cluster, members, neighbourhoods
from geofm.embeddings.vectors import STEPS, Lattice, Space
from geofm.types import Indices

#: Chips per leaf, children per cluster above, clusters at the top, and most clustered at once.
LEAF_OF, CHILDREN, TOP, CLUSTERED_OF = 20, 10, 50, 2048


def balanced_rank(space: Space, rows: Indices, seed: int) -> Indices:
    """In which turn each row is taken from its top cluster: 0 for the first of each.

    Keeping the rows of lowest rank is the search for the cap per top cluster that fills a budget.
    """
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    lists, centres = _clusters(space, rows, LEAF_OF, seed)
    below = len(rows)
    while TOP < len(centres) < below:
        below = len(centres)
        level = Space((centres / STEPS).astype(np.float16), np.zeros(centres.shape[1]))
        groups, centres = _clusters(level, np.arange(below), CHILDREN, seed)
        lists = [in_turn([lists[child] for child in group]) for group in groups]
    rank = np.empty(len(rows), dtype=np.int64)
    for ranked in lists:
        rank[ranked] = np.arange(len(ranked))
    return rank


def _clusters(space: Space, rows: Indices, size: int, seed: int) -> tuple[list[Indices], Lattice]:
    """Clusters of about ``size``: positions, closest to the centre first, and centres [k, d].

    They are made neighbourhood by neighbourhood, so that time is linear in the rows.
    """
    groups, found = [], []
    for block in neighbourhoods(space, rows, CLUSTERED_OF, seed):
        labels, centres, near = cluster(space, rows[block], -(-len(block) // size), seed)
        for number, mine in enumerate(members(labels, len(centres))):
            if len(mine):
                groups.append(block[mine[np.argsort(-near[mine], kind="stable")]])
                found.append(centres[number])
    return groups, np.array(found)


def in_turn(lists: Sequence[Indices]) -> Indices:
    """The first of each list, then the second of each, and so on."""
    turn = np.concatenate([np.arange(len(one)) for one in lists])
    return np.concatenate(lists)[np.argsort(turn, kind="stable")]
