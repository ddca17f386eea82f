"""Products of blocks propose every pair, whatever their precision and shape."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geofm.dedup import matmul
from geofm.dedup.matmul import BFLOAT16, FLOAT32, as_factors, near_pairs
from geofm.runtime.threads import map_on_cores

EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "25"))


def units(seed: int, rows: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = draw.normal(size=(rows, width)) + draw.normal(size=width) * draw.uniform(0, 3)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(0, 90), st.integers(0, 700), st.sampled_from([2, 17, 64])),
    threshold=st.sampled_from([-0.5, 0.0, 0.3, 0.9, 0.999]),
    precision=st.sampled_from([FLOAT32, BFLOAT16]),
)
@example(seed=82, shape=(15, 78, 2), threshold=0.9, precision=BFLOAT16)
def test_no_pair_is_missed_and_none_is_far_below(seed, shape, threshold, precision):
    rows, columns, width = shape
    left, right = units(seed, rows, width), units(seed + 1, columns, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "TILE_ROWS", 64)
        patch.setattr(matmul, "TILE_COLUMNS", 512)
        i, j = near_pairs(
            as_factors(left, precision), as_factors(right, precision), threshold, precision
        )
    exact = left.astype(np.float64) @ right.astype(np.float64).T
    proposed = np.zeros(exact.shape, dtype=np.bool_)
    proposed[i, j] = True
    assert int(proposed.sum()) == len(i)
    assert proposed[exact >= threshold].all()
    assert (exact[i, j] >= threshold - 2.01 * precision.error).all()


def test_vectors_that_bfloat16_rounds_worst_are_near_themselves():
    vectors = np.full((2, 1017), 1017**-0.5, dtype=np.float32)  # 1.0034 * 2^-5 becomes 2^-5
    left, right = (as_factors(vectors, BFLOAT16) for _ in range(2))
    assert float(left[0].double() @ right[0].double()) < 0.9933
    i, j = near_pairs(left, right, 0.9999, BFLOAT16)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_upper_half_has_each_pair_once():
    factors = as_factors(units(1, 300, 16), FLOAT32)
    i, j = near_pairs(factors, factors, 0.5, FLOAT32, upper=True)
    whole = {(a, b) for a, b in zip(*near_pairs(factors, factors, 0.5, FLOAT32), strict=True)}
    assert {(a, b) for a, b in zip(i, j, strict=True)} == {(a, b) for a, b in whole if a < b}
    assert len(i) > 100


def test_too_many_proposals_end_early():
    factors = as_factors(np.ones((64, 1), dtype=np.float32), FLOAT32)
    with pytest.raises(matmul.TooManyProposals, match="more than 100"):
        near_pairs(factors, factors, 0.5, FLOAT32, most=100)


def test_results_come_in_order_and_errors_come_through():
    assert list(map_on_cores(lambda n: n * n, range(200))) == [n * n for n in range(200)]

    def fail(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        return number

    with pytest.raises(ValueError, match="five"):
        list(map_on_cores(fail, range(10)))
