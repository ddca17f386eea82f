"""A chip on disk: a ``.npy`` member of a tar, found by offset, known by its pixels' digest."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.artifact import Artifact


def chip_bytes(pixels: NDArray[np.generic]) -> bytes:
    """The ``.npy`` encoding (version 1.0, C order), the same bytes for the same pixels."""
    buffer = io.BytesIO()
    np.lib.format.write_array(
        buffer, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False
    )
    return buffer.getvalue()


def chip_from_bytes(data: bytes) -> NDArray[Any]:
    """Pixels [bands, height, width] of a ``.npy`` member; never unpickles."""
    return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))


def pixel_sha256(pixels: NDArray[np.generic]) -> str:
    """Digest over dtype, shape and C-order bytes: independent of the file format."""
    head = f"{pixels.dtype.name} {'x'.join(map(str, pixels.shape))}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def read_chip(chips: Artifact, row: Any) -> NDArray[Any]:
    """The pixels of one row of ``chips.parquet`` (columns part, offset, size)."""
    return chip_from_bytes(chips.read_range(row.part, int(row.offset), int(row.size)))
