"""Nearest neighbours of each chip in a pool, and the distance to the k-th as a density."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_catalog.progress import tick
from geofm.embeddings.clusters import cluster, nearest_centre, rows_by_label
from geofm.embeddings.vectors import (
    QUANTIZED_ONE,
    EmbeddingSpace,
    Quantized,
    nearest_rows,
    quantize,
    quantized_blocks,
    use_all_cores,
)
from geofm.runtime.native import faiss
from geofm.runtime.threads import map_on_cores
from geofm.types import Floats, Indices

#: The neighbour whose distance measures the density of the pool around a chip.
NEIGHBOUR = 16
#: Rows up to which the search is exact. Larger pools are searched by clusters: rows per cluster,
#: and clusters in which the neighbours of a row are searched.
EXACT_UP_TO, CLUSTER_ROWS, PROBED_CLUSTERS = 20_000, 512, 4


def nearest_neighbours(
    space: EmbeddingSpace, rows: Indices, k: int, seed: int = 0
) -> Iterator[tuple[Indices, Indices, Floats]]:
    """Find the ``k`` nearest other rows of each row, group by group.

    The search is exact up to 20,000 rows. Beyond, it covers the four clusters (of about 512 rows)
    nearest to the row's own, so some neighbours may be missed. Vectors are quantized, so the result
    is the same for any number of threads.

    Yields:
        Rows of a group, shape (n,); their neighbours, shape (n, k), with -1 where there are fewer;
        the similarities, shape (n, k).
    """
    if len(rows) <= EXACT_UP_TO:
        yield rows, *_search(space, rows, rows, k)
        return
    labels, centres, _ = cluster(space, rows, -(-len(rows) // CLUSTER_ROWS), seed)
    groups = rows_by_label(labels, len(centres))
    used = [number for number in range(len(groups)) if len(groups[number])]

    def search_group(number: int) -> tuple[Indices, Floats]:
        base = np.concatenate([groups[other] for other in _near_clusters(centres, number)])
        return _search(space, rows[groups[number]], rows[base], k)

    for number, found in zip(used, map_on_cores(search_group, used), strict=True):
        yield rows[groups[number]], *found
        tick("neighbours", number + 1, len(groups), "clusters")


def _near_clusters(centres: Quantized, number: int) -> Indices:
    """List the clusters in which the neighbours of a cluster's rows are searched."""
    return np.argsort(-(centres @ centres[number]), kind="stable")[:PROBED_CLUSTERS]


def knn_radius(space: EmbeddingSpace, rows: Indices, k: int = NEIGHBOUR, seed: int = 0) -> Floats:
    """Compute 1 - similarity of each row to its k-th nearest other row.

    Beyond 20,000 rows the search may miss neighbours, which can only make a radius too large.

    Returns:
        Radii in 0..1, shape (rows,); 1 where there is no other row, or no similar one.
    """
    k = min(k, len(rows) - 1)
    if k < 1:
        return np.ones(len(rows))
    radius = np.ones(len(rows))
    order = np.argsort(rows)
    for group, _, similarity in nearest_neighbours(space, rows, k, seed):
        position = order[np.searchsorted(rows[order], group)]
        radius[position] = np.clip(1 - similarity[:, -1], 0, 1)
    return radius


def most_similar(
    space: EmbeddingSpace, queries: Indices, base: Indices, seed: int = 0
) -> tuple[Indices, Floats]:
    """Find the row of ``base`` that is most similar to each query, near linear in both.

    The search is exact up to 20,000 rows of ``base``. Beyond, it covers the four clusters of
    ``base`` nearest to the query's own, so a slightly less similar row may be found.

    Returns:
        Rows and exact similarities, each of shape (queries,).
    """
    if len(base) <= EXACT_UP_TO:
        rows, similarity = nearest_rows(space, queries, base, 1)
        return rows[:, 0], similarity[:, 0]
    labels, centres, _ = cluster(space, base, -(-len(base) // CLUSTER_ROWS), seed)
    groups = rows_by_label(labels, len(centres))
    own = np.empty(len(queries), np.int64)
    for part, vectors in quantized_blocks(space, queries):
        own[part] = nearest_centre(vectors, centres)[0]
    queries_of = rows_by_label(own, len(centres))
    used = [number for number in range(len(centres)) if len(queries_of[number])]
    found = np.empty(len(queries), np.int64)

    def search_group(number: int) -> Indices:
        members = base[np.concatenate([groups[other] for other in _near_clusters(centres, number)])]
        use_all_cores()
        _, position = faiss.knn(
            quantize(space, queries[queries_of[number]]),
            quantize(space, members),
            1,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        return np.asarray(members[position[:, 0]])

    for number, rows in zip(used, map_on_cores(search_group, used), strict=True):
        found[queries_of[number]] = rows
        tick("most similar kept chips", number + 1, len(centres), "clusters")
    return found, space.similarity(queries, found)


def _search(
    space: EmbeddingSpace, queries: Indices, base: Indices, k: int
) -> tuple[Indices, Floats]:
    """Find the neighbours of some rows among ``base``, which includes these rows."""
    use_all_cores()
    wanted = min(k + 1, len(base))
    products, position = faiss.knn(
        quantize(space, queries), quantize(space, base), wanted, metric=faiss.METRIC_INNER_PRODUCT
    )
    near = base[position]
    itself = near == queries[:, None]
    # equal vectors may leave no room for the row itself: then the last candidate is removed instead
    itself[~itself.any(axis=1), -1] = True
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    similarity = np.full((len(queries), k), -1.0)
    width = wanted - 1
    rows[:, :width] = near[~itself].reshape(len(queries), width)
    similarity[:, :width] = products[~itself].reshape(len(queries), width) / QUANTIZED_ONE
    return rows, similarity
