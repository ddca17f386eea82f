"""The certificate of a curation: what was found, and what could have been missed.

The search for duplicates is audited the slow way: a random sample of chips is compared with every
other in float64, and each pair that search should have found is looked up among its edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import CheckError
from geofm.dedup.edges import Edges
from geofm.dedup.exact_pairs import hash_rows
from geofm.dedup.join import exact_pairs
from geofm.dedup.matmul import (
    FLOAT32,
    LOOKED_AT,
    as_factors,
    look_at_all,
    near_pairs,
    on_every_core,
)
from geofm.embeddings.vectors import Space, take_rows, unit_rows
from geofm.runtime.native import torch
from geofm.types import Indices

#: ``covered(lower, higher)``: which pairs of rows lie in a dense cell.
Covered = Callable[[Indices, Indices], NDArray[np.bool_]]

#: Chips whose pairs are searched again, and the confidence of the bound on recall.
QUERIES, CONFIDENCE = 2000, 0.99


class MissedPairs(CheckError):
    """The audit found duplicates that the search did not."""


def recall_bound(found: int, pairs: int, confidence: float = CONFIDENCE) -> float | None:
    """Lower Clopper-Pearson bound of the share of pairs found; None without any pair."""
    from scipy.stats import beta  # takes as long to import as all the rest of this room

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
    if len(hashes) <= queries:
        return np.arange(len(hashes))
    few = np.flatnonzero(value <= np.partition(value, queries - 1)[queries - 1])
    return np.sort(few[np.argsort(value[few], kind="stable")][:queries])


@dataclass(frozen=True)
class Asked:
    """Rows whose pairs are searched exactly among others, as these are read (``look``).

    Float32 proposes, float64 decides; neither cells nor bfloat16 have a part in it.
    """

    space: Space
    rows: Indices
    factors: torch.Tensor
    threshold: float
    proposed: list[tuple[Indices, Indices]] = field(default_factory=list)

    def look(self, first: int, units: NDArray[np.float32]) -> None:
        """Compare with the rows from ``first``, whose unit vectors are given."""
        self.compare(np.arange(first, first + len(units)), units)

    def compare(self, others: Indices, units: NDArray[np.float32]) -> None:
        """Compare with other rows."""
        if len(self.rows):
            found = as_factors(units, FLOAT32)
            i, j = near_pairs(self.factors, found, self.threshold, FLOAT32)
            self.proposed.append((self.rows[i], others[j]))

    def pairs(self) -> tuple[Indices, Indices]:
        """All pairs with the rows that were looked at: (lower, higher), once."""
        nothing = np.empty(0, np.int64)
        left, right = zip((nothing, nothing), *self.proposed, strict=True)
        return exact_pairs(self.space, np.concatenate(left), np.concatenate(right), self.threshold)


def ask(space: Space, rows: Indices, threshold: float) -> Asked:
    """Begin to search the pairs of some rows."""
    return Asked(space, rows, as_factors(space.exact(rows).astype(np.float32), FLOAT32), threshold)


def true_pairs(space: Space, rows: Indices, threshold: float) -> tuple[Indices, Indices]:
    """All pairs of some rows with any other, exactly: (lower, higher), each once."""
    asked = ask(space, rows, threshold)
    look_at_all(space, asked.look)
    return asked.pairs()


@dataclass(frozen=True)
class Audited:
    """The rows that were asked, and all their true pairs (lower, higher)."""

    asked: Indices
    low: Indices
    high: Indices


def audit_rows(
    space: Space,
    hashes: NDArray[np.uint64],
    pool: Indices,
    threshold: float,
    seed: int,
    queries: int = QUERIES,
) -> Audited:
    """Search the pairs of a random sample of rows exactly.

    Args:
        space: the pool.
        hashes: of all rows.
        pool: the rows that were searched, ascending.
        threshold: of the search.
        seed: chooses the sample.
        queries: size of the sample; all rows of a smaller pool.
    """
    asked = pool[choose_queries(hashes[pool], seed, queries)]
    low, high = true_pairs(space, asked, threshold)
    mask = np.zeros(len(space), dtype=np.bool_)
    mask[pool] = True
    real = mask[low] & mask[high]
    return Audited(asked, low[real], high[real])


def carry_audit(
    space: Space,
    before: Audited,
    to: Indices,
    asked: Indices,
    new: Indices,
    threshold: float,
) -> tuple[Audited, Indices]:
    """What an earlier audit says of the pool of now.

    Args:
        space: the pool of now.
        before: the audit, by rows of then.
        to: for each row of then its row of now, -1 where it is gone.
        asked: the rows to be audited now.
        new: the rows of now that were not there.
        threshold: of both searches.

    Returns:
        The pairs of those of ``asked`` that were asked before, with old rows and new ones; and
        the rest of ``asked``.
    """
    then = to[before.asked]
    known = np.isin(asked, then)
    low, high = to[before.low], to[before.high]
    mine = np.zeros(len(space), dtype=np.bool_)
    mine[asked[known]] = True
    there = (low >= 0) & (high >= 0)
    there[there] = mine[low[there]] | mine[high[there]]
    ours = ask(space, asked[known], threshold)

    def work(first: int) -> None:
        some = new[first : first + LOOKED_AT]
        ours.compare(some, unit_rows(take_rows(space.stored, some), space.centre))

    for _ in on_every_core(work, range(0, len(new), LOOKED_AT)):
        pass
    a, b = ours.pairs()
    low, high = np.concatenate([low[there], a]), np.concatenate([high[there], b])
    return Audited(asked[known], np.minimum(low, high), np.maximum(low, high)), asked[~known]


def merge_audit(
    known: Audited, rest: Indices, low: Indices, high: Indices, home: NDArray[np.int32]
) -> Audited:
    """An audit of carried rows and of the rest; rows without a home were not searched."""
    real = (home[low] >= 0) & (home[high] >= 0)
    code = np.concatenate([known.low, low[real]]) * len(home)
    code += np.concatenate([known.high, high[real]])
    low, high = np.divmod(np.unique(code), len(home))
    return Audited(np.sort(np.concatenate([known.asked, rest])), low, high)


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
    everyone = np.arange(len(space)) if pool is None else pool
    audited = audit_rows(space, hash_rows(space.stored), everyone, threshold, seed, queries)
    return certify(audited, edges, len(space), covered)


def certify(
    audited: Audited, edges: Edges, rows: int, covered: Covered | None = None
) -> dict[str, Any]:
    """The certificate of the edges of ``rows`` rows, from the true pairs of some of them."""
    low, high = audited.low, audited.high
    there = np.isin(low * rows + high, edges.left * rows + edges.right)
    if covered is not None:
        there |= covered(low, high)
    found = int(there.sum())
    bound = recall_bound(found, len(low))
    return {
        "queries": len(audited.asked),
        "pairs": len(low),
        "found": found,
        "missed": len(low) - found,
        "confidence": CONFIDENCE,
        "recall_lower_bound": None if bound is None else round(bound, 9),
    }


def require_complete(certificate: dict[str, Any]) -> None:
    """Refuse a search that missed a pair of the audit, all of which its cells cover.

    Raises:
        MissedPairs: with the numbers and what to do.
    """
    if certificate["missed"]:
        raise MissedPairs(
            f"the audit of {certificate['queries']} chips found {certificate['missed']} of "
            f"{certificate['pairs']} duplicate pairs that the search had missed, though it covers "
            "them: this is a defect of the search or of a library that it uses (faiss, torch); "
            "nothing was published, report it with the versions in use"
        )
