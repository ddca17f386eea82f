"""A perceptual hash of thumbnails from which the hashes of all 8 orientations follow.

Source: pHash (Zauner 2010), with zero in place of the median. The bits are the signs of the 63
lowest frequencies of the discrete cosine transform (DCT-II). Mirroring a picture changes the sign
of the odd frequencies, and transposing it swaps the two axes. So the hashes of all flips and
quarter turns follow from one hash by an exclusive or and a permutation of its bits; no picture is
turned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: 64-bit perceptual hashes.
PixelHashes = NDArray[np.uint64]
#: Frequencies along each axis: 8 x 8, without the mean.
SIDE = 8
#: Number 4 * mirror + turns: the columns are reversed where ``mirror`` is 1, then the picture is
#: turned by ``turns`` times 90 degrees, as ``numpy.rot90`` does.
ORIENTATIONS = tuple(range(8))
#: Thumbnails that are hashed at once.
BLOCK = 256


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
