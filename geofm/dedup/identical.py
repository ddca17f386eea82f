"""Identical chips: equal pixels and equal vectors are collapsed before any search.

Without this step, n copies of one chip would give a search n² / 2 pairs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.vectors import READ_ROWS, read_rows, take_rows
from geofm.runtime.threads import map_on_cores
from geofm.types import Indices

#: 64-bit hashes of the bytes of vectors.
VectorHashes = NDArray[np.uint64]
#: Rows that are hashed at once: they stay in the cache of a core.
HASHED_ROWS = 2048


def collapse_groups(groups: list[str], order: Indices) -> Indices:
    """Find the representative of each row: the first row of its group in an order.

    Args:
        groups: identity of the content of each row.
        order: all rows, best first.

    Returns:
        The representative of each row, shape (rows,); the row itself if it is its group's best.
    """
    first: dict[str, int] = {}
    for row in order:
        first.setdefault(groups[row], int(row))
    return np.array([first[group] for group in groups], dtype=np.int64)


def hash_vectors(stored: NDArray[np.float16]) -> VectorHashes:
    """Compute a 64-bit hash of the bytes of each vector, the same on every machine.

    The hash multiplies 64-bit words with fixed odd numbers and adds them modulo 2^64, between two
    steps that mix high bits into low ones.

    Args:
        stored: vectors, shape (n, d); may be mapped from a file.

    Returns:
        Hashes, shape (n,).
    """
    width = stored.shape[1]
    words = -(-width // 4)
    weights = np.random.Generator(np.random.PCG64(width)).integers(
        1, 2**63, words, dtype=np.uint64
    ) * np.uint64(2) + np.uint64(1)
    hashes = np.empty(len(stored), dtype=np.uint64)

    def hash_block(start: int) -> None:
        block = read_rows(stored, start, min(start + READ_ROWS, len(stored)))
        if width % 4:
            block = np.pad(block, ((0, 0), (0, -width % 4)))
        whole = np.ascontiguousarray(block).view(np.uint64)
        for first in range(0, len(whole), HASHED_ROWS):
            part = whole[first : first + HASHED_ROWS]
            mixed = part >> np.uint64(29)
            mixed ^= part
            value = np.einsum("ij,j->i", mixed, weights)  # modulo 2^64
            value = (value ^ (value >> np.uint64(32))) * weights[0]
            hashes[start + first : start + first + len(part)] = value ^ (value >> np.uint64(29))

    for _ in map_on_cores(hash_block, range(0, len(stored), READ_ROWS)):
        pass
    return hashes


def collapse_vectors(stored: NDArray[np.float16], hashes: VectorHashes) -> Indices:
    """Find the first row that has the same bytes as each row.

    Args:
        stored: vectors, shape (n, d).
        hashes: their hashes, shape (n,) (``hash_vectors``).

    Returns:
        Rows, shape (n,). Vectors with equal hashes and different bytes are kept apart.
    """
    representative = _first_with_hash(hashes)
    copies = np.flatnonzero(representative != np.arange(len(stored)))
    by_content: dict[tuple[int, bytes], int] = {}
    for start in range(0, len(copies), READ_ROWS):
        rows = copies[start : start + READ_ROWS]
        own, other = take_rows(stored, rows), stored[representative[rows]]
        differ = (own.view(np.uint16) != other.view(np.uint16)).any(axis=1)
        for row in rows[differ]:
            content = int(hashes[row]), stored[row].tobytes()
            representative[row] = by_content.setdefault(content, int(row))
    return representative


def _first_with_hash(hashes: VectorHashes) -> Indices:
    """Find the first row with the same hash as each row."""
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
    return first
