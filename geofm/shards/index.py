"""``index.parquet`` of a dataset: byte range and SHA-256 of the two members of each sample.

The index depends only on the tars, so a damaged index can be made again from them, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from geofm.formats.npy import SUFFIX
from geofm.formats.tar import DamagedTar, Member, read_members
from geofm.shards.split import HOLDOUT, TRAIN

INDEX = "index.parquet"
#: Rows of a row group.
GROUP_ROWS = 2**14
MEMBER = [("offset", pa.int64()), ("size", pa.int64()), ("sha256", pa.string())]
#: Columns of the rows of one tar.
MEMBERS = pa.schema(
    [("key", pa.string()), *MEMBER, *((f"json_{name}", kind) for name, kind in MEMBER)]
)
#: Columns of the index.
COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("chip_id", pa.string()),
        ("shard", pa.string()),
        ("split", pa.string()),
        *list(MEMBERS)[1:],
    ]
)


@dataclass(frozen=True)
class ShardRows:
    """Rows of one shard (columns ``MEMBERS``), with its name in the dataset and its split."""

    shard: str
    split: str
    rows: pa.Table


def index_rows(keys: Sequence[str], written: Sequence[Member]) -> pa.Table:
    """Make the rows of the samples of one tar, whose members alternate: pixels, JSON."""
    columns: dict[str, Sequence[object]] = {"key": keys}
    for prefix, members in (("", written[::2]), ("json_", written[1::2])):
        columns[f"{prefix}offset"] = [member.offset for member in members]
        columns[f"{prefix}size"] = [member.size for member in members]
        columns[f"{prefix}sha256"] = [member.sha256 for member in members]
    return pa.table(columns, schema=MEMBERS)


def release_memory() -> None:
    """Return memory that Arrow keeps for later to the system; else the peaks of steps add up."""
    pa.default_memory_pool().release_unused()


def write_index(shards: Iterable[ShardRows], path: Path) -> int:
    """Write the index with the shards in the given order; memory holds one row group.

    Returns:
        The number of samples.
    """
    count = 0
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        waiting = COLUMNS.empty_table()
        for shard in shards:
            waiting = pa.concat_tables([waiting, _with_shard(shard)])
            while len(waiting) >= GROUP_ROWS:
                writer.write_table(waiting.slice(0, GROUP_ROWS).combine_chunks())
                waiting = waiting.slice(GROUP_ROWS)
                release_memory()
            count += len(shard.rows)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())
    return count


def _with_shard(shard: ShardRows) -> pa.Table:
    """Add chip id, shard and split to the rows of a shard."""
    names, splits = (pa.repeat(text, len(shard.rows)) for text in (shard.shard, shard.split))
    key, *members = shard.rows.columns
    return pa.table([key, key, names, splits, *members], schema=COLUMNS)


def split_of(shard: str) -> str:
    """Return the split in a shard's name (``shards/NAME-SPLIT-00000.tar``)."""
    return HOLDOUT if shard.rsplit("-", 2)[-2:-1] == [HOLDOUT] else TRAIN


def find_outside(
    offsets: NDArray[np.int64], sizes: NDArray[np.int64], ends: NDArray[Any]
) -> int | None:
    """Find the first row whose bytes are not all in its shard.

    Args:
        offsets: First byte of each row's member.
        sizes: Bytes of each member.
        ends: Bytes of the shard that each row names; -1 where the dataset has no such shard.
    """
    # subtracted, since the sum of two large numbers of a hostile index would overflow
    wrong = (offsets < 0) | (sizes <= 0) | (sizes > ends) | (offsets > ends - sizes)
    return int(wrong.argmax()) if wrong.any() else None


def sort_shards(shards: Iterable[str]) -> list[str]:
    """Sort names of shards as in the index: the train split first, then by number."""
    return sorted(shards, key=lambda name: (split_of(name) != TRAIN, len(name), name))


def index_tar(path: Path | UPath, shard: str) -> ShardRows:
    """Make the rows of a shard from its bytes.

    Raises:
        DamagedTar: The file is not a tar of samples as ``pack`` writes it.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        members = [
            Member(name, offset, len(data), hashlib.sha256(data).hexdigest())
            for name, offset, data in read_members(file)
        ]
    keys = [member.name.removesuffix(SUFFIX) for member in members[::2]]
    if [m.name for m in members] != [f"{key}{end}" for key in keys for end in (SUFFIX, ".json")]:
        raise DamagedTar(f"{shard}: its members are not pairs of {SUFFIX} and .json")
    return ShardRows(shard, split_of(shard), index_rows(keys, members))
