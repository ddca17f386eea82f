"""Stage ``pack``: kept chips -> WebDataset tars with an index, statistics and a card.

plan    join and sort the rows; divide each split into shards   (sample_join.py, sample_metadata.py)
work    write one shard, and add up its pixels                  (formats/tar.py, stats.py)
seal    join the shards; write index.parquet, samples.parquet,
        stats.json and the card                                 (index.py, card.py)

A part is one shard: a range of the hashes by which the samples of a split are ordered. The number
of shards grows in steps (1, 2, 3, 4, 6, 8, 12, ...); between two steps a shard is written again
only if samples of its own are added or removed.

Pixels stay the ``.npy`` members that were cut, an encoding chosen by measurement
(``benchmarks/chip_encodings.py``) and recorded in the manifest's facts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_catalog.errors import CheckError
from data_catalog.hashing import canonical, digest_of
from data_catalog.progress import advance, tick
from data_catalog.run import read_plan
from data_catalog.sources import count_sources
from data_catalog.stage import Job, Part, Sealed, Stage, link
from geofm.config.recipe import PackSettings
from geofm.formats.npy import SUFFIX, chip_from_bytes, pixel_sha256
from geofm.formats.tar import BLOCK, END, read_range, write_tar
from geofm.shards.card import write_card
from geofm.shards.index import INDEX, ShardRows, index_rows, write_index
from geofm.shards.sample_metadata import load_samples, write_samples
from geofm.shards.stats import BandSums, finish_stats, merge_sums

#: Bytes assumed for the JSON of a sample when shards are planned.
JSON_BYTES = 2048
TAR, ROWS, SUMS = "shard.tar", "index.arrow", "sums.json"


class DamagedChip(CheckError):
    """The pixels of a chip differ from those that were cut."""


def shard_count(total: int, target: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, ... for shards of ``target`` bytes on average."""
    power = 1
    while True:
        for count in (power, power + power // 2):
            if total <= count * target:
                return count
        power *= 2


def shard_ranges(hashes: NDArray[np.uint64], count: int) -> list[tuple[int, int]]:
    """Divide sorted hashes by equal shares of the 64-bit space; empty shares are left out.

    Returns:
        First and last + 1 row of each range.
    """
    firsts = np.array([-(-(number << 64) // count) for number in range(count)], dtype=np.uint64)
    edges = [*np.searchsorted(hashes, firsts), len(hashes)]
    return [(int(a), int(b)) for a, b in pairwise(edges) if a < b]


def plan(job: Job) -> list[Part]:
    """Return one part per shard; its key covers the JSON of all its samples."""
    settings: PackSettings = job.settings
    samples = load_samples(job)
    parts = []
    for split, (start, end) in samples.splits.items():
        blocks = samples.npy_blocks[split] + (end - start) * (2 + JSON_BYTES // BLOCK)
        total = blocks * BLOCK + len(END)
        count = shard_count(total, int(settings.shard_mib * 2**20))
        for number, (a, b) in enumerate(shard_ranges(samples.hashes[start:end], count)):
            first, last = start + a, start + b
            covers = [
                [digest_of(document), float(row["valid_fraction"])]
                for row, document in samples.documents(first, last)
            ]
            name = f"shards/{settings.name}-{split}-{number:05d}.tar"
            payload = {"first": first, "last": last, "split": split, "shard": name}
            parts.append(job.part(payload, covers, fields=(), rows=last - first))
            tick("planning", last, len(samples), "samples")
    return parts


def work(job: Job, part: Part, folder: Path) -> None:
    """Write one shard: the tar, its rows of the index, and the sums of its pixels.

    Raises:
        DamagedChip: The digest of a chip's pixels is not the one from the cutting.
    """
    samples, chips = load_samples(job), job.inputs["chips"]
    local = lru_cache(maxsize=None)(chips.local)
    sums, keys = BandSums(), []

    def members() -> Iterator[tuple[str, bytes]]:
        for row, document in samples.documents(part.payload["first"], part.payload["last"]):
            key = row["chip_id"]
            payload = read_range(local(row["part"]), row["offset"], row["size"])
            pixels = chip_from_bytes(payload)
            if pixel_sha256(pixels) != row["pixel_sha256"]:
                raise DamagedChip(
                    f"chip {key} of chips {chips.digest[:12]} has other pixels than when it was "
                    "cut; run `geofm verify` on them and cut them again"
                )
            sums.add(pixels, row["scale"], float(row["valid_fraction"]))
            keys.append(key)
            yield f"{key}{SUFFIX}", payload
            yield f"{key}.json", canonical(document)
            advance(1)

    written = write_tar(folder / TAR, members())
    with pa.OSFile(str(folder / ROWS), "wb") as file:
        rows = index_rows(keys, written)
        with pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)
    (folder / SUMS).write_bytes(canonical(sums.to_json()))


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Join the shards: tars, ``index.parquet``, ``samples.parquet``, ``stats.json``, the card."""
    settings: PackSettings = job.settings
    samples, parts = load_samples(job), read_plan(job)
    for part, part_folder in zip(parts, folders, strict=True):
        link(part_folder / TAR, folder / part.payload["shard"])
    count = write_index(_rows(parts, folders), folder / INDEX)
    write_samples(samples, folder / "samples.parquet")
    total = merge_sums(json.loads((part_folder / SUMS).read_bytes()) for part_folder in folders)
    _, first = next(samples.documents(0, 1))
    stats = finish_stats(first["bands"], first["dtype"], first["scale"], total)
    (folder / "stats.json").write_bytes(canonical(stats))
    sources = count_sources(samples.records(columns=["source", "licence"]))
    write_card(folder / "README.md", settings.name, samples, stats, sources, job.inputs)
    left_out = len(samples.left_out)
    if left_out:
        pq.write_table(samples.left_out, folder / "left_out.parquet", compression="zstd")
    samples.file.unlink(missing_ok=True)  # the next version has other rows
    return Sealed(
        counts={
            "rows_in": len(samples) + left_out,
            "rows_out": count,
            "shards": len(folders),
            **{split: last - first for split, (first, last) in samples.splits.items()},
        },
        dropped={"holdout rim": left_out} if left_out else {},
        facts={
            "name": settings.name,
            "bands": first["bands"],
            "dtype": first["dtype"],
            "encoding": "npy",
            "sources": sources,
            # the evaluation sets that were checked are reported with the scores of each model
            "decontamination": job.inputs["decisions"].manifest.facts.get("decontamination"),
            "pixels": int(math.prod(int(first["window"][s]) for s in ("width", "height"))),
        },
    )


def _rows(parts: list[Part], folders: list[Path]) -> Iterator[ShardRows]:
    """Yield the index rows of each part."""
    for part, part_folder in zip(parts, folders, strict=True):
        with pa.memory_map(str(part_folder / ROWS)) as file:
            rows = pa.ipc.open_file(file).read_all()
        yield ShardRows(part.payload["shard"], part.payload["split"], rows)


STAGE = Stage(
    name="pack",
    version="4",
    kind="dataset",
    inputs=("items", "chips", "decisions"),
    software=("numpy", "pyarrow"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
    exclusive=True,
    unit="samples",
)
