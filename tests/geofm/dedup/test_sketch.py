"""Products of sketches are never below those of the vectors, and few are far above."""

from __future__ import annotations

import faiss  # noqa: F401  before torch: both bring an OpenMP
import numpy as np
import pytest
import torch

from geofm.dedup.sketch import LEAST, LOST, WIDTH, find_axes, sketch


def units(seed: int, rows: int, width: int, rank: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = draw.normal(size=(rows, rank)) @ draw.normal(size=(rank, width))
    found[0] = 0
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def products(short: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(short).view(torch.bfloat16).double().numpy()
    return values @ values.T


@pytest.mark.parametrize("rank", [2, 63, 128, 256])
@pytest.mark.parametrize("learnt_from", [1, 50, 400])
def test_no_product_is_below_that_of_the_vectors(rank, learnt_from):
    vectors = units(rank, 400, 256, rank)
    short = sketch(vectors, find_axes(vectors[:learnt_from] - vectors.mean(axis=0)))
    assert short.shape == (400, WIDTH)
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    near = exact >= LEAST
    assert near.sum() >= 399
    assert (products(short) - exact)[near].min() > -LOST


def test_vectors_of_few_directions_lose_nothing():
    vectors = units(1, 300, 256, 40)[1:]
    short = sketch(vectors, find_axes(vectors))
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    assert np.abs(products(short) - exact).max() < LOST + 2.0**-6
