"""Data of the page: the tables of the artifacts, read and joined once for all sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.provenance.costs import ArtifactCost
from geofm.chips.schema import chip_columns

#: Roles of the artifacts that the page shows, in the order of the stages.
ROLES = (
    "items",
    "chips",
    "embeddings",
    "descriptors",
    "pool",
    "calibration",
    "buckets",
    "pairs",
    "alike",
    "decisions",
    "dataset",
    "model",
    "scores",
)

_CHIP_COLUMNS = chip_columns(
    "chip_id",
    "item_id",
    "collection",
    "status",
    "reason",
    "geometry",
    "bands",
    "scale",
    "part",
    "offset",
    "size",
    "datetime",
    "cloud_fraction",
    "valid_fraction",
    "witness",
    "licence",
)
_DECISION_COLUMNS = (
    "chip_id",
    "decision",
    "rule",
    "reason",
    "witness_id",
    "similarity",
    "quality",
    "entropy",
    "gradient",
    "cluster",
)


@dataclass(frozen=True)
class ReportData:
    """Artifacts, tables and costs of a run. A table of a missing artifact is empty.

    Attributes:
        artifacts: Artifacts by role.
        items: ``items.parquet``.
        chips: One row per candidate chip with the columns of its decision, ``state`` (kept, dropped
            or quarantined) and ``why`` (rule or reason).
        quarantine: Scenes, chips and assets that could not be used: what, id, collection, reason.
        metrics: One row per training step.
        scores: ``scores.parquet``.
        curve: Precision and recall by threshold and collection.
        survival: Candidates left after each step, by stratum.
        measures: Quality measures of the selection and of its baselines.
        costs: Costs of all stages in the lineage.
    """

    artifacts: Mapping[str, Artifact]
    items: pd.DataFrame
    chips: pd.DataFrame
    quarantine: pd.DataFrame
    metrics: pd.DataFrame
    scores: pd.DataFrame
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    survival: pd.DataFrame = field(default_factory=pd.DataFrame)
    measures: pd.DataFrame = field(default_factory=pd.DataFrame)
    costs: Sequence[ArtifactCost] = ()

    def facts(self, role: str) -> dict[str, Any]:
        """Facts in the manifest of an artifact; empty if it is missing."""
        artifact = self.artifacts.get(role)
        return {} if artifact is None else artifact.manifest.facts

    def settings(self, role: str) -> dict[str, Any]:
        """Settings in the manifest of an artifact; empty if it is missing."""
        artifact = self.artifacts.get(role)
        return {} if artifact is None else artifact.manifest.settings

    def kept(self) -> pd.DataFrame:
        """Chips that are kept."""
        return self.chips[self.chips["state"] == "kept"]


def read_report_data(
    artifacts: Mapping[str, Artifact], costs: Sequence[ArtifactCost]
) -> ReportData:
    """Read the tables that the page shows.

    Args:
        artifacts: Artifacts by role; ``items``, ``chips`` and ``decisions`` are required.
        costs: Costs of the artifacts and of their lineage.
    """
    items = artifacts["items"].table("items.parquet")
    return ReportData(
        artifacts=artifacts,
        items=items,
        chips=_read_chips(artifacts),
        quarantine=_read_quarantine(artifacts, items),
        metrics=_read_table(artifacts, "model", "metrics.parquet"),
        scores=_read_table(artifacts, "scores", "scores.parquet"),
        curve=_read_table(artifacts, "calibration", "curve.parquet"),
        survival=_read_table(artifacts, "decisions", "survival.parquet"),
        measures=_read_table(artifacts, "decisions", "measures.parquet"),
        costs=costs,
    )


def _read_table(artifacts: Mapping[str, Artifact], role: str, name: str) -> pd.DataFrame:
    artifact = artifacts.get(role)
    if artifact is None or not _has_file(artifact, name):
        return pd.DataFrame()
    return artifact.table(name)


def _has_file(artifact: Artifact, name: str) -> bool:
    return any(file.path == name for file in artifact.manifest.files)


def _read_chips(artifacts: Mapping[str, Artifact]) -> pd.DataFrame:
    """Candidate chips joined with their decisions; see ``ReportData.chips``."""
    chips = artifacts["chips"].table("chips.parquet")
    chips = chips[[c for c in _CHIP_COLUMNS if c in chips]].rename(columns={"reason": "cut_reason"})
    decisions = artifacts["decisions"].table("decisions.parquet")
    decisions = decisions[[c for c in _DECISION_COLUMNS if c in decisions]]
    joined = chips.merge(decisions, on="chip_id", how="left", validate="one_to_one")
    state = np.where(joined["decision"] == "keep", "kept", "dropped")
    joined["state"] = np.where(joined["status"] == "quarantined", "quarantined", state)
    rule = joined["rule"].fillna("").astype(str)
    joined["why"] = np.where(joined["status"] == "ok", rule, joined["cut_reason"].fillna(""))
    return joined


def _read_quarantine(artifacts: Mapping[str, Artifact], items: pd.DataFrame) -> pd.DataFrame:
    """Quarantined scenes, chips and assets; see ``ReportData.quarantine``."""
    chips = artifacts["chips"]
    tables = [
        _quarantined_rows(items, "scene", ["item_id"]),
        _quarantined_rows(chips.table("chips.parquet"), "chip", ["chip_id", "item_id"]),
    ]
    if _has_file(chips, "assets.parquet"):
        assets = chips.table("assets.parquet")
        tables.append(_quarantined_rows(assets, "asset", ["item_id", "asset"]))
    filled = [table for table in tables if len(table)]
    empty = pd.DataFrame(columns=["what", "id", "collection", "reason"])
    return pd.concat(filled, ignore_index=True) if filled else empty


def _quarantined_rows(table: pd.DataFrame, what: str, id_columns: list[str]) -> pd.DataFrame:
    rows = table[table["status"] == "quarantined"] if "status" in table else table.iloc[:0]
    collection = rows["collection"].astype(str) if "collection" in rows else ""
    ids = rows[id_columns].itertuples(index=False)
    return pd.DataFrame(
        {
            "what": what,
            "id": [" / ".join(str(part) for part in row) for row in ids],
            "collection": collection,
            "reason": rows["reason"].astype(str),
        }
    )


def count_drops(table: pd.DataFrame, state: str, why: str) -> list[tuple[str, str, int]]:
    """Count the rows that were not kept by state and reason, the most frequent first.

    Args:
        table: One row per scene or chip.
        state: Column with kept, dropped or quarantined.
        why: Column with the reason.

    Returns:
        Tuples (state, reason, number of rows).
    """
    gone = table[table[state] != "kept"]
    sizes = gone.groupby([state, why], sort=True).size().reset_index(name="rows")
    sizes = sizes.sort_values("rows", ascending=False, kind="stable")
    return [(str(s), str(w), int(n)) for s, w, n in sizes.itertuples(index=False)]


def with_item_states(items: pd.DataFrame) -> pd.DataFrame:
    """Scenes with a column ``state`` (kept, dropped, quarantined), derived from ``status``."""
    names = {"ok": "kept", "dropped": "dropped", "quarantined": "quarantined"}
    return items.assign(state=items["status"].map(names).fillna("dropped"))


def sample_vectors(
    artifacts: Mapping[str, Artifact], most: int
) -> tuple[list[str], NDArray[np.float32]]:
    """Read the embeddings of at most ``most`` chips, evenly spaced over the table.

    Returns:
        Chip ids, and vectors of shape (n, D).
    """
    embeddings = artifacts.get("embeddings")
    if embeddings is None:
        return [], np.zeros((0, 0), dtype=np.float32)
    ids = embeddings.table("ids.parquet")["chip_id"].astype(str).tolist()
    matrix = np.load(embeddings.local("embeddings.npy"), mmap_mode="r", allow_pickle=False)
    rows = np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).round().astype(int))
    return [ids[i] for i in rows], np.asarray(matrix[rows], dtype=np.float32)
