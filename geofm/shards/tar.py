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
from pathlib import Path
from typing import BinaryIO

from data_catalog.errors import CheckError

BLOCK = 512
#: What ends a tar: two blocks of zeros.
END = bytes(2 * BLOCK)


class DamagedTar(CheckError):
    """A tar is not what a writer wrote."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: ``offset`` and ``size`` are the byte range of its data."""

    name: str
    offset: int
    size: int
    sha256: str


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data.

    Raises:
        ValueError: for a name of more than 100 bytes in its last part, or 8 GiB and more.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


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
    with path.open("wb") as file:
        for name, data in members:
            file.write(header(name, len(data)))
            file.write(data)
            file.write(padding(len(data)))
            digest = hashlib.sha256(data).hexdigest() if digests else ""
            written.append(Member(name, offset + BLOCK, len(data), digest))
            offset += BLOCK + len(data) + (-len(data) % BLOCK)
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


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The data at each (offset, size) of one file, opened once.

    Raises:
        DamagedTar: when the file ends before a range does.
    """
    with path.open("rb") as file:
        for offset, size in ranges:
            file.seek(offset)
            data = file.read(size)
            if len(data) < size:
                raise DamagedTar(
                    f"{path.name} ends inside a member at byte {offset}: run "
                    "`geofm verify`, and make the artifact again"
                )
            yield data
