"""How far a chip's k-th nearest neighbour is: small where chips crowd, large where one is rare."""

from __future__ import annotations

import faiss
import numpy as np

from data_catalog.progress import tick
from geofm.curation.clusters import cluster, members
from geofm.curation.lattice import ONE, lattice
from geofm.curation.space import Floats, Indices, Space, use_threads

#: Which neighbour; beyond how many rows it is sought in clusters, of what size and how many.
NEIGHBOUR, EXACT_UP_TO, CLUSTER_OF, PROBED = 16, 20_000, 512, 4


def knn_radius(space: Space, rows: Indices, k: int = NEIGHBOUR, seed: int = 0) -> Floats:
    """1 − similarity of each row to its k-th nearest of ``rows``, itself not counted.

    Exact up to 20,000 rows. Beyond that, neighbours are those of the four clusters (of about 512
    rows) nearest to a row's own, which can only make a radius too large. Similarities are on the
    lattice, so the result is the same for any number of threads.

    Returns:
        Radii in 0..1 [len(rows)]; 1 where there is no other row, or none that is alike.
    """
    use_threads()
    if len(rows) <= EXACT_UP_TO:
        return _radius(space, rows, rows, k)
    labels, centres, _ = cluster(space, rows, -(-len(rows) // CLUSTER_OF), seed)
    groups = members(labels, len(centres))
    found = np.ones(len(rows))
    for number, mine in enumerate(groups):
        if not len(mine):
            continue
        near = np.argsort(-(centres @ centres[number]), kind="stable")[:PROBED]
        base = np.concatenate([groups[n] for n in near])
        found[mine] = _radius(space, rows[mine], rows[base], k)
        tick("neighbours", number + 1, len(groups))
    return found


def _radius(space: Space, queries: Indices, base: Indices, k: int) -> Floats:
    """The radius of some rows among others, which they are part of."""
    k = min(k, len(base) - 1)
    if k < 1:
        return np.ones(len(queries))
    similarity, at = faiss.knn(
        lattice(space, queries), lattice(space, base), k + 1, metric=faiss.METRIC_INNER_PRODUCT
    )
    itself = (base[at[:, :k]] == queries[:, None]).any(axis=1)
    kth = np.where(itself, similarity[:, k], similarity[:, k - 1])
    return np.asarray(np.clip(1 - kth.astype(np.float64) / ONE, 0, 1))
