"""A perceptual hash of thumbnails from which the hashes of all 8 orientations follow.

``hash_thumbnails`` computes hashes, ``match_hashes`` and ``near_by_hash`` find those that are near.

Source: pHash (Zauner 2010), with zero in place of the median. The bits are the signs of the 63
lowest frequencies of the discrete cosine transform (DCT-II). Mirroring a picture changes the sign
of the odd frequencies, and transposing it swaps the two axes. So the hashes of all flips and
quarter turns follow from one hash by an exclusive or and a permutation of its bits; no picture is
turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.dedup.edges import pair_codes
from geofm.types import Indices, Pairs

#: 64-bit perceptual hashes.
PixelHashes = NDArray[np.uint64]
#: Frequencies along each axis: 8 x 8, without the mean.
SIDE = 8
#: Number 4 * mirror + turns: the columns are reversed where ``mirror`` is 1, then the picture is
#: turned by ``turns`` times 90 degrees, as ``numpy.rot90`` does.
ORIENTATIONS = tuple(range(8))
#: Thumbnails that are hashed at once.
BLOCK = 256
#: Bits in which near hashes may differ.
BITS = 12


def orient(pictures: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Bring pictures, shape (..., height, width), into one of the 8 orientations."""
    mirrored = pictures[..., ::-1] if orientation >= 4 else pictures
    return np.rot90(mirrored, orientation % 4, axes=(-2, -1))


def hash_thumbnails(thumbnails: NDArray[np.uint8]) -> PixelHashes:
    """Compute hashes, shape (n,), of thumbnails, shape (n, edge, edge); 0 without any contrast."""
    edge = thumbnails.shape[-1]
    angles = np.pi * np.outer(np.arange(SIDE), np.arange(edge) + 0.5) / edge
    waves = np.cos(angles)
    hashes = np.zeros(len(thumbnails), dtype=np.uint64)
    for first in range(0, len(thumbnails), BLOCK):
        part = thumbnails[first : first + BLOCK].astype(np.float64)
        part -= part.mean(axis=(1, 2), keepdims=True)
        # rounded, so that no sign depends on the last bits of a sum
        coefficients = np.rint(waves @ part @ waves.T * 1e6)
        hashes[first : first + BLOCK] = _pack(coefficients.reshape(len(part), -1) > 0)
    return hashes


def hash_orientations(hashes: PixelHashes) -> PixelHashes:
    """Compute the hashes, shape (n, 8), of the pictures in each orientation."""
    bits = _unpack(hashes).reshape(-1, SIDE, SIDE)
    has_contrast = (hashes != 0)[:, None, None]
    odd = np.arange(SIDE) % 2 == 1
    oriented = []
    for orientation in ORIENTATIONS:
        turned = bits ^ (odd[None, None, :] & has_contrast) if orientation >= 4 else bits
        for _ in range(orientation % 4):  # a quarter turn transposes, then mirrors the rows
            turned = turned.transpose(0, 2, 1) ^ (odd[None, :, None] & has_contrast)
        flat = turned.reshape(len(bits), SIDE * SIDE).copy()
        flat[:, 0] = False
        oriented.append(_pack(flat))
    return np.stack(oriented, axis=1) if len(hashes) else np.empty((0, 8), np.uint64)


def canonical_hash(hashes: PixelHashes) -> PixelHashes:
    """Return the smallest hash of the 8 orientations: the same however a picture is turned."""
    return np.asarray(hash_orientations(hashes).min(axis=1, initial=np.iinfo(np.uint64).max))


def hamming_distance(left: PixelHashes, right: PixelHashes) -> NDArray[np.uint8]:
    """Count the bits in which hashes differ, elementwise."""
    return np.asarray(np.bitwise_count(left ^ right), dtype=np.uint8)


def _pack(bits: NDArray[np.bool_]) -> PixelHashes:
    """Convert bits, shape (n, 64), to numbers, shape (n,); the first bit is the highest."""
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def _unpack(hashes: PixelHashes) -> NDArray[np.bool_]:
    """Convert numbers, shape (n,), to bits, shape (n, 64)."""
    data = np.ascontiguousarray(hashes.astype(">u8")).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(data, axis=1).astype(np.bool_)


# Search for near hashes. Multi-index hashing (Norouzi et al. 2012): two hashes that differ in fewer
# bits than there are slices agree in at least one slice, so only chips that share a slice are
# compared. Slices are so long that a bucket stays small, which keeps the time near linear.

#: Largest number of chips of one slice that are all compared with each other. In a larger bucket a
#: chip is compared with its neighbours in the order of the hashes.
BUCKET = 64
#: Hashes whose slices are looked up at once.
QUERIES = 1 << 16
#: Shortest and longest slice in bits.
SLICE_BITS = (8, 21)


