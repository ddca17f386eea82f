"""The stages buckets and pairs: cells against brute force, parts, kills, order, certificate."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from data_catalog.catalogue import open_catalogue
from data_catalog.run import make_job, plan_parts, run_stage, seal, with_previous, work_parts
from data_catalog.store import open_store
from geofm.config.recipe import CurateSettings
from geofm.dedup import buckets, incremental, join, pairs, partition
from geofm.dedup.edges import sort_edges
from geofm.dedup.identical import collapse_vectors
from geofm.dedup.leader import choose_leaders
from geofm.dedup.matmul import BFLOAT16, FLOAT32
from geofm.embeddings.vectors import EmbeddingSpace
from tests.geofm.dedup.synthetic import make_calibration, make_embeddings, make_pool

SETTINGS = CurateSettings(threshold=0.95)


@pytest.fixture
def cells(monkeypatch):
    """Pools of a few thousand are searched by cells, in several ranges and parts."""
    monkeypatch.setattr(partition, "EXHAUSTIVE_UP_TO", 100)
    monkeypatch.setattr(buckets, "PART_ROWS", 700)
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


def search(store, catalogue, ids, vectors, settings=SETTINGS, calibrated=None):
    embeddings = make_embeddings(store, ids, vectors)
    made = {
        "embeddings": embeddings,
        "pool": make_pool(store, ids),
        "calibration": make_calibration(store, calibrated),
    }
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
    assert facts["margin"] < facts["complete_margin"]
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
    vectors, ids = clusters(2000), names(2000)
    _, artifact = search(store, catalogue, ids, vectors)
    other = open_store(tmp_path / "other")
    embeddings = make_embeddings(other, ids, vectors)
    inputs = {
        "embeddings": embeddings,
        "pool": make_pool(other, ids),
        "calibration": make_calibration(other),
    }
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
    stored = np.array([[1, 2], [3, 4], [1, 2], [3, 4]], dtype=np.float16)
    same = collapse_vectors(stored, np.zeros(4, dtype=np.uint64))
    assert same.tolist() == [0, 1, 0, 1]


def test_float32_and_bfloat16_decide_alike(monkeypatch):
    from geofm.embeddings.vectors import make_space
    from tests.geofm.dedup.search import find_edges

    space = make_space(clusters(1500))
    results = []
    for precision in (FLOAT32, BFLOAT16):
        monkeypatch.setattr(join, "best_precision", lambda p=precision: p)
        results.append(find_edges(space, 0.95))
    assert len(results[0]) > 100
    for name in ("left", "right", "similarity"):
        assert np.array_equal(getattr(results[0], name), getattr(results[1], name))


def test_rows_that_are_not_compared_are_in_no_pair(store, catalogue, monkeypatch):
    vectors, ids = clusters(300), names(300)
    monkeypatch.setattr(buckets, "searched_rows", lambda job: np.arange(0, 300, 2))
    made, artifact = search(store, catalogue, ids, vectors)
    assert found(artifact) == brute(vectors[::2], ids[::2], 0.95)
    assert made["buckets"].manifest.dropped["not_compared"] == 150
    assert isinstance(artifact.table("dense.parquet"), pd.DataFrame)


def _refresh(store, catalogue, ids, vectors, keep, new):
    """The pairs of a pool that lost some rows and got others, after those of the first pool."""
    now = np.concatenate([vectors[keep], new])
    names_now = [ids[row] for row in keep] + [f"new{row:05d}" for row in range(len(new))]
    made, artifact = search(store, catalogue, names_now, now)
    return names_now, now, made, artifact


@pytest.mark.usefixtures("cells")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("width", "precision"),  # the longer vectors are searched by sketches
    [(32, None), (160, None), (160, FLOAT32), (160, BFLOAT16)],
)
def test_new_and_withdrawn_chips_give_the_pairs_of_a_full_search(
    store, catalogue, tmp_path, monkeypatch, shuffled, width, precision
):
    if precision is not None:
        monkeypatch.setattr(incremental, "best_precision", lambda: precision)
    vectors, ids = clusters(3000, width=width), names(3000)
    first, _ = search(store, catalogue, ids, vectors)
    draw = np.random.default_rng(5)
    keep = draw.permutation(3000)[:2900] if shuffled else np.arange(100, 3000)
    new = vectors[keep[:150]].astype(np.float32) + draw.normal(0, 0.15, (150, width))
    new = np.concatenate([new.astype(np.float16), clusters(100, seed=9, width=width)])
    _, now, made, artifact = _refresh(store, catalogue, ids, vectors, keep, new)
    facts = made["buckets"].manifest.facts
    assert facts["frame_from"] == first["buckets"].digest
    job = with_previous(pairs.STAGE, make_job(pairs.STAGE, store, made, SETTINGS), catalogue)
    assert pairs.known_rows(job) is not None

    # the same over the same frame, everything searched
    full_store = open_store(tmp_path / "full")
    full = seal_without_previous(full_store, made)
    assert artifact.manifest.facts["certificate"] == full.manifest.facts["certificate"]
    assert len(artifact.table("pairs.parquet")) > 500
    assert found(artifact) == found(full)
    assert artifact.digest == full.digest
    # and the cells that were carried over are those that a full assignment gives
    partition_now = buckets.read_partition(made["buckets"])
    again = partition.assign_cells(
        partition_now, EmbeddingSpace(now, partition_now.centre), 0, len(now)
    )
    carried = buckets.read_cells(made["buckets"])
    assert np.array_equal(carried.home, again.home)
    assert np.array_equal(carried.row, again.row)
    assert np.array_equal(carried.begin, again.begin)


@pytest.mark.usefixtures("cells")
@pytest.mark.parametrize(
    ("before", "now", "carried"),
    [(0.94, 0.95, True), (0.95, 0.94, True), (0.95, 0.92, False), (0.88, 0.95, False)],
)
def test_a_calibrated_threshold_may_change_a_little_from_night_to_night(
    store, catalogue, tmp_path, before, now, carried
):
    settings = CurateSettings()
    vectors, ids = clusters(3000), names(3000)
    first, _ = search(store, catalogue, ids[:2900], vectors[:2900], settings, {"c": before})
    made, artifact = search(store, catalogue, ids, vectors, settings, {"c": now})
    facts = made["buckets"].manifest.facts
    assert facts["frame_from"] == (first["buckets"].digest if carried else "trained")
    lowest = round((before if carried else now) - buckets.SLACK, 3)
    assert facts["frame_threshold"] == artifact.manifest.facts["searched_from"] == lowest
    assert facts["threshold"] == artifact.manifest.facts["threshold"] == now
    full = seal_without_previous(open_store(tmp_path / "full"), made, settings)
    assert artifact.digest == full.digest
    assert found(artifact) == {
        tuple(sorted((ids[a], ids[b]))) for a, b in brute_rows(made, vectors, now)
    }
    # another calibration of the same pool: row numbers are those of the newest artifact
    if carried:
        made, artifact = search(store, catalogue, ids, vectors, settings, {"c": now + 0.01})
        assert found(artifact) == {
            tuple(sorted((ids[a], ids[b]))) for a, b in brute_rows(made, vectors, now + 0.01)
        }
        assert made["buckets"].manifest.facts["margin_widened_for"] == 0
    # a later night still stands on the first partition
    third, _ = search(store, catalogue, ids[50:], vectors[50:], settings, {"c": now + 0.005})
    assert third["buckets"].manifest.facts["frame_threshold"] == lowest


def brute_rows(made, vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    """All pairs of rows at or above a threshold, compared in the centre of the partition."""
    space = EmbeddingSpace(vectors, buckets.read_partition(made["buckets"]).centre)
    units = space.exact_units(np.arange(len(vectors)))
    low, high = np.nonzero(np.triu(units @ units.T >= threshold, 1))
    return set(zip(low.tolist(), high.tolist(), strict=True))


def seal_without_previous(store, made, settings=SETTINGS):
    """The stage pairs, in an empty store, on the same inputs."""
    job = make_job(pairs.STAGE, store, made, settings)
    parts = plan_parts(pairs.STAGE, job)
    assert len(parts) > 1
    work_parts(pairs.STAGE, job, parts)
    return seal(pairs.STAGE, job, parts)[0]


def test_small_pools_do_not_inherit_their_frame(store, catalogue):
    vectors, ids = clusters(400), names(400)
    search(store, catalogue, ids, vectors)
    _, _, made, artifact = _refresh(store, catalogue, ids, vectors, np.arange(390), vectors[:0])
    assert made["buckets"].manifest.facts["frame_from"] == "trained"
    assert found(artifact) == brute(vectors[:390], ids[:390], 0.95)


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from data_catalog.artifact import Artifact
from data_catalog.run import make_job, plan_parts, work_parts
from data_catalog.stage import Part
from data_catalog.store import Store
from geofm.dedup import pairs, partition
from geofm.config.recipe import CurateSettings
partition.EXHAUSTIVE_UP_TO, pairs.PART_ROWS = 100, 700
store = Store(sys.argv[1])
inputs = {"embeddings": Artifact(sys.argv[2]), "buckets": Artifact(sys.argv[3])}
job = make_job(pairs.STAGE, store, inputs, CurateSettings(threshold=0.95))
for number, part in enumerate(plan_parts(pairs.STAGE, job)):
    if number == 2:
        print("two parts are done", flush=True)
        time.sleep(60)
    work_parts(pairs.STAGE, job, [part])
"""


