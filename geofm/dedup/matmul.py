"""Which vectors of two blocks may be near each other: fast products that never miss a pair.

Where the processor multiplies bfloat16 (AVX-512 BF16 or AMX), unit vectors are rounded to it and
multiplied two to eight times as fast as in float32. What comes out are proposals: the limit is
lowered by a bound on the rounding error, and whoever asked decides each proposal exactly. So the
result does not depend on the processor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import RunError
from data_catalog.storage.process import cores
from geofm.embeddings.vectors import MARGIN, READ, Space
from geofm.runtime.native import torch
from geofm.runtime.threads import Item, Result, map_ordered, one_torch_thread
from geofm.types import Indices

#: A tile of products stays in a core's cache while it is compared with the limit.
TILE_ROWS, TILE_COLUMNS = 512, 4096
#: How many times wider a tile of few rows may be.
WIDER = 4
#: Rows that are multiplied from the right.
FEW_ROWS = 16
#: Sizes of tiles are multiples of these.
ROW_STEP, COLUMN_STEP = 16, 256
#: Bound on |product of two unit vectors of bfloat16, exact - in bfloat16|: the result (2^-9 below
#: 1), float32 sums of up to 8192 terms (2^-11).
BF16_SUM = 2.0**-9 + 2.0**-11
#: The same for vectors that are rounded to it: with 8 bits either loses up to 2^-8 of itself.
BF16_ERROR = 2.0**-7 + 2.0**-16 + BF16_SUM
#: Rows looked at together: with fewer, calls cost more than the cache saves.
LOOKED_AT = 4096
#: Items begun before the result of an earlier one is taken: one may take far longer than others.
AHEAD = 32
FLAGS = ("avx512_bf16", "amx_bf16")


class TooManyProposals(RunError):
    """A block has more pairs than its caller wants to hold."""


@dataclass(frozen=True)
class Precision:
    """How blocks are multiplied: the type of the factors, and the bound on the error."""

    name: Literal["float32", "bfloat16"]
    error: float

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors."""
        return torch.bfloat16 if self.name == "bfloat16" else torch.float32


FLOAT32 = Precision("float32", MARGIN)
BFLOAT16 = Precision("bfloat16", BF16_ERROR)


def _flags() -> set[str]:
    """What the processor says it can do; nothing where the system does not tell."""
    place = Path("/proc/cpuinfo")
    if not place.exists():
        return set()
    lines = place.read_text(errors="replace").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@cache
def best_precision() -> Precision:
    """bfloat16 where the processor has it and a trial keeps to the bound, else float32."""
    if not _flags().intersection(FLAGS):
        return FLOAT32
    draw = np.random.default_rng(0)
    units = draw.normal(size=(64, 256))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    rounded = torch.from_numpy(units).to(torch.bfloat16)
    error = np.abs(torch.mm(rounded, rounded.T).double().numpy() - units @ units.T).max()
    return BFLOAT16 if error <= BF16_ERROR else FLOAT32


def as_factors(units: NDArray[np.float32], precision: Precision) -> torch.Tensor:
    """Unit vectors [n, d] in the type in which they are multiplied."""
    return torch.from_numpy(units).to(precision.dtype)


_memory = threading.local()


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products [n, m] of two blocks, in memory of this thread that the next call overwrites.

    Tiles are megabytes: to ask the system for each anew would cost as much as a fifth of it.
    """
    return torch.mm(left, right.T, out=_own("tile", (left.shape[0], right.shape[0]), left.dtype))


def _own(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread by name, with what was last written there."""
    memory: dict[tuple[str, torch.dtype], torch.Tensor] = _memory.__dict__.setdefault("named", {})
    size = shape[0] * shape[1]
    own = memory.get((name, dtype))
    if own is None or own.shape[0] < size:
        own = memory[name, dtype] = torch.empty(size, dtype=dtype)
    return own[:size].view(shape)


def _padded(factors: torch.Tensor, step: int) -> torch.Tensor:
    """With rows of zeros up to a multiple of ``step``.

    oneDNN compiles and keeps a kernel for every new shape: with thousands of cells of thousands
    of sizes that would be slower than the products, and hundreds of megabytes.
    """
    missing = -factors.shape[0] % step
    return torch.nn.functional.pad(factors, (0, 0, 0, missing)) if missing else factors


