"""The certificate of a curation: what was found, and what could have been missed.

The search for duplicates is audited the slow way: a random sample of chips is compared with every
other in float64, and each pair that search should have found is looked up among its edges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from data_catalog.errors import CheckError
from geofm.curation.duplicates import hash_rows
from geofm.curation.edges import Edges
from geofm.curation.products import FLOAT32, as_factors, near_pairs, on_every_core
from geofm.curation.space import BLOCK, Indices, Space, take_rows

#: ``covered(lower, higher)``: which pairs of rows lie in a dense cell.
Covered = Callable[[Indices, Indices], NDArray[np.bool_]]

#: Chips whose pairs are searched again, and the confidence of the bound on recall.
QUERIES, CONFIDENCE = 2000, 0.99


class MissedPairs(CheckError):
    """The audit found duplicates that the search did not."""


def recall_bound(found: int, pairs: int, confidence: float = CONFIDENCE) -> float | None:
    """Lower Clopper-Pearson bound of the share of pairs found; None without any pair."""
    if pairs == 0:
        return None
    if found == 0:
        return 0.0
    return float(beta.ppf(1 - confidence, found, pairs - found + 1))


def choose_queries(hashes: NDArray[np.uint64], seed: int, queries: int = QUERIES) -> Indices:
    """Rows to audit: those whose vectors hash lowest. The same rows as long as they are there."""
    salt = np.random.default_rng(seed).integers(1, 2**63, dtype=np.uint64)
    value = (hashes ^ salt) * np.uint64(0x9E3779B97F4A7C15)
    value ^= value >> np.uint64(31)
    count = min(queries, len(hashes))
    return np.sort(np.lexsort((np.arange(len(hashes)), value))[:count])


def true_pairs(
    space: Space, asked: Indices, threshold: float, first: int = 0, last: int | None = None
) -> tuple[Indices, Indices]:
    """All pairs of asked rows with rows ``first`` to ``last``, exactly: (lower, higher), once.

    Float32 proposes, float64 decides; neither cells nor bfloat16 have a part in it.
    """
    queries = as_factors(space.exact(asked).astype(np.float32), FLOAT32)
    end = len(space) if last is None else last

    def work(start: int) -> tuple[Indices, Indices]:
        stop = min(start + BLOCK, end)
        units = as_factors(space.block(start, stop), FLOAT32)
        i, j = near_pairs(queries, units, threshold, FLOAT32)
        return asked[i], j + start

    found = list(on_every_core(work, range(first, end, BLOCK)))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    left = np.concatenate([part[0] for part in found])
    right = np.concatenate([part[1] for part in found])
    low, high = np.minimum(left, right)[left != right], np.maximum(left, right)[left != right]
    code = np.unique(low * len(space) + high)
    low, high = np.divmod(code, len(space))
    rows, at = np.unique(np.concatenate([low, high]), return_inverse=True)
    part = Space(take_rows(space.stored, rows), space.centre)
    near = part.similarity(at[: len(low)], at[len(low) :]) >= threshold
    return low[near], high[near]


def audit_edges(
    space: Space,
    edges: Edges,
    threshold: float,
    seed: int,
    queries: int = QUERIES,
    covered: Covered | None = None,
    pool: Indices | None = None,
) -> dict[str, Any]:
    """Compare a random sample of rows with all others, exactly, and look for missed edges.

    Args:
        space: the pool.
        edges: what the search found.
        threshold: of the search.
        seed: chooses the sample.
        queries: size of the sample; all rows of a smaller pool.
        covered: tells which pairs (lower, higher) lie in dense cells, whose pairs are not listed.
        pool: the rows that were searched, ascending; None for all.

    Returns:
        ``queries``, ``pairs`` (distinct pairs that exist), ``found``, ``missed``, ``confidence``
        and ``recall_lower_bound`` (one-sided; pairs are treated as independent draws).
    """
    hashes = hash_rows(space.stored)
    if pool is None:
        asked = choose_queries(hashes, seed, queries)
        low, high = true_pairs(space, asked, threshold)
    else:
        asked = pool[choose_queries(hashes[pool], seed, queries)]
        low, high = true_pairs(space, asked, threshold)
        both = np.isin(low, pool) & np.isin(high, pool)
        low, high = low[both], high[both]
    return certify(len(asked), low, high, edges, len(space), covered)


def certify(
    queries: int, low: Indices, high: Indices, edges: Edges, rows: int, covered: Covered | None
) -> dict[str, Any]:
    """The certificate from the true pairs of some rows."""
    there = np.isin(low * rows + high, edges.left * rows + edges.right)
    if covered is not None:
        there |= covered(low, high)
    found = int(there.sum())
    bound = recall_bound(found, len(low))
    return {
        "queries": queries,
        "pairs": len(low),
        "found": found,
        "missed": len(low) - found,
        "confidence": CONFIDENCE,
        "recall_lower_bound": None if bound is None else round(bound, 9),
    }


def require_complete(certificate: dict[str, Any], least: float = 1.0) -> None:
    """Refuse a search whose recall is, with the certificate's confidence, below ``least``.

    With 1.0 (a pool searched whole) nothing may be missed.

    Raises:
        MissedPairs: with the numbers and the remedy.
    """
    pairs, missed = certificate["pairs"], certificate["missed"]
    if not missed:
        return
    highest = float(beta.ppf(CONFIDENCE, pairs - missed + 1, missed))
    if highest < least or least == 1.0:
        remedy = (
            "this is a defect of the search or of its library: report it with the versions in use"
            if least == 1.0
            else "the cells do not fit this pool: run again with a larger curate.reach"
        )
        raise MissedPairs(
            f"the audit of {certificate['queries']} chips found {missed} of "
            f"{pairs} duplicate pairs that the search had missed; {remedy}"
        )
