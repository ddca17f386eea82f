"""Stage ``pack``: kept chips as WebDataset tars with an index, statistics and a card.

A part is one shard: a range of the hashes by which samples are ordered. The number of shards
grows in steps (1, 2, 3, 4, 6, 8, 12, ...), so that between steps a shard is written again only
when samples of its own come or go.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.canonical import canonical, digest_of
from data_catalog.errors import CheckError
from data_catalog.progress import tick
from data_catalog.sources import count_sources
from data_catalog.stage import Job, Part, Sealed, Stage, link
from data_catalog.tables import records, write_table
from geofm.imagery.chips import chip_from_bytes, pixel_sha256
from geofm.settings import PackSettings
from geofm.shards.card import write_card
from geofm.shards.samples import Samples, load_samples
from geofm.shards.stats import band_sums, finish_stats
from geofm.shards.tar import read_ranges, tar_size, write_tar

#: What a sample's JSON is taken to need when shards are planned.
JSON_BYTES = 2048


class DamagedChip(CheckError):
    """A chip's pixels are not those that were cut."""


def shard_count(total: int, target: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, ... with which shards average ``target`` bytes."""
    power = 1
    while True:
        for count in (power, power + power // 2):
            if total <= count * target:
                return count
        power *= 2


def shard_ranges(hashes: NDArray[np.uint64], count: int) -> list[tuple[int, int]]:
    """Ranges of sorted hashes that fall into equal shares of the 64-bit space, none empty."""
    shard = [int(value) * count >> 64 for value in hashes]
    edges = np.searchsorted(shard, np.arange(count + 1))
    return [(int(a), int(b)) for a, b in pairwise(edges) if a < b]


def _samples(job: Job) -> Samples:
    chips, items, decisions = (job.inputs[r] for r in ("chips", "items", "decisions"))
    return load_samples(items, chips, decisions, job.seed)


def plan(job: Job) -> list[Part]:
    """One part per shard; its key covers the very documents of its samples."""
    settings: PackSettings = job.settings
    samples = _samples(job)
    sizes = samples.rows["size"].to_numpy(dtype=np.int64)
    total = tar_size(size for npy in sizes for size in (int(npy), JSON_BYTES))
    count = shard_count(total, int(settings.shard_mib * 2**20))
    return [
        job.part(
            {"first": first, "last": last},
            [digest_of(samples.document(number)) for number in range(first, last)],
        )
        for first, last in shard_ranges(samples.hashes, count)
    ]


def work(job: Job, part: Part, folder: Path) -> None:
    """Write one shard: ``shard.tar``, ``index.json`` (a row per sample) and ``sums.json``.

    Raises:
        DamagedChip: when pixels do not have the digest under which they were cut.
    """
    samples, chips = _samples(job), job.inputs["chips"]
    numbers = range(part.payload["first"], part.payload["last"])
    payloads = _read(chips, samples.rows.iloc[numbers.start : numbers.stop])
    members, sums, index = [], [], []
    for number, payload in zip(numbers, payloads, strict=True):
        document = samples.document(number)
        key, pixels = document["chip_id"], chip_from_bytes(payload)
        if pixel_sha256(pixels) != document["pixel_sha256"]:
            raise DamagedChip(
                f"chip {key} of chips {chips.digest[:12]} has other pixels than when it was cut; "
                "run `geofm verify` on them and cut them again"
            )
        members += [(f"{key}.npy", payload), (f"{key}.json", canonical(document))]
        valid = float(samples.table[number]["valid_fraction"])
        sums.append(band_sums(pixels, document["scale"], valid))
    written = write_tar(folder / "shard.tar", members)
    for npy, text in zip(written[::2], written[1::2], strict=True):
        row: dict[str, Any] = {"key": npy.name.removesuffix(".npy")}
        row |= {"offset": npy.offset, "size": npy.size, "sha256": npy.sha256}
        row |= {"json_offset": text.offset, "json_size": text.size, "json_sha256": text.sha256}
        index.append(row)
    (folder / "index.json").write_bytes(canonical(index))
    (folder / "sums.json").write_bytes(canonical(sums))
    tick("pack", len(index), len(index), "samples")


def _read(chips: Artifact, rows: pd.DataFrame) -> list[bytes]:
    """The ``.npy`` bytes of each row, each tar opened once."""
    found: list[bytes] = [b""] * len(rows)
    order = rows.reset_index(drop=True)[["part", "offset", "size"]]
    for part, group in order.sort_values(["part", "offset"]).groupby("part", sort=True):
        ranges = zip(group["offset"].astype(int), group["size"].astype(int), strict=True)
        for at, data in zip(group.index, read_ranges(chips.local(str(part)), ranges), strict=True):
            found[int(at)] = data
    return found


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Join the shards: tars, ``index.parquet``, ``samples.parquet``, ``stats.json``, the card."""
    settings: PackSettings = job.settings
    samples = _samples(job)
    tables, sums = [], []
    for number, part in enumerate(folders):
        name = f"shards/{settings.name}-{number:05d}.tar"
        link(part / "shard.tar", folder / name)
        table = pd.DataFrame(json.loads((part / "index.json").read_bytes()))
        table.insert(1, "chip_id", table["key"])
        table.insert(2, "shard", name)
        tables.append(table)
        sums += json.loads((part / "sums.json").read_bytes())
    index = pd.concat(tables, ignore_index=True)
    write_table(index, folder / "index.parquet")
    write_table(samples.rows.drop(columns=["part", "offset", "size"]), folder / "samples.parquet")
    first = samples.document(0)
    stats = finish_stats(first["bands"], first["dtype"], first["scale"], sums)
    (folder / "stats.json").write_bytes(canonical(stats))
    sources = count_sources(records(samples.rows[["source", "licence"]]))
    write_card(folder / "README.md", settings.name, samples.rows, stats, sources, job.inputs)
    return Sealed(
        counts={"rows_in": len(samples.rows), "rows_out": len(index), "shards": len(folders)},
        facts={
            "name": settings.name,
            "bands": first["bands"],
            "dtype": first["dtype"],
            "sources": sources,
            # what was checked against which evaluation sets; goes with the scores of every model
            "decontamination": job.inputs["decisions"].manifest.facts.get("decontamination"),
            "pixels": int(math.prod(int(first["window"][s]) for s in ("width", "height"))),
        },
    )


STAGE = Stage(
    name="pack",
    version="1",
    kind="dataset",
    inputs=("items", "chips", "decisions"),
    software=("numpy", "pyarrow", "geopandas"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
)
