"""Tars that are the same bytes for the same members, with the place of each member's data.

Plain ustar (POSIX 1003.1-1988), which GNU tar, Python and WebDataset read: no owner, no times,
mode 0644, two blocks of zeros at the end. A member's header follows from its name and size
alone, so a reader that knows them can check every bit of the file.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data_catalog.errors import CheckError

BLOCK = 512
#: What ends a tar: two blocks of zeros.
END = bytes(2 * BLOCK)
#: What eleven octal digits cannot say any more.
LARGEST = 8 * 2**30
#: Small members are written together.
BUFFER = 2**20


class DamagedTar(CheckError):
    """A tar is not what a writer wrote."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: ``offset`` and ``size`` are the byte range of its data."""

    name: str
    offset: int
    size: int
    sha256: str


@lru_cache(maxsize=128)
def _frame(name_bytes: int) -> tuple[bytes, bytes, bytes, int]:
    """What headers of names of one length share: three pieces, and the sum of their bytes.

    Between them come the name, the size (11 octal digits) and the checksum (6).
    """
    after_name = bytes(100 - name_bytes) + b"0000644\0" + 2 * b"0000000\0"
    after_size = b"\0" + b"00000000000\0"
    after_sum = b"\0 0" + bytes(100) + b"ustar\x0000" + bytes(247)
    # the checksum's own field counts as eight spaces, two of which stand in the last piece
    total = sum(after_name) + sum(after_size) + sum(after_sum[2:]) + 8 * ord(" ")
    return after_name, after_size, after_sum, total


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data; the same whatever Python's version.

    Raises:
        ValueError: for a name that is empty or has more than 100 bytes, or 8 GiB and more.
    """
    text = name.encode()
    if not 0 < len(text) <= 100 or b"\0" in text or not 0 <= size < LARGEST:
        raise ValueError(f"a plain tar has no place for {size} bytes named {name!r}")
    after_name, after_size, after_sum, total = _frame(len(text))
    octal = b"%011o" % size
    checksum = b"%06o" % (total + sum(text) + sum(octal))
    return b"".join((text, after_name, octal, after_size, checksum, after_sum))


def padding(size: int) -> bytes:
    """The zeros after ``size`` bytes of data up to the next whole block."""
    return bytes(-size % BLOCK)


def tar_size(sizes: Iterable[int]) -> int:
    """Bytes of a tar whose members have these sizes."""
    return sum(BLOCK + size + (-size % BLOCK) for size in sizes) + len(END)


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], digests: bool = True
) -> list[Member]:
    """Write a tar of (name, data) in the order given; returns where each member's data is.

    Without ``digests`` the members' ``sha256`` stays empty.
    """
    written = []
    offset = 0
    with path.open("wb", buffering=BUFFER) as file:
        for name, data in members:
            size = len(data)
            file.write(header(name, size))
            file.write(data)
            file.write(padding(size))
            digest = hashlib.sha256(data).hexdigest() if digests else ""
            written.append(Member(name, offset + BLOCK, size, digest))
            offset += BLOCK + size + (-size % BLOCK)
        file.write(END)
    return written


def walk(file: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """Members of a tar written by ``write_tar`` as (name, offset, data), in order.

    Raises:
        DamagedTar: at the first header, padding or end that is not as written, with the byte.
    """
    offset = 0
    while True:
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            if file.read() != bytes(BLOCK):
                raise DamagedTar(f"the end of the tar at byte {offset} is not two blocks of zeros")
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            whole = header(info.name, info.size) == block
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedTar(f"no tar header at byte {offset}: {error}") from error
        if not whole:
            raise DamagedTar(f"the tar header of {info.name!r} at byte {offset} is not as written")
        data = file.read(info.size)
        if len(data) < info.size or file.read(len(padding(info.size))) != padding(info.size):
            raise DamagedTar(f"{info.name!r} at byte {offset} is truncated or badly padded")
        yield info.name, offset + BLOCK, data
        offset += BLOCK + info.size + (-info.size % BLOCK)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """The data at one place of a file.

    Raises:
        DamagedTar: when the file ends before.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise _cut_off(path, offset)
    return data


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> Iterator[memoryview]:
    """The data at each (offset, size) of one file, opened once.

    Each is to be used before the next is asked for: they share one piece of memory, which so
    stays in the processor's cache.

    Raises:
        DamagedTar: when the file ends before a range does.
    """
    memory = bytearray()
    with path.open("rb", buffering=0) as file:
        for offset, size in ranges:
            if len(memory) < size:
                memory = bytearray(size)
            file.seek(offset)
            data = memoryview(memory)[:size]
            if file.readinto(data) < size:
                raise _cut_off(path, offset)
            yield data.toreadonly()


def _cut_off(path: Path, offset: int) -> DamagedTar:
    return DamagedTar(
        f"{path.name} ends inside a member at byte {offset}: run `geofm verify`, and make the "
        "artifact again"
    )
