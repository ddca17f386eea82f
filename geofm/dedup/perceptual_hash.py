"""A perceptual hash of a thumbnail for which all 8 flips and rotations are known.

The bits are the signs of the lowest 63 frequencies of the discrete cosine transform (as in pHash,
Zauner 2010, but with zero in place of the median). A mirror image changes the sign of the odd
frequencies and a transposed one swaps them, so the hashes of all 8 orientations follow from one by
exclusive or and a permutation of its bits; no picture is turned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
#: Frequencies along each axis: 8 × 8 without the mean.
SIDE = 8
#: Number 4·mirror + turns: the columns are reversed where ``mirror`` is 1, then the picture is
#: turned by ``turns`` × 90° as ``numpy.rot90`` does.
ORIENTATIONS = tuple(range(8))


def turn(pictures: NDArray[Any], which: int) -> NDArray[Any]:
    """Pictures [..., height, width] in one of the 8 orientations; 0 leaves them as they are."""
    mirrored = pictures[..., ::-1] if which >= 4 else pictures
    return np.rot90(mirrored, which % 4, axes=(-2, -1))


def hash_thumbnails(thumbnails: NDArray[np.uint8]) -> Hashes:
    """Hashes [n] of thumbnails [n, edge, edge]; 0 for one without any contrast."""
    edge = thumbnails.shape[-1]
    angles = np.pi * np.outer(np.arange(SIDE), np.arange(edge) + 0.5) / edge
    waves = np.cos(angles)
    found = np.zeros(len(thumbnails), dtype=np.uint64)
    for first in range(0, len(thumbnails), 256):
        part = thumbnails[first : first + 256].astype(np.float64)
        part -= part.mean(axis=(1, 2), keepdims=True)
        high = np.rint(waves @ part @ waves.T * 1e6)  # a sign that hangs on the last bit is none
        found[first : first + 256] = _pack(high.reshape(len(part), -1) > 0)
    return found


def variants(hashes: Hashes) -> Hashes:
    """Hashes [n, 8] of the pictures in each orientation, in the order of ``turn``."""
    bits = _unpack(hashes).reshape(-1, SIDE, SIDE)
    some = (hashes != 0)[:, None, None]  # without contrast there is nothing to turn
    odd = np.arange(SIDE) % 2 == 1
    found = []
    for which in ORIENTATIONS:
        turned = bits ^ (odd[None, None, :] & some) if which >= 4 else bits
        for _ in range(which % 4):  # a quarter turn is a transposition and a mirror of the rows
            turned = turned.transpose(0, 2, 1) ^ (odd[None, :, None] & some)
        flat = turned.reshape(len(bits), SIDE * SIDE).copy()
        flat[:, 0] = False
        found.append(_pack(flat))
    return np.stack(found, axis=1) if len(hashes) else np.empty((0, 8), np.uint64)


def canonical_hash(hashes: Hashes) -> Hashes:
    """The smallest of the 8 hashes: the same for a picture however it is turned."""
    return np.asarray(variants(hashes).min(axis=1, initial=np.iinfo(np.uint64).max))


def hamming(left: Hashes, right: Hashes) -> NDArray[np.uint8]:
    """Bits in which hashes differ, elementwise."""
    return np.asarray(np.bitwise_count(left ^ right), dtype=np.uint8)


def _pack(bits: NDArray[np.bool_]) -> Hashes:
    """[n, 64] bits to [n] numbers, the first bit the highest."""
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def _unpack(hashes: Hashes) -> NDArray[np.bool_]:
    data = np.ascontiguousarray(hashes.astype(">u8")).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(data, axis=1).astype(np.bool_)
