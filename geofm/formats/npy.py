"""A chip on disk: a ``.npy`` member of a tar, found by offset, known by its pixels' digest."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact

#: Bytes before the pixels: numpy fills a short header with spaces to so many.
HEAD = 128


def chip_bytes(pixels: NDArray[np.generic]) -> bytes:
    """The ``.npy`` encoding (version 1.0, C order), the same bytes for the same pixels."""
    plain = np.ascontiguousarray(pixels)
    return b"".join((npy_head(plain.dtype, plain.shape), plain.data))


@lru_cache(maxsize=64)
def npy_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What comes before the numbers of a ``.npy``; chips of an artifact have the same few heads."""
    buffer = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


@lru_cache(maxsize=64)
def _layout(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Dtype, shape and bytes that a header says; an artifact's chips have the same few headers."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject or file.tell() != HEAD:
        raise ValueError("not a .npy of numbers in C order with a short header")
    return dtype, shape, dtype.itemsize * math.prod(shape)


def chip_from_bytes(data: bytes | memoryview) -> NDArray[Any]:
    """Pixels [bands, height, width] of a ``.npy`` member: a read-only view, nothing is copied.

    Raises:
        ValueError: when ``data`` is not a whole ``.npy`` as ``chip_bytes`` writes it.
    """
    dtype, shape, size = _layout(bytes(data[:HEAD]))
    if len(data) != HEAD + size:
        raise ValueError(f"{len(data)} bytes are not a .npy of {dtype} {shape}")
    return np.ndarray(shape, dtype, data, HEAD)


def pixel_sha256(pixels: NDArray[np.generic]) -> str:
    """Digest over dtype, shape and C-order bytes: independent of the file format."""
    digest = hashlib.sha256(f"{pixels.dtype.name} {'x'.join(map(str, pixels.shape))}\n".encode())
    digest.update(np.ascontiguousarray(pixels).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


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
