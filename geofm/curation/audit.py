"""The certificate of a curation: what was found, and what could have been missed.

The search for duplicates is audited the slow way: a random sample of chips is compared with every
other in float64, and each pair that search should have found is looked up among its edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import beta

from data_catalog.errors import CheckError
from geofm.curation.duplicates import Edges
from geofm.curation.space import Indices, Space

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


def audit_edges(
    space: Space, edges: Edges, threshold: float, seed: int, queries: int = QUERIES
) -> dict[str, Any]:
    """Compare a random sample of rows with all others, exactly, and look for missed edges.

    Returns:
        ``queries``, ``pairs`` (distinct pairs that exist), ``found``, ``missed``, ``confidence``
        and ``recall_lower_bound`` (one-sided; pairs are treated as independent draws).
    """
    rows = len(space)
    asked = np.random.default_rng(seed).permutation(rows)[: min(queries, rows)]
    asked = np.sort(asked)
    codes: list[Indices] = []
    every = np.arange(rows)
    for first in range(0, len(asked), 256):
        part = asked[first : first + 256]
        left = space.exact(part)
        for begin in range(0, rows, 16_384):
            others = every[begin : begin + 16_384]
            near, at = np.nonzero(left @ space.exact(others).T >= threshold - 1e-9)
            a, b = part[near], others[at]
            a, b = a[a != b], b[a != b]
            exact = space.similarity(a, b) >= threshold
            codes.append((np.minimum(a, b) * rows + np.maximum(a, b))[exact])
    pairs = np.unique(np.concatenate(codes)) if codes else np.empty(0, dtype=np.int64)
    found = int(np.isin(pairs, edges.left * rows + edges.right).sum())
    bound = recall_bound(found, len(pairs))
    return {
        "queries": len(asked),
        "pairs": len(pairs),
        "found": found,
        "missed": len(pairs) - found,
        "confidence": CONFIDENCE,
        "recall_lower_bound": None if bound is None else round(bound, 9),
    }


def require_complete(certificate: dict[str, Any]) -> None:
    """Refuse a search that missed something.

    Raises:
        MissedPairs: with the numbers.
    """
    if certificate["missed"]:
        raise MissedPairs(
            f"the audit of {certificate['queries']} chips found {certificate['missed']} of "
            f"{certificate['pairs']} duplicate pairs that the search had missed; this is a defect "
            "of the search or of its library: report it with the versions in use"
        )
