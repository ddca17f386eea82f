"""The space in which chips are compared: centred embeddings, cosine similarity.

Pooled features of a convolutional encoder share a large common part, so that unrelated chips
have cosines near 0.9; subtracting the pool's mean removes it and spreads the similarities
(copy-detection work recommends the same, e.g. SSCD's descriptors). A fast float32 search only
proposes pairs here. What decides is ``Space.similarity``: float64, one pair at a time, so that it
depends on neither the batch nor the number of threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Pools smaller than this are not centred: the mean of a few chips is mostly the chips themselves.
CENTRE_FROM = 32
#: Rows converted at once; pairs compared at once (what stays in a core's cache).
BLOCK, PAIRS = 8192, 128
#: Decimals to which a similarity is exact.
DECIMALS = 12
#: How far a float32 similarity of unit vectors may be from the exact one (d <= 8192), with room.
MARGIN = 1e-4


@dataclass(frozen=True)
class Space:
    """Embeddings [n, d] as stored (float16), and what is subtracted from each (float64 [d])."""

    stored: NDArray[np.float16]
    centre: Floats

    def __len__(self) -> int:
        return len(self.stored)

    def exact(self, rows: Indices) -> Floats:
        """Unit vectors of some rows, float64 [len(rows), d]; a zero vector stays zero."""
        vectors = self.stored[rows].astype(np.float64) - self.centre
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0)[:, None])

    @cached_property
    def units(self) -> NDArray[np.float32]:
        """All unit vectors in float32, for searching."""
        found = np.empty(self.stored.shape, dtype=np.float32)
        for first in range(0, len(self), BLOCK):
            rows = np.arange(first, min(first + BLOCK, len(self)))
            found[rows] = self.exact(rows)
        return found

    def similarity(self, left: Indices, right: Indices) -> Floats:
        """Exact cosine similarity of pairs of rows, rounded to 12 decimals."""
        found = np.empty(len(left))
        for first in range(0, len(left), PAIRS):
            part = slice(first, first + PAIRS)
            # pairs often come grouped by their left row: convert each of those once
            rows, of = np.unique(left[part], return_inverse=True)
            found[part] = np.einsum("ij,ij->i", self.exact(rows)[of], self.exact(right[part]))
        return np.asarray(np.round(np.clip(found, -1.0, 1.0), DECIMALS), dtype=np.float64)


def make_space(stored: NDArray[np.float16]) -> Space:
    """The space of a pool, centred on its mean where the pool is large enough."""
    centre = np.zeros(stored.shape[1])
    if len(stored) >= CENTRE_FROM:
        for first in range(0, len(stored), BLOCK):
            centre += stored[first : first + BLOCK].astype(np.float64).sum(axis=0)
        centre /= len(stored)
    return Space(stored, centre)


def use_threads() -> None:
    """Give the search the CPUs this process may use."""
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))


def nearest(
    space: Space, queries: Indices, base: Indices, count: int, slack: int = 8
) -> tuple[Indices, Floats]:
    """The ``count`` rows of ``base`` most similar to each query, itself excluded.

    Ties go to the lower row. Float32 finds ``slack`` more than asked for, and the exact
    similarities choose among them.

    Returns:
        Rows [queries, k] and exact similarities [queries, k], best first, with
        k = min(count, len(base)); a row of -1 (similarity -1) fills up where there is none.
    """
    use_threads()
    width = min(count, len(base))
    rows = np.full((len(queries), width), -1, dtype=np.int64)
    best = np.full((len(queries), width), -1.0)
    index = faiss.IndexFlatIP(space.stored.shape[1])
    index.add(space.units[base])
    wanted = min(count + 1 + slack, len(base))
    for first in range(0, len(queries), 1024):
        asked = queries[first : first + 1024]
        _, found = index.search(space.units[asked], wanted)
        near = base[found]
        pairs = space.similarity(np.repeat(asked, wanted), near.ravel()).reshape(near.shape)
        itself = near == asked[:, None]
        pairs[itself] = -np.inf
        order = np.lexsort((near, -pairs))[:, :width]
        rows[first : first + 1024] = np.take_along_axis(near, order, axis=1)
        best[first : first + 1024] = np.take_along_axis(pairs, order, axis=1)
    nothing = np.isneginf(best)
    rows[nothing], best[nothing] = -1, -1.0
    return rows, best
