"""Files that no honest program writes: TIFF tag by tag, JPEG 2000 with a false size."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from affine import Affine
from rasterio.io import MemoryFile

from tests.geofm.stac.small_world import NORTH, WEST

SHORT, LONG, DOUBLE, LONG8, ASCII = 3, 4, 12, 16, 2
_FORMS = {SHORT: "H", LONG: "I", DOUBLE: "d", LONG8: "Q"}
UTM31 = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32631)
Tags = dict[int, tuple[int, Any]]


def usual(edge: int = 32, tiles: int = 1) -> Tags:
    """The tags of an uint16 band of ``edge`` pixels in tiles of 32, deflate, UTM zone 31."""
    return {
        256: (LONG, (edge,)), 257: (LONG, (edge,)), 258: (SHORT, (16,)), 259: (SHORT, (8,)),
        262: (SHORT, (1,)), 277: (SHORT, (1,)), 322: (SHORT, (32,)), 323: (SHORT, (32,)),
        324: (LONG, (0,) * tiles), 325: (LONG, (0,) * tiles), 339: (SHORT, (1,)),
        33550: (DOUBLE, (10.0, 10.0, 0.0)), 33922: (DOUBLE, (0, 0, 0, WEST, NORTH, 0)),
        34735: (SHORT, UTM31),
    }  # fmt: skip


def tile(seed: int = 0) -> bytes:
    """A compressed tile of 32 x 32 pixels."""
    pixels = np.random.default_rng(seed).integers(1, 4000, (32, 32)).astype("<u2")
    return zlib.compress(pixels.tobytes())


def craft(
    tags: Tags, data: bytes = b"", big: bool = False, following: int = 0, place: bool = True
) -> bytes:
    """A little-endian TIFF with one directory, its tags' values, and then ``data``.

    Args:
        tags: type and values by number.
        data: one tile; every offset in tag 324 leads to it unless ``place`` is False.
        big: BigTIFF.
        following: where the next directory is said to lie.
        place: fill in tags 324 and 325.
    """
    head, entry = (16, 20) if big else (8, 12)
    number, room = ("Q", 8) if big else ("I", 4)
    start = head + (8 if big else 2) + entry * len(tags) + room
    values = {n: _packed(*value) for n, value in tags.items()}
    at, places = start, {}
    for n, value in values.items():
        if len(value) > room:
            places[n], at = at, at + len(value)
    if place:
        for n, filled in ((324, at), (325, len(data))):
            kind, old = tags[n]
            values[n] = _packed(kind, (filled,) * len(old))
    out = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) if big else struct.pack("<2sHI", b"II", 42, 8)
    out += struct.pack("<Q" if big else "<H", len(tags))
    for n in sorted(tags):
        kind, content = tags[n]
        count = len(content) + 1 if kind == ASCII else len(content)
        where = (
            struct.pack(f"<{number}", places[n]) if n in places else values[n].ljust(room, b"\0")
        )
        out += struct.pack(f"<HH{number}", n, kind, count) + where
    out += struct.pack(f"<{number}", following)
    return out + b"".join(values[n] for n in places) + data


def _packed(kind: int, content: Any) -> bytes:
    if kind == ASCII:
        return bytes(content.encode()) + b"\0"
    return struct.pack(f"<{len(content)}{_FORMS[kind]}", *content)


def vast_jpeg2000() -> bytes:
    """A JPEG 2000 file of 32 x 32 pixels whose header says 2^31 - 1 squared."""
    place = Affine(10, 0, WEST, 0, -10, NORTH)
    with MemoryFile(ext=".jp2") as memory:
        with memory.open(driver="JP2OpenJPEG", height=32, width=32, count=1, dtype="uint16",
                         crs="EPSG:32631", transform=place) as file:  # fmt: skip
            file.write(np.ones((32, 32), np.uint16), 1)
        data = bytes(memory.read())
    vast = struct.pack(">I", 2**31 - 1)
    box = data.index(b"ihdr") + 4
    data = data[:box] + vast * 2 + data[box + 8 :]
    size = data.index(b"\xff\x51") + 6
    return data[:size] + vast * 2 + data[size + 8 :]
