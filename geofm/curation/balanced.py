"""Balanced choice from a hierarchy of clusters (Vo et al. 2024), as a rank per chip.

Level 1 are clusters of about 20 chips; each further level clusters the centres of the one below,
which evens out how dense the pool is, until there are few. Going down, a budget is shared equally
among the children of a cluster, and what a small child cannot use goes to its siblings. All
budgets at once: the chips of a leaf are taken closest to its centre first, children in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geofm.curation.clusters import cluster, members, nearest_centre, neighbourhoods, train_centres
from geofm.curation.space import Indices, Space

#: Chips per leaf, children per cluster above it, clusters at the top, and chips clustered at once.
LEAF_OF, CHILDREN, TOP, CLUSTERED_OF = 20, 10, 50, 2048


def balanced_rank(space: Space, rows: Indices, seed: int) -> Indices:
    """In which turn each row is taken from its top cluster: 0 for the first of each.

    Keeping the rows of lowest rank is the search for the cap per top cluster that fills a budget.
    """
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    lists: list[Indices] = []
    leaves = []
    for block in neighbourhoods(space, rows, CLUSTERED_OF, seed):
        labels, centres, near = cluster(space, rows[block], -(-len(block) // LEAF_OF), seed)
        for number, leaf in enumerate(members(labels, len(centres))):
            if len(leaf):
                lists.append(block[leaf[np.argsort(-near[leaf], kind="stable")]])
                leaves.append(centres[number])
    centres = np.array(leaves)
    while len(centres) > TOP:
        upper = train_centres(centres, -(-len(centres) // CHILDREN), seed)
        labels, _ = nearest_centre(centres, upper)
        children = members(labels, len(upper))
        lists = [in_turn([lists[child] for child in group]) for group in children if len(group)]
        centres = np.array([upper[n] for n, group in enumerate(children) if len(group)])
    rank = np.empty(len(rows), dtype=np.int64)
    for ranked in lists:
        rank[ranked] = np.arange(len(ranked))
    return rank


def in_turn(lists: Sequence[Indices]) -> Indices:
    """The first of each list, then the second of each, and so on."""
    turn = np.concatenate([np.arange(len(one)) for one in lists])
    return np.concatenate(lists)[np.argsort(turn, kind="stable")]
