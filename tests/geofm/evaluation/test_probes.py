"""Probes separate classes only if they differ, and intervals cover as often as stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geofm.evaluation.probes import bootstrap_interval, knn_predict, linear_probe, standardise

CLASSES = 4


def blobs(n: int, apart: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    centres = np.eye(CLASSES, 16) * apart
    rows = centres[labels] + rng.normal(size=(n, 16))
    return rows.astype(np.float32), labels.astype(np.int64)


def accuracies(apart: float) -> dict[str, NDArray[np.int64]]:
    rows, labels = blobs(600, apart, 3)
    train, test = slice(0, 360), slice(360, None)
    near = knn_predict(rows[train], labels[train], rows[test], 5)
    probe = linear_probe(rows[train], labels[train], rows[test], 0)
    truth = labels[test]
    return {
        "knn": (near == truth).astype(np.int64),
        "linear": (probe.predicted == truth).astype(np.int64),
    }


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_separable_features_are_separated(protocol: str) -> None:
    assert accuracies(apart=12.0)[protocol].mean() > 0.99


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_features_without_a_signal_are_at_chance(protocol: str) -> None:
    found = bootstrap_interval(accuracies(apart=0.0)[protocol], 1000, 0)
    assert found.low <= 1 / CLASSES <= found.high


def test_scale_and_offset_of_a_feature_change_nothing() -> None:
    rows, labels = blobs(200, 2.0, 1)
    moved = rows * np.linspace(0.01, 100, 16, dtype=np.float32) + 7
    plain = knn_predict(rows[:120], labels[:120], rows[120:], 5)
    assert (plain == knn_predict(moved[:120], labels[:120], moved[120:], 5)).mean() > 0.98


def test_a_constant_feature_is_ignored() -> None:
    rows, _ = blobs(40, 2.0, 1)
    rows[:, 3] = 5.0
    train, test = standardise(rows[:30], rows[30:])
    assert not train[:, 3].any()
    assert not test[:, 3].any()
    assert np.isfinite(train).all()


def test_knn_ties_go_to_the_more_similar_class() -> None:
    train = np.array([[2.0, 0.1], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.1]])
    labels = np.array([1, 0, 2, 3])
    assert knn_predict(train, labels, np.array([[1.5, 0.4]]), 2).tolist() == [1]


def test_more_neighbours_than_images_is_all_images() -> None:
    rows, labels = blobs(12, 9.0, 0)
    assert len(knn_predict(rows[:8], labels[:8], rows[8:], 50)) == 4


def test_a_class_with_one_image_still_trains() -> None:
    rows, labels = blobs(20, 9.0, 0)
    labels = labels % 3
    labels[0] = 3
    probe = linear_probe(rows[:12], labels[:12], rows[12:], 0)
    assert probe.c == 1e-2
    assert set(probe.predicted) <= {0, 1, 2, 3}


def test_the_probe_is_the_same_twice() -> None:
    rows, labels = blobs(200, 1.0, 5)
    first, second = (linear_probe(rows[:150], labels[:150], rows[150:], 1) for _ in range(2))
    assert first.predicted.tolist() == second.predicted.tolist()
    assert first.c == second.c


@given(n=st.integers(40, 2000), share=st.floats(0.2, 0.8))
@settings(max_examples=15, deadline=None)
def test_the_interval_agrees_with_the_normal_one(n: int, share: float) -> None:
    right = (np.arange(n) < round(share * n)).astype(np.int64)
    found = bootstrap_interval(right, 2000, 0)
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / n)
    assert found.value == right.mean()
    # a quantile of 2,000 resamples has an error, and shares are multiples of 1/n
    slack = 0.15 * half + 1 / n
    assert abs((found.high - found.low) / 2 - half) < slack


def test_the_same_seed_draws_the_same_resamples() -> None:
    a, b = np.array([1, 0, 1, 1, 0, 1]), np.array([0, 0, 1, 1, 0, 1])
    assert bootstrap_interval(a, 500, 7) == bootstrap_interval(a, 500, 7)
    both = bootstrap_interval(a - b, 500, 7)
    assert both.low <= both.value <= both.high
    assert both.value == pytest.approx(1 / 6)


def test_all_right_has_an_interval_without_width() -> None:
    found = bootstrap_interval(np.ones(50), 200, 0)
    assert (found.value, found.low, found.high, found.n) == (1.0, 1.0, 1.0, 50)
