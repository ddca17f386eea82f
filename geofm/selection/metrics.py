"""How well a choice stands for its pool, beside other choices of the same size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from geofm.embeddings.clusters import cluster
from geofm.embeddings.vectors import ONE, Space, lattice, lattice_blocks, use_threads
from geofm.runtime.native import faiss
from geofm.selection.methods import Candidates, Method, select
from geofm.types import Floats, Indices

#: Chips on which coverage is measured; most clusters of the Gini, and chips per cluster at least.
MEASURED, GINI_CLUSTERS, CLUSTERS_OF = 20_000, 100, 20
COLUMNS = (
    "choice", "chips", "facility_location", "low", "high", "covering_radius", "measured_on",
    "spectral_log_volume", "cluster_gini",
)  # fmt: skip


def coverage(space: Space, pool: Indices, chosen: Indices) -> Floats:
    """Similarity of each row of ``pool`` to its most similar chosen row (1 for a chosen row).

    On the lattice: the same for any number of threads, exact to about 1e-4.
    """
    if not len(pool) or not len(chosen):
        return np.zeros(len(pool))
    use_threads()
    base = lattice(space, chosen)
    found = np.empty(len(pool))
    for part, vectors in lattice_blocks(space, pool):
        best, _ = faiss.knn(vectors, base, 1, metric=faiss.METRIC_INNER_PRODUCT)
        found[part] = np.clip(best[:, 0].astype(np.float64) / ONE, -1, 1)
    found[np.isin(pool, chosen)] = 1.0
    return found


def gini(counts: Floats) -> float:
    """Inequality of counts: 0 when all are the same, near 1 when one has them all."""
    ordered = np.sort(counts)
    if not ordered.sum():
        return 0.0
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))


def log_volume(features: Floats) -> float | None:
    """Half the log-determinant of the covariance of band moments [n, m]: spectral diversity.

    The log of the volume of the ellipsoid that the spectra fill; a tiny ridge keeps it finite.
    None for fewer than two chips.
    """
    if len(features) < 2:
        return None
    covariance = np.atleast_2d(np.cov(features, rowvar=False))
    _, value = np.linalg.slogdet(covariance + 1e-9 * np.eye(len(covariance)))
    return round(float(value) / 2, 6)


def volume_of(moments: Sequence[Sequence[float]], rows: Indices) -> float | None:
    """``log_volume`` of some chips' band moments; None where chips have not the same bands."""
    if len({len(one) for one in moments}) != 1:
        return None
    table = np.array([list(one) for one in moments], dtype=np.float64)
    return log_volume(table[rows])


def compare(
    candidates: Candidates,
    kept: Indices,
    moments: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    others: Sequence[Method] = ("random", "balanced-kmeans"),
) -> pd.DataFrame:
    """A choice beside those that other methods make of the same pool, with as many chips.

    Args:
        candidates: the pool.
        kept: rows of the space that were chosen.
        moments: spectral moments (or band means) of each candidate.
        seed: of the other choices, the clusters and the sample.
        others: the methods to compare with; without strata.

    Returns:
        A row per choice (``kept`` first, then the methods): ``choice``, ``chips``;
        ``facility_location`` (mean over the pool of the similarity to the most similar chosen
        chip, at least 0) with ``low`` and ``high`` (95 % interval; the value itself where the
        whole pool was measured), ``covering_radius`` (1 − the least of these similarities),
        ``measured_on`` (pool chips measured: all, or a random 20,000; the radius is then that
        of the sample), ``spectral_log_volume`` and ``cluster_gini`` (inequality of chosen chips
        per cluster of the pool; 0 is even).
    """
    space, pool = candidates.space, np.sort(candidates.rows)
    if not len(pool) or not len(kept):
        return pd.DataFrame(columns=COLUMNS)
    choices: dict[str, Indices] = {"kept": np.sort(kept)}
    for method in others:
        choices[method] = select(candidates, method, len(kept), seed=seed).rows
    seen = np.sort(np.random.default_rng([seed, 1]).permutation(pool)[:MEASURED])
    count = max(1, min(GINI_CLUSTERS, len(pool) // CLUSTERS_OF))
    labels, centres, _ = cluster(space, pool, count, seed)
    place = {int(row): at for at, row in enumerate(candidates.rows)} if moments is not None else {}
    found = []
    for name, rows in choices.items():
        best = np.maximum(coverage(space, seen, rows), 0)
        half = 1.96 * best.std() * float(np.sqrt((1 - len(seen) / len(pool)) / len(seen)))
        shares = np.bincount(labels[np.searchsorted(pool, rows)], minlength=len(centres))
        at = np.array([place[int(row)] for row in rows]) if moments is not None else rows
        found.append(
            {
                "choice": name,
                "chips": len(rows),
                "facility_location": round(float(best.mean()), 6),
                "low": round(float(best.mean() - half), 6),
                "high": round(float(best.mean() + half), 6),
                "covering_radius": round(1 - float(best.min()), 6),
                "measured_on": len(seen),
                "spectral_log_volume": None if moments is None else volume_of(moments, at),
                "cluster_gini": round(gini(shares.astype(np.float64)), 6),
            }
        )
    return pd.DataFrame(found, columns=COLUMNS)
