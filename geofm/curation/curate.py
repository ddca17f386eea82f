"""Stage ``curate``: one decision per candidate chip, each with its rule, scores and witness.

Gates, then identical pixels, then near duplicates by the leader rule, then the choice to a budget.
That two chips show the same place is no reason for anything; only what they look like counts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.curation import audit
from geofm.curation.choose import measured, survivors
from geofm.curation.decide import Evidence, decide
from geofm.curation.duplicates import find_edges
from geofm.curation.pool import load_pool, load_vectors
from geofm.curation.space import make_space
from geofm.settings import CurateSettings

VERSION = "2"
COPIED = ("quality", "entropy", "gradient", "valid", "cloud", "saturated", "constant", "band_means")


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Decide.

    Writes ``decisions.parquet``; ``survival.parquet`` (who was left, by stratum);
    ``measures.parquet`` (the choice beside others); ``centre.npy``, with which similarities are
    computed.
    """
    settings: CurateSettings = job.settings
    pool = load_pool(job.inputs["chips"], job.inputs["descriptors"], settings)
    vectors = load_vectors(job.inputs["embeddings"], pool.ids)
    space = make_space(vectors[pool.distinct])
    edges = find_edges(space, settings.threshold)
    certificate = audit.audit_edges(space, edges, settings.threshold, job.seed)
    audit.require_complete(certificate)
    sentence = (
        "cosine similarity {similarity:.4f} to {witness}, which is kept; chips are duplicates "
        f"from {settings.threshold:g} (curate.threshold)"
    )
    evidence = [Evidence("near_duplicate", sentence, edges)]
    outcome = decide(pool, space, evidence, settings, job.seed)

    passed = np.sort(pool.order)
    decisions = pd.DataFrame({"chip_id": pool.ids, "decision": "drop", "rule": pool.rules})
    decisions["reason"] = pool.reasons
    decisions["witness_id"] = ""
    decisions["similarity"] = np.nan
    for column in COPIED:
        decisions[column] = pool.table[column]
    decisions["cluster"] = ""
    for column in ("decision", "rule", "reason", "witness_id", "similarity", "cluster"):
        values = decisions[column].to_numpy(copy=True)
        values[passed] = outcome.rows[column].to_numpy()
        decisions[column] = values
    write_table(decisions, folder / "decisions.parquet")
    np.save(folder / "centre.npy", space.centre)
    survival = survivors(pool, pool.distinct, outcome.leaders, outcome.kept)
    write_table(survival, folder / "survival.parquet")
    kept = np.flatnonzero(outcome.kept).astype(np.int64)
    measures = measured(pool.table.iloc[pool.distinct], space, kept, job.seed)
    write_table(measures, folder / "measures.parquet")

    dropped = Counter(decisions.loc[decisions["decision"] == "drop", "rule"])
    return Sealed(
        counts={
            "rows_in": len(decisions),
            "rows_out": len(kept),
            "leaders": int(outcome.leaders.sum()),
        },
        dropped={str(rule): int(count) for rule, count in dropped.items()},
        facts={
            "threshold": settings.threshold,
            "budget": settings.budget,
            "method": settings.method,
            "strata": list(outcome.strata),
            "similarity": "cosine of embeddings minus centre.npy, float64",
            "centred": bool(np.any(space.centre)),
            "certificate": certificate,
            "largest_group": outcome.largest_group,
            "measures": measures_by_choice(measures),
        },
    )


def measures_by_choice(measures: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The table of measures as JSON; what could not be measured is null."""
    return {
        str(row.pop("choice")): {
            str(name): None if pd.isna(value) else value for name, value in row.items()
        }
        for row in measures.to_dict("records")
    }


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
