"""Blocked matrix products that propose every pair of near vectors, fast and without a miss.

A product of two blocks of unit vectors gives the cosine similarity of each pair of rows. On a
processor that multiplies bfloat16 (AVX-512 BF16 or AMX) the vectors are rounded to bfloat16, which
is two to eight times as fast as float32. The threshold is lowered by a bound on the rounding
error, and the caller verifies each proposed pair in float64. So the result does not depend on the
processor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import RunError
from geofm.embeddings.vectors import FLOAT32_ERROR, READ_ROWS, EmbeddingSpace
from geofm.runtime.native import torch
from geofm.runtime.threads import map_on_cores
from geofm.types import Floats32, Indices

#: Rows and columns of a tile of products: it stays in the cache of a core while it is compared.
TILE_ROWS, TILE_COLUMNS = 512, 4096
#: A tile with few rows may have up to this many times as many columns.
WIDEST_TILE = 4
#: Blocks with at most this many rows are multiplied from the right.
FEW_ROWS = 16
#: The rows of a left and of a right block are multiples of these numbers (``_pad_rows``).
ROW_STEP, COLUMN_STEP = 16, 256
#: Bound on |computed - exact| for the product of two unit vectors that are exact in bfloat16: the
#: result is rounded (2^-9 below 1) after float32 sums of up to 8192 terms (2^-11).
BF16_SUM = 2.0**-9 + 2.0**-11
#: The same bound for vectors that are rounded to bfloat16 first. With 8 bits of precision, rounding
#: takes up to 2^-8 of the length of each.
BF16_ERROR = 2.0**-7 + 2.0**-16 + BF16_SUM
#: Rows that ``for_each_block`` passes on at once: with fewer, calls cost more than the cache saves.
BLOCK_ROWS = 4096
#: Numbers of the largest block whose memory a thread keeps.
MOST_KEPT = 1 << 24
#: Flags of processors that multiply bfloat16.
BF16_FLAGS = ("avx512_bf16", "amx_bf16")


class TooManyProposals(RunError):
    """A block has more pairs than its caller wants to hold."""


@dataclass(frozen=True)
class Precision:
    """The type in which blocks are multiplied, and the bound on the error of a product."""

    name: Literal["float32", "bfloat16"]
    error: float

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors."""
        return torch.bfloat16 if self.name == "bfloat16" else torch.float32


FLOAT32 = Precision("float32", FLOAT32_ERROR)
BFLOAT16 = Precision("bfloat16", BF16_ERROR)


def _processor_flags() -> set[str]:
    """Read the flags of the processor; none where the system does not list them."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return set()
    lines = listing.read_text(errors="replace").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@cache
def best_precision() -> Precision:
    """Choose bfloat16 where the processor has it and a trial stays within the bound."""
    if not _processor_flags().intersection(BF16_FLAGS):
        return FLOAT32
    draw = np.random.default_rng(0)
    units = draw.normal(size=(64, 256))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    rounded = torch.from_numpy(units).to(torch.bfloat16)
    error = np.abs(torch.mm(rounded, rounded.T).double().numpy() - units @ units.T).max()
    return BFLOAT16 if error <= BF16_ERROR else FLOAT32


def as_factors(units: Floats32, precision: Precision) -> torch.Tensor:
    """Convert unit vectors, shape (n, d), to the type in which they are multiplied."""
    return torch.from_numpy(units).to(precision.dtype)


_thread_memory = threading.local()


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply two blocks into memory of this thread, which the next call overwrites.

    A tile is megabytes large. New memory for each would cost a fifth of the product's time.

    Args:
        left: factors, shape (n, d).
        right: factors, shape (m, d).

    Returns:
        Products, shape (n, m).
    """
    shape = left.shape[0], right.shape[0]
    return torch.mm(left, right.T, out=_reuse_memory("tile", shape, left.dtype))


