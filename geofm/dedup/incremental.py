"""Refresh of a searched pool: only the pairs of new vectors are searched.

Which pairs a partition covers depends on the two vectors and the partition alone. So with the
partition of an earlier search

- a vector that is still in the pool has the same home and the same visits,
- a pair of two such vectors is still a pair, with the same similarity,
- the pairs of withdrawn vectors are gone, and
- only pairs with a new vector have to be searched (``join_new_rows``).

The union is, pair for pair, the result of a full search with that partition, and so are the
decisions of the leader rule. The same holds for the audit of a sample: its rows are chosen by the
hashes of their vectors, so most of them were audited before.

A vector is recognised by the 64-bit hash of its bytes, not by the id of its chip.

The few new rows of a cell are compared with all its members. Most of the time of such a join goes
into copying the vectors of the members, so *sketches* propose the pairs. With d numbers per vector
and orthonormal axes P, shape (63, d), the sketch of a unit vector x has 64 numbers:

    s(x) = (P x, |x - P'P x|)

The Cauchy-Schwarz inequality gives s(x)·s(y) >= x·y: no pair at the threshold is lost, whatever the
axes are. Good axes propose few other pairs, and every proposed pair is verified with the vectors
themselves. The axes are those along which vectors differ most from the centroids of their cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.dedup.certificate import Audit, find_pairs_of
from geofm.dedup.edges import Edges, empty_edges, sort_edges
from geofm.dedup.identical import VectorHashes
from geofm.dedup.join import DENSE_PAIRS, dense_limit, load_factors, verify_pairs
from geofm.dedup.matmul import (
    COLUMN_STEP,
    ROW_STEP,
    TooManyProposals,
    as_factors,
    best_precision,
    for_each_block,
    gather_rows,
    near_pairs,
)
from geofm.dedup.partition import Cells, Partition, sort_visits, visit_keys
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.runtime.native import torch
from geofm.runtime.threads import map_on_cores, one_torch_thread
from geofm.types import Floats32, Indices

#: Numbers of a sketch. Vectors with fewer than twice as many numbers are compared as they are.
WIDTH = 64
#: Vectors from which the axes are computed.
AXES_FROM = 4096
#: Added to the square of a sketch's last number: more than float32 can have lost of it.
SQUARE_ERROR = 1e-5


def match_previous_rows(
    old_hashes: VectorHashes, old_home: NDArray[np.int32], new_hashes: VectorHashes
) -> Indices:
    """Find the row that each vector had in the previous search.

    Args:
        old_hashes: hashes of the previous pool's vectors, shape (n_old,).
        old_home: cell of each previous vector, shape (n_old,); -1 if it was not searched.
        new_hashes: hashes of the current pool's vectors, shape (n_new,).

    Returns:
        Row in the previous pool of each current vector, shape (n_new,); -1 if it is new.
    """
    searched = np.flatnonzero(old_home >= 0)
    previous = np.full(len(new_hashes), -1, dtype=np.int64)
    if not len(searched):
        return previous
    old_rows = searched[np.argsort(old_hashes[searched], kind="stable")]
    old_sorted = old_hashes[old_rows]
    order = np.argsort(new_hashes)  # sorted queries keep the binary search in the cache
    new_sorted = new_hashes[order]
    position = np.minimum(np.searchsorted(old_sorted, new_sorted), len(old_sorted) - 1)
    is_known = old_sorted[position] == new_sorted
    previous[order[is_known]] = old_rows[position[is_known]]
    return previous


def current_rows(previous: Indices, old_rows: int, pool: NDArray[np.bool_]) -> Indices:
    """Invert ``match_previous_rows``.

    Args:
        previous: previous row of each current row, shape (n_new,); -1 if it is new.
        old_rows: number of rows of the previous pool.
        pool: whether each current row is searched, shape (n_new,).

    Returns:
        Searched current row of each previous row, shape (old_rows,); -1 if it was withdrawn.
    """
    current = np.full(old_rows, -1, dtype=np.int64)
    kept = np.flatnonzero((previous >= 0) & pool)
    current[previous[kept]] = kept
    return current


def carry_cells(old: Cells, current: Indices, new: Indices, new_cells: Cells, rows: int) -> Cells:
    """Combine the cells of known rows with those of new rows.

    Args:
        old: cells of the previous pool.
        current: current row of each previous row, shape (n_old,) (``current_rows``).
        new: current rows of the new vectors, shape (n_added,).
        new_cells: cells of the new vectors, numbered by their position in ``new``.
        rows: number of current rows.
    """
    home = np.full(rows, -1, dtype=np.int32)
    kept = np.flatnonzero(current >= 0)
    home[current[kept]] = old.home[kept]
    home[new] = new_cells.home
    visitor = current[old.row]
    is_kept = visitor >= 0
    keys = [
        visit_keys(visitor[is_kept], old.visited[is_kept]),
        visit_keys(new[new_cells.row], new_cells.visited),
    ]
    return sort_visits(home, keys, len(old.begin) - 1)


def join_new_rows(
    space: EmbeddingSpace,
    partition: Partition,
    cells: Cells,
    new: Indices,
    threshold: float,
) -> Edges | None:
    """Search the covered pairs that have at least one new row.

    Args:
        space: space of all rows.
        partition: cells of the pool.
        cells: residents and visitors of each cell.
        new: new rows, ascending.
        threshold: least similarity of a pair.

    Returns:
        The edges; None if a cell has so many proposals that it may be dense.
    """
    if not len(new):
        return empty_edges()
    sketches = sketch_pool(space, partition, cells.home)
    precision = best_precision()
    is_new = np.zeros(len(space), dtype=np.bool_)
    is_new[new] = True

    def propose(cell: int) -> list[tuple[Indices, Indices]]:
        residents, visitors = cells.members(cell)
        new_residents, new_visitors = residents[is_new[residents]], visitors[is_new[visitors]]
        # New residents are compared with all members, new visitors with the residents. A pair of
        # two new rows is proposed twice, and each new resident with itself; verify_pairs drops it.
        members = np.concatenate([residents, visitors]) if len(new_residents) else residents
        comparisons = [(new_residents, members), (new_visitors, residents)]
        if not len(new_residents) and not len(new_visitors):
            return []
        limit = dense_limit(len(residents), len(visitors))
        gathered = gather_rows(sketches, members, COLUMN_STEP, "members")
        proposals = []
        for queries, others in comparisons:
            query_factors = gather_rows(sketches, queries, ROW_STEP, "queries")
            other_factors = gathered[: len(others) + -len(others) % COLUMN_STEP]
            shape = len(queries), len(others)
            i, j = near_pairs(
                query_factors, other_factors, threshold, precision, most=limit, shape=shape
            )
            proposals.append((queries[i], others[j]))
        return proposals

    proposed = [(new[:0], new[:0])]
    try:
        for cell, pairs in enumerate(map_on_cores(propose, range(partition.count))):
            tick("duplicates of new chips", cell + 1, partition.count)
            proposed.extend(pairs)
    except TooManyProposals:
        return None
    left, right = (np.concatenate(side) for side in zip(*proposed, strict=True))
    return verify_pairs(space, left, right, threshold, partition, cells.home)


def sketch_pool(
    space: EmbeddingSpace, partition: Partition, home: NDArray[np.int32]
) -> torch.Tensor:
    """Compute the sketches of all rows, or their vectors if these are short.

    Args:
        space: space of all rows.
        partition: cells of the pool.
        home: cell in which each row resides, shape (n,); -1 if it is not searched.

    Returns:
        Factors of products, shape (n, WIDTH) or (n, d).
    """
    precision = best_precision()
    width = space.stored.shape[1]
    if width < 2 * WIDTH:
        return load_factors(space, np.arange(len(space)), precision)
    axes = torch.from_numpy(_sketch_axes(space, partition, home))
    sketches = torch.empty((len(space), WIDTH), dtype=precision.dtype)

    def sketch_block(first: int, units: Floats32) -> None:
        short = sketch_units(units, axes)
        sketches[first : first + len(units)] = as_factors(short, precision)

    for_each_block(space, sketch_block)
    return sketches


def _sketch_axes(space: EmbeddingSpace, partition: Partition, home: NDArray[np.int32]) -> Floats32:
    """Compute the axes along which vectors differ most from the centroids of their cells.

    These are the principal axes of the differences, of evenly spaced rows.

    Returns:
        Orthonormal axes, shape (WIDTH, d). The last is zero: its number is that of the rest.
    """
    searched = np.flatnonzero(home >= 0)
    rows = searched[:: -(-len(searched) // AXES_FROM)]
    differences = space.exact_units(rows) - partition.centroids[home[rows]]
    with one_torch_thread():
        values = torch.from_numpy(differences)
        _, vectors = torch.linalg.eigh(values.T @ values)  # eigenvalues ascend
    axes = np.zeros((WIDTH, space.stored.shape[1]), dtype=np.float32)
    axes[:-1] = vectors[:, 1 - WIDTH :].T.numpy()
    return axes


def sketch_units(units: Floats32, axes: torch.Tensor) -> Floats32:
    """Compute the sketches, shape (n, WIDTH), of unit vectors, shape (n, d).

    The products of torch stay in this thread; those of numpy would start threads of their own.
    """
    sketches = torch.mm(torch.from_numpy(units), axes.T)
    rest = 1 - torch.linalg.vector_norm(sketches, dim=1) ** 2
    sketches[:, -1] = torch.sqrt(rest.clamp_(min=0).add_(SQUARE_ERROR))
    return np.asarray(sketches.numpy(), dtype=np.float32)


def carry_edges(old: Edges, current: Indices) -> Edges:
    """Keep the edges of rows that are still there, by their current rows."""
    left, right = current[old.left], current[old.right]
    kept = (left >= 0) & (right >= 0)
    return sort_edges(left[kept], right[kept], old.similarity[kept])


def could_be_dense(edges: Edges, home: NDArray[np.int32]) -> bool:
    """Whether a cell has so many pairs that a full search might not list them.

    Args:
        edges: pairs of the pool.
        home: cell in which each row resides, shape (n,).
    """
    count = int(home.max(initial=0)) + 1
    pairs = np.bincount(home[edges.left], minlength=count)
    pairs += np.bincount(home[edges.right], minlength=count)
    return bool(pairs.max(initial=0) > DENSE_PAIRS)


def carry_audit(
    space: EmbeddingSpace,
    old: Audit,
    current: Indices,
    sample: Indices,
    new: Indices,
    home: NDArray[np.int32],
    threshold: float,
) -> Audit:
    """Audit a sample of the current pool, with what an earlier audit knows.

    Args:
        space: space of the current rows.
        old: audit of the previous pool.
        current: current row of each previous row (``current_rows``).
        sample: current rows to audit, ascending (``certificate.choose_sample``).
        new: current rows of the new vectors, ascending.
        home: cell in which each current row resides, shape (n,); -1 if it is not searched.
        threshold: least similarity of a pair, at least that of the earlier audit.

    Returns:
        The audit that ``certificate.audit_sample`` gives for the same sample.
    """
    audited_before = np.isin(sample, current[old.sample])
    in_sample = np.zeros(len(space), dtype=np.bool_)
    in_sample[sample] = True
    low, high = current[old.low], current[old.high]
    kept = (low >= 0) & (high >= 0)
    low, high = low[kept], high[kept]
    kept = in_sample[low] | in_sample[high]
    low, high = low[kept], high[kept]
    kept = space.similarity(low, high) >= threshold
    pairs = [
        (low[kept], high[kept]),
        find_pairs_of(space, sample[audited_before], threshold, among=new),
        find_pairs_of(space, sample[~audited_before], threshold),
    ]
    low, high = (np.concatenate(side) for side in zip(*pairs, strict=True))
    low, high = np.minimum(low, high), np.maximum(low, high)
    searched = (home[low] >= 0) & (home[high] >= 0)
    codes = np.unique(low[searched] * len(space) + high[searched])
    low, high = np.divmod(codes, len(space))
    return Audit(sample, low, high)
