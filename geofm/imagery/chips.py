"""A chip on disk: a ``.npy`` member of a tar, found by offset, known by its pixels' digest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
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
    """The pixels of one row of ``chips.parquet`` (columns part, offset, size).

    Args:
        chips: the artifact.
        row: a named tuple, a mapping or a Series (whose own ``size`` is something else).
    """
    by_key = isinstance(row, (Mapping, pd.Series))
    part, offset, size = (
        row[name] if by_key else getattr(row, name) for name in ("part", "offset", "size")
    )
    return chip_from_bytes(chips.read_range(part, int(offset), int(size)))