def near_by_hash(hashes: PixelHashes, bits: int = BITS) -> Pairs:
    """Find pairs of rows whose hashes differ in at most ``bits`` bits in some orientation.

    All pairs that differ in fewer bits than there are slices are found, and most of the others. A
    row with hash 0 (no contrast) is in no pair.
    """
    return unique_pairs(*match_hashes(hashes, hashes, bits, same_list=True), len(hashes))


def match_hashes(
    base: PixelHashes, queries: PixelHashes, bits: int = BITS, *, same_list: bool = False
) -> Pairs:
    """Find the near pairs between two lists of hashes.

    Args:
        base: hashes, shape (n,).
        queries: hashes, shape (m,); those of all orientations are looked up.
        bits: number of bits in which the hashes of a pair may differ.
        same_list: whether both lists are the same; then each pair is (higher row, lower row).

    Returns:
        Row of ``base`` and row of ``queries``, each of shape (pairs,); each pair once.
    """
    base_rows, query_rows = (np.flatnonzero(part != 0).astype(np.int64) for part in (base, queries))
    base, queries = base[base_rows], queries[query_rows]
    length = slice_bits(len(base))
    codes: list[Indices] = []
    for begin in range(0, 64 - length + 1, length):
        for query, row in _pairs_with_slice(base, queries, begin, length):
            wanted = query < row if same_list else np.ones(len(query), np.bool_)
            codes.append(_near_codes(base, queries, row[wanted], query[wanted], bits))
    pairs = np.unique(np.concatenate(codes)) if codes else base_rows[:0]
    count = max(len(queries), 1)
    return base_rows[pairs // count], query_rows[pairs % count]


def slice_bits(count: int) -> int:
    """Choose the length of a slice, so that a bucket holds about one of ``count`` hashes."""
    return int(np.clip(np.ceil(np.log2(max(count, 2))), *SLICE_BITS))


def _pairs_with_slice(
    base: PixelHashes, queries: PixelHashes, begin: int, length: int
) -> Iterator[Pairs]:
    """Yield pairs (query, row of base) that agree in the slice ``begin``, in some orientation."""
    shift, mask = np.uint64(begin), np.uint64((1 << length) - 1)
    keys = (base >> shift) & mask
    order = np.lexsort((base, keys)).astype(np.int64)
    sorted_keys, sorted_hashes = keys[order], base[order]
    for first in range(0, len(queries), QUERIES):
        oriented = hash_orientations(queries[first : first + QUERIES])
        slices = (oriented >> shift) & mask
        for orientation in ORIENTATIONS:
            wanted = slices[:, orientation]
            start = np.searchsorted(sorted_keys, wanted, "left")
            end = np.searchsorted(sorted_keys, wanted, "right")
            crowded = end - start > BUCKET
            if crowded.any():
                start[crowded], end[crowded] = _nearest_in_bucket(
                    sorted_hashes, oriented[crowded, orientation], start[crowded], end[crowded]
                )
            sizes = end - start
            query = first + np.repeat(np.arange(len(wanted)), sizes)
            offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield query, order[np.repeat(start, sizes) + offsets]


def _nearest_in_bucket(
    sorted_hashes: PixelHashes, hashes: PixelHashes, start: Indices, end: Indices
) -> Pairs:
    """Choose the ``BUCKET`` rows of each large bucket whose hashes are nearest in their order.

    Hashes are sorted within a bucket; the loop is a binary search in all buckets at once.
    """
    low, high = start.copy(), end.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        less = (low < high) & (sorted_hashes[np.minimum(middle, len(sorted_hashes) - 1)] < hashes)
        low, high = np.where(less, middle + 1, low), np.where(less, high, np.minimum(middle, high))
        high = np.maximum(high, low)
    begin = np.clip(low - BUCKET // 2, start, end - BUCKET)
    return begin, begin + BUCKET


def _near_codes(
    base: PixelHashes, queries: PixelHashes, row: Indices, query: Indices, bits: int
) -> Indices:
    """Return the codes ``row * len(queries) + query`` of pairs near in one of the orientations."""
    codes = [row[:0]]
    for first in range(0, len(query), QUERIES):
        a, b = query[first : first + QUERIES], row[first : first + QUERIES]
        unique, position = np.unique(a, return_inverse=True)
        oriented = hash_orientations(queries[unique])[position]
        near = hamming_distance(oriented, base[b][:, None]).min(axis=1) <= bits
        codes.append(b[near] * len(queries) + a[near])
    return np.unique(np.concatenate(codes))


def unique_pairs(left: Indices, right: Indices, rows: int) -> Pairs:
    """Sort pairs, each once and with the lower row left."""
    codes = np.unique(pair_codes(left, right, rows)[left != right])
    return codes // max(rows, 1), codes % max(rows, 1)
