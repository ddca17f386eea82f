from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from geofm.embeddings.vectors import make_space
from geofm.selection import rarity
from geofm.selection.rarity import affinity, soft_scores, spectral_rarity
from tests.geofm.dedup.pools import skewed_pool


def test_rare_chips_are_novel_and_monotone_ones_dense():
    pool, modes = skewed_pool()
    moments = np.random.default_rng(0).normal(size=(600, 6)).tolist()
    scores = soft_scores(pool.space, pool.rows, moments)
    assert list(scores) == ["novelty", "density", "spectral_rarity"]
    assert scores["novelty"].between(0, 1).all()
    rare, monotone = scores[modes >= 12], scores[modes < 2]
    assert rare["novelty"].min() > monotone["novelty"].max()
    assert rare["density"].max() < 1 < monotone["density"].median() + 1e-9
    # the definition, by hand, for one chip
    others = np.delete(pool.rows, 7)
    exact = np.sort(pool.space.similarity(np.full(599, 7), others))[-16]
    assert scores["novelty"][7] == pytest.approx(1 - exact, abs=5e-4)


def test_spectral_rarity_is_the_distance_to_the_sixteenth_nearest():
    draw = np.random.default_rng(1)
    moments = draw.normal(0.3, 0.02, (400, 3))
    moments[5] = [0.9, 0.1, 0.5]
    found = spectral_rarity(moments.tolist())
    assert found.argmax() == 5
    scores = np.clip((moments - moments.mean(axis=0)) / moments.std(axis=0), -8, 8)
    by_hand = np.sort(np.linalg.norm(scores - scores[9], axis=1))[16]
    assert found[9] == pytest.approx(by_hand, abs=0.06)


def test_sensors_are_compared_among_themselves():
    draw = np.random.default_rng(2)
    one, other = draw.normal(size=(50, 3)).tolist(), draw.normal(9, 1, (40, 2)).tolist()
    both = spectral_rarity(one + other)
    assert both[:50].tolist() == spectral_rarity(one).tolist()
    assert both[50:].tolist() == spectral_rarity(other).tolist()
    assert spectral_rarity([[1.0]]).tolist() == [0.0]
    assert spectral_rarity([]).tolist() == []


def test_scores_do_not_depend_on_threads_and_a_sample_stands_for_the_pool(monkeypatch):
    moments = np.random.default_rng(3).normal(size=(500, 8)).tolist()
    with threadpool_limits(1):
        once = spectral_rarity(moments)
    assert np.array_equal(spectral_rarity(moments), once)
    monkeypatch.setattr(rarity, "COMPARED_WITH", 100)
    assert np.corrcoef(spectral_rarity(moments), once)[0, 1] > 0.8


def test_affinity_is_the_mean_similarity_to_the_targets():
    draw = np.random.default_rng(4)
    space = make_space(draw.normal(size=(60, 8)).astype(np.float16))
    found = affinity(space, np.arange(60), space.stored[:3].astype(np.float32))
    rows = np.arange(60)
    by_hand = np.mean([space.similarity(np.full(60, t), rows) for t in range(3)], axis=0)
    assert found == pytest.approx(by_hand, abs=1e-9)
    scores = soft_scores(space, rows, [[0.0]] * 60, targets=space.stored[:3])
    assert scores["affinity"].to_numpy() == pytest.approx(by_hand, abs=1e-6)
