"""Stage ``curate``: one decision per candidate chip, each with its rule, scores and witness.

Gates, then identical pixels, then near duplicates by the leader rule, then the choice to a budget.
A chip that is dropped for another names a chip that *stays* as its witness, with the exact
similarity: so a duplicate whose leader falls to the budget is dropped for the budget as well,
unless another chip that stays is within the threshold. That two chips show the same place is no
reason for anything; only what they look like counts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.curation import audit
from geofm.curation.decide import decide
from geofm.curation.pool import load_pool, load_vectors
from geofm.curation.space import Floats
from geofm.settings import CurateSettings

VERSION = "2"


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Decide: ``decisions.parquet``, and ``centre.npy`` with which similarities are computed."""
    settings: CurateSettings = job.settings
    pool = load_pool(job.inputs["chips"], job.inputs["descriptors"], settings)
    table, chip_ids = pool.table, pool.ids
    vectors = load_vectors(job.inputs["embeddings"], chip_ids)
    outcome = decide(pool, vectors, settings, job.seed)
    passed = np.sort(pool.order)

    decisions = pd.DataFrame({"chip_id": chip_ids, "decision": "drop", "rule": pool.rules})
    decisions["reason"] = pool.reasons
    decisions["witness_id"] = ""
    decisions["similarity"] = np.nan
    for column in ("quality", "entropy", "gradient", "valid", "cloud", "saturated"):
        decisions[column] = table[column]
    decisions["constant"] = table["constant"].astype(bool)
    decisions["band_means"] = table["band_means"]
    decisions["cluster"] = ""
    for column in ("decision", "rule", "reason", "witness_id", "similarity", "cluster"):
        values = decisions[column].to_numpy(copy=True)
        values[passed] = outcome.rows[column].to_numpy()
        decisions[column] = values
    write_table(decisions, folder / "decisions.parquet")
    np.save(folder / "centre.npy", outcome.space.centre)

    kept = np.flatnonzero(decisions["decision"] == "keep").astype(np.int64)
    dropped = Counter(decisions.loc[decisions["decision"] == "drop", "rule"])
    means = table["band_means"].iloc[passed].tolist()
    stayed = np.flatnonzero(np.isin(passed, kept)).astype(np.int64)
    return Sealed(
        counts={"rows_in": len(decisions), "rows_out": len(kept), "leaders": outcome.leaders},
        dropped={str(rule): int(count) for rule, count in dropped.items()},
        facts={
            "threshold": settings.threshold,
            "budget": settings.budget,
            "method": settings.method,
            "similarity": "cosine of embeddings minus centre.npy, float64",
            "centred": bool(np.any(outcome.space.centre)),
            "certificate": outcome.certificate,
            "largest_group": outcome.largest_group,
            **outcome.measures,
            **(audit.spectral_diversity(means, stayed) if means else {}),
            "mean_quality_kept": _mean(table["quality"].to_numpy(np.float64)[kept]),
        },
    )


def _mean(values: Floats) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


STAGE = Stage(
    name="curate",
    version=VERSION,
    kind="decisions",
    inputs=("chips", "descriptors", "embeddings"),
    software=("faiss-cpu", "numpy", "scipy"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    seeded=True,
)
