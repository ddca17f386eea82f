from __future__ import annotations

import numpy as np
import pytest

from geofm.selection import metrics
from geofm.selection.methods import select
from geofm.selection.metrics import compare_selections, coverage, gini, log_volume
from tests.geofm.dedup.pools import skewed_pool


def test_coverage_is_the_similarity_to_the_nearest_chosen():
    pool, _ = skewed_pool()
    chosen = np.array([3, 77, 500])
    best = coverage(pool.space, pool.rows, chosen)
    exact = np.max([pool.space.similarity(np.full(600, c), pool.rows) for c in chosen], axis=0)
    assert best == pytest.approx(exact, abs=5e-4)
    assert (best[chosen] == 1).all()


def test_gini():
    assert gini(np.array([3.0, 3, 3])) == 0
    assert gini(np.array([0.0, 0, 0, 4])) == pytest.approx(0.75)
    assert gini(np.zeros(3)) == 0


def test_volume_grows_with_spread():
    points = np.random.default_rng(0).normal(size=(200, 3))
    assert log_volume(points * 2) == pytest.approx(log_volume(points) + 3 * np.log(2), abs=1e-5)
    assert log_volume(points[:1]) is None


def test_compare_shows_a_choice_beside_others_of_the_same_size(monkeypatch):
    pool, modes = skewed_pool()
    moments = np.random.default_rng(1).normal(size=(600, 4)) * np.where(modes < 2, 0.1, 1)[:, None]
    kept = select(pool, "facility-location", 40, rarity=0).rows
    table = compare_selections(pool, kept, moments.tolist()).set_index("choice")
    assert table.index.tolist() == ["kept", "random", "balanced-kmeans"]
    assert (table["chips"] == 40).all()
    value = table["facility_location"]
    assert value["kept"] > value["balanced-kmeans"] > value["random"]
    assert (table["low"] == value).all()  # the whole pool was measured
    assert table.loc["kept", "cluster_gini"] < table.loc["random", "cluster_gini"]
    volume = table["spectral_log_volume"]
    assert volume["kept"] > volume["random"]

    monkeypatch.setattr(metrics, "MEASURED", 200)
    sampled = compare_selections(pool, kept, None, seed=5).set_index("choice")
    assert sampled.loc["kept", "measured_on"] == 200
    assert sampled.loc["kept", "low"] < value["kept"] < sampled.loc["kept", "high"]
    assert sampled["spectral_log_volume"].isna().all()


def test_bands_that_differ_have_no_common_volume():
    pool, _ = skewed_pool()
    moments = [[0.1, 0.2]] * 300 + [[0.1]] * 300
    table = compare_selections(pool, np.arange(10), moments, others=())
    assert table["spectral_log_volume"].isna().all()
