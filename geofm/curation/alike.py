"""Near duplicates by what chips look like: candidates from hashes and embeddings, then a check.

A hash finds copies of the same view (haze, gain, half a pixel, turned, mirrored); an embedding's
nearest neighbours also find views that overlap. Neither decides: every candidate pair is aligned
and compared by its thumbnails (``likeness``). Where chips lie plays no part.

Multi-index hashing (Norouzi et al. 2012): two hashes that differ in fewer bits than there are
slices agree in at least one slice, so only chips that share a slice are compared. Slices are as
long as the pool needs for a bucket to stay small, which keeps the work near linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.curation.duplicates import Edges
from geofm.curation.hashing import Hashes, hamming, variants
from geofm.curation.likeness import Indices, compare
from geofm.curation.neighbours import neighbours
from geofm.curation.space import Space

#: Similarity from which two views are one (chosen on scenes other than those of the benchmark).
SAME_VIEW = 0.98
#: Least shared ground (intersection over union), and bits in which hashes of a pair may differ.
LEAST_IOU, BITS = 0.58, 12
#: Neighbours by embedding that each chip is compared with.
NEIGHBOURS = 32
#: Most chips of one slice that are all compared with each other; of more, neighbours in the order
#: of their hashes are.
BUCKET = 64
#: Hashes whose slices are looked up at once.
QUERIES = 1 << 16
KINDS = ("same view", "turned", "overlap")


@dataclass(frozen=True)
class Alike:
    """Pairs of rows ``left < right`` that show the same, sorted by (left, right).

    ``similarity`` 0..1, ``kind`` an index into ``KINDS``, ``orientation`` and ``shift`` [n, 2]
    (thumbnail pixels) of right to left, ``compared`` the number of candidate pairs.
    """

    left: Indices
    right: Indices
    similarity: NDArray[np.float64]
    kind: NDArray[np.int8]
    orientation: NDArray[np.int8]
    shift: NDArray[np.int16]
    compared: int

    def __len__(self) -> int:
        return len(self.left)

    def edges(self) -> Edges:
        """As the edges of the leader rule."""
        return Edges(self.left, self.right, self.similarity)


def find_alike(
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    near: tuple[Indices, Indices] | None = None,
    *,
    threshold: float = SAME_VIEW,
    least_iou: float = LEAST_IOU,
    bits: int = BITS,
) -> Alike:
    """Every candidate pair that shows the same view, turned or shifted or not.

    Args:
        descriptors: columns hash, thumbnail_low, thumbnail_high; constant chips among them match
            nothing.
        thumbnails: uint8 [n, 64, 64], row by row (may be a memory map).
        near: candidate pairs besides those of the hashes, e.g. ``near_by_embedding``.
        threshold: least similarity.
        least_iou: least share of common ground.
        bits: most bits in which hashes of candidates differ.
    """
    left, right = propose(descriptors, near, bits)
    return decide_alike(
        descriptors, thumbnails, left, right, threshold=threshold, least_iou=least_iou
    )


def propose(
    descriptors: pd.DataFrame, near: tuple[Indices, Indices] | None = None, bits: int = BITS
) -> tuple[Indices, Indices]:
    """Candidate pairs (lower row, higher row), sorted; arguments as ``find_alike``."""
    left, right = near_by_hash(descriptors["hash"].to_numpy(np.uint64), bits)
    if near is not None:
        left, right = np.concatenate([left, near[0]]), np.concatenate([right, near[1]])
    return _unique(left, right, len(descriptors))


def decide_alike(
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    left: Indices,
    right: Indices,
    *,
    threshold: float = SAME_VIEW,
    least_iou: float = LEAST_IOU,
) -> Alike:
    """Which of some candidate pairs show the same view; arguments as ``find_alike``."""
    low, high = (descriptors[f"thumbnail_{end}"].to_numpy(np.float32) for end in ("low", "high"))
    found: list[list[NDArray[Any]]] = []
    step = 1 << 14
    for first in range(0, max(len(left), 1), step):
        mine, other = left[first : first + step], right[first : first + step]
        like = compare(thumbnails, low, high, mine, other)
        same = (like.similarity >= threshold) & (like.iou >= least_iou)
        moved = np.abs(like.shift).max(axis=1) > 1
        kind = np.where(moved, 2, np.where(like.orientation > 0, 1, 0)).astype(np.int8)
        columns = (mine, other, like.similarity, kind, like.orientation, like.shift)
        found.append([column[same] for column in columns])
        tick("alike", min(first + step, len(left)), len(left))
    joined = [np.concatenate(column) for column in zip(*found, strict=True)]
    return Alike(
        joined[0], joined[1], joined[2], joined[3], joined[4], joined[5], compared=len(left)
    )


def near_by_hash(hashes: Hashes, bits: int = BITS) -> tuple[Indices, Indices]:
    """Pairs of rows whose hashes differ in at most ``bits`` bits in some orientation.

    All pairs that differ in fewer bits than there are slices, most of the others. Rows with hash
    0 (no contrast) are in no pair.
    """
    return _unique(*hash_matches(hashes, hashes, bits, itself=True), len(hashes))


def hash_matches(
    base: Hashes, queries: Hashes, bits: int = BITS, *, itself: bool = False
) -> tuple[Indices, Indices]:
    """The same between two lists: (row of ``base``, row of ``queries``), once each.

    With ``itself`` the two are one list, and pairs are (higher row, lower row).
    """
    rows, asking = (np.flatnonzero(some != 0).astype(np.int64) for some in (base, queries))
    some, asked = base[rows], queries[asking]
    length = slice_bits(len(rows))
    codes: list[Indices] = []
    for begin in range(0, 64 - length + 1, length):
        for query, given in _share_slice(some, asked, begin, length):
            keep = query < given if itself else np.ones(len(query), np.bool_)
            codes.append(_close(some, asked, given[keep], query[keep], bits))
    pairs = np.unique(np.concatenate(codes)) if codes else rows[:0]
    return rows[pairs // max(len(asked), 1)], asking[pairs % max(len(asked), 1)]


def slice_bits(count: int) -> int:
    """Length of a slice: a bucket holds about one hash; at least 8 bits, at most 21."""
    return int(np.clip(np.ceil(np.log2(max(count, 2))), 8, 21))


def _share_slice(
    base: Hashes, queries: Hashes, begin: int, length: int
) -> Iterator[tuple[Indices, Indices]]:
    """Pairs that agree in a slice: (query, in some orientation; row of base)."""
    shift, mask = np.uint64(begin), np.uint64((1 << length) - 1)
    keys = (base >> shift) & mask
    order = np.lexsort((base, keys)).astype(np.int64)
    sorted_keys, ordered = keys[order], base[order]
    for first in range(0, len(queries), QUERIES):
        views = variants(queries[first : first + QUERIES])
        slices = (views >> shift) & mask
        for which in range(8):
            wanted = slices[:, which]
            start = np.searchsorted(sorted_keys, wanted, "left")
            end = np.searchsorted(sorted_keys, wanted, "right")
            crowded = end - start > BUCKET
            if crowded.any():
                start[crowded], end[crowded] = _window(
                    ordered, views[crowded, which], start[crowded], end[crowded]
                )
            sizes = end - start
            query = first + np.repeat(np.arange(len(wanted)), sizes)
            offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield query, order[np.repeat(start, sizes) + offsets]


def _window(
    ordered: Hashes, views: Hashes, start: Indices, end: Indices
) -> tuple[Indices, Indices]:
    """Of large buckets, the ``BUCKET`` rows whose hashes are nearest in order."""
    # within a bucket the hashes are sorted: a bisection of all buckets at once
    low, high = start.copy(), end.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        less = (low < high) & (ordered[np.minimum(middle, len(ordered) - 1)] < views)
        low, high = np.where(less, middle + 1, low), np.where(less, high, np.minimum(middle, high))
        high = np.maximum(high, low)
    begin = np.clip(low - BUCKET // 2, start, end - BUCKET)
    return begin, begin + BUCKET


def _close(base: Hashes, queries: Hashes, given: Indices, query: Indices, bits: int) -> Indices:
    """Codes given·queries + query of the pairs that are near in one of the orientations."""
    found = [given[:0]]
    for first in range(0, len(query), QUERIES):
        a, b = query[first : first + QUERIES], given[first : first + QUERIES]
        unique, of = np.unique(a, return_inverse=True)
        distance = hamming(variants(queries[unique])[of], base[b][:, None]).min(axis=1)
        near = distance <= bits
        found.append(b[near] * len(queries) + a[near])
    return np.unique(np.concatenate(found))


def near_by_embedding(space: Space, count: int = 16, least: float = 0.3) -> tuple[Indices, Indices]:
    """Pairs of rows at least so similar of which one is among the other's ``count`` nearest."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for rows, near, similarity in neighbours(space, np.arange(len(space)), count):
        here = (near >= 0) & (similarity >= least)
        left = np.broadcast_to(rows[:, None], near.shape)[here]
        found.append(_unique(left, near[here], len(space)))
    left, right = (np.concatenate(side) for side in zip(*found, strict=True))
    return _unique(left, right, len(space))


def _unique(left: Indices, right: Indices, rows: int) -> tuple[Indices, Indices]:
    """Pairs once, left below right, sorted."""
    low, high = np.minimum(left, right), np.maximum(left, right)
    codes = np.unique((low * rows + high)[low < high])
    return codes // max(rows, 1), codes % max(rows, 1)
