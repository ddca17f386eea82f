from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_catalog.errors import UsageError
from geofm.curation.selection import (
    budget_count,
    coverage,
    facility_location,
    ground_region,
    make_strata,
    quotas,
    random_choice,
    stratified,
)
from geofm.curation.space import make_space


@pytest.mark.parametrize(
    ("budget", "pool", "count"),
    [(None, 10, 10), (1.0, 10, 10), (0.5, 10, 5), (0.001, 10, 1), (3, 10, 3), (10, 10, 10)],
)
def test_budget(budget, pool, count):
    assert budget_count(budget, pool) == count


def test_budget_of_nothing_is_nothing():
    assert budget_count(5, 0) == 0


def test_budget_beyond_the_pool_names_field_pool_and_remedy():
    with pytest.raises(UsageError, match=r"curate\.budget asks for 11 .* pool has 10 .* at most"):
        budget_count(11, 10)
    with pytest.raises(UsageError, match=r"curate\.budget is 2\.5.*whole number"):
        budget_count(2.5, 10)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), data=st.data())
def test_quotas_are_proportional_with_a_floor(sizes, data):
    budget = data.draw(st.integers(len(sizes), sum(sizes)))
    given_ = quotas(sizes, budget)
    assert sum(given_) == budget
    assert all(1 <= g <= s for g, s in zip(given_, sizes, strict=True))
    exact = [budget * s / sum(sizes) for s in sizes]
    # beyond the floor nobody has a whole chip more than their share
    assert all(g <= max(1, e + 1) for g, e in zip(given_, exact, strict=True))


def _pool(rows: int = 300) -> np.ndarray:
    draw = np.random.default_rng(2)
    sizes = np.array([150, 100, 40, 10])
    centres = draw.normal(size=(4, 24)) * 2
    which = np.repeat(np.arange(4), sizes)[:rows]
    return (centres[which] + draw.normal(0, 0.6, (rows, 24))).astype(np.float16)


def _greedy(similarity: np.ndarray, count: int) -> list[int]:
    """Plain greedy on a dense matrix of whole millionths."""
    worth = np.rint(np.maximum(similarity, 0) * 1e6).astype(np.int64)
    reached = np.zeros(len(worth), dtype=np.int64)
    chosen: list[int] = []
    for _ in range(count):
        gains = np.maximum(worth - reached, 0).sum(axis=1)
        gains[chosen] = -1
        chosen.append(int(np.argmax(gains)))
        reached = np.maximum(reached, worth[chosen[-1]])
    return chosen


def test_lazy_greedy_on_a_full_graph_is_greedy():
    space = make_space(_pool())
    rows = np.arange(len(space))
    similarity = np.array([space.similarity(np.full(len(rows), r), rows) for r in rows])
    assert facility_location(space, rows, 12, 299).tolist() == _greedy(similarity, 12)


def test_facility_location_beats_random_and_finds_the_rare_mode():
    space = make_space(_pool())
    rows = np.arange(len(space))
    chosen = np.sort(facility_location(space, rows, 8, 64))
    ids = [f"{row:03d}" for row in rows]
    random = [
        coverage(space, rows, np.sort(random_choice(ids, rows, 8, seed))).mean()
        for seed in range(5)
    ]
    assert coverage(space, rows, chosen).mean() > max(random)
    assert (chosen >= 290).any()  # the mode with 10 of 300 chips


def test_strata_have_quotas_and_fall_back_when_too_many():
    space = make_space(_pool())
    rows = np.arange(len(space))
    strata = ["north" if row < 270 else "south" for row in rows]
    chosen = stratified(space, rows, strata, 10, 16)
    assert len(chosen) == len(set(chosen.tolist())) == 10
    assert (chosen >= 270).sum() == 1
    assert make_strata(["a", "a", "b"], ["x", "y", "x"], 3) == ["a x", "a y", "b x"]
    assert make_strata(["a", "a", "b"], ["x", "y", "x"], 2) == ["a", "a", "b"]
    assert make_strata(["a", "a", "b"], ["x", "y", "x"], 1) == ["", "", ""]


def test_regions_are_squares_of_the_chips_own_crs():
    near = ground_region("EPSG:32631", [10, 0, 510_000, 0, -10, 5_020_000])
    assert near == ground_region("EPSG:32631", [10, 0, 590_000, 0, -10, 5_090_000])
    assert near != ground_region("EPSG:32631", [10, 0, 610_000, 0, -10, 5_020_000])
    assert near != ground_region("EPSG:32632", [10, 0, 510_000, 0, -10, 5_020_000])
    assert ground_region("EPSG:4326", [1e-4, 0, -0.5, 0, -1e-4, 45.2]) == "EPSG:4326 -1 45"


def test_random_choice_depends_on_seed_and_ids_alone():
    ids = [f"{n:02d}" for n in range(40)]
    rows = np.arange(40)
    assert set(random_choice(ids, rows, 9, 1)) == set(random_choice(ids, rows[::-1], 9, 1))
    assert set(random_choice(ids, rows, 9, 1)) != set(random_choice(ids, rows, 9, 2))
