"""All pairs of chips that are as similar as the threshold, found and decided exactly.

Identical pixels, and identical vectors, are collapsed before any search: both would make it return
a square number of pairs. Small pools are searched whole, large ones by cells (``frame.py``); every
pair is decided in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.dedup.edges import Edges
from geofm.dedup.join import MOST_EDGES, TooManyPairs, join_cells, too_many
from geofm.dedup.matmul import on_every_core
from geofm.dedup.partition import Cells, Frame, assign, train_frame
from geofm.embeddings.vectors import READ, Space, read_rows, take_rows
from geofm.types import Indices

__all__ = ["Edges", "TooManyPairs", "collapse_identical", "find_edges"]

Hashes = NDArray[np.uint64]
#: Rows hashed at once: they stay in a core's cache.
HASHED = 2048


@dataclass(frozen=True)
class Pairs:
    """The searched pairs of a pool: edges; and the cells whose pairs are not written down."""

    edges: Edges
    dense: list[int]
    frame: Frame
    cells: Cells


def collapse_identical(groups: list[str], order: Indices) -> Indices:
    """The representative of each row: the first, in ``order``, of the rows of its group.

    Args:
        groups: the identity of each row's content.
        order: rows, best first.

    Returns:
        For each row, the row that stands for it (itself if it is the best of its group).
    """
    first: dict[str, int] = {}
    for row in order:
        first.setdefault(groups[row], int(row))
    return np.array([first[group] for group in groups], dtype=np.int64)


def hash_rows(stored: NDArray[np.float16]) -> Hashes:
    """A 64-bit hash of the bytes of each row, the same on every machine."""
    width = stored.shape[1]
    words = -(-width // 4)
    weights = np.random.Generator(np.random.PCG64(width)).integers(
        1, 2**63, words, dtype=np.uint64
    ) * np.uint64(2) + np.uint64(1)
    found = np.empty(len(stored), dtype=np.uint64)

    def work(start: int) -> None:
        block = read_rows(stored, start, min(start + READ, len(stored)))
        if width % 4:
            block = np.pad(block, ((0, 0), (0, -width % 4)))
        whole = np.ascontiguousarray(block).view(np.uint64)
        for first in range(0, len(whole), HASHED):
            some = whole[first : first + HASHED]
            mixed = some >> np.uint64(29)
            mixed ^= some
            value = np.einsum("ij,j->i", mixed, weights)  # modulo 2^64
            value = (value ^ (value >> np.uint64(32))) * weights[0]
            found[start + first : start + first + len(some)] = value ^ (value >> np.uint64(29))

    for _ in on_every_core(work, range(0, len(stored), READ)):
        pass
    return found


def slots(hashes: Hashes, size: int) -> Indices:
    """Where hashes belong in a table of ``size`` (a power of 2), by their first bits."""
    return (hashes >> np.uint64(65 - size.bit_length())).astype(np.int64)


def table_of(hashes: Hashes) -> tuple[NDArray[np.int32], Indices]:
    """A table with one row of each slot that has any, and each row's slot."""
    table = np.zeros(2 ** (len(hashes).bit_length() + 2), dtype=np.int32)
    slot = slots(hashes, len(table))
    table[slot] = np.arange(len(slot), dtype=np.int32)
    return table, slot


def collapse_vectors(stored: NDArray[np.float16], hashes: Hashes) -> Indices:
    """For each row, the first row whose vector has the same bytes; in linear time."""
    return tell_apart(stored, hashes, first_alike(hashes))


def first_alike(hashes: Hashes) -> Indices:
    """For each row, the first row with the same hash."""
    stands_for = np.arange(len(hashes))
    table, slot = table_of(hashes)
    shared = table[slot] != stands_for
    shared[table[slot[shared]]] = True
    some = np.flatnonzero(shared)  # most are alone in their slot
    if not len(some):
        return stands_for
    order = some[np.argsort(hashes[some])]
    begins = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
    first = np.minimum.reduceat(order, begins)
    stands_for[order] = np.repeat(first, np.diff(begins, append=len(order)))
    return stands_for


def tell_apart(stored: NDArray[np.float16], hashes: Hashes, stands_for: Indices) -> Indices:
    """Take back, in place, where different vectors share a hash: their bytes tell."""
    copies = np.flatnonzero(stands_for != np.arange(len(stored)))
    known: dict[tuple[int, bytes], int] = {}
    for start in range(0, len(copies), READ):
        rows = copies[start : start + READ]
        ours, theirs = take_rows(stored, rows), stored[stands_for[rows]]
        differ = (ours.view(np.uint16) != theirs.view(np.uint16)).any(axis=1)
        for row in rows[differ]:
            key = int(hashes[row]), stored[row].tobytes()
            stands_for[row] = known.setdefault(key, int(row))
    return stands_for


def find_pairs(
    space: Space,
    threshold: float,
    frame: Frame | None = None,
    seed: int = 0,
    pool: Indices | None = None,
) -> Pairs:
    """All searched pairs of distinct vectors, in this process.

    Args:
        space: where vectors are compared.
        threshold: least similarity of a pair.
        frame: of an earlier pool; None to train one.
        seed: of the training.
        pool: the rows that are searched, ascending; None for all.
    """
    frame = train_frame(space, threshold, seed, pool) if frame is None else frame
    mask = None if pool is None else np.isin(np.arange(len(space)), pool)
    cells = assign(frame, space, 0, len(space), mask)
    found = join_cells(space, frame, cells, range(frame.count), threshold)
    return Pairs(found.edges, found.dense, frame, cells)


def find_edges(space: Space, threshold: float, most: int = MOST_EDGES) -> Edges:
    """Every pair of rows whose exact similarity is at least ``threshold``.

    Raises:
        TooManyPairs: beyond ``most`` pairs.
    """
    found = find_pairs(space, threshold)
    if found.dense or len(found.edges) > most:
        raise too_many(threshold, most)
    return found.edges
