"""What the page is made from: the artifacts' tables joined once, sampled where they are large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.provenance.costs import Cost

_CHIPS = (
    "chip_id", "item_id", "collection", "status", "reason", "geometry", "bands", "scale", "part",
    "offset", "size", "datetime", "cloud_fraction", "valid_fraction", "witness", "licence",
)  # fmt: skip
_DECISIONS = (
    "chip_id", "decision", "rule", "reason", "witness_id", "similarity", "quality", "entropy",
    "gradient", "cluster",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """The artifacts by role, their tables, and run costs.

    ``chips`` has one row per candidate with ``state`` (kept, dropped, quarantined) and ``why``
    (the rule or reason), and the decision's columns where there was one.
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
    costs: Sequence[Cost] = ()

    def facts(self, role: str) -> dict[str, Any]:
        """The facts of an artifact's manifest; empty where there is no such artifact."""
        found = self.artifacts.get(role)
        return {} if found is None else found.manifest.facts

    def settings(self, role: str) -> dict[str, Any]:
        """The settings an artifact was made with; empty where there is no such artifact."""
        found = self.artifacts.get(role)
        return {} if found is None else found.manifest.settings

    def kept(self) -> pd.DataFrame:
        """The chips that are kept."""
        return self.chips[self.chips["state"] == "kept"]


def gather(artifacts: Mapping[str, Artifact], costs: Sequence[Cost]) -> Material:
    """Read the tables that the page shows.

    Args:
        artifacts: by role; ``items``, ``chips`` and ``decisions`` are needed, the rest may lack.
        costs: of the artifacts and of all they were made from.
    """
    items = artifacts["items"].table("items.parquet")
    return Material(
        artifacts=artifacts,
        items=items,
        chips=_chips(artifacts),
        quarantine=_quarantine(artifacts, items),
        metrics=_table(artifacts, "model", "metrics.parquet"),
        scores=_table(artifacts, "scores", "scores.parquet"),
        curve=_table(artifacts, "calibration", "curve.parquet"),
        survival=_table(artifacts, "decisions", "survival.parquet"),
        measures=_table(artifacts, "decisions", "measures.parquet"),
        costs=costs,
    )


def _table(artifacts: Mapping[str, Artifact], role: str, name: str) -> pd.DataFrame:
    found = artifacts.get(role)
    if found is None or not any(f.path == name for f in found.manifest.files):
        return pd.DataFrame()
    return found.table(name)


def _chips(artifacts: Mapping[str, Artifact]) -> pd.DataFrame:
    chips = artifacts["chips"].table("chips.parquet")
    chips = chips[[c for c in _CHIPS if c in chips]].rename(columns={"reason": "cut_reason"})
    decisions = artifacts["decisions"].table("decisions.parquet")
    decisions = decisions[[c for c in _DECISIONS if c in decisions]]
    joined = chips.merge(decisions, on="chip_id", how="left", validate="one_to_one")
    state = np.where(joined["decision"] == "keep", "kept", "dropped")
    joined["state"] = np.where(joined["status"] == "quarantined", "quarantined", state)
    rule = joined["rule"].fillna("").astype(str)
    joined["why"] = np.where(joined["status"] == "ok", rule, joined["cut_reason"].fillna(""))
    return joined


def _quarantine(artifacts: Mapping[str, Artifact], items: pd.DataFrame) -> pd.DataFrame:
    """Everything set aside as unusable or hostile: what, which, why."""
    found = [_set_aside(items, "scene", ["item_id"])]
    chips = artifacts["chips"]
    found.append(_set_aside(chips.table("chips.parquet"), "chip", ["chip_id", "item_id"]))
    if any(f.path == "assets.parquet" for f in chips.manifest.files):
        found.append(_set_aside(chips.table("assets.parquet"), "asset", ["item_id", "asset"]))
    filled = [frame for frame in found if len(frame)]
    empty = pd.DataFrame(columns=["what", "id", "collection", "reason"])
    return pd.concat(filled, ignore_index=True) if filled else empty


def _set_aside(table: pd.DataFrame, what: str, names: list[str]) -> pd.DataFrame:
    rows = table[table["status"] == "quarantined"] if "status" in table else table.iloc[:0]
    collection = rows["collection"].astype(str) if "collection" in rows else ""
    return pd.DataFrame(
        {
            "what": what,
            "id": [" / ".join(str(v) for v in ids) for ids in rows[names].itertuples(index=False)],
            "collection": collection,
            "reason": rows["reason"].astype(str),
        }
    )


def cascade(table: pd.DataFrame, state: str, why: str) -> list[tuple[str, str, int]]:
    """How many rows fell for which reason, most first: (state, reason, rows), kept rows left out.

    Args:
        table: one row per scene or chip.
        state: column with kept, dropped or quarantined.
        why: column with the reason.
    """
    gone = table[table[state] != "kept"]
    sizes = gone.groupby([state, why], sort=True).size().reset_index(name="rows")
    sizes = sizes.sort_values("rows", ascending=False, kind="stable")
    return [(str(s), str(w), int(n)) for s, w, n in sizes.itertuples(index=False)]


def item_states(items: pd.DataFrame) -> pd.DataFrame:
    """Scenes with ``state`` (kept, dropped, quarantined) in place of ``status``."""
    names = {"ok": "kept", "dropped": "dropped", "quarantined": "quarantined"}
    return items.assign(state=items["status"].map(names).fillna("dropped"))


def vectors(artifacts: Mapping[str, Artifact], most: int) -> tuple[list[str], NDArray[np.float32]]:
    """Chip ids and embeddings [n, d] of at most ``most`` chips, evenly spaced over the table."""
    found = artifacts.get("embeddings")
    if found is None:
        return [], np.zeros((0, 0), dtype=np.float32)
    ids = found.table("ids.parquet")["chip_id"].astype(str).tolist()
    matrix = np.load(found.local("embeddings.npy"), mmap_mode="r", allow_pickle=False)
    rows = np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).round().astype(int))
    return [ids[i] for i in rows], np.asarray(matrix[rows], dtype=np.float32)
