"""A chip's nearest neighbours; the k-th is close where chips crowd, far where one is rare."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_catalog.progress import tick
from geofm.embeddings.clusters import cluster, members
from geofm.embeddings.vectors import ONE, Space, lattice, use_threads
from geofm.runtime.native import faiss
from geofm.types import Floats, Indices

#: Which neighbour; beyond how many rows it is sought in clusters, of what size and how many.
NEIGHBOUR, EXACT_UP_TO, CLUSTER_OF, PROBED = 16, 20_000, 512, 4


def neighbours(
    space: Space, rows: Indices, k: int, seed: int = 0
) -> Iterator[tuple[Indices, Indices, Floats]]:
    """The ``k`` nearest of ``rows`` of each of them, itself not counted, a group at a time.

    Exact up to 20,000 rows. Beyond that, neighbours are those of the four clusters (of about 512
    rows) nearest to a row's own: some may be missed. Similarities are on the lattice, so the
    result is the same for any number of threads.

    Yields:
        Rows [n], their neighbours [n, k] (−1 where there are fewer), and the similarities [n, k].
    """
    use_threads()
    if len(rows) <= EXACT_UP_TO:
        yield rows, *_nearest(space, rows, rows, k)
        return
    labels, centres, _ = cluster(space, rows, -(-len(rows) // CLUSTER_OF), seed)
    groups = members(labels, len(centres))
    for number, mine in enumerate(groups):
        if not len(mine):
            continue
        near = np.argsort(-(centres @ centres[number]), kind="stable")[:PROBED]
        base = np.concatenate([groups[n] for n in near])
        yield rows[mine], *_nearest(space, rows[mine], rows[base], k)
        tick("neighbours", number + 1, len(groups))


def knn_radius(space: Space, rows: Indices, k: int = NEIGHBOUR, seed: int = 0) -> Floats:
    """1 − similarity of each row to its k-th nearest of ``rows``, itself not counted.

    Beyond 20,000 rows the search is that of ``neighbours``, which can only make a radius too large.

    Returns:
        Radii in 0..1 [len(rows)]; 1 where there is no other row, or none that is alike.
    """
    k = min(k, len(rows) - 1)
    if k < 1:
        return np.ones(len(rows))
    found = np.ones(len(rows))
    place = np.argsort(rows)
    for some, _, similarity in neighbours(space, rows, k, seed):
        at = place[np.searchsorted(rows[place], some)]
        found[at] = np.clip(1 - similarity[:, -1], 0, 1)
    return found


def _nearest(space: Space, queries: Indices, base: Indices, k: int) -> tuple[Indices, Floats]:
    """Neighbours of some rows among others, which they are part of."""
    wanted = min(k + 1, len(base))
    similarity, at = faiss.knn(
        lattice(space, queries), lattice(space, base), wanted, metric=faiss.METRIC_INNER_PRODUCT
    )
    near = base[at]
    itself = near == queries[:, None]
    itself[~itself.any(axis=1), -1] = True  # crowded out by its equals: the last goes instead
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    value = np.full((len(queries), k), -1.0)
    width = wanted - 1
    rows[:, :width] = near[~itself].reshape(len(queries), width)
    value[:, :width] = similarity[~itself].reshape(len(queries), width) / ONE
    return rows, value