def _reuse_memory(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return memory of this thread by name, with its last content; new memory for a large block."""
    blocks: dict[tuple[str, torch.dtype], torch.Tensor]
    blocks = _thread_memory.__dict__.setdefault("blocks", {})
    size = shape[0] * shape[1]
    if size > MOST_KEPT:  # threads live as long as the process
        return torch.empty(shape, dtype=dtype)
    block = blocks.get((name, dtype))
    if block is None or block.shape[0] < size:
        block = blocks[name, dtype] = torch.empty(size, dtype=dtype)
    return block[:size].view(shape)


def _pad_rows(factors: torch.Tensor, step: int) -> torch.Tensor:
    """Append rows of zeros up to a multiple of ``step``.

    oneDNN compiles and keeps a kernel for every new shape. Thousands of cells of thousands of sizes
    would cost more time than the products, and hundreds of megabytes.
    """
    missing = -factors.shape[0] % step
    return torch.nn.functional.pad(factors, (0, 0, 0, missing)) if missing else factors


def _column_tiles(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Divide a range evenly into tiles of whole steps, none wider than ``most``."""
    count = max(1, -(-(last - first) // most))
    size = max(1, -(-(last - first) // (count * COLUMN_STEP))) * COLUMN_STEP
    return pairwise([*range(first, last, size), last])


def gather_rows(
    factors: torch.Tensor,
    rows: Indices | NDArray[np.int32],
    step: int = 1,
    buffer: str | None = None,
) -> torch.Tensor:
    """Copy rows of factors, and append zeros up to a multiple of ``step``.

    ``numpy.take`` copies whole rows; the indexing of numpy and torch is slower.

    Args:
        factors: shape (n, d).
        rows: row numbers, shape (m,).
        step: number of which the result's rows are a multiple (``_pad_rows``).
        buffer: name of memory of this thread that the next call with this name overwrites; None
            for new memory.

    Returns:
        Factors, shape (m rounded up, d).
    """
    shape = (len(rows) + -len(rows) % step, factors.shape[1])
    dtype = factors.dtype
    gathered = (
        torch.empty(shape, dtype=dtype) if buffer is None else _reuse_memory(buffer, shape, dtype)
    )
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    # the default mode copies once more, to guard against an index out of range
    factors.view(bits).numpy().take(
        rows, axis=0, out=gathered[: len(rows)].view(bits).numpy(), mode="clip"
    )
    if gathered.shape[0] > len(rows):
        gathered[len(rows) :] = 0
    return gathered


def near_pairs(
    left: torch.Tensor,
    right: torch.Tensor,
    threshold: float,
    precision: Precision,
    upper: bool = False,
    most: int | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Indices, Indices]:
    """Propose all pairs of rows with a product at or above a threshold, and some just below it.

    Args:
        left: factors, shape (n, d) (``as_factors``).
        right: factors, shape (m, d).
        threshold: least product.
        precision: precision of the factors.
        upper: whether both blocks are the same vectors and only pairs i < j are wanted.
        most: number of proposals beyond which the search gives up; None for no limit.
        shape: number of rows of each block that are vectors; the rest is padding. None for all.

    Returns:
        Rows of ``left`` and of ``right``, each of shape (pairs,).

    Raises:
        TooManyProposals: There are more than ``most`` proposals.
    """
    lowest = np.float32(threshold - precision.error)
    height, width = shape or (left.shape[0], right.shape[0])
    left = _pad_rows(left, ROW_STEP)
    right = left if upper else _pad_rows(right, COLUMN_STEP)
    rows: list[Indices] = []
    columns: list[Indices] = []
    count = 0
    for top in range(0, left.shape[0], TILE_ROWS):
        block = left[top : top + TILE_ROWS]
        most_columns = TILE_COLUMNS * min(WIDEST_TILE, TILE_ROWS // block.shape[0])
        for begin, end in _column_tiles(top if upper else 0, right.shape[0], most_columns):
            if block.shape[0] <= FEW_ROWS:
                # the larger block is then read as it lies in memory, without a transposed copy
                j, i = _at_least(multiply(right[begin:end], block), lowest)
            else:
                i, j = _at_least(multiply(block, right[begin:end]), lowest)
            if not len(i):
                continue
            i, j = i + top, j + begin
            wanted = (i < height) & (j < width)
            if upper:
                wanted &= i < j
            i, j = i[wanted], j[wanted]
            count += len(i)
            if most is not None and count > most:
                raise TooManyProposals(f"more than {most} proposals")
            rows.append(i)
            columns.append(j)
    if not rows:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(rows), np.concatenate(columns)


def _at_least(tile: torch.Tensor, lowest: np.float32) -> tuple[Indices, Indices]:
    """Find the rows and columns of a tile whose products reach a limit.

    The bits of positive floats are ordered like integers, and the largest integer of a long row is
    found many times as fast as all products that reach the limit. Few rows have any.
    """
    if lowest <= 0:
        i, j = np.nonzero(tile.float().numpy() >= lowest)
        return i, j
    bits = int(lowest.view(np.uint32))
    if tile.dtype == torch.float32:
        values, limit = tile.view(torch.int32).numpy(), bits
    else:
        # a bfloat16 reaches the limit if it reaches the next bfloat16 at or above it
        values, limit = tile.view(torch.int16).numpy(), (bits + 0xFFFF) >> 16
    if values.shape[1] <= FEW_ROWS:
        i, j = np.divmod(np.flatnonzero(values.reshape(-1) >= limit), values.shape[1])
        return i, j
    candidates = np.flatnonzero(values.max(axis=1) >= limit)
    i, j = np.divmod(np.flatnonzero(values[candidates] >= limit), values.shape[1])
    return candidates[i], j


def for_each_block(space: EmbeddingSpace, visit: Callable[[int, Floats32], None]) -> None:
    """Call ``visit(first, units)`` on all unit vectors of a space, block by block, on all cores."""

    def visit_rows(first: int) -> None:
        for begin in range(first, min(first + READ_ROWS, len(space)), BLOCK_ROWS):
            visit(begin, space.unit_block(begin, min(begin + BLOCK_ROWS, len(space))))

    for _ in map_on_cores(visit_rows, range(0, len(space), READ_ROWS)):
        pass
