"""The certificate of the duplicate search: the pairs found, and a bound on the pairs missed.

The stage ``buckets`` compares a random sample of chips with the whole pool, exhaustively. Float32
proposes pairs and float64 verifies them; neither cells nor bfloat16 have a part in it. The stage
``pairs`` then looks up each of these pairs among the edges of its search. From n pairs found
without a miss follows a lower bound on the recall (Clopper and Pearson 1934).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import CheckError
from geofm.dedup.edges import Edges, contains_codes, pair_codes
from geofm.dedup.identical import VectorHashes
from geofm.dedup.join import verify_pairs
from geofm.dedup.matmul import FLOAT32, as_factors, for_each_block, near_pairs
from geofm.embeddings.vectors import EmbeddingSpace, take_rows
from geofm.types import Floats32, Indices

#: Chips in the sample, and the confidence of the bound on the recall.
QUERIES, CONFIDENCE = 2000, 0.99

#: ``in_dense(left, right)``: whether each pair of rows lies in a dense cell.
InDenseCell = Callable[[Indices, Indices], NDArray[np.bool_]]


class MissedPairs(CheckError):
    """The exhaustive comparison of a sample found duplicates that the search did not."""


@dataclass(frozen=True)
class Audit:
    """A sample of rows and all their pairs in the pool.

    Attributes:
        sample: rows of the sample, ascending, shape (queries,).
        low: lower row of each pair, shape (pairs,).
        high: higher row of each pair, shape (pairs,).
    """

    sample: Indices
    low: Indices
    high: Indices


def audit_sample(
    space: EmbeddingSpace,
    hashes: VectorHashes,
    pool: Indices,
    threshold: float,
    seed: int,
    queries: int = QUERIES,
) -> Audit:
    """Find all pairs of a random sample of rows by exhaustive comparison.

    Args:
        space: space of all rows.
        hashes: hashes of all vectors, shape (n,).
        pool: rows that are searched, ascending.
        threshold: least similarity of a pair.
        seed: seed of the sample.
        queries: size of the sample; all rows of a smaller pool.
    """
    sample = pool[choose_sample(hashes[pool], seed, queries)]
    low, high = find_pairs_of(space, sample, threshold)
    searched = np.zeros(len(space), dtype=np.bool_)
    searched[pool] = True
    both = searched[low] & searched[high]
    return Audit(sample, low[both], high[both])


def choose_sample(hashes: VectorHashes, seed: int, queries: int = QUERIES) -> Indices:
    """Choose the rows whose salted hashes are lowest, ascending.

    A vector is chosen by its own hash, so a later pool with the same vectors has the same sample.
    """
    salt = np.random.default_rng(seed).integers(1, 2**63, dtype=np.uint64)
    value = (hashes ^ salt) * np.uint64(0x9E3779B97F4A7C15)
    value ^= value >> np.uint64(31)
    if len(hashes) <= queries:
        return np.arange(len(hashes))
    lowest = np.flatnonzero(value <= np.partition(value, queries - 1)[queries - 1])
    return np.sort(lowest[np.argsort(value[lowest], kind="stable")][:queries])


def find_pairs_of(
    space: EmbeddingSpace, rows: Indices, threshold: float, among: Indices | None = None
) -> tuple[Indices, Indices]:
    """Find all pairs of some rows with any other row by exhaustive comparison.

    Args:
        space: space of all rows.
        rows: rows of which each pair has at least one, shape (queries,).
        threshold: least similarity of a pair.
        among: rows that are compared with them, ascending; None for all.

    Returns:
        The lower and the higher row of each pair, each pair once.
    """
    others = (
        space if among is None else EmbeddingSpace(take_rows(space.stored, among), space.centre)
    )
    queries = as_factors(space.exact_units(rows).astype(np.float32), FLOAT32)
    proposed = [(rows[:0], rows[:0])]

    def compare(first: int, units: Floats32) -> None:
        i, j = near_pairs(queries, as_factors(units, FLOAT32), threshold, FLOAT32)
        proposed.append((rows[i], j + first if among is None else among[j + first]))

    if len(rows):
        for_each_block(others, compare)
    left, right = (np.concatenate(side) for side in zip(*proposed, strict=True))
    edges = verify_pairs(space, left, right, threshold)
    return edges.left, edges.right


def certify(
    audit: Audit, edges: Edges, rows: int, in_dense: InDenseCell | None = None
) -> dict[str, Any]:
    """Look up the pairs of a sample among the edges of a search.

    Args:
        audit: the sample and its pairs.
        edges: result of the search.
        rows: number of rows of the space.
        in_dense: tells which pairs lie in dense cells, whose pairs are not listed.

    Returns:
        ``queries``, ``pairs`` (distinct pairs that exist), ``found``, ``missed``, ``confidence``
        and ``recall_lower_bound`` (one-sided; pairs are treated as independent draws).
    """
    low, high = audit.low, audit.high
    is_found = contains_codes(
        pair_codes(edges.left, edges.right, rows), pair_codes(low, high, rows)
    )
    if in_dense is not None:
        is_found |= in_dense(low, high)
    found = int(is_found.sum())
    bound = recall_bound(found, len(low))
    return {
        "queries": len(audit.sample),
        "pairs": len(low),
        "found": found,
        "missed": len(low) - found,
        "confidence": CONFIDENCE,
        "recall_lower_bound": None if bound is None else round(bound, 9),
    }


def recall_bound(found: int, pairs: int, confidence: float = CONFIDENCE) -> float | None:
    """Compute a lower bound of the share of pairs that are found; None without any pair.

    Source: the one-sided interval of Clopper and Pearson 1934: the (1 - confidence) quantile of
    Beta(found, pairs - found + 1).
    """
    from scipy.stats import beta  # takes as long to import as all the rest of this room

    if pairs == 0:
        return None
    if found == 0:
        return 0.0
    return float(beta.ppf(1 - confidence, found, pairs - found + 1))


def require_complete(certificate: dict[str, Any]) -> None:
    """Refuse a search that missed a pair of the sample; its cells cover all of them.

    Raises:
        MissedPairs: A pair was missed.
    """
    if certificate["missed"]:
        raise MissedPairs(
            f"the audit of {certificate['queries']} chips found {certificate['missed']} of "
            f"{certificate['pairs']} duplicate pairs that the search had missed, though it covers "
            "them: this is a defect of the search or of a library that it uses (faiss, torch); "
            "nothing was published, report it with the versions in use"
        )
