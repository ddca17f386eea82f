"""Nodes and evidence of a pool: the leader rule on them is that of brute force on all chips."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_catalog.run import run_stage
from data_catalog.tables import write_table
from geofm.config.recipe import CurateSettings
from geofm.dedup import buckets, join, pairs, partition
from geofm.dedup.edges import concat_edges
from geofm.dedup.leader import choose_leaders, total_order
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.pool.pool import Pool
from geofm.selection.curate import build_graph
from tests.geofm.dedup.search import find_edges
from tests.geofm.dedup.synthetic import make_calibration, make_embeddings, make_pool, publish
from tests.geofm.dedup.test_pairs import clusters, names

SETTINGS = CurateSettings(threshold=0.95)


def no_lookalikes(store):
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        table = pd.DataFrame({"left": [], "right": [], "similarity": np.empty(0)})
        write_table(table, out / "alike.parquet")
        return publish(store, "alike", "alike", out, {}, 0)


@pytest.mark.parametrize("dense", [False, True])
def test_leaders_of_the_graph_are_those_of_brute_force(store, catalogue, monkeypatch, dense):
    """With equal vectors, and with a sea in which all is near all."""
    monkeypatch.setattr(partition, "EXHAUSTIVE_UP_TO", 100)
    draw = np.random.default_rng(3)
    sea = draw.normal(size=32) * 2 + draw.normal(0, 0.3, (400, 32))
    vectors = np.concatenate([clusters(1200), sea.astype(np.float16)])
    vectors[50:60] = vectors[300]
    vectors[1300:1320] = vectors[1250]
    ids = names(len(vectors))
    if dense:
        monkeypatch.setattr(join, "DENSE_PAIRS", 2000)
        monkeypatch.setattr(join, "DENSE_PER_ROW", 2)
    made = {
        "embeddings": make_embeddings(store, ids, vectors),
        "pool": make_pool(store, ids),
        "calibration": make_calibration(store),
        "alike": no_lookalikes(store),
    }
    for stage in (buckets.STAGE, pairs.STAGE):
        made[stage.kind] = run_stage(stage, store, catalogue, made, SETTINGS)
    assert (made["pairs"].manifest.facts["dense_cells"] > 0) == dense

    quality = np.round(draw.random(len(ids)), 2)
    table = pd.DataFrame({"chip_id": ids, "quality": quality, "rule": "", "witness_id": ""})
    pool = Pool(table.sort_values("chip_id", ignore_index=True))
    graph = build_graph(made, pool, np.full(len(ids), 0.95))
    assert (graph.dense_search is not None) == dense
    edges = concat_edges([evidence.edges for evidence in graph.evidence])
    leaders = choose_leaders(graph.order, edges, graph.dense_search, graph.dense_nodes)
    kept = {pool.ids[row] for row in graph.nodes[leaders.kept]}

    order = total_order(quality, ids)
    if dense:  # brute force writes all pairs down
        monkeypatch.setattr(join, "DENSE_PAIRS", 10**9)
    space = EmbeddingSpace(vectors, np.load(made["buckets"].local("centre.npy")))
    monkeypatch.setattr(partition, "EXHAUSTIVE_UP_TO", 10_000)
    expected = choose_leaders(order, find_edges(space, 0.95))
    assert 300 < expected.kept.sum() < 1400
    assert kept == {ids[row] for row in np.flatnonzero(expected.kept)}
    similar = dict(zip(ids, expected.similarity, strict=True))
    nodes = [pool.ids[row] for row in graph.nodes]
    mine = np.array([similar[chip_id] for chip_id in nodes])
    assert np.array_equal(leaders.similarity, mine, equal_nan=True)


def test_a_pair_needs_the_larger_of_two_thresholds(store, catalogue):
    vectors, ids = clusters(300), names(300)
    made = {
        "embeddings": make_embeddings(store, ids, vectors),
        "pool": make_pool(store, ids),
        "calibration": make_calibration(store),
        "alike": no_lookalikes(store),
    }
    for stage in (buckets.STAGE, pairs.STAGE):
        made[stage.kind] = run_stage(stage, store, catalogue, made, SETTINGS)
    table = pd.DataFrame({"chip_id": sorted(ids), "quality": 1.0, "rule": "", "witness_id": ""})
    least = np.where(np.arange(300) % 2, 0.95, 0.995)
    found = build_graph(made, Pool(table), least).evidence[0].edges
    whole = build_graph(made, Pool(table), np.full(300, 0.95)).evidence[0].edges
    needs = np.maximum(least[whole.left], least[whole.right])
    assert len(found) == (whole.similarity >= needs).sum()
    assert 0 < len(found) < len(whole)