@pytest.mark.long
@pytest.mark.usefixtures("cells")
def test_a_killed_search_goes_on_and_ends_the_same(store, catalogue, tmp_path):
    vectors, ids = clusters(2000), names(2000)
    _, clean = search(store, catalogue, ids, vectors)
    other = open_store(tmp_path / "killed")
    made = {
        "embeddings": make_embeddings(other, ids, vectors),
        "pool": make_pool(other, ids),
        "calibration": make_calibration(other),
    }
    made["buckets"] = run_stage(
        buckets.STAGE,
        other,
        open_catalogue(f"sqlite:///{tmp_path}/killed.db", other),
        made,
        SETTINGS,
    )
    command = [sys.executable, "-c", CHILD, other.url, made["embeddings"].url, made["buckets"].url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "two parts are done\n"
        child.send_signal(signal.SIGKILL)
    job = make_job(pairs.STAGE, other, made, SETTINGS)
    parts = plan_parts(pairs.STAGE, job)
    assert [other.has_part(part.key) for part in parts[:3]] == [True, True, False]
    assert work_parts(pairs.STAGE, job, parts) == len(parts) - 2
    artifact, _ = seal(pairs.STAGE, job, parts)
    assert artifact.digest == clean.digest
    edges = [leaders_of(done, ids) for done in (artifact, clean)]
    assert edges[0] == edges[1]


def leaders_of(artifact, ids: list[str]) -> list[bool]:
    """The leader rule on the pairs of an artifact, chips by id."""
    table = artifact.table("pairs.parquet")
    row = {chip: number for number, chip in enumerate(sorted(ids))}
    left, right = (table[side].map(row).to_numpy(np.int64) for side in ("left", "right"))
    edges = sort_edges(left, right, table["similarity"].to_numpy())
    kept: list[bool] = choose_leaders(np.arange(len(ids)), edges).kept.tolist()
    return kept
