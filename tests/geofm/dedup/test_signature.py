from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from geofm.dedup.perceptual_hash import ORIENTATIONS, orient
from geofm.dedup.signature import (
    LENGTH,
    TURNS,
    WIDTH,
    best_agreeing,
    signatures,
)
from tests.geofm.dedup.search import near_signatures

EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "25"))
EDGE = 64


def ground(seed: int) -> np.ndarray:
    """Bytes with structure of several sizes, shape (128, 128)."""
    white = np.random.default_rng(seed).normal(size=(128, 128))
    total = sum(width * gaussian_filter(white, width) for width in (1.0, 2.0, 4.0, 8.0))
    return 128 + 30 * total / total.std()


def view(picture: np.ndarray, top: int = 32, left: int = 32) -> np.ndarray:
    part = picture[top : top + EDGE, left : left + EDGE]
    return np.clip(np.rint(part), 0, 255).astype(np.uint8)


def of_views(*views: np.ndarray) -> np.ndarray:
    return signatures(np.stack(views), np.ones(len(views), np.float32))


def product(left: np.ndarray, right: np.ndarray) -> float:
    """Return the largest product over the orientations, as a share of that of equal views."""
    return max(float(left[turn].astype(int) @ right.astype(int)) for turn in TURNS) / LENGTH**2


@given(st.integers(0, 10_000), st.sampled_from(ORIENTATIONS), st.integers(-9, 9),
       st.integers(-9, 9), st.floats(0.6, 1.3))  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_shifted_and_turned_view_of_other_brightness_agrees(seed, which, down, right, gain):
    picture = ground(seed)
    moved = view(128 + (picture - 128) * gain, 32 + down, 32 + right)
    first, second = of_views(view(picture), np.ascontiguousarray(orient(moved, which)))
    assert len(near_signatures(first[None], second[None])[0]) == 1


def test_unrelated_views_do_not_agree():
    found = of_views(*(view(ground(seed)) for seed in range(60)))
    left, right = near_signatures(found, found)
    assert (left == right).sum() == 60
    assert len(left) <= 60 + 2 * 35  # of 1,770 pairs, 2 %


@pytest.mark.parametrize("which", ORIENTATIONS)
def test_turning_permutes_a_signature(which):
    picture = view(ground(3))
    first, turned = of_views(picture, np.ascontiguousarray(orient(picture, which)))
    assert product(first, turned) > 0.95


def test_a_view_without_contrast_agrees_with_nothing():
    flat = np.full((2, EDGE, EDGE), 7, np.uint8)
    found = signatures(flat, np.array([1.0, 0.0], np.float32))
    assert found.shape == (2, WIDTH)
    assert not found.any()
    assert not len(near_signatures(found, found)[0])


def test_products_are_exact_and_do_not_depend_on_the_batch():
    found = of_views(*(view(ground(seed)) for seed in range(8)))
    alone = np.concatenate([of_views(view(ground(seed))) for seed in range(8)])
    assert (found == alone).all()
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    assert lengths.max() ** 2 < 2**24
    assert np.abs(lengths - LENGTH).max() < LENGTH / 50


def test_no_chips():
    nothing = signatures(np.empty((0, EDGE, EDGE), np.uint8), np.empty(0, np.float32))
    assert nothing.shape == (0, WIDTH)
    assert not len(near_signatures(nothing, nothing)[0])


def test_the_best_agree_first_and_equal_ones_by_rank():
    picture, other = view(ground(1)), view(ground(2))
    near = [view(ground(1), 32 + n, 32) for n in range(4)]
    left, right = of_views(picture, other), of_views(*near, other, picture)
    nothing = np.zeros((2, 6), np.bool_)
    rank = np.array([3, 1, 2, 0, 5, 4])
    i, j = best_agreeing(left, right, nothing, rank, 3)
    # positions 0 and 5 are the picture itself: the one of lower rank comes first
    assert list(zip(i, j, strict=True))[:2] == [(0, 0), (0, 5)]
    assert (np.bincount(i) <= 3).all()
    without = nothing.copy()
    without[0, 0] = True
    i, j = best_agreeing(left, right, without, rank, 1)
    assert list(zip(i, j, strict=True)) == [(0, 5), (1, 4)]
