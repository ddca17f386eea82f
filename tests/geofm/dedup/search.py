"""The searches for duplicates in one process, without stages: for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.dedup.alike import PixelDuplicates, find_pixel_duplicates
from geofm.dedup.certificate import QUERIES, audit_sample, certify
from geofm.dedup.edges import Edges, merge_edges
from geofm.dedup.identical import hash_vectors
from geofm.dedup.join import MOST_EDGES, join_cells, too_many_pairs
from geofm.dedup.pairs import group_cells
from geofm.dedup.partition import Cells, Partition, assign_cells, train_partition
from geofm.dedup.perceptual_hash import near_by_hash, unique_pairs
from geofm.dedup.signature import Signatures, best_agreeing, signatures
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.types import Indices, Pairs


@dataclass(frozen=True)
class Search:
    """Result of a search: its edges, the dense cells, and how the pool was divided."""

    edges: Edges
    dense: list[int]
    partition: Partition
    cells: Cells


def find_pairs(
    space: EmbeddingSpace,
    threshold: float,
    partition: Partition | None = None,
    seed: int = 0,
    pool: Indices | None = None,
) -> Search:
    """Find all pairs of a pool, with a given partition or a trained one."""
    if partition is None:
        partition = train_partition(space, threshold, seed, pool)
    mask = None if pool is None else np.isin(np.arange(len(space)), pool)
    cells = assign_cells(partition, space, 0, len(space), mask)
    parts = [
        join_cells(space, partition, cells, range(first, last), threshold)
        for first, last in group_cells(cells, partition.count)
    ]
    dense = [number for part in parts for number in part.dense]
    return Search(merge_edges([part.edges for part in parts]), dense, partition, cells)


def find_edges(space: EmbeddingSpace, threshold: float, most: int = MOST_EDGES) -> Edges:
    """Find all pairs of a pool; more than ``most`` are an error, as is a dense cell."""
    search = find_pairs(space, threshold)
    if search.dense or len(search.edges) > most:
        raise too_many_pairs(threshold, most)
    return search.edges


def audit_edges(
    space: EmbeddingSpace, edges: Edges, threshold: float, seed: int, queries: int = QUERIES
) -> dict[str, Any]:
    """Certify the edges of a whole space."""
    everyone = np.arange(len(space))
    hashes = hash_vectors(space.stored)
    audit = audit_sample(space, hashes, everyone, threshold, seed, queries)
    return certify(audit, edges, len(space))


def near_signatures(left: Signatures, right: Signatures) -> Pairs:
    """Find all pairs of two lists whose signatures agree."""
    all_pairs = np.zeros((len(left), len(right)), np.bool_)
    return best_agreeing(left, right, all_pairs, np.arange(len(right)), len(right))


def find_alike(descriptors: pd.DataFrame, thumbnails: NDArray[np.uint8]) -> PixelDuplicates:
    """Find the pixel duplicates among all pairs with near hashes or signatures."""
    contrast = descriptors[["thumbnail_low", "thumbnail_high"]].to_numpy(np.float32)
    of_chips = signatures(thumbnails, contrast[:, 1] - contrast[:, 0])
    by_hash = near_by_hash(descriptors["hash"].to_numpy(np.uint64))
    by_signature = near_signatures(of_chips, of_chips)
    left, right = (np.concatenate(side) for side in zip(by_hash, by_signature, strict=True))
    return find_pixel_duplicates(thumbnails, contrast, *unique_pairs(left, right, len(descriptors)))
