"""Chips as ``.npy`` members of tars, and large ``.npy`` files that are written row by row.

A chip is found by the offset of its member and identified by the digest of its pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from data_catalog.artifact import Artifact
from geofm.types import Indices

#: Suffix of a member that holds pixels.
SUFFIX = ".npy"
#: Bytes of the header: numpy pads a short header with spaces to this size.
HEAD = 128


def chip_bytes(pixels: NDArray[np.generic]) -> bytes:
    """Encode pixels as ``.npy`` (version 1.0, C order): the same bytes for the same pixels."""
    contiguous = np.ascontiguousarray(pixels)
    return b"".join((npy_head(contiguous.dtype, contiguous.shape), contiguous.data))


@lru_cache(maxsize=64)
def npy_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of a ``.npy``. The chips of an artifact share a few headers."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@lru_cache(maxsize=64)
def _layout(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Read dtype, shape and number of bytes of the pixels from a header."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("the file format is not .npy version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject or file.tell() != HEAD:
        raise ValueError("the .npy does not hold numbers in C order after a short header")
    return dtype, shape, dtype.itemsize * math.prod(shape)


def chip_from_bytes(data: bytes | memoryview) -> NDArray[Any]:
    """Return the pixels of a ``.npy`` member as a read-only view, shape (bands, height, width).

    Raises:
        ValueError: ``data`` is not a whole ``.npy`` as ``chip_bytes`` writes it.
    """
    dtype, shape, size = _layout(bytes(data[:HEAD]))
    if len(data) != HEAD + size:
        raise ValueError(f"{len(data)} bytes are not a .npy of {dtype} {shape}")
    return np.ndarray(shape, dtype, data, HEAD)


def pixel_sha256(pixels: NDArray[np.generic]) -> str:
    """Hash dtype, shape and pixels in C order; the digest does not depend on the file format."""
    digest = hashlib.sha256(f"{pixels.dtype.name} {'x'.join(map(str, pixels.shape))}\n".encode())
    digest.update(np.ascontiguousarray(pixels).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_chip(chips: Artifact, row: Any) -> NDArray[Any]:
    """Read the pixels of a row of ``chips.parquet``, shape (bands, height, width).

    Args:
        chips: Chips artifact.
        row: Named tuple, mapping or Series with ``part``, ``offset`` and ``size``.
    """
    by_key = isinstance(row, (Mapping, pd.Series))  # Series.size is the number of its values
    part, offset, size = (
        row[name] if by_key else getattr(row, name) for name in ("part", "offset", "size")
    )
    return chip_from_bytes(chips.read_range(part, int(offset), int(size)))


def write_npy_rows(
    path: Path,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    blocks: Iterable[tuple[Indices, NDArray[Any]]],
) -> None:
    """Write an array whose rows come in blocks, in any order; only a block is in memory.

    The file is written, not mapped: a mapped file ends the process if the disk is full.

    Args:
        path: The file.
        shape: Shape of the array.
        dtype: Type of the array.
        blocks: Row numbers, shape (n,), and values, shape (n, ...), of each block; together all
            rows of the array.
    """
    head = npy_head(np.dtype(dtype), shape)
    size = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(head)
        for rows, values in blocks:
            order = np.argsort(rows, kind="stable")
            starts = np.flatnonzero(np.diff(rows[order], prepend=-2) != 1)
            sorted_values = np.ascontiguousarray(values[order], dtype=dtype)
            for first, last in pairwise([*starts.tolist(), len(order)]):
                file.seek(len(head) + int(rows[order[first]]) * size)
                file.write(sorted_values[first:last].data)
