"""Pools of 50,000 to 200,000 vectors: no pair of any row is missed, whatever their distribution."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_catalog.catalogue import open_catalogue
from data_catalog.store import open_store
from geofm.config.recipe import CurateSettings
from geofm.dedup import buckets
from geofm.embeddings.vectors import EmbeddingSpace
from tests.geofm.dedup.test_pairs import search

pytestmark = pytest.mark.long
EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "4"))
WIDTH, ASKED = 48, 400


def pool(kind: str, rows: int, draw: np.random.Generator) -> np.ndarray:
    """Vectors, a fifth of which are near copies of others, shape (rows, WIDTH)."""
    if kind == "clustered":
        centres = draw.normal(size=(rows // 50, WIDTH))
        found = centres[draw.integers(0, len(centres), rows)] + draw.normal(0, 0.7, (rows, WIDTH))
    elif kind == "monotone":  # two thirds differ little, as water and sand do
        found = draw.normal(size=WIDTH) * 3 + draw.normal(0, 0.8, (rows, WIDTH))
        found[: rows // 3] = draw.normal(size=(rows // 3, WIDTH)) * 2
    else:  # lengths with heavy tails, and one direction in which some vectors are far out
        found = draw.normal(size=(rows, WIDTH)) * (1 + draw.pareto(1.5, (rows, 1)))
        found += 0.3 * np.outer(draw.standard_t(2, rows), draw.normal(size=WIDTH))
    copies = rows // 5
    steps = draw.normal(0, 0.02, (copies, WIDTH)) * np.exp(draw.normal(0, 1, (copies, 1)))
    found[-copies:] = found[:copies] + steps * np.abs(found[:copies])
    return np.clip(found, -60_000, 60_000).astype(np.float16)


@given(
    st.sampled_from(["clustered", "monotone", "heavy tails"]),
    st.integers(50_001, 200_000),
    st.sampled_from([0.9, 0.95, 0.98]),
    st.integers(0, 2**31),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_pair_of_some_rows_is_found(kind, rows, threshold, seed):
    draw = np.random.default_rng(seed)
    vectors = pool(kind, rows, draw)
    ids = [f"{row:08d}" for row in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "store")
        catalogue = open_catalogue(f"sqlite:///{folder}/c.db", store)
        # a missed pair of the audited sample ends the search with MissedPairs
        made, artifact = search(store, catalogue, ids, vectors, CurateSettings(threshold=threshold))
        facts = artifact.manifest.facts
        assert facts["certificate"]["missed"] == 0
        table = artifact.table("pairs.parquet")
        found = set(zip(table["left"].astype(int), table["right"].astype(int), strict=True))
        dense = set(artifact.table("dense.parquet")["chip_id"].astype(int))
        same = artifact.table("identical.parquet")
        copies = set(same["chip_id"].astype(int))
        space = EmbeddingSpace(vectors, buckets.read_partition(made["buckets"]).centre)
        asked = np.setdiff1d(np.sort(draw.choice(rows, ASKED, replace=False)), list(copies))
        queries, wrong = space.exact_units(asked), []
        for first in range(0, rows, 8192):
            others = np.arange(first, min(first + 8192, rows))
            near = queries @ space.exact_units(others).T >= threshold + 1e-9
            for i, j in np.argwhere(near):
                a, b = sorted((int(asked[i]), int(others[j])))
                known = a == b or {a, b} & copies or (a in dense and b in dense)
                if not known and (a, b) not in found:
                    wrong.append((a, b))
        assert not wrong
