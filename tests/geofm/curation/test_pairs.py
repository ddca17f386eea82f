"""The stages buckets and pairs: cells against brute force, parts, kills, order, certificate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_catalog.run import make_job, plan_parts, run_stage, seal, work_parts
from geofm.curation import audit, buckets, frame, join, pairs
from geofm.settings import CurateSettings
from tests.geofm.curation.synthetic import make_embeddings

SETTINGS = CurateSettings(threshold=0.95)


@pytest.fixture
def cells(monkeypatch):
    """Pools of a few thousand are searched by cells, in several ranges and parts."""
    monkeypatch.setattr(frame, "WHOLE_UP_TO", 100)
    monkeypatch.setattr(buckets, "RANGE", 700)
    monkeypatch.setattr(pairs, "PART_ROWS", 700)


def clusters(rows: int, seed: int = 0, width: int = 32) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(rows // 20, width))
    found = centres[draw.integers(0, len(centres), rows)] + draw.normal(0, 0.8, (rows, width))
    near = rows // 5
    found[:near] = found[-near:] + draw.normal(0, 0.15, (near, width))
    return found.astype(np.float16)


def names(rows: int) -> list[str]:
    return [f"chip{number * 7919 % 100_003:06d}" for number in range(rows)]


def brute(vectors: np.ndarray, ids: list[str], threshold: float) -> set[tuple[str, str]]:
    exact = vectors.astype(np.float64)
    exact = exact - exact.mean(axis=0)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    low, high = np.nonzero(np.triu(exact @ exact.T >= threshold, 1))
    return {tuple(sorted((ids[a], ids[b]))) for a, b in zip(low, high, strict=True)}


def search(store, catalogue, ids, vectors, settings=SETTINGS):
    embeddings = make_embeddings(store, ids, vectors)
    made = {"embeddings": embeddings}
    made["buckets"] = run_stage(buckets.STAGE, store, catalogue, made, settings)
    return made, run_stage(pairs.STAGE, store, catalogue, made, settings)


def found(artifact) -> set[tuple[str, str]]:
    table = artifact.table("pairs.parquet")
    return set(zip(table["left"], table["right"], strict=True))


@pytest.mark.usefixtures("cells")
def test_cells_find_what_brute_force_finds(store, catalogue):
    vectors, ids = clusters(3000), names(3000)
    _, artifact = search(store, catalogue, ids, vectors)
    facts = artifact.manifest.facts
    assert facts["cells"] > 50
    assert facts["reach"] < facts["complete_reach"]
    expected = brute(vectors, ids, 0.95)
    assert len(expected) > 500
    assert found(artifact) == expected
    certificate = facts["certificate"]
    assert certificate["queries"] == 2000
    assert certificate["missed"] == 0
    assert certificate["recall_lower_bound"] > 0.98
    assert certificate["pairs_found"] == len(expected)
    assert facts["threshold_from"] == "curate.threshold"
    assert (artifact.table("pairs.parquet")["similarity"] >= 0.95).all()


def test_a_small_pool_is_searched_whole(store, catalogue):
    vectors, ids = clusters(400), names(400)
    _, artifact = search(store, catalogue, ids, vectors)
    assert artifact.manifest.facts["method"] == "every pair"
    assert found(artifact) == brute(vectors, ids, 0.95)


@pytest.mark.usefixtures("cells")
def test_parts_make_one_result_in_any_order_and_after_a_kill(store, catalogue, tmp_path):
    from data_catalog.store import open_store

    vectors, ids = clusters(2000), names(2000)
    _, artifact = search(store, catalogue, ids, vectors)
    other = open_store(tmp_path / "other")
    embeddings = make_embeddings(other, ids, vectors)
    inputs = {"embeddings": embeddings}
    for stage in (buckets.STAGE, pairs.STAGE):
        job = make_job(stage, other, inputs, SETTINGS)
        parts = plan_parts(stage, job)
        assert len(parts) > 2
        for part in parts[::-1]:
            work_parts(stage, job, [part])
        again, _ = seal(stage, job, parts)
        inputs[stage.kind] = again
    assert inputs["pairs"].digest == artifact.digest


@pytest.mark.usefixtures("cells")
def test_identical_vectors_are_one_and_named(store, catalogue):
    vectors, ids = clusters(1000), names(1000)
    vectors[100:600] = vectors[99]
    made, artifact = search(store, catalogue, ids, vectors)
    table = artifact.table("identical.parquet")
    assert len(table) == 500
    assert set(table["same_as"]) == {ids[99]}
    assert made["buckets"].manifest.dropped == {"identical": 500, "not_compared": 0}
    assert artifact.manifest.facts["largest_identical"] == 501


def test_two_vectors_with_one_hash_are_told_apart():
    from geofm.curation.duplicates import collapse_vectors

    stored = np.array([[1, 2], [3, 4], [1, 2], [3, 4]], dtype=np.float16)
    same = collapse_vectors(stored, np.zeros(4, dtype=np.uint64))
    assert same.tolist() == [0, 1, 0, 1]


@pytest.mark.usefixtures("cells")
def test_a_search_that_misses_pairs_is_refused(store, catalogue, monkeypatch):
    monkeypatch.setattr(frame, "DEVIATIONS", 1e-4)
    with pytest.raises(audit.MissedPairs, match="duplicate pairs that the search had missed"):
        search(store, catalogue, names(3000), clusters(3000))


def test_float32_and_bfloat16_decide_alike(monkeypatch):
    from geofm.curation import products
    from geofm.curation.duplicates import find_edges
    from geofm.curation.space import make_space

    space = make_space(clusters(1500))
    results = []
    for precision in (products.FLOAT32, products.BFLOAT16):
        monkeypatch.setattr(join, "best_precision", lambda p=precision: p)
        results.append(find_edges(space, 0.95))
    assert len(results[0]) > 100
    for name in ("left", "right", "similarity"):
        assert np.array_equal(getattr(results[0], name), getattr(results[1], name))


def test_rows_that_are_not_compared_are_in_no_pair(store, catalogue, monkeypatch):
    vectors, ids = clusters(300), names(300)
    monkeypatch.setattr(buckets, "joined_rows", lambda job: np.arange(0, 300, 2))
    made, artifact = search(store, catalogue, ids, vectors)
    assert found(artifact) == brute(vectors[::2], ids[::2], 0.95)
    assert made["buckets"].manifest.dropped["not_compared"] == 150
    assert isinstance(artifact.table("dense.parquet"), pd.DataFrame)
