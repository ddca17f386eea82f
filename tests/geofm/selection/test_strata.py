from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_catalog.errors import UsageError
from geofm.selection.strata import (
    budget_count,
    count_survivors,
    divide_into_strata,
    ground_region,
    meteorological_season,
    quotas,
    take_best,
)


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


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), data=st.data())
def test_equal_quotas_differ_only_where_a_stratum_is_used_up(sizes, data):
    budget = data.draw(st.integers(len(sizes), sum(sizes)))
    given_ = quotas(sizes, budget, equal=True)
    assert sum(given_) == budget
    assert all(1 <= g <= s for g, s in zip(given_, sizes, strict=True))
    unfilled = [g for g, s in zip(given_, sizes, strict=True) if g < s]
    assert all(g >= max(given_) - 1 for g in unfilled)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), equal=st.booleans(), min_share=st.floats(0, 1))
def test_take_keeps_the_budget_and_what_strata_are_sure_of(data, equal, min_share):
    strata = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=40)))
    _, strata = np.unique(strata, return_inverse=True)
    sizes = np.bincount(strata)
    count = data.draw(st.integers(len(sizes), len(strata)))
    levels = st.lists(st.integers(0, 6), min_size=len(strata), max_size=len(strata))
    priority = np.array(data.draw(levels), dtype=np.float64)
    chosen = take_best(priority, strata, count, min_share, equal)
    assert len(np.unique(chosen)) == len(chosen) == count
    counts = np.bincount(strata[chosen], minlength=len(sizes))
    promised = min(count, max(len(sizes), int(min_share * count + 0.5)))
    sure = quotas(sizes.tolist(), promised, equal)
    assert (counts >= sure).all()
    left = np.setdiff1d(np.arange(len(strata)), chosen)
    for stratum in range(len(sizes)):  # nobody stays behind one of the stratum that is worse
        mine = chosen[strata[chosen] == stratum]
        behind = left[strata[left] == stratum]
        if len(behind):
            assert priority[mine].min() >= priority[behind].max()


def test_the_rest_of_the_budget_goes_to_the_best():
    strata = np.array([0, 0, 0, 0, 1, 1])
    priority = np.array([1.0, 2, 3, 4, 9, 8])
    assert take_best(priority, strata, 3, 0.0, False).tolist() == [3, 4, 5]
    assert take_best(priority, strata, 3, 1.0, False).tolist() == [2, 3, 4]
    assert take_best(priority, np.zeros(6, np.int64), 3, 0.0, False).tolist() == [3, 4, 5]


def test_columns_are_left_out_from_the_end_when_strata_are_too_many():
    columns = {"collection": ["a", "a", "b"], "region": ["x", "y", "x"]}
    codes, used = divide_into_strata(columns, 3)
    assert codes.tolist() == [0, 1, 2] and used == ("collection", "region")
    codes, used = divide_into_strata(columns, 2)
    assert codes.tolist() == [0, 0, 1] and used == ("collection",)
    codes, used = divide_into_strata(columns, 1)
    assert codes.tolist() == [0, 0, 0] and used == ()


def test_regions_are_squares_of_the_chips_own_crs():
    near = ground_region("EPSG:32631", [10, 0, 510_000, 0, -10, 5_020_000])
    assert near == ground_region("EPSG:32631", [10, 0, 590_000, 0, -10, 5_090_000])
    assert near != ground_region("EPSG:32631", [10, 0, 610_000, 0, -10, 5_020_000])
    assert near != ground_region("EPSG:32632", [10, 0, 510_000, 0, -10, 5_020_000])
    assert ground_region("EPSG:4326", [1e-4, 0, -0.5, 0, -1e-4, 45.2]) == "EPSG:4326 -1 45"


def test_seasons_are_months():
    times = [f"2024-{month:02d}-15T10:00:00Z" for month in (12, 2, 3, 8, 11)]
    seasons = [meteorological_season(time) for time in times]
    assert seasons == ["DJF", "DJF", "MAM", "JJA", "SON"]
    assert meteorological_season("") == meteorological_season(None) == ""


def test_survival_shows_the_bias_of_a_filter():
    passed = np.array([True, True, True, False, False, True])
    kept = np.array([True, False, True, False, False, False])
    table = count_survivors(
        {"region": ["n", "n", "n", "s", "s", "s"], "season": ["DJF"] * 6},
        {"passed": passed, "kept": kept},
    )
    assert table["stratum"].tolist() == ["n", "s", "DJF"]
    assert table["candidates"].tolist() == [3, 3, 6]
    assert table["passed"].tolist() == [3, 1, 4]
    assert table["kept"].tolist() == [2, 0, 2]
    assert table["representation"].tolist() == [2.0, 0.0, 1.0]
