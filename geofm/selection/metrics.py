"""Measure how well a selection represents its pool, compared with selections of the same size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_catalog.progress import tick
from geofm.embeddings.clusters import cluster
from geofm.embeddings.vectors import (
    QUANTIZED_ONE,
    EmbeddingSpace,
    quantize,
    quantized_blocks,
    use_all_cores,
)
from geofm.runtime.native import faiss
from geofm.selection.methods import Candidates, Method, select
from geofm.types import Floats, Indices

#: Chips of the pool on which coverage is measured.
MEASURED = 20_000
#: Gini coefficient: largest number of clusters, and least average number of chips per cluster.
GINI_CLUSTERS, CLUSTER_CHIPS = 100, 20
#: Normal quantile of a 95 % interval.
Z_95 = 1.96
COLUMNS = (
    "choice", "chips", "facility_location", "low", "high", "covering_radius", "measured_on",
    "spectral_log_volume", "cluster_gini",
)  # fmt: skip


def compare_selections(
    candidates: Candidates,
    kept: Indices,
    moments: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    others: Sequence[Method] = ("random", "balanced-kmeans"),
) -> pd.DataFrame:
    """Measure a selection, and the selections of other methods from the same pool.

    Args:
        candidates: chips of the pool.
        kept: selected rows of the space.
        moments: spectral moments (or band means) of each candidate.
        seed: seed of the other selections, the clusters and the sample.
        others: methods to compare with; they select without strata.

    Returns:
        One row per selection (``kept`` first, then the methods): ``choice``; ``chips``;
        ``facility_location`` (mean over the pool of the similarity to the most similar selected
        chip, at least 0) with ``low`` and ``high`` (95 % interval; the value itself if the whole
        pool was measured); ``covering_radius`` (1 - the least of these similarities);
        ``measured_on`` (number of measured chips: the whole pool, or a random sample of 20,000; the
        covering radius is then that of the sample); ``spectral_log_volume``; ``cluster_gini``
        (inequality of the numbers of selected chips per cluster of the pool; 0 is even).
    """
    space, pool = candidates.space, np.sort(candidates.rows)
    if not len(pool) or not len(kept):
        return pd.DataFrame(columns=COLUMNS)
    selections: dict[str, Indices] = {"kept": np.sort(kept)}
    for method in others:
        selections[method] = select(candidates, method, len(kept), seed=seed).rows
    sample = np.sort(np.random.default_rng([seed, 1]).permutation(pool)[:MEASURED])
    count = max(1, min(GINI_CLUSTERS, len(pool) // CLUSTER_CHIPS))
    labels, centres, _ = cluster(space, pool, count, seed)
    position = {int(row): number for number, row in enumerate(candidates.rows)}
    table = []
    for name, rows in selections.items():
        similarity = np.maximum(coverage(space, sample, rows), 0)
        unmeasured = 1 - len(sample) / len(pool)
        half_width = Z_95 * similarity.std() * float(np.sqrt(unmeasured / len(sample)))
        per_cluster = np.bincount(labels[np.searchsorted(pool, rows)], minlength=len(centres))
        volume = None
        if moments is not None:
            volume = spectral_volume(moments, np.array([position[int(row)] for row in rows]))
        table.append(
            {
                "choice": name,
                "chips": len(rows),
                "facility_location": round(float(similarity.mean()), 6),
                "low": round(float(similarity.mean() - half_width), 6),
                "high": round(float(similarity.mean() + half_width), 6),
                "covering_radius": round(1 - float(similarity.min()), 6),
                "measured_on": len(sample),
                "spectral_log_volume": volume,
                "cluster_gini": round(gini(per_cluster.astype(np.float64)), 6),
            }
        )
    return pd.DataFrame(table, columns=COLUMNS)


def coverage(space: EmbeddingSpace, pool: Indices, selected: Indices) -> Floats:
    """Compute the similarity of each row of a pool to its most similar selected row.

    Vectors are quantized, so the result is the same for any number of threads. Its error is about
    1e-4.

    Returns:
        Similarities in -1..1, shape (pool,); 1 for selected rows.
    """
    if not len(pool) or not len(selected):
        return np.zeros(len(pool))
    use_all_cores()
    similarity = np.ones(len(pool))
    others = np.flatnonzero(~np.isin(pool, selected))
    if not len(others):
        return similarity
    base = quantize(space, selected)
    for part, vectors in quantized_blocks(space, pool[others]):
        best, _ = faiss.knn(vectors, base, 1, metric=faiss.METRIC_INNER_PRODUCT)
        similarity[others[part]] = np.clip(best[:, 0].astype(np.float64) / QUANTIZED_ONE, -1, 1)
        tick("coverage", min(part.stop, len(others)), len(others), "chips")
    return similarity


def gini(counts: Floats) -> float:
    """Compute the Gini coefficient of counts: 0 if all are equal, near 1 if all but one are 0."""
    ordered = np.sort(counts)
    if not ordered.sum():
        return 0.0
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))


def spectral_volume(moments: Sequence[Sequence[float]], rows: Indices) -> float | None:
    """Compute ``log_volume`` of the moments of some chips; None if chips have different bands."""
    if len({len(values) for values in moments}) != 1:
        return None
    table = np.array([list(values) for values in moments], dtype=np.float64)
    return log_volume(table[rows])


def log_volume(features: Floats) -> float | None:
    """Compute half of the log-determinant of the covariance of features, shape (n, m).

    This is the log of the volume of the ellipsoid that the features fill, up to a constant. The
    covariance gets 1e-9 on its diagonal, so the result is finite. It is None for fewer than two
    rows.
    """
    if len(features) < 2:
        return None
    covariance = np.atleast_2d(np.cov(features, rowvar=False))
    _, value = np.linalg.slogdet(covariance + 1e-9 * np.eye(len(covariance)))
    return round(float(value) / 2, 6)
