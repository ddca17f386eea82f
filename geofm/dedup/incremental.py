"""Refresh of a searched pool: only the pairs of new vectors are searched.

Which pairs a partition covers depends on the two vectors and the partition alone. So with the
partition of an earlier search

- a vector that is still in the pool has the same home and the same visits,
- a pair of two such vectors is still a pair, with the same similarity,
- the pairs of withdrawn vectors are gone, and
- only pairs with a new vector have to be searched (``join.join_cells`` with ``new``).

The union is, pair for pair, the result of a full search with that partition, and so are the
decisions of the leader rule. The same holds for the audit of a sample: its rows are chosen by the
hashes of their vectors, so most of them were audited before.

A vector is recognised by the 64-bit hash of its bytes, not by the id of its chip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geofm.dedup.certificate import Audit, find_pairs_of
from geofm.dedup.edges import Edges, sort_edges
from geofm.dedup.identical import VectorHashes
from geofm.dedup.join import DENSE_PAIRS
from geofm.dedup.partition import Cells, sort_visits, visit_keys
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.types import Indices


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
        threshold: least similarity of a pair, the same in both audits.

    Returns:
        The audit that ``certificate.audit_sample`` gives for the same sample.
    """
    audited_before = np.isin(sample, current[old.asked])
    in_sample = np.zeros(len(space), dtype=np.bool_)
    in_sample[sample] = True
    low, high = current[old.low], current[old.high]
    kept = (low >= 0) & (high >= 0)
    low, high = low[kept], high[kept]
    kept = in_sample[low] | in_sample[high]
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
