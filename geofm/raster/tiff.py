"""The plainest and most usual GeoTIFF, read without GDAL: one band in deflated tiles.

GDAL takes a millisecond to open such a file and inflates with zlib, while its directory is a few
dozen numbers and libdeflate is twice as fast. What is damaged is :class:`Unsure`; then GDAL reads
the file and has the last word, so that pixels and errors are GDAL's (TIFF 6.0, sections 14 and 15).
"""

from __future__ import annotations

import math
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

# The directory of a GeoTIFF, where it is so plain that no two readers could differ about it.
# ``parse`` returns None for all that leaves room for interpretation, and GDAL looks
# instead: stripes,
# several bands, masks, other compressions, pixels that are points, odd nodata, any tag it does not
# know (TIFF 6.0; BigTIFF; OGC GeoTIFF 1.1).

#: Most entries of a directory, directories of a file, tiles of a band and bytes of a tile.
MOST_ENTRIES, MOST_DIRECTORIES, MOST_TILES, MOST_TILE = 64, 32, 2**18, 2**22
#: Bytes of the beginning of a file that are looked at together.
HEAD = 4096
_FORMS = {1: "B", 2: "s", 3: "H", 4: "I", 12: "d", 16: "Q"}
_DTYPES = {(8, 1): "uint8", (16, 1): "uint16", (16, 2): "int16", (32, 3): "float32",
           (64, 3): "float64"}  # fmt: skip
(_KIND, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR,
 _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _SIZES, _FORMAT, _PIXEL, _TIE, _KEYS, _DOUBLES,
 _TEXTS, _NODATA) = (254, 256, 257, 258, 259, 262, 274, 277, 284, 317, 322, 323, 324, 325, 339,
                     33550, 33922, 34735, 34736, 34737, 42113)  # fmt: skip
#: Tags that change neither pixels nor places: texts, resolution in print, GDAL's metadata.
_IGNORED = {269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 42112}
#: Tags of one number: what is usual where the tag is absent, and what is understood.
_NUMBERS: dict[int, tuple[int, set[int]]] = {
    _KIND: (0, {0}), _COMPRESSION: (1, {8, 32946}), _PHOTOMETRIC: (1, {1}),
    _ORIENTATION: (1, {1}), _SAMPLES: (1, {1}), _PLANAR: (1, {1, 2}), _PREDICTOR: (1, {1, 2}),
}  # fmt: skip
_KNOWN = {*_NUMBERS, _WIDTH, _HEIGHT, _BITS, _TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _SIZES, _FORMAT,
          _PIXEL, _TIE, _KEYS, _DOUBLES, _TEXTS, _NODATA, *_IGNORED}  # fmt: skip
_RASTER_TYPE, _AREA = 1025, 1


@dataclass(frozen=True)
class _Entry:
    kind: int
    count: int
    value: bytes


@dataclass(frozen=True)
class _File:
    """A little-endian TIFF, classic or big; ``head`` is its beginning, where most of it lies."""

    read: Read
    head: bytes
    big: bool

    def take(self, offset: int, size: int) -> bytes:
        end = offset + size
        data = self.head[offset:end] if end <= len(self.head) else self.read(offset, size)
        if len(data) != size:
            raise Unsure("the file ends in its directory")
        return data

    def directory(self, offset: int) -> tuple[dict[int, _Entry], int]:
        """Entries by tag, and where the next directory lies (0: nowhere)."""
        size, number, room = (8, "Q", 20) if self.big else (2, "I", 12)
        (count,) = struct.unpack("<Q" if self.big else "<H", self.take(offset, size))
        if not 0 < count <= MOST_ENTRIES:
            raise Unsure("an odd number of entries")
        width = struct.calcsize(number)
        data = self.take(offset + size, count * room + width)
        form = f"<HH{number}{width}s"
        found: dict[int, _Entry] = {}
        for tag, kind, length, value in struct.iter_unpack(form, data[: count * room]):
            if found and tag <= next(reversed(found)):
                raise Unsure("tags out of order")
            found[tag] = _Entry(kind, length, value)
        return found, struct.unpack(f"<{number}", data[count * room :])[0]

    def raw(self, entry: _Entry | None) -> bytes:
        """The bytes of an entry's values, none where there is no entry."""
        if entry is None:
            return b""
        if entry.kind not in _FORMS or entry.count > MOST_TILES:
            raise Unsure("an odd entry")
        size = entry.count * struct.calcsize(_FORMS[entry.kind])
        if size <= len(entry.value):
            return entry.value[:size]
        place = struct.unpack("<Q" if self.big else "<I", entry.value)[0]
        return self.take(place, size)

    def numbers(self, entry: _Entry | None, kinds: str = "HIQ") -> tuple[Any, ...]:
        """The values of an entry."""
        data = self.raw(entry)
        if entry is None:
            return ()
        form = _FORMS[entry.kind]
        if form not in kinds:
            raise Unsure("an entry of another type")
        return struct.unpack(f"<{entry.count}{form}", data)