def _tiles(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Even pieces of a range, in whole steps, none above ``most``."""
    count = max(1, -(-(last - first) // most))
    size = max(1, -(-(last - first) // (count * COLUMN_STEP))) * COLUMN_STEP
    return pairwise([*range(first, last, size), last])


def pick(
    factors: torch.Tensor,
    rows: Indices | NDArray[np.int32],
    step: int = 1,
    into: str | None = None,
) -> torch.Tensor:
    """Some rows of factors, and zeros up to a multiple of ``step``.

    ``numpy.take`` copies whole rows; numpy's indexing and torch do not.

    Args:
        factors: [n, d].
        rows: which.
        step: see ``_padded``.
        into: name of memory of this thread, which the next call with that name overwrites.
    """
    shape = (len(rows) + -len(rows) % step, factors.shape[1])
    dtype = factors.dtype
    found = torch.empty(shape, dtype=dtype) if into is None else _own(into, shape, dtype)
    kind = torch.int32 if factors.dtype == torch.float32 else torch.int16
    # mode: the default one copies once more, to be safe from an index out of range
    factors.view(kind).numpy().take(
        rows, axis=0, out=found[: len(rows)].view(kind).numpy(), mode="clip"
    )
    if found.shape[0] > len(rows):
        found[len(rows) :] = 0
    return found


def near_pairs(
    left: torch.Tensor,
    right: torch.Tensor,
    threshold: float,
    precision: Precision,
    upper: bool = False,
    most: int | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Indices, Indices]:
    """All (i, j) with left[i] · right[j] at or above ``threshold``, and some just below it.

    Args:
        left: factors [n, d] from ``as_factors``.
        right: factors [m, d].
        threshold: least product wanted.
        precision: of the factors.
        upper: both are the same vectors, and only i < j is wanted.
        most: proposals beyond which to give up.
        shape: how many rows of each count, where the rest fill up (``pick``); None for all.

    Raises:
        TooManyProposals: beyond ``most``.
    """
    lowest = np.float32(threshold - precision.error)
    height, width = shape or (left.shape[0], right.shape[0])
    left = _padded(left, ROW_STEP)
    right = left if upper else _padded(right, COLUMN_STEP)
    rows: list[Indices] = []
    columns: list[Indices] = []
    found = 0
    for top in range(0, left.shape[0], TILE_ROWS):
        some = left[top : top + TILE_ROWS]
        high = some.shape[0]
        wide = TILE_COLUMNS * min(WIDER, TILE_ROWS // high)
        for side, end in _tiles(top if upper else 0, right.shape[0], wide):
            if high <= FEW_ROWS:
                # the many are then read as they lie, not turned round for the processor first
                j, i = _at_least(multiply(right[side:end], some), lowest)
            else:
                i, j = _at_least(multiply(some, right[side:end]), lowest)
            if not len(i):
                continue
            i, j = i + top, j + side
            wanted = (i < height) & (j < width)
            if upper:
                wanted &= i < j
            i, j = i[wanted], j[wanted]
            found += len(i)
            if most is not None and found > most:
                raise TooManyProposals(f"more than {most} proposals")
            rows.append(i)
            columns.append(j)
    if not rows:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(rows), np.concatenate(columns)


def _at_least(tile: torch.Tensor, lowest: np.float32) -> tuple[Indices, Indices]:
    """Rows and columns of the products that reach the limit.

    The bits of positive floats are ordered as integers, whose largest of a long row is found many
    times as fast as all that reach the limit; few rows have any.
    """
    if lowest <= 0:
        i, j = np.nonzero(tile.float().numpy() >= lowest)
        return i, j
    bits = int(lowest.view(np.uint32))
    if tile.dtype == torch.float32:
        values, limit = tile.view(torch.int32).numpy(), bits
    else:
        # products are whole bfloat16: they reach the limit where they reach the next one above
        values, limit = tile.view(torch.int16).numpy(), (bits + 0xFFFF) >> 16
    if values.shape[1] <= FEW_ROWS:
        i, j = np.divmod(np.flatnonzero(values.reshape(-1) >= limit), values.shape[1])
        return i, j
    some = np.flatnonzero(values.max(axis=1) >= limit)
    i, j = np.divmod(np.flatnonzero(values[some] >= limit), values.shape[1])
    return some[i], j


def on_every_core(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``function`` of each item, in order, one thread of products per core.

    Products of small blocks and the work around them keep a core busy; torch's own threads would
    wait for each other at every block.
    """
    threads = cores()
    if threads == 1 or len(items) == 1:
        yield from map(function, items)
        return
    # each thread says it for itself too: MKL keeps a number per thread
    with (
        one_torch_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield from map_ordered(pool, function, items, AHEAD * threads)


def look_at_all(space: Space, look: Callable[[int, NDArray[np.float32]], None]) -> None:
    """``look(first, units)`` at all unit vectors, some rows at a time, on every core."""

    def work(first: int) -> None:
        for begin in range(first, min(first + READ, len(space)), LOOKED_AT):
            look(begin, space.block(begin, min(begin + LOOKED_AT, len(space))))

    for _ in on_every_core(work, range(0, len(space), READ)):
        pass
