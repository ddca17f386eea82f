"""The space in which chips are compared: centred embeddings, cosine similarity.

Pooled features of a convolutional encoder share a large common part, so that unrelated chips
have cosines near 0.9; subtracting the pool's mean removes it and spreads the similarities
(copy-detection work recommends the same, e.g. SSCD's descriptors). A fast float32 search only
proposes pairs here. What decides is ``Space.similarity``: float64, one pair at a time, so that it
depends on neither the batch nor the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.storage.process import cores
from geofm.runtime.native import faiss, torch
from geofm.types import Floats, Indices

# Unit vectors on a lattice: similarities that are whole numbers, whatever the order of the sums.
# A matrix product in floating point depends in its last bits on the library, the number of threads
# and the shape of the blocks, and a choice that follows such bits is not the same twice. Here each
# component of a unit vector is rounded to a whole multiple of 1/4000. A product of two such vectors
# is then a whole number, and all its partial sums stay below 2**24 (Cauchy-Schwarz, for up to
# 30,000 components), where float32 is exact: any BLAS gives the same bits. What rounding costs is
# about 1e-4 of similarity, which choosing a set does not notice; what *decides* about duplicates is
# ``Space.similarity``.

Lattice = NDArray[np.float32]

#: Lattice steps per unit of length, and the whole number that stands for a similarity of 1.
STEPS = 4000
ONE = STEPS * STEPS


def to_lattice(units: Floats) -> Lattice:
    """Vectors [n, d] of length 1 (or 0) in whole lattice steps."""
    return np.rint(units * STEPS).astype(np.float32)


def lattice(space: Space, rows: Indices) -> Lattice:
    """Some rows of a space on the lattice [len(rows), d]."""
    found = np.empty((len(rows), space.stored.shape[1]), dtype=np.float32)
    for part, vectors in lattice_blocks(space, rows):
        found[part] = vectors
    return found


def lattice_blocks(space: Space, rows: Indices) -> Iterator[tuple[slice, Lattice]]:
    """The same a few thousand rows at a time, each with the positions in ``rows`` it is of."""
    for first in range(0, len(rows), BLOCK):
        part = slice(first, first + BLOCK)
        yield part, to_lattice(space.exact(rows[part]))


#: Pools smaller than this are not centred: the mean of a few chips is mostly the chips themselves.
CENTRE_FROM = 32
#: Rows converted at once; pairs compared at once (what stays in a core's cache).
BLOCK, PAIRS = 8192, 128
#: Rows read at once from a file.
READ = 16_384
#: Part of such a block that is read as fast as single rows are.
SPARSE = 32
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
            last = min(first + BLOCK, len(self))
            found[first:last] = self.block(first, last)
        return found

    def block(self, first: int, last: int) -> NDArray[np.float32]:
        """Unit vectors of the rows ``first`` to ``last`` in float32, for searching."""
        return unit_rows(read_rows(self.stored, first, last), self.centre)

    def may_be(self, left: Indices, right: Indices, least: float) -> NDArray[np.bool_]:
        """Which pairs of rows can have a similarity of at least ``least``: in float32, fast."""
        ours, theirs = (unit_rows(self.stored[side], self.centre) for side in (left, right))
        return np.asarray(np.einsum("ij,ij->i", ours, theirs) >= least - MARGIN)

    def similarity(self, left: Indices, right: Indices) -> Floats:
        """Exact cosine similarity of pairs of rows, rounded to 12 decimals."""
        found = np.empty(len(left))
        for first in range(0, len(left), PAIRS):
            part = slice(first, first + PAIRS)
            # pairs often come grouped by their left row: convert each of those once
            rows, of = np.unique(left[part], return_inverse=True)
            found[part] = np.einsum("ij,ij->i", self.exact(rows)[of], self.exact(right[part]))
        return np.asarray(np.round(np.clip(found, -1.0, 1.0), DECIMALS), dtype=np.float64)


def unit_rows(stored: NDArray[np.float16], centre: Floats) -> NDArray[np.float32]:
    """Unit vectors of stored ones in float32, for searching; a zero vector stays zero.

    By torch, which converts from float16 several times as fast as numpy.
    """
    writable = stored if stored.flags.writeable else stored.copy()  # torch insists
    vectors = torch.from_numpy(writable).float()
    vectors -= torch.from_numpy(centre).float()
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    vectors /= torch.where(lengths > 0, lengths, torch.ones(()))
    return np.asarray(vectors.numpy(), dtype=np.float32)


def read_rows(stored: NDArray[np.float16], first: int, last: int) -> NDArray[np.float16]:
    """Rows ``first`` to ``last``; of a mapped file they are read, not mapped.

    Mapped pages count as memory of this process until something else needs it.
    """
    if isinstance(stored, np.memmap) and stored.filename is not None:
        return np.asarray(_read(stored, first, last), dtype=np.float16)
    return stored[first:last]


def _read(stored: np.memmap[Any, np.dtype[np.float16]], first: int, last: int) -> Any:
    """Rows of a mapped file, read from the file."""
    width = stored.shape[1]
    offset = stored.offset + first * width * stored.itemsize
    data = np.fromfile(str(stored.filename), stored.dtype, (last - first) * width, offset=offset)
    return data.reshape(last - first, width)


def _read_each(stored: np.memmap[Any, np.dtype[np.float16]], rows: Indices) -> Any:
    """Some rows of a mapped file, each read from the file."""
    size = stored.shape[1] * stored.itemsize
    with Path(str(stored.filename)).open("rb", buffering=0) as file:
        number = file.fileno()
        data = [os.pread(number, size, stored.offset + row * size) for row in rows.tolist()]
    return np.frombuffer(b"".join(data), stored.dtype).reshape(len(rows), -1)


def take_rows(stored: NDArray[np.float16], rows: Indices) -> NDArray[np.float16]:
    """Some rows (ascending); of a mapped file, its blocks that have any are read in turn.

    Of a block of which few are wanted these are read one by one.
    """
    if not isinstance(stored, np.memmap) or stored.filename is None:
        return stored[rows]
    found = np.empty((len(rows), stored.shape[1]), dtype=np.float16)
    begin_at = int(rows[0]) // READ * READ if len(rows) else 0
    for first in range(begin_at, int(rows[-1]) + 1 if len(rows) else 0, READ):
        last = min(first + READ, len(stored))
        begin, end = np.searchsorted(rows, [first, last])
        if begin == end:
            continue
        if end - begin < (last - first) // SPARSE:
            found[begin:end] = _read_each(stored, rows[begin:end])
        else:
            block = _read(stored, first, last)
            some = slice(None) if end - begin == last - first else rows[begin:end] - first
            found[begin:end] = block[some]
    return found


def make_space(stored: NDArray[np.float16], rows: Indices | None = None) -> Space:
    """The space of a pool, centred on its mean where the pool is large enough.

    Args:
        stored: embeddings [n, d].
        rows: those that are the pool, ascending; None for all.
    """
    centre = np.zeros(stored.shape[1])
    if rows is not None and len(rows) < len(stored):
        for first in range(0, len(rows), BLOCK) if len(rows) >= CENTRE_FROM else ():
            some = take_rows(stored, rows[first : first + BLOCK])
            centre += some.astype(np.float64).sum(axis=0)
        centre /= max(1, len(rows))
    elif len(stored) >= CENTRE_FROM:
        for first in range(0, len(stored), BLOCK):
            last = min(first + BLOCK, len(stored))
            centre += read_rows(stored, first, last).astype(np.float64).sum(axis=0)
        centre /= len(stored)
    return Space(stored, centre)


def use_threads() -> None:
    """Give the search the CPUs this process may use."""
    faiss.omp_set_num_threads(cores())


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