def parse(read: Read, size: int) -> PlainTiff | None:
    """The directory of a plain file; None where GDAL has to look.

    Args:
        read: gives the file's bytes.
        size: of the file, bytes.

    Raises:
        Quarantine: when bytes can't be had.
    """
    try:
        return _parse(read, size)
    except Unsure:
        return None


def _parse(read: Read, size: int) -> PlainTiff:
    head = read(0, HEAD)
    if len(head) < 16 or head[:4] not in (b"II*\0", b"II+\0") or size > 2**48:
        raise Unsure("another byte order")
    file = _File(read, head, head[2:3] == b"+")
    if file.big and head[4:8] != b"\x08\0\0\0":
        raise Unsure("odd offsets")
    (first,) = struct.unpack("<Q" if file.big else "<I", head[8:16] if file.big else head[4:8])
    tags, following = file.directory(first)
    _only_overviews(file, following, {first})
    if not tags.keys() <= _KNOWN:
        raise Unsure("tags of other meanings")
    one = {tag: _one(file, tags, tag, usual) for tag, (usual, _) in _NUMBERS.items()}
    if any(one[tag] not in known for tag, (_, known) in _NUMBERS.items()):
        raise Unsure("another way to store pixels")
    dtype = _DTYPES.get((_one(file, tags, _BITS, 1), _one(file, tags, _FORMAT, 1)))
    if dtype is None or (one[_PREDICTOR] == 2 and dtype.startswith("float")):
        raise Unsure("another type of pixels")
    height, width, down, over = (
        _one(file, tags, tag, 0) for tag in (_HEIGHT, _WIDTH, _TILE_HEIGHT, _TILE_WIDTH)
    )
    if not (height and width and down and over) or down % 16 or over % 16:
        raise Unsure("an odd size")
    tile = down * over * np.dtype(dtype).itemsize
    if tile > MOST_TILE:
        raise Unsure("large tiles")
    count = -(-height // down) * -(-width // over)
    if any(tag not in tags or tags[tag].count != count for tag in (_OFFSETS, _SIZES)):
        raise Unsure("another number of tiles")
    offsets, sizes = file.numbers(tags[_OFFSETS]), file.numbers(tags[_SIZES])
    if not all(offsets) or not all(sizes):
        raise Unsure("tiles that are left out")
    if max(sizes) > 2 * tile + 1024:
        raise Unsure("tiles that deflate did not make")
    return PlainTiff(
        shape=(height, width), tile_shape=(down, over), dtype=dtype, offsets=offsets, sizes=sizes,
        predictor=one[_PREDICTOR], transform=_transform(file, tags),
        nodata=_nodata(file, tags, dtype),
        geokeys=_geokeys(file, tags),
    )  # fmt: skip


def _one(file: _File, tags: dict[int, _Entry], tag: int, usual: int) -> int:
    """The only number of a tag."""
    if tag not in tags:
        return usual
    found = file.numbers(tags[tag])
    if len(found) != 1:
        raise Unsure("several numbers for one")
    return int(found[0])


def _only_overviews(file: _File, following: int, seen: set[int]) -> None:
    """What follows is smaller copies, no masks and no further pages."""
    while following:
        if following in seen or len(seen) > MOST_DIRECTORIES:
            raise Unsure("directories in a circle")
        seen.add(following)
        tags, following = file.directory(following)
        if _one(file, tags, _KIND, 0) != 1:
            raise Unsure("a mask or another page")


def _transform(file: _File, tags: dict[int, _Entry]) -> tuple[float, ...]:
    pixel, tie = file.numbers(tags.get(_PIXEL), "d"), file.numbers(tags.get(_TIE), "d")
    if len(pixel) != 3 or len(tie) != 6 or tie[:2] != (0.0, 0.0):
        raise Unsure("another georeference")
    if not all(map(math.isfinite, pixel + tie)) or pixel[0] <= 0 or pixel[1] <= 0:
        raise Unsure("an odd georeference")
    return pixel[0], 0.0, tie[3], 0.0, -pixel[1], tie[4]


def _nodata(file: _File, tags: dict[int, _Entry], dtype: str) -> float | None:
    if _NODATA not in tags:
        return None
    text = file.raw(tags[_NODATA]).rstrip(b"\0 ").decode("latin-1")
    whole = np.dtype(dtype).kind in "iu"
    if tags[_NODATA].kind != 2 or not re.fullmatch(r"-?[0-9]{1,9}" if whole else "nan", text):
        raise Unsure("odd nodata")
    value = float(text)
    if whole and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        raise Unsure("nodata that no pixel has")
    return value


def _geokeys(file: _File, tags: dict[int, _Entry]) -> bytes:
    keys = file.numbers(tags.get(_KEYS), "H")
    if len(keys) < 4 or len(keys) != 4 * (keys[3] + 1):
        raise Unsure("no CRS")
    for start in range(4, len(keys), 4):
        if keys[start] == _RASTER_TYPE and keys[start + 1 : start + 4] != (0, 1, _AREA):
            raise Unsure("pixels are points")
    parts = [file.raw(tags.get(tag)) for tag in (_KEYS, _DOUBLES, _TEXTS)]
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


# Decoded tiles that a neighbouring window will want as well, of all open files together.

#: Bytes of decoded tiles that a process keeps.
KEPT = 256 * 2**20


@dataclass
class Decoded:
    """The tiles that were used last, up to ``most`` bytes, by open file and place in it."""

    most: int = KEPT
    size: int = 0
    tiles: OrderedDict[tuple[Hashable, Hashable], NDArray[Any]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self, key: tuple[Hashable, Hashable]) -> NDArray[Any] | None:
        """A tile, if it is still there."""
        with self._lock:
            if key not in self.tiles:
                return None
            self.tiles.move_to_end(key)
            return self.tiles[key]

    def put(self, key: tuple[Hashable, Hashable], tile: NDArray[Any]) -> None:
        """Keep a tile of an open file, in place of those that nobody used for longest."""
        with self._lock:
            self.tiles[key] = tile
            self.size += tile.nbytes
            while self.size > self.most:
                self._drop(next(iter(self.tiles)))

    def forget(self, owner: Hashable) -> None:
        """Drop the tiles of a file that is closed."""
        with self._lock:
            for key in [key for key in self.tiles if key[0] is owner]:
                self._drop(key)

    def _drop(self, key: tuple[Hashable, Hashable]) -> None:
        self.size -= self.tiles.pop(key).nbytes


DECODED = Decoded()

#: Gives bytes of the file by offset and size; fewer at its end.
Read = Callable[[int, int], bytes]
#: Row and column of a tile.
Place = tuple[int, int]


class Unsure(Exception):
    """The file is not as plain as it seemed."""


@dataclass(frozen=True)
class PlainTiff:
    """What the first directory says.

    Attributes:
        shape: pixels, [height, width].
        tile_shape: the same of a tile.
        offsets: first byte of each tile, by rows; ``sizes`` their bytes.
        predictor: 1, or 2 for differences along the row.
        transform: a, b, c, d, e, f; north is up.
        geokeys: the CRS, as it is written in the file.
    """

    shape: tuple[int, int]
    tile_shape: tuple[int, int]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    predictor: int
    transform: tuple[float, ...]
    nodata: float | None
    geokeys: bytes

    def tiles(self, row: int, col: int, height: int, width: int) -> Iterator[Place]:
        """The tiles that a window touches, by rows."""
        down, over = self.tile_shape
        for y in range(row // down, -(-(row + height) // down)):
            for x in range(col // over, -(-(col + width) // over)):
                yield y, x

    def range_of(self, place: Place) -> tuple[int, int]:
        """First byte of a tile and the one after its last."""
        number = place[0] * -(-self.shape[1] // self.tile_shape[1]) + place[1]
        return self.offsets[number], self.offsets[number] + self.sizes[number]

    def read(
        self, source: Read, owner: Hashable, row: int, col: int, height: int, width: int
    ) -> NDArray[Any]:
        """Pixels [height, width] of a window.

        A tile that lies whole in the window will not be wanted by a neighbour; others are kept.

        Args:
            source: gives the file's bytes.
            owner: the open file, under which decoded tiles are kept.
            row: of the window's upper left pixel.
            col: the same.
            height: pixels.
            width: pixels.

        Raises:
            Unsure: when a tile is not what the directory says, or the window leaves the raster.
        """
        if min(row, col) < 0 or row + height > self.shape[0] or col + width > self.shape[1]:
            raise Unsure("the window leaves the raster")
        found = np.empty((height, width), self.dtype)
        down, over = self.tile_shape
        for place in self.tiles(row, col, height, width):
            top, left = place[0] * down - row, place[1] * over - col
            if top >= 0 and left >= 0 and top + down <= height and left + over <= width:
                self._decode(source, place, found[top : top + down, left : left + over])
                continue
            tile = DECODED.get((owner, place))
            if tile is None:
                tile = np.empty(self.tile_shape, self.dtype)
                self._decode(source, place, tile)
                DECODED.put((owner, place), tile)
            first, start = max(-top, 0), max(-left, 0)
            some = tile[first : height - top, start : width - left]
            y, x = max(top, 0), max(left, 0)
            found[y : y + some.shape[0], x : x + some.shape[1]] = some
        return found

    def _decode(self, source: Read, place: Place, into: NDArray[Any]) -> None:
        start, end = self.range_of(place)
        data = source(start, end - start)
        try:
            plain = imagecodecs.deflate_decode(data, out=into.nbytes)
        except imagecodecs.DeflateError as error:
            raise Unsure(str(error)) from error
        if len(data) != end - start or len(plain) != into.nbytes:
            raise Unsure("a tile is cut short")
        pixels = np.frombuffer(plain, into.dtype.newbyteorder("<")).reshape(into.shape)
        if self.predictor == 2:
            imagecodecs.delta_decode(pixels, axis=1, out=into)
        else:
            into[...] = pixels
