from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.raster.resample import axis_weights, binomial_downsample, resample

METHODS = ["nearest", "bilinear", "cubic", "average"]


def whole(source: np.ndarray, ratio: float, count: int, method: str) -> np.ndarray:
    n = source.shape[0]
    t = axis_weights(0, count, ratio, 0.0, n, method)
    low, high = t.span
    part = source[low:high, low:high]
    return resample(part, np.ones_like(part, bool), t, t)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.5, 1 / 3, 2.0, 1.5])
def test_a_constant_stays_constant(method: str, ratio: float) -> None:
    out = whole(np.full((30, 30), 7.0), ratio, int(30 / ratio), method)
    assert np.allclose(out, 7)


def test_nearest_and_average_by_hand() -> None:
    source = np.arange(16, dtype=float).reshape(4, 4)
    assert np.array_equal(whole(source, 0.5, 8, "nearest"), source.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(whole(source, 2, 2, "average"), [[2.5, 4.5], [10.5, 12.5]])


def test_bilinear_keeps_a_ramp() -> None:
    ramp = np.tile(np.arange(20.0), (20, 1))
    out = whole(ramp, 0.5, 40, "bilinear")
    assert np.allclose(out[:, 1:-1], (np.arange(40)[1:-1] + 0.5) / 2 - 0.5)


@given(
    st.integers(0, 60), st.integers(1, 20), st.sampled_from(METHODS),
    st.sampled_from([0.5, 1 / 3, 1.5, 2.0, 0.6667]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_window_has_the_same_bytes_as_the_whole(
    start: int, count: int, method: str, ratio: float
) -> None:
    source = np.random.default_rng(0).integers(0, 9999, (200, 200)).astype(float)
    good = np.random.default_rng(1).random((200, 200)) > 0.1
    all_rows = axis_weights(0, 90, ratio, 0.25, 200, method)
    some = axis_weights(start, count, ratio, 0.25, 200, method)
    low, high = all_rows.span
    whole_scene, valid = resample(
        source[low:high, low:high], good[low:high, low:high], all_rows, all_rows
    )
    low, high = some.span
    part, ok = resample(source[low:high, low:high], good[low:high, low:high], some, some)
    span = slice(start, start + count)
    assert np.array_equal(part, whole_scene[span, span])
    assert np.array_equal(ok, valid[span, span])


def test_pixels_without_data_do_not_spread() -> None:
    source, good = np.full((8, 8), 100.0), np.ones((8, 8), bool)
    source[:, :4], good[:, :4] = 0, False
    t = axis_weights(0, 16, 0.5, 0.0, 8, "bilinear")
    out, valid = resample(source, good, t, t)
    assert np.array_equal(np.unique(out[valid]), [100])
    assert not valid[:, :7].any()
    assert valid[:, 9:].all()
    outside = axis_weights(0, 4, 1.0, 6.0, 8, "nearest")
    assert list(outside.inside) == [True, True, False, False]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_halving_sums_four_neighbours_and_three_at_the_rim(axis: int, dtype: type) -> None:
    values = np.random.default_rng(3).integers(0, 4000, (6, 8, 10)).astype(dtype)
    padded = np.zeros([n + 2 * (k == axis) for k, n in enumerate(values.shape)], np.int64)
    padded[tuple(slice(1, -1) if k == axis else slice(None) for k in range(3))] = values
    taken = [
        np.take(padded, range(k, 2 * (values.shape[axis] // 2) + k, 2), axis) for k in range(4)
    ]
    expected = taken[0] + 3 * taken[1] + 3 * taken[2] + taken[3]
    sums = binomial_downsample(values, axis)
    assert sums.dtype == dtype
    assert np.array_equal(sums, expected)
    assert np.array_equal(binomial_downsample(values, axis, np.uint32), expected)
