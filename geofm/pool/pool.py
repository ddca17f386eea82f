"""Stage ``pool``: which chips are candidates. Gates, evaluation sets, identical pixels.

A chip that fails a gate, or that an evaluation set shows, or whose pixels are those of a better
one, is no candidate; the others are what is searched for duplicates and chosen from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.hashing import digest_of
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_table
from geofm.config.recipe import CurateSettings
from geofm.dedup.describe import load_described
from geofm.dedup.descriptors import is_monotone
from geofm.dedup.exact_pairs import collapse_identical
from geofm.dedup.leader import total_order
from geofm.pool import evaluation_sets
from geofm.pool.gates import apply_gates, quality
from geofm.runtime.parts import ok_chips
from geofm.types import Indices

CHIP_COLUMNS = ["chip_id", "item_id", "collection", "cell", "crs", "transform", "datetime",
                "geometry", "pixel_sha256", "bands", "scale"]  # fmt: skip
#: The settings that a pool depends on.
GATES = ("min_valid", "max_cloud", "max_saturated")
EVALUATION = ("evaluation_sets", "evaluation_buffer_m", "evaluation_similarity")
SHARES = {"valid_fraction": "valid", "cloud_fraction": "cloud", "saturated_fraction": "saturated"}


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """``pool.parquet``: a row per usable chip, sorted by id, with the rule it falls by or ""."""
    settings: CurateSettings = job.settings
    chips, descriptors = job.inputs["chips"], job.inputs["descriptors"]
    table = load_chips(chips, descriptors)
    table["rule"], table["reason"] = apply_gates(table, settings)
    table["witness_id"], table["similarity"] = "", np.nan
    found = evaluation_sets.check(job, folders, table)
    at = np.flatnonzero(table["rule"] == "")
    hit = found.rows[found.rows["row"].isin(at)]
    for column in ("rule", "reason", "similarity"):
        table.loc[hit["row"], column] = hit[column].to_numpy()
    table.loc[hit["row"], "witness_id"] = (hit["set"] + "/" + hit["witness"]).to_numpy()
    _collapse(table)
    table["monotone"] = is_monotone(table)
    columns = ["chip_id", "rule", "reason", "witness_id", "similarity", "quality", "monotone"]
    write_table(table[columns], folder / "pool.parquet")
    dropped = Counter(table.loc[table["rule"] != "", "rule"])
    return Sealed(
        counts={"rows_in": len(table), "rows_out": int((table["rule"] == "").sum())},
        dropped={str(rule): int(count) for rule, count in dropped.items()},
        facts={"decontamination": found.certificate},
    )


def load_chips(chips: Artifact, descriptors: Artifact) -> pd.DataFrame:
    """Usable chips sorted by id: what they are, shares, descriptors and quality.

    Raises:
        RunError: when the descriptors are of other chips.
    """
    table = ok_chips(chips, [*CHIP_COLUMNS, *SHARES]).rename(columns=SHARES)
    for share in SHARES.values():
        table[share] = table[share].astype(np.float64)
    table["saturated"] = table["saturated"].fillna(0.0)
    table = table.sort_values("chip_id", ignore_index=True)
    described = load_described(descriptors, table["chip_id"].astype(str).tolist())
    if (rows := descriptors.manifest.counts["rows_out"]) != len(table):
        raise RunError(
            f"descriptors {descriptors.digest[:12]} are not of these chips ({rows} rows, "
            f"{len(table)} chips); describe these chips"
        )
    described = described.drop(columns="chip_id").reset_index(drop=True)
    table[described.columns] = described
    table["quality"] = quality(table)
    return table


def _collapse(table: pd.DataFrame) -> None:
    """Rule ``identical`` for chips whose pixels are those of a better one that passed so far."""
    passed = np.flatnonzero(table["rule"] == "")
    mine = table.iloc[passed]
    order = total_order(mine["quality"].to_numpy(np.float64), mine["chip_id"].astype(str).tolist())
    best = collapse_identical(_contents(mine), order)
    copies = np.flatnonzero(best != np.arange(len(best)))
    witnesses = mine["chip_id"].astype(str).to_numpy()[best[copies]]
    rows = passed[copies]
    table.loc[rows, "rule"] = "identical"
    table.loc[rows, "reason"] = [f"its pixels are those of {one}" for one in witnesses]
    table.loc[rows, "witness_id"] = witnesses
    table.loc[rows, "similarity"] = 1.0


def _contents(chips: pd.DataFrame) -> list[str]:
    """What makes two chips the same: pixels, and what their numbers mean."""
    columns = (chips[name].tolist() for name in ("pixel_sha256", "bands", "scale"))
    return [
        digest_of([str(pixels), [str(band) for band in bands], [float(value) for value in scale]])
        for pixels, bands, scale in zip(*columns, strict=True)
    ]


@dataclass(frozen=True)
class Pool:
    """The chips of a pool artifact, sorted by id.

    ``table`` has what is known of each; its ``rule`` is "" for candidates.
    """

    table: pd.DataFrame

    @property
    def ids(self) -> list[str]:
        """Chip ids by row."""
        return [str(chip_id) for chip_id in self.table["chip_id"]]

    @property
    def candidates(self) -> Indices:
        """Rows of the candidates, ascending."""
        return np.flatnonzero(self.table["rule"] == "").astype(np.int64)


def load_pool(inputs: dict[str, Artifact]) -> Pool:
    """The pool with its chips and their descriptors."""
    table = load_chips(inputs["chips"], inputs["descriptors"])
    pool = inputs["pool"].table("pool.parquet").drop(columns="quality")
    if pool["chip_id"].astype(str).tolist() != table["chip_id"].astype(str).tolist():
        raise RunError(f"pool {inputs['pool'].digest[:12]} is not of these chips")
    for column in ("rule", "reason", "witness_id", "similarity"):
        table[column] = pool[column]
    return Pool(table)


def plan(job: Job) -> list[Part]:
    """One part per evaluation set with images: what they look like."""
    return evaluation_sets.plan(job)


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe and embed the images of one evaluation set."""
    evaluation_sets.work(job, part, folder)


def reads(settings: Any) -> Any:
    """Identity of the registry of evaluation sets."""
    return evaluation_sets.identity(settings)


STAGE = Stage(
    name="pool",
    version="1",
    kind="pool",
    inputs=("chips", "descriptors", "embeddings"),
    software=("numpy", "scipy", "shapely"),
    plan=plan,
    work=work,
    seal=seal,
    section="curate",
    fields=GATES + EVALUATION,
    reads=reads,
    resolve=evaluation_sets.resolve,
)
