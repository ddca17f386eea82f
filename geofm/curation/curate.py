"""Stage ``curate``: one decision per candidate chip, each with its rule, scores and witness.

Gates, then identical pixels, then near duplicates by the leader rule, then the choice to a budget.
A chip that is dropped for another names a chip that *stays* as its witness, with the exact
similarity: so a duplicate whose leader falls to the budget is dropped for the budget as well,
unless another chip that stays is within the threshold. That two chips show the same place is no
reason for anything; only what they look like counts.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.canonical import canonical, digest_of
from data_catalog.errors import RunError
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_table
from geofm.curation import audit
from geofm.curation.decide import Pool, decide
from geofm.curation.descriptors import describe
from geofm.curation.parts import chips_by_part, covers, ok_chips, read_pixels
from geofm.curation.scores import apply_gates, quality
from geofm.curation.space import Floats
from geofm.settings import CurateSettings

VERSION = "1"
CHIP_COLUMNS = ["chip_id", "collection", "crs", "transform", "pixel_sha256", "bands", "scale"]
SHARES = {"valid_fraction": "valid", "cloud_fraction": "cloud", "saturated_fraction": "saturated"}


def plan(job: Job) -> list[Part]:
    """One part per tar of chips: its descriptors, which depend on no setting and no seed."""
    chips = job.inputs["chips"]
    return [
        Part(
            digest_of({"descriptors": VERSION, "covers": covers(chips, part, refs)}),
            {"part": part},
        )
        for part, refs in chips_by_part(chips).items()
    ]


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe the chips of one tar: ``descriptors.json``, by chip id."""
    chips, name = job.inputs["chips"], part.payload["part"]
    refs = chips_by_part(chips)[name]
    found = {}
    for ref, pixels in zip(refs, read_pixels(chips, name, refs), strict=True):
        found[ref.chip_id] = describe(pixels, ref.bands, ref.scale)
    (folder / "descriptors.json").write_bytes(canonical(found))


def load_pool(chips: Artifact, folders: list[Path]) -> pd.DataFrame:
    """Usable chips sorted by id, with descriptors, shares (valid, cloud, saturated) and quality."""
    table = ok_chips(chips, [*CHIP_COLUMNS, *SHARES]).rename(columns=SHARES)
    for share in SHARES.values():
        table[share] = table[share].astype(np.float64)
    table["saturated"] = table["saturated"].fillna(0.0)
    table = table.sort_values("chip_id", ignore_index=True)
    described: dict[str, dict[str, Any]] = {}
    for folder in folders:
        described |= json.loads((folder / "descriptors.json").read_bytes())
    for column in ("entropy", "gradient", "constant", "band_means"):
        table[column] = [described[chip_id][column] for chip_id in table["chip_id"]]
    for column in ("entropy", "gradient"):
        table[column] = table[column].astype(np.float64)
    table["quality"] = quality(table)
    return table


def load_vectors(embeddings: Artifact, chip_ids: list[str]) -> NDArray[np.float16]:
    """Embeddings [n, d] in the order of ``chip_ids``.

    Raises:
        RunError: when the embeddings are of other chips.
    """
    ids = embeddings.table("ids.parquet")["chip_id"].astype(str).tolist()
    row_of = {chip_id: row for row, chip_id in enumerate(ids)}
    if set(ids) != set(chip_ids) or len(ids) != len(row_of):
        raise RunError(
            f"embeddings {embeddings.digest[:12]} are not of these chips "
            f"({len(ids)} vectors, {len(chip_ids)} chips); embed these chips"
        )
    vectors = np.load(embeddings.local("embeddings.npy"), mmap_mode="r", allow_pickle=False)
    rows = np.array([row_of[chip_id] for chip_id in chip_ids], dtype=np.int64)
    return np.asarray(vectors[rows], dtype=np.float16)


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Decide: ``decisions.parquet``, and ``centre.npy`` with which similarities are computed."""
    settings: CurateSettings = job.settings
    table = load_pool(job.inputs["chips"], folders)
    chip_ids = table["chip_id"].astype(str).tolist()
    rules, reasons = apply_gates(table, settings)
    passed = np.flatnonzero([rule == "" for rule in rules])
    vectors = load_vectors(job.inputs["embeddings"], chip_ids)
    outcome = decide(Pool(table.iloc[passed], vectors[passed]), settings, job.seed)

    decisions = pd.DataFrame({"chip_id": chip_ids, "decision": "drop", "rule": rules})
    decisions["reason"] = reasons
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
    inputs=("chips", "embeddings"),
    software=("faiss-cpu", "numpy", "scipy"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
)
