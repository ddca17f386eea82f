"""Stage ``pool``: which chips are candidates of the search and the selection.

plan    one part per evaluation set with images                (evaluation_sets.py)
work    describe and embed the images of a set                 (evaluation_sets.py)
seal    drop chips that fail a gate                            (gates.py),
        chips that an evaluation set shows                     (decontaminate.py),
        and chips whose pixels equal those of a better chip

The remaining chips are the candidates.
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
from geofm.chips.schema import chip_columns
from geofm.config.recipe import CurateSettings
from geofm.dedup.describe import load_described
from geofm.dedup.descriptors import is_monotone
from geofm.dedup.identical import collapse_groups
from geofm.dedup.leader import total_order
from geofm.pool import evaluation_sets
from geofm.pool.gates import apply_gates, quality
from geofm.runtime.parts import ok_chips
from geofm.types import Indices

#: Columns of the chips that a pool is made from.
GATE_COLUMNS = chip_columns(
    "chip_id",
    "item_id",
    "collection",
    "cell",
    "crs",
    "transform",
    "datetime",
    "geometry",
    "pixel_sha256",
    "bands",
    "scale",
)
#: Columns of ``pool.parquet``.
POOL_COLUMNS = ["chip_id", "rule", "reason", "witness_id", "similarity", "quality", "monotone"]
#: Settings that a pool depends on.
GATE_FIELDS = ("min_valid", "max_cloud", "max_saturated")
EVALUATION_FIELDS = ("evaluation_sets", "evaluation_buffer_m", "evaluation_similarity")
#: Shares of a chip's pixels: column of the chips, and its name here.
SHARES = {"valid_fraction": "valid", "cloud_fraction": "cloud", "saturated_fraction": "saturated"}


def reads(settings: Any) -> Any:
    """Return the digest of the registry of evaluation sets."""
    return evaluation_sets.identity(settings)


def plan(job: Job) -> list[Part]:
    """List one part per evaluation set with images."""
    return evaluation_sets.plan(job)


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe and embed the images of one evaluation set."""
    evaluation_sets.work(job, part, folder)


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write ``pool.parquet``: one row per usable chip, sorted by id.

    The column ``rule`` names the rule by which a chip is dropped; it is empty for candidates.
    """
    settings: CurateSettings = job.settings
    table = load_chips(job.inputs["chips"], job.inputs["descriptors"])
    table["rule"], table["reason"] = apply_gates(table, settings)
    table["witness_id"], table["similarity"] = "", np.nan
    decontamination = evaluation_sets.check(job, folders, table)
    _drop_shown(table, decontamination.rows)
    _drop_identical(table)
    table["monotone"] = is_monotone(table)
    write_table(table[POOL_COLUMNS], folder / "pool.parquet")
    dropped = Counter(table.loc[table["rule"] != "", "rule"])
    return Sealed(
        counts={"rows_in": len(table), "rows_out": int((table["rule"] == "").sum())},
        dropped={str(rule): int(count) for rule, count in dropped.items()},
        facts={"decontamination": decontamination.certificate},
    )


def load_chips(chips: Artifact, descriptors: Artifact) -> pd.DataFrame:
    """Read the usable chips, sorted by id, with shares, descriptors and quality.

    Raises:
        RunError: The descriptors were computed from other chips.
    """
    table = ok_chips(chips, [*GATE_COLUMNS, *SHARES]).rename(columns=SHARES)
    for share in SHARES.values():
        table[share] = table[share].astype(np.float64)
    table["saturated"] = table["saturated"].fillna(0.0)
    table = table.sort_values("chip_id", ignore_index=True)
    described = load_described(descriptors, table["chip_id"].astype(str).tolist())
    if (rows := descriptors.manifest.counts["rows_out"]) != len(table):
        raise RunError(
            f"descriptors {descriptors.digest[:12]} were computed from other chips ({rows} rows, "
            f"{len(table)} chips); run the describe stage again to describe these chips"
        )
    described = described.drop(columns="chip_id").reset_index(drop=True)
    table[described.columns] = described
    table["quality"] = quality(table)
    return table


def _drop_shown(table: pd.DataFrame, hits: pd.DataFrame) -> None:
    """Mark the chips that passed the gates and that an evaluation set shows.

    Args:
        table: usable chips; written in place.
        hits: rows of ``Decontamination``.
    """
    passed = np.flatnonzero(table["rule"] == "")
    hits = hits[hits["row"].isin(passed)]
    for column in ("rule", "reason", "similarity"):
        table.loc[hits["row"], column] = hits[column].to_numpy()
    table.loc[hits["row"], "witness_id"] = (hits["set"] + "/" + hits["witness"]).to_numpy()


def _drop_identical(table: pd.DataFrame) -> None:
    """Mark the chips (rule ``identical``) whose pixels equal those of a better chip.

    Only chips that passed the gates and the evaluation sets are compared.

    Args:
        table: usable chips; written in place.
    """
    passed = np.flatnonzero(table["rule"] == "")
    chips = table.iloc[passed]
    ids = chips["chip_id"].astype(str)
    order = total_order(chips["quality"].to_numpy(np.float64), ids.tolist())
    best = collapse_groups(_content_digests(chips), order)
    copies = np.flatnonzero(best != np.arange(len(best)))
    witnesses = ids.to_numpy()[best[copies]]
    rows = passed[copies]
    table.loc[rows, "rule"] = "identical"
    table.loc[rows, "reason"] = [f"its pixels are those of {witness}" for witness in witnesses]
    table.loc[rows, "witness_id"] = witnesses
    table.loc[rows, "similarity"] = 1.0


def _content_digests(chips: pd.DataFrame) -> list[str]:
    """Compute a digest of each chip's pixels, bands and scale."""
    columns = (chips[name].tolist() for name in ("pixel_sha256", "bands", "scale"))
    return [
        digest_of([str(pixels), [str(band) for band in bands], [float(value) for value in scale]])
        for pixels, bands, scale in zip(*columns, strict=True)
    ]


# The artifact as the stage `curate` reads it.


@dataclass(frozen=True)
class Pool:
    """The chips of a pool.

    Attributes:
        table: one row per usable chip, sorted by id: chip, shares, descriptors, quality, and the
            rule by which it is dropped, "" for candidates.
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
    """Read a pool with its chips and their descriptors.

    Raises:
        RunError: The pool was made from other chips.
    """
    table = load_chips(inputs["chips"], inputs["descriptors"])
    pool = inputs["pool"].table("pool.parquet").drop(columns="quality")
    if pool["chip_id"].astype(str).tolist() != table["chip_id"].astype(str).tolist():
        raise RunError(
            f"pool {inputs['pool'].digest[:12]} was made from other chips; run the pool stage again"
        )
    for column in ("rule", "reason", "witness_id", "similarity"):
        table[column] = pool[column]
    return Pool(table)


STAGE = Stage(
    name="pool",
    version="2",
    kind="pool",
    inputs=("chips", "descriptors", "embeddings"),
    software=("numpy", "scipy", "shapely"),
    plan=plan,
    work=work,
    seal=seal,
    section="curate",
    fields=GATE_FIELDS + EVALUATION_FIELDS,
    reads=reads,
    resolve=evaluation_sets.resolve,
)
