"""Every bit of the shards against the index: what is damaged, in which shard, of which sample.

A shard's bytes follow from the index and the members' contents: headers from names and sizes,
padding and end are zeros. So a flipped bit is found and named wherever it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa

from data_catalog.artifact import Artifact
from data_catalog.tables import records
from geofm.shards.tar import BLOCK, END, header, padding, tar_size

INDEX = "index.parquet"


@dataclass(frozen=True)
class Expected:
    """One member as the index has it."""

    key: str
    name: str
    offset: int
    size: int
    sha256: str


def verify_shards(dataset: Artifact) -> list[str]:
    """Problems of a dataset's shards, in words; empty when every bit is as written.

    Each names the shard, the sample and its member (or the header or padding of it), and the
    byte where that is known.
    """
    try:
        index = dataset.table(INDEX)
    except (pa.ArrowException, OSError) as error:
        return [f"{INDEX} cannot be read ({error}); restore it from another copy"]
    listed = {f.path for f in dataset.manifest.files if f.path.endswith(".tar")}
    problems = [f"{name}: not in {INDEX}" for name in sorted(listed - set(index["shard"]))]
    for name, rows in index.groupby("shard", sort=True):
        problems += _verify_shard(dataset, str(name), expected_members(rows))
    return problems


def expected_members(rows: pd.DataFrame) -> list[Expected]:
    """Members of one shard by offset, from its rows of the index."""
    found = []
    for row in records(rows):
        for suffix, prefix in (("npy", ""), ("json", "json_")):
            found.append(_expected(row, suffix, prefix))
    return sorted(found, key=lambda member: member.offset)


def _expected(row: dict[str, Any], suffix: str, prefix: str) -> Expected:
    return Expected(
        key=str(row["key"]),
        name=f"{row['key']}.{suffix}",
        offset=int(row[f"{prefix}offset"]),
        size=int(row[f"{prefix}size"]),
        sha256=str(row[f"{prefix}sha256"]),
    )


def _verify_shard(dataset: Artifact, shard: str, members: list[Expected]) -> list[str]:
    try:
        with dataset.path(shard).open("rb") as file:
            return [f"{shard}: {problem}" for problem in compare(file, members)]
    except FileNotFoundError:
        return [f"{shard}: missing; restore it from another copy, or pack again"]


def compare(file: BinaryIO, members: list[Expected]) -> Iterator[str]:
    """Everything in which a tar differs from its members, in the order of the file."""
    length = file.seek(0, os.SEEK_END)
    whole = tar_size(member.size for member in members)
    file.seek(0)
    place = 0
    for member in members:
        label = f"sample {member.key}: {member.name}"
        if member.offset != place + BLOCK:
            yield f"{label}: the index says byte {member.offset}, it should be {place + BLOCK}"
            return
        end = member.offset + member.size + len(padding(member.size))
        if length < end:
            yield (
                f"truncated at byte {length} of {whole}: {label} and all samples after it "
                "are lost or incomplete"
            )
            return
        yield from _differences(file.read(BLOCK), header(member.name, member.size), place, label)
        data = file.read(member.size)
        if hashlib.sha256(data).hexdigest() != member.sha256:
            yield (
                f"{label}: SHA-256 of bytes {member.offset} to {member.offset + member.size - 1} "
                "is not that of the index"
            )
        zeros = padding(member.size)
        found = file.read(len(zeros))
        if found != zeros:
            at = member.offset + member.size + _first_difference(found, zeros)
            yield f"{label}: padding differs at byte {at}"
        place = end
    rest = file.read()
    if len(rest) < len(END):
        yield f"truncated at byte {length} of {whole}: the end of the tar is missing"
    elif rest != END:
        at = _first_difference(rest, END + bytes(max(0, len(rest) - len(END))))
        where = "is longer than written" if len(rest) > len(END) else "differs"
        yield f"the end of the tar {where} at byte {place + min(at, len(rest))}"


def _differences(found: bytes, wanted: bytes, place: int, label: str) -> Iterator[str]:
    if found != wanted:
        yield f"{label}: tar header differs at byte {place + _first_difference(found, wanted)}"


def _first_difference(found: bytes, wanted: bytes) -> int:
    pairs = zip(found, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
