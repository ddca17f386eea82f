"""Sketches propose every pair: their products are never below those of the vectors."""

from __future__ import annotations

import numpy as np
import pytest

from geofm.dedup.incremental import WIDTH, join_new_rows, sketch_pool, sketch_units
from geofm.dedup.matmul import FLOAT32
from geofm.dedup.partition import Partition, assign_cells
from geofm.embeddings.vectors import FLOAT32_ERROR, EmbeddingSpace
from geofm.runtime.native import torch


def units(seed: int, rows: int, width: int, rank: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = draw.normal(size=(rows, rank)) @ draw.normal(size=(rank, width))
    found[0] = 0
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def pool(vectors: np.ndarray, cells: int) -> tuple[EmbeddingSpace, Partition, np.ndarray]:
    """A space, and a partition whose centroids are some of its vectors."""
    space = EmbeddingSpace(vectors.astype(np.float16), np.zeros(vectors.shape[1]))
    partition = Partition(space.centre, vectors[1 : 1 + cells].copy(), margin=0.1)
    return space, partition, assign_cells(partition, space, 0, len(space)).home


@pytest.mark.parametrize("rank", [2, 63, 128, 256])
@pytest.mark.parametrize("cells", [2, 50, 300])
def test_no_product_is_below_that_of_the_vectors(rank, cells, monkeypatch):
    monkeypatch.setattr("geofm.dedup.incremental.best_precision", lambda: FLOAT32)
    space, partition, home = pool(units(rank, 400, 256, rank), cells)
    sketches = sketch_pool(space, partition, home).double().numpy()
    assert sketches.shape == (400, WIDTH)
    vectors = space.exact_units(np.arange(400))
    difference = sketches @ sketches.T - vectors @ vectors.T
    assert difference.min() > -FLOAT32_ERROR


def test_vectors_of_few_directions_lose_nothing(monkeypatch):
    monkeypatch.setattr("geofm.dedup.incremental.best_precision", lambda: FLOAT32)
    space, partition, home = pool(units(1, 300, 256, 40), 2)
    sketches = sketch_pool(space, partition, home).double().numpy()
    vectors = space.exact_units(np.arange(300))
    difference = sketches @ sketches.T - vectors @ vectors.T
    assert np.abs(difference[1:, 1:]).max() < 2.0**-6


def test_short_vectors_are_compared_as_they_are():
    space, partition, home = pool(units(2, 50, 32, 32), 4)
    assert sketch_pool(space, partition, home).shape == (50, 32)


def test_a_sketch_has_the_length_of_its_vector():
    axes = np.zeros((WIDTH, 200), dtype=np.float32)
    axes[:-1, :63] = np.eye(63)
    sketches = sketch_units(units(3, 40, 200, 200), torch.from_numpy(axes))
    assert np.abs(np.linalg.norm(sketches[1:], axis=1) - 1).max() < 1e-4


def test_no_new_row_has_no_new_pair():
    space, partition, _ = pool(units(4, 60, 16, 16), 4)
    cells = assign_cells(partition, space, 0, len(space))
    edges = join_new_rows(space, partition, cells, np.empty(0, np.int64), 0.9)
    assert edges is not None
    assert len(edges) == 0
