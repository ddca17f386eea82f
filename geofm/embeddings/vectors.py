"""The space in which chips are compared: centred embeddings and their cosine similarity.

Pooled features of a convolutional encoder share a large common part, so unrelated chips have
cosines near 0.9. Subtracting the mean of the pool removes that part and spreads the similarities
(the same is recommended for copy detection; SSCD, Pizzi et al. 2022).

Three precisions serve three purposes:

- ``EmbeddingSpace.similarity`` decides about duplicates: float64, one pair at a time, so that the
  value depends neither on the batch nor on the number of threads.
- ``EmbeddingSpace.unit_block`` proposes pairs: float32, fast, with a known bound on the error.
- ``quantize`` serves clustering and selection: products that are whole numbers, so that every
  machine computes the same sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.storage.process import cores
from geofm.runtime.native import faiss, torch
from geofm.runtime.threads import is_core_thread, map_on_cores
from geofm.types import Floats, Floats32, Indices

#: Pools smaller than this are not centred: the mean of a few chips is mostly the chips themselves.
CENTRE_FROM = 32
#: Rows that are converted at once, and pairs that are compared at once (they stay in the cache).
BLOCK, PAIRS = 8192, 128
#: Pairs whose rows are converted together, each once.
SHARED_PAIRS = 2048
#: Rows that are read at once from a file.
READ_ROWS = 16_384
#: Part of such a block below which reading single rows is faster than reading the block.
SPARSE = 32
#: Decimals to which a similarity is exact.
DECIMALS = 12
#: Bound on the error of a float32 similarity of unit vectors (d <= 8192), with room.
FLOAT32_ERROR = 1e-4
#: Queries that are searched at once by ``nearest_rows``.
QUERY_BLOCK = 1024

#: Unit vectors in whole steps of 1 / ``STEPS``, as float32.
Quantized = Floats32
#: Steps per unit of length, and the product that stands for a similarity of 1.
STEPS = 4000
QUANTIZED_ONE = STEPS * STEPS


@dataclass(frozen=True)
class EmbeddingSpace:
    """Embeddings of a pool and the centre that is subtracted from each.

    Attributes:
        stored: embeddings as stored, shape (n, d); may be mapped from a file.
        centre: float64, shape (d,).
    """

    stored: NDArray[np.float16]
    centre: Floats

    def __len__(self) -> int:
        return len(self.stored)

    def exact_units(self, rows: Indices) -> Floats:
        """Compute unit vectors of some rows in float64, shape (rows, d); zero vectors stay zero."""
        vectors = self.stored[rows].astype(np.float64) - self.centre
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0)[:, None])

    @cached_property
    def units(self) -> Floats32:
        """All unit vectors in float32, shape (n, d)."""
        units = np.empty(self.stored.shape, dtype=np.float32)
        for first in range(0, len(self), BLOCK):
            last = min(first + BLOCK, len(self))
            units[first:last] = self.unit_block(first, last)
        return units

    def unit_block(self, first: int, last: int) -> Floats32:
        """Compute unit vectors of the rows ``first`` to ``last`` in float32."""
        return unit_rows(read_rows(self.stored, first, last), self.centre)

    def can_reach(self, left: Indices, right: Indices, threshold: float) -> NDArray[np.bool_]:
        """Tell for pairs of rows, by float32, whether their similarity can reach a threshold."""
        similarity = _similarities(
            lambda rows: unit_rows(self.stored[rows], self.centre), left, right
        )
        return np.asarray(similarity >= threshold - FLOAT32_ERROR)

    def similarity(self, left: Indices, right: Indices) -> Floats:
        """Compute the cosine similarity of pairs of rows in float64, rounded to 12 decimals."""
        similarity = _similarities(self.exact_units, left, right)
        return np.asarray(np.round(np.clip(similarity, -1.0, 1.0), DECIMALS), dtype=np.float64)


def _similarities(
    units_of: Callable[[Indices], NDArray[Any]], left: Indices, right: Indices
) -> Floats:
    """Compute the products of pairs of unit vectors, one pair at a time.

    A row that is in many pairs of a block is converted once.

    Args:
        units_of: ``units_of(rows)`` computes the unit vectors of rows.
        left: rows, shape (pairs,).
        right: rows, shape (pairs,).
    """
    similarity = np.empty(len(left))
    for first in range(0, len(left), SHARED_PAIRS):
        both = np.concatenate([side[first : first + SHARED_PAIRS] for side in (left, right)])
        rows, position = np.unique(both, return_inverse=True)
        units, count = units_of(rows), len(both) // 2
        for begin in range(0, count, PAIRS):
            end = min(begin + PAIRS, count)
            a, b = units[position[begin:end]], units[position[count + begin : count + end]]
            similarity[first + begin : first + end] = np.einsum("ij,ij->i", a, b)
    return similarity


def make_space(stored: NDArray[np.float16], rows: Indices | None = None) -> EmbeddingSpace:
    """Make the space of a pool, centred on the pool's mean if the pool is large enough.

    Args:
        stored: embeddings, shape (n, d).
        rows: rows of the pool, ascending; None for all.
    """
    centre = np.zeros(stored.shape[1])
    if rows is not None and len(rows) < len(stored):
        for first in range(0, len(rows), BLOCK) if len(rows) >= CENTRE_FROM else ():
            part = take_rows(stored, rows[first : first + BLOCK])
            centre += part.astype(np.float64).sum(axis=0)
        centre /= max(1, len(rows))
    elif len(stored) >= CENTRE_FROM:
        for first in range(0, len(stored), BLOCK):
            last = min(first + BLOCK, len(stored))
            centre += read_rows(stored, first, last).astype(np.float64).sum(axis=0)
        centre /= len(stored)
    return EmbeddingSpace(stored, centre)


def unit_rows(stored: NDArray[np.float16], centre: Floats) -> Floats32:
    """Compute unit vectors in float32, shape (n, d); a zero vector stays zero.

    Torch converts from float16 several times as fast as numpy.
    """
    writable = stored if stored.flags.writeable else stored.copy()  # torch requires it
    vectors = torch.from_numpy(writable).float()
    vectors -= torch.from_numpy(centre).float()
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    vectors /= torch.where(lengths > 0, lengths, torch.ones(()))
    return np.asarray(vectors.numpy(), dtype=np.float32)


# Quantized unit vectors. The last bits of a floating-point matrix product depend on the library,
# the number of threads and the shape of the blocks, and a selection that follows these bits differs
# from machine to machine. Here each component of a unit vector is rounded to a multiple of 1/4000.
# The product of two such vectors is a whole number, and by Cauchy-Schwarz all partial sums stay
# below 2**24 (for up to 30,000 components), where float32 is exact: every BLAS gives the same bits.
# The rounding changes a similarity by about 1e-4. That does not matter for a selection; duplicates
# are decided by ``EmbeddingSpace.similarity``.


def quantize_units(units: Floats) -> Quantized:
    """Round vectors of length 1 (or 0), shape (n, d), to whole steps."""
    return np.rint(units * STEPS).astype(np.float32)


def quantize(space: EmbeddingSpace, rows: Indices) -> Quantized:
    """Compute the quantized unit vectors of some rows, shape (rows, d)."""
    vectors = np.empty((len(rows), space.stored.shape[1]), dtype=np.float32)
    for part, block in quantized_blocks(space, rows):
        vectors[part] = block
    return vectors


def quantized_blocks(space: EmbeddingSpace, rows: Indices) -> Iterator[tuple[slice, Quantized]]:
    """Yield the quantized vectors of ``BLOCK`` rows at a time, with their positions in ``rows``."""

    def quantize_part(first: int) -> tuple[slice, Quantized]:
        part = slice(first, first + BLOCK)
        return part, quantize_units(space.exact_units(rows[part]))

    yield from map_on_cores(quantize_part, range(0, len(rows), BLOCK), lookahead=1)


# Reading stored vectors. The pages of a mapped file count as memory of the process until another
# process needs the memory, so large scans read the file instead.


def read_rows(stored: NDArray[np.float16], first: int, last: int) -> NDArray[np.float16]:
    """Return the rows ``first`` to ``last``; those of a mapped file are read from the file."""
    if isinstance(stored, np.memmap) and stored.filename is not None:
        return np.asarray(_read_block(stored, first, last), dtype=np.float16)
    return stored[first:last]


def take_rows(stored: NDArray[np.float16], rows: Indices) -> NDArray[np.float16]:
    """Return some rows, given in ascending order.

    A mapped file is read block by block. If few rows of a block are wanted, they are read one by
    one.
    """
    if not isinstance(stored, np.memmap) or stored.filename is None:
        return stored[rows]
    taken = np.empty((len(rows), stored.shape[1]), dtype=np.float16)
    start = int(rows[0]) // READ_ROWS * READ_ROWS if len(rows) else 0
    for first in range(start, int(rows[-1]) + 1 if len(rows) else 0, READ_ROWS):
        last = min(first + READ_ROWS, len(stored))
        begin, end = np.searchsorted(rows, [first, last])
        if begin == end:
            continue
        if end - begin < (last - first) // SPARSE:
            taken[begin:end] = _read_single_rows(stored, rows[begin:end])
        else:
            block = _read_block(stored, first, last)
            whole = end - begin == last - first
            taken[begin:end] = block if whole else block[rows[begin:end] - first]
    return taken


def _read_block(stored: np.memmap[Any, np.dtype[np.float16]], first: int, last: int) -> Any:
    """Read consecutive rows of a mapped file."""
    width = stored.shape[1]
    offset = stored.offset + first * width * stored.itemsize
    data = np.fromfile(str(stored.filename), stored.dtype, (last - first) * width, offset=offset)
    return data.reshape(last - first, width)


def _read_single_rows(stored: np.memmap[Any, np.dtype[np.float16]], rows: Indices) -> Any:
    """Read rows of a mapped file one by one."""
    size = stored.shape[1] * stored.itemsize
    with Path(str(stored.filename)).open("rb", buffering=0) as file:
        number = file.fileno()
        data = [os.pread(number, size, stored.offset + row * size) for row in rows.tolist()]
    return np.frombuffer(b"".join(data), stored.dtype).reshape(len(rows), -1)


def use_all_cores() -> None:
    """Let faiss use all cores, unless each core has a thread of ``map_on_cores`` already."""
    faiss.omp_set_num_threads(1 if is_core_thread() else cores())


def nearest_rows(
    space: EmbeddingSpace, queries: Indices, base: Indices, count: int, slack: int = 8
) -> tuple[Indices, Floats]:
    """Find the rows of ``base`` most similar to each query, other than the query itself.

    A float32 search returns ``slack`` candidates more than requested; the exact similarities choose
    among them. Ties go to the lower row.

    Args:
        space: space of all rows.
        queries: rows, shape (q,).
        base: rows to choose from, shape (b,).
        count: number of rows per query.
        slack: number of additional candidates.

    Returns:
        Rows and exact similarities, each of shape (q, min(count, b)), best first. Where there is no
        other row, the row is -1 and the similarity -1.
    """
    use_all_cores()
    width = min(count, len(base))
    rows = np.full((len(queries), width), -1, dtype=np.int64)
    best = np.full((len(queries), width), -1.0)
    index = faiss.IndexFlatIP(space.stored.shape[1])
    index.add(space.units[base])
    candidates = min(count + 1 + slack, len(base))
    for first in range(0, len(queries), QUERY_BLOCK):
        part = queries[first : first + QUERY_BLOCK]
        _, position = index.search(space.units[part], candidates)
        near = base[position]
        similarity = space.similarity(np.repeat(part, candidates), near.ravel())
        similarity = similarity.reshape(near.shape)
        similarity[near == part[:, None]] = -np.inf
        order = np.lexsort((near, -similarity))[:, :width]
        rows[first : first + QUERY_BLOCK] = np.take_along_axis(near, order, axis=1)
        best[first : first + QUERY_BLOCK] = np.take_along_axis(similarity, order, axis=1)
    nothing = np.isneginf(best)
    rows[nothing], best[nothing] = -1, -1.0
    return rows, best
