"""The pool: usable chips with their descriptors and shares, who passes the gates, who is a copy.

The stages that look for pairs and those that decide on them see the same rows in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.canonical import digest_of
from data_catalog.errors import RunError
from geofm.curation.duplicates import collapse_identical
from geofm.curation.leader import total_order
from geofm.curation.parts import ok_chips
from geofm.curation.scores import apply_gates, quality
from geofm.curation.space import Indices
from geofm.settings import CurateSettings

CHIP_COLUMNS = ["chip_id", "item_id", "collection", "cell", "crs", "transform", "datetime",
                "geometry", "pixel_sha256", "bands", "scale"]  # fmt: skip
SHARES = {"valid_fraction": "valid", "cloud_fraction": "cloud", "saturated_fraction": "saturated"}
#: The settings that say which chips are in a pool.
GATE_FIELDS = ("min_valid", "max_cloud", "max_saturated")


@dataclass(frozen=True)
class Pool:
    """Usable chips sorted by id.

    Attributes:
        table: one row per chip: what it is, its descriptors, shares and quality.
        rules: the gate that each row fails, "" for rows that pass them all; ``reasons`` why.
        order: rows that passed, best first.
        stands_for: for each row that passed, the row that stands for its identical copies
            (itself if it is the best of them); -1 for the others.
        distinct: the rows that stand for themselves, ascending: those that are searched.
    """

    table: pd.DataFrame
    rules: list[str]
    reasons: list[str]
    order: Indices
    stands_for: Indices
    distinct: Indices

    @property
    def ids(self) -> list[str]:
        """Chip ids by row."""
        return [str(chip_id) for chip_id in self.table["chip_id"]]


def load_pool(chips: Artifact, descriptors: Artifact, settings: CurateSettings) -> Pool:
    """The pool of a chips artifact.

    Raises:
        RunError: when the descriptors are of other chips.
    """
    table = ok_chips(chips, [*CHIP_COLUMNS, *SHARES]).rename(columns=SHARES)
    for share in SHARES.values():
        table[share] = table[share].astype(np.float64)
    table["saturated"] = table["saturated"].fillna(0.0)
    table = table.sort_values("chip_id", ignore_index=True)
    described = descriptors.table("descriptors.parquet").set_index("chip_id")
    if len(described) != len(table) or not described.index.isin(table["chip_id"]).all():
        raise RunError(
            f"descriptors {descriptors.digest[:12]} are not of these chips ({len(described)} "
            f"rows, {len(table)} chips); describe these chips"
        )
    described = described.loc[table["chip_id"]].reset_index(drop=True)
    table[described.columns] = described
    table["quality"] = quality(table)

    rules, reasons = apply_gates(table, settings)
    passed = np.flatnonzero([rule == "" for rule in rules]).astype(np.int64)
    mine = table.iloc[passed]
    order = total_order(mine["quality"].to_numpy(np.float64), mine["chip_id"].astype(str).tolist())
    stands_for = np.full(len(table), -1, dtype=np.int64)
    stands_for[passed] = passed[collapse_identical(_contents(mine), order)]
    distinct = np.unique(stands_for[passed])
    return Pool(table, rules, reasons, passed[order], stands_for, distinct)


def _contents(chips: pd.DataFrame) -> list[str]:
    """What makes two chips the same: pixels, and what their numbers mean."""
    columns = (chips[name].tolist() for name in ("pixel_sha256", "bands", "scale"))
    return [
        digest_of([str(pixels), [str(band) for band in bands], [float(value) for value in scale]])
        for pixels, bands, scale in zip(*columns, strict=True)
    ]


def load_vectors(embeddings: Artifact, chip_ids: list[str]) -> NDArray[np.float16]:
    """Embeddings [n, d] in the order of ``chip_ids``, some or all of those embedded.

    Raises:
        RunError: when a chip has no embedding.
    """
    ids = pd.Index(embeddings.table("ids.parquet")["chip_id"].astype(str))
    rows = ids.get_indexer(pd.Index(chip_ids))
    if (rows < 0).any():
        raise RunError(
            f"embeddings {embeddings.digest[:12]} are not of these chips: "
            f"{int((rows < 0).sum())} of {len(chip_ids)} have no vector; embed these chips"
        )
    vectors = np.load(embeddings.local("embeddings.npy"), mmap_mode="r", allow_pickle=False)
    return np.asarray(vectors[rows], dtype=np.float16)
