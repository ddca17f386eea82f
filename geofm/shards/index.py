"""``index.parquet`` of a dataset: where each sample's two members are, and their SHA-256.

It follows from the tars alone, so a damaged one can be made again from them, byte for byte.
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

from geofm.formats.tar import DamagedTar, Member, walk
from geofm.shards.split import HOLDOUT, TRAIN

INDEX = "index.parquet"
GROUP_ROWS = 2**14
WHERE = [("offset", pa.int64()), ("size", pa.int64()), ("sha256", pa.string())]
MEMBERS = pa.schema(
    [("key", pa.string()), *WHERE, *((f"json_{name}", kind) for name, kind in WHERE)]
)
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
    """The rows of one shard (columns ``MEMBERS``), its name in the dataset, and its split."""

    shard: str
    split: str
    rows: pa.Table


def index_rows(keys: Sequence[str], written: Sequence[Member]) -> pa.Table:
    """Rows of the samples of one tar, whose members alternate: pixels, JSON."""
    columns: dict[str, Sequence[object]] = {"key": keys}
    for prefix, members in (("", written[::2]), ("json_", written[1::2])):
        columns[f"{prefix}offset"] = [member.offset for member in members]
        columns[f"{prefix}size"] = [member.size for member in members]
        columns[f"{prefix}sha256"] = [member.sha256 for member in members]
    return pa.table(columns, schema=MEMBERS)


def release_memory() -> None:
    """Give back what Arrow keeps in case it is needed again; else each step's peak adds up."""
    pa.default_memory_pool().release_unused()


def write_index(shards: Iterable[ShardRows], path: Path) -> int:
    """Write the index, shards in the order given; returns the number of samples.

    Only a row group is in memory at a time.
    """
    count = 0
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        waiting = COLUMNS.empty_table()
        for one in shards:
            waiting = pa.concat_tables([waiting, _with_shard(one)])
            while len(waiting) >= GROUP_ROWS:
                writer.write_table(waiting.slice(0, GROUP_ROWS).combine_chunks())
                waiting = waiting.slice(GROUP_ROWS)
                release_memory()
            count += len(one.rows)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())
    return count


def _with_shard(one: ShardRows) -> pa.Table:
    shard, split = (pa.repeat(text, len(one.rows)) for text in (one.shard, one.split))
    key, *members = one.rows.columns
    return pa.table([key, key, shard, split, *members], schema=COLUMNS)


def split_of(shard: str) -> str:
    """The split that a shard's name tells (``shards/NAME-SPLIT-00000.tar``)."""
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


def in_order(shards: Iterable[str]) -> list[str]:
    """Shards as they come in the index: those of the train split first, by number."""
    return sorted(shards, key=lambda name: (split_of(name) != TRAIN, len(name), name))


def index_of_tar(path: Path | UPath, shard: str) -> ShardRows:
    """The rows of a shard as its bytes are.

    Raises:
        DamagedTar: when it is not a tar of samples as it was written.
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        found = [
            Member(name, offset, len(data), hashlib.sha256(data).hexdigest())
            for name, offset, data in walk(file)
        ]
    keys = [member.name.removesuffix(".npy") for member in found[::2]]
    if [m.name for m in found] != [f"{key}.{end}" for key in keys for end in ("npy", "json")]:
        raise DamagedTar(f"{shard}: its members are not pairs of .npy and .json")
    return ShardRows(shard, split_of(shard), index_rows(keys, found))
