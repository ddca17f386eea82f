from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from data_catalog.errors import UsageError
from geofm.selection import methods
from geofm.selection.methods import Candidates, Method, select
from geofm.selection.metrics import coverage
from geofm.selection.strata import quotas
from tests.geofm.dedup.pools import skewed_pool

METHODS = get_args(Method)


@pytest.mark.parametrize("method", METHODS)
def test_same_choice_for_any_input_order_and_number_of_threads(method, monkeypatch):
    monkeypatch.setattr(methods, "GROUP_ROWS", 128)  # several groups
    pool, modes = skewed_pool()
    strata = (modes % 3).astype(np.int64)
    with threadpool_limits(1):
        once = select(pool, method, 40, strata, seed=4)
    assert len(np.unique(once.rows)) == 40
    shuffle = np.random.default_rng(0).permutation(600)
    shuffled = Candidates(
        pool.space,
        pool.rows[shuffle],
        [pool.chip_ids[n] for n in shuffle],
        pool.entropy[shuffle],
        [pool.tiles[n] for n in shuffle],
    )
    again = select(shuffled, method, 40, strata[shuffle], seed=4)
    assert np.array_equal(again.rows, once.rows)
    assert np.array_equal(again.priority, once.priority[shuffle])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(count=st.integers(16, 599), min_share=st.floats(0, 1), equal=st.booleans())
def test_every_method_keeps_to_budget_and_quotas(method, count, min_share, equal):
    pool, modes = skewed_pool()
    choice = select(pool, method, count, modes, min_share=min_share, equal=equal)
    assert len(np.unique(choice.rows)) == count
    promised = min(count, max(16, int(min_share * count + 0.5)))
    sure = quotas(np.bincount(modes).tolist(), promised, equal)
    assert (np.bincount(modes[choice.rows], minlength=16) >= sure).all()


def test_facility_location_covers_best():
    pool, _ = skewed_pool()
    value = {
        method: coverage(pool.space, pool.rows, select(pool, method, 60, rarity=0).rows).mean()
        for method in METHODS
    }
    assert max(value, key=value.__getitem__) == "facility-location"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rare_modes_survive(seed):
    pool, modes = skewed_pool(seed)
    kept = select(pool, "facility-location", 30).rows
    assert set(range(12, 16)) <= set(modes[kept].tolist())
    usual = select(pool, "random", 30).rows
    assert not set(range(12, 16)) <= set(modes[usual].tolist())


def test_rarity_moves_budget_from_monotone_to_rare():
    pool, modes = skewed_pool()
    shares = [
        (modes[select(pool, "facility-location", 60, rarity=rarity).rows] < 2).mean()
        for rarity in (0.0, 1.0)
    ]
    assert shares[1] < shares[0]


def test_a_stratum_of_redundant_chips_does_not_vanish():
    pool, modes = skewed_pool()
    strata = (modes == 0).astype(np.int64)
    for min_share in (0.0, 0.5):
        kept = select(pool, "entropy", 20, strata, min_share=min_share).rows
        assert (modes[kept] == 0).sum() >= max(1, int(20 * min_share * 0.5))


def test_chance_depends_on_seed_and_id_alone():
    pool, _ = skewed_pool()
    half = replace(pool, rows=pool.rows[:300], chip_ids=pool.chip_ids[:300])
    everyone, some = select(pool, "random", 100), select(half, "random", 40)
    assert np.array_equal(everyone.priority[:300], some.priority)
    assert not np.array_equal(select(pool, "random", 100, seed=1).rows, everyone.rows)


def test_small_tiles_and_thin_places_are_likelier():
    pool, modes = skewed_pool()
    tiles = ["crowded" if mode < 2 else "quiet" for mode in modes]
    kept = [select(replace(pool, tiles=tiles), "per-tile", 60, seed=s).rows for s in range(5)]
    assert 0.3 < np.mean([(modes[rows] < 2).mean() for rows in kept]) < 0.7
    thin = [select(pool, "density", 60, seed=s, power=2).rows for s in range(5)]
    usual = [select(pool, "random", 60, seed=s).rows for s in range(5)]
    assert np.mean(modes[np.array(thin)] < 2) < np.mean(modes[np.array(usual)] < 2) - 0.2


def test_entropy_takes_the_highest():
    pool, _ = skewed_pool()
    kept = select(pool, "entropy", 50).rows
    assert pool.entropy[kept].min() >= np.sort(pool.entropy)[-50]


def test_a_method_without_its_input_says_what_it_needs():
    pool, _ = skewed_pool()
    with pytest.raises(UsageError, match=r"curate\.method entropy needs the entropy"):
        select(replace(pool, entropy=None), "entropy", 5)
    with pytest.raises(UsageError, match=r"curate\.method per-tile needs the tiles"):
        select(replace(pool, tiles=None), "per-tile", 5)
    with pytest.raises(UsageError, match=r"curate\.method is best: give one of facility"):
        select(pool, "best", 5)
