"""Find damage in the shards and the index of a dataset, down to the sample and the byte.

Every byte of a shard follows from the index and the contents of its members: headers from names
and sizes, padding and end are zeros. The index in turn follows from the shards. Each thus shows
where the other is damaged, and a flipped bit is found wherever it is.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, first_line
from data_catalog.hashing import sha256_file
from data_catalog.manifest import Manifest
from data_catalog.progress import tick
from data_catalog.provenance.verify import first_difference
from data_catalog.storage.reach import reach
from data_catalog.tables import records
from geofm.formats.npy import SUFFIX, pixel_sha256
from geofm.formats.tar import BLOCK, END, DamagedTar, header, padding, tar_size
from geofm.shards.index import INDEX, find_outside, index_tar, sort_shards, write_index
from geofm.shards.reader import DamagedShard, NoSuchSplit, ShardFiles, open_index


@dataclass(frozen=True)
class Expected:
    """A member as the index lists it."""

    key: str
    name: str
    offset: int
    size: int
    sha256: str


def verify_shards(dataset: Artifact, sealed: Manifest | None = None) -> list[str]:
    """Check every bit of a dataset's shards and index.

    Args:
        dataset: Dataset to verify.
        sealed: Undamaged manifest of the dataset; it shows whether the index or a shard is wrong
            where they differ. Without a manifest the index is taken as right.

    Returns:
        A message per problem: it names the shard, the sample and its member (or the header or
        padding of the member) and the byte if it is known; or byte, column and samples of the
        index. Empty if every bit is as written.
    """
    digests = {entry.path: entry.sha256 for entry in sealed.files} if sealed else {}
    tars = {name for name in digests if name.endswith(".tar")} | _tars(dataset)
    wrong = {name for name in sorted(tars) if _is_altered(dataset, name, digests)}
    if sealed and _is_altered(dataset, INDEX, digests):
        return _verify_index(dataset, sort_shards(tars), wrong, digests[INDEX])
    try:
        index = dataset.table(INDEX)
    except (pa.ArrowException, OSError, ValueError, CheckError) as error:
        return [f"{INDEX} cannot be read ({error}); restore it from another copy"]
    problems = [f"{name}: not in {INDEX}" for name in sorted(tars - set(index["shard"]))]
    for name, rows in index.groupby("shard", sort=True):
        if not sealed or name in wrong:
            problems += _verify_shard(dataset, str(name), expected_members(rows))
    return problems


def check_index(dataset: Artifact) -> list[str]:
    """Check that an index lists only shards and bytes that the dataset has.

    An artifact that somebody else made may be sealed with a wrong index.

    Returns:
        A message per problem.

    Raises:
        OutOfReach: The index could not be read.
    """
    try:
        open_index(dataset, "all", digests=True)
        files = {entry.path: entry.size for entry in dataset.manifest.files}
        rows = dataset.table(INDEX, ["key", "shard", "json_offset", "json_size"])
        ends = rows["shard"].map(files).fillna(-1).to_numpy(np.int64)
        offsets, sizes = (rows[f"json_{name}"].to_numpy(np.int64) for name in ("offset", "size"))
        wrong = find_outside(offsets, sizes, ends)
    except NoSuchSplit:
        return []
    except CheckError as error:
        return [str(error)]
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        return [f"{INDEX}: it is not an index of a dataset ({first_line(error)})"]
    if wrong is None:
        return []
    return [f"{INDEX}: the JSON of sample {rows['key'][wrong]!r} is not inside its shard"]


def _tars(dataset: Artifact) -> set[str]:
    """List the tars in the folder of the shards."""
    folder = dataset.path("shards")
    try:
        names = reach(folder, lambda: [path.name for path in folder.iterdir()])
    except OSError:  # no folder
        return set()
    return {f"shards/{name}" for name in names if name.endswith(".tar")}


def _is_altered(dataset: Artifact, name: str, digests: Mapping[str, str]) -> bool:
    """Return whether a file is missing or differs from the sealed one."""
    try:
        path = UPath(dataset.local(name)) if dataset.is_local else dataset.path(name)
        return reach(path, lambda: sha256_file(path)) != digests.get(name)
    except (OSError, CheckError):
        return True


def _verify_index(dataset: Artifact, tars: list[str], wrong: set[str], sha256: str) -> list[str]:
    """Compare the index with the index that is made from the shards."""
    problems = []
    shards = []
    for number, name in enumerate(tars):
        tick("index from shards", number + 1, len(tars), name)
        try:
            shards.append(index_tar(dataset.path(name), name))
        except (DamagedTar, OSError) as error:
            problems.append(f"{name}: {error}")
    if wrong or problems:
        altered = [f"{name}: altered" for name in sorted(wrong) if name not in str(problems)]
        return [*problems, *altered, f"{INDEX}: damaged as well; restore it from another copy"]
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / INDEX
        write_index(shards, again)
        if sha256_file(again) != sha256:
            return [f"{INDEX}: damaged; this version of pyarrow cannot make it again to compare"]
        try:
            present = dataset.path(INDEX).read_bytes()
        except OSError:
            return [f"{INDEX}: missing; it can be made again from the shards, which are whole"]
        at = first_difference(present, again.read_bytes())
        return [
            f"{INDEX}: differs at byte {at} ({_column_at(again, at)}) from what the shards, which "
            "are as sealed, say; restore it from another copy, or pack again"
        ]


def _column_at(path: Path, byte: int) -> str:
    """Name the column and rows that a Parquet file holds at a byte."""
    metadata = pq.read_metadata(path)
    first = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        last = first + group.num_rows - 1
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            if start <= byte < start + column.total_compressed_size:
                return f"column {column.path_in_schema} of samples {first} to {last}"
        first = last + 1
    return "the table's own header or footer"


def expected_members(rows: pd.DataFrame) -> list[Expected]:
    """Return the members of a shard, sorted by offset, from its rows of the index."""
    members = []
    for row in records(rows):
        for suffix, prefix in ((SUFFIX, ""), (".json", "json_")):
            members.append(_expected(row, suffix, prefix))
    return sorted(members, key=lambda member: member.offset)


def _expected(row: dict[str, Any], suffix: str, prefix: str) -> Expected:
    """Make the entry of one member from a row of the index."""
    return Expected(
        key=str(row["key"]),
        name=f"{row['key']}{suffix}",
        offset=int(row[f"{prefix}offset"]),
        size=int(row[f"{prefix}size"]),
        sha256=str(row[f"{prefix}sha256"]),
    )


def _verify_shard(dataset: Artifact, shard: str, members: list[Expected]) -> list[str]:
    """Check a shard against the members that the index lists."""
    try:
        path = UPath(dataset.local(shard)) if dataset.is_local else dataset.path(shard)
        return reach(path, lambda: _compare_file(path, shard, members))
    except FileNotFoundError:
        return [f"{shard}: missing; restore it from another copy, or pack again"]
    except (OSError, CheckError) as error:
        return [f"{shard}: {error}"]


def _compare_file(path: UPath, shard: str, members: list[Expected]) -> list[str]:
    """Check an open shard; the messages begin with its name."""
    with path.open("rb") as file:
        return [f"{shard}: {problem}" for problem in compare(file, members)]


def packed_pixels(dataset: Artifact, chip_ids: Sequence[str]) -> dict[str, str]:
    """Hash the pixels of samples as they are in the shards.

    Args:
        dataset: Artifact of kind ``dataset``.
        chip_ids: Chip ids of the samples.

    Returns:
        ``pixel_sha256`` by chip id; for a damaged sample the message in place of the digest.

    Raises:
        OutOfReach: A shard could not be read.
    """
    index = open_index(dataset, "all")
    numbers = {key: number for number, key in enumerate(index.keys.to_pylist())}
    digests = {}
    with ShardFiles(index) as files:
        for name in chip_ids:
            try:
                digests[name] = pixel_sha256(files.pixels(numbers[name]))
            except DamagedShard as error:
                digests[name] = str(error)
    return digests


def compare(file: BinaryIO, members: list[Expected]) -> Iterator[str]:
    """Yield a message for each difference between a tar and its members, in file order."""
    length = file.seek(0, os.SEEK_END)
    whole = tar_size(member.size for member in members)
    file.seek(0)
    position = 0
    for member in members:
        label = f"sample {member.key}: {member.name}"
        if member.offset != position + BLOCK:
            yield f"{label}: the index says byte {member.offset}, it should be {position + BLOCK}"
            return
        end = member.offset + member.size + len(padding(member.size))
        if length < end:
            yield (
                f"truncated at byte {length} of {whole}: {label} and all samples after it "
                "are lost or incomplete"
            )
            return
        yield from _differences(file.read(BLOCK), header(member.name, member.size), position, label)
        data = file.read(member.size)
        if hashlib.sha256(data).hexdigest() != member.sha256:
            yield (
                f"{label}: SHA-256 of bytes {member.offset} to {member.offset + member.size - 1} "
                "is not that of the index"
            )
        zeros = padding(member.size)
        present = file.read(len(zeros))
        if present != zeros:
            at = member.offset + member.size + first_difference(present, zeros)
            yield f"{label}: padding differs at byte {at}"
        position = end
    rest = file.read()
    if len(rest) < len(END):
        yield f"truncated at byte {length} of {whole}: the end of the tar is missing"
    elif rest != END:
        at = first_difference(rest, END + bytes(max(0, len(rest) - len(END))))
        where = "is longer than written" if len(rest) > len(END) else "differs"
        yield f"the end of the tar {where} at byte {position + min(at, len(rest))}"


def _differences(present: bytes, expected: bytes, position: int, label: str) -> Iterator[str]:
    """Yield a message if a tar header differs from the expected one."""
    if present != expected:
        byte = position + first_difference(present, expected)
        yield f"{label}: tar header differs at byte {byte}"
