"""Stage ``curate``: one decision per candidate chip, each with its rule, scores and witness.

Near duplicates go by the leader rule, then the budget is filled. That two chips show the same
place is no reason for anything; only what they look like counts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.curation.buckets import thresholds_of
from geofm.curation.choose import measured, scored, survivors
from geofm.curation.decide import decide
from geofm.curation.graph import load_graph
from geofm.curation.pool import load_pool
from geofm.settings import CurateSettings

COPIED = ("quality", "entropy", "gradient", "valid", "cloud", "saturated", "constant", "band_means")


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Decide.

    Writes ``decisions.parquet``; ``dense_pairs.parquet`` (the pairs of dense cells that name a
    witness); ``survival.parquet`` (who was left, by stratum); ``measures.parquet`` (the choice
    beside others).
    """
    settings: CurateSettings = job.settings
    pool = load_pool(job.inputs)
    pairs = job.inputs["pairs"].manifest.facts
    thresholds = thresholds_of(settings, job.inputs["calibration"])
    collections = pool.table["collection"].astype(str)
    least = np.array([thresholds[name] for name in collections], dtype=np.float64)
    graph = load_graph(job.inputs, pool, least)
    outcome = decide(pool, graph, settings, job.seed)
    decisions = outcome.rows
    for column in COPIED:
        decisions[column] = pool.table[column]
    chips = pool.table.iloc[graph.nodes]
    scores = scored(chips, graph.space, job.seed).set_axis(graph.nodes)
    decisions[scores.columns] = scores.reindex(decisions.index)
    write_table(decisions, folder / "decisions.parquet")
    write_table(outcome.dense_pairs, folder / "dense_pairs.parquet")
    survival = survivors(pool, graph.nodes, outcome.leaders, outcome.kept)
    write_table(survival, folder / "survival.parquet")
    kept = np.flatnonzero(outcome.kept).astype(np.int64)
    measures = measured(chips, graph.space, kept, job.seed)
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
            "budget": settings.budget,
            "method": settings.method,
            "strata": list(outcome.strata),
            "largest_group": outcome.largest_group,
            "measures": measures_by_choice(measures),
            "decontamination": job.inputs["pool"].manifest.facts["decontamination"],
            "thresholds": thresholds,
            **{name: pairs[name] for name in ("threshold", "threshold_from", "certificate")},
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


INPUTS = (
    "chips", "descriptors", "embeddings", "pool", "calibration", "buckets", "pairs", "alike",
)  # fmt: skip

STAGE = Stage(
    name="curate",
    version="3",
    kind="decisions",
    inputs=INPUTS,
    software=("faiss-cpu", "numpy", "scipy"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    seeded=True,
    fields=("threshold", "budget", "method", "rarity", "strata", "stratum_share", "equal_strata"),
)
