"""Read the most common kind of GeoTIFF without GDAL: one band in deflated tiles.

GDAL takes a millisecond to open such a file and inflates it with zlib, while the directory is a few
dozen numbers and libdeflate is twice as fast. `parse` returns None for every file that leaves room
for interpretation: strips, several bands, masks, other compressions, point pixels, unusual
nodata, any unknown tag. `Unsure` reports damage. In both cases GDAL reads the file, so pixels and
errors are always those of GDAL.

Source: TIFF 6.0, sections 14 and 15; BigTIFF; OGC GeoTIFF 1.1.
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

#: Limits: entries of a directory, directories of a file, tiles of a band, bytes of a tile.
MAX_ENTRIES, MAX_DIRECTORIES, MAX_TILES, MAX_TILE_BYTES = 64, 32, 2**18, 2**22
#: Bytes of a file's beginning that are read at once; they hold most of the directory.
HEAD_BYTES = 4096
_FORMS = {1: "B", 2: "s", 3: "H", 4: "I", 12: "d", 16: "Q"}
_DTYPES = {(8, 1): "uint8", (16, 1): "uint16", (16, 2): "int16", (32, 3): "float32",
           (64, 3): "float64"}  # fmt: skip
(_KIND, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR,
 _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _SIZES, _FORMAT, _PIXEL, _TIE, _KEYS, _DOUBLES,
 _TEXTS, _NODATA) = (254, 256, 257, 258, 259, 262, 274, 277, 284, 317, 322, 323, 324, 325, 339,
                     33550, 33922, 34735, 34736, 34737, 42113)  # fmt: skip
#: Tags that affect neither pixels nor location: texts, print resolution, GDAL's metadata.
_IGNORED = {269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 42112}
#: Tags with one number: the default if the tag is absent, and the values that are supported.
_NUMBERS: dict[int, tuple[int, set[int]]] = {
    _KIND: (0, {0}), _COMPRESSION: (1, {8, 32946}), _PHOTOMETRIC: (1, {1}),
    _ORIENTATION: (1, {1}), _SAMPLES: (1, {1}), _PLANAR: (1, {1, 2}), _PREDICTOR: (1, {1, 2}),
}  # fmt: skip
_KNOWN = {*_NUMBERS, _WIDTH, _HEIGHT, _BITS, _TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _SIZES, _FORMAT,
          _PIXEL, _TIE, _KEYS, _DOUBLES, _TEXTS, _NODATA, *_IGNORED}  # fmt: skip
_RASTER_TYPE, _AREA = 1025, 1


#: Returns bytes of the file by offset and size; there are fewer at its end.
Read = Callable[[int, int], bytes]
#: Row and column of a tile.
TilePosition = tuple[int, int]


class Unsure(Exception):
    """The file leaves room for interpretation, or is damaged."""


# Pixels

#: Bytes of decoded tiles that a process keeps, since neighbouring windows share tiles.
CACHE_BYTES = 256 * 2**20


@dataclass
class TileCache:
    """The decoded tiles that were used last, up to ``limit`` bytes, by open file and position."""

    limit: int = CACHE_BYTES
    size: int = 0
    tiles: OrderedDict[tuple[Hashable, Hashable], NDArray[Any]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self, key: tuple[Hashable, Hashable]) -> NDArray[Any] | None:
        """Return a tile, or None if it is not kept."""
        with self._lock:
            if key not in self.tiles:
                return None
            self.tiles.move_to_end(key)
            return self.tiles[key]

    def put(self, key: tuple[Hashable, Hashable], tile: NDArray[Any]) -> None:
        """Keep a tile of an open file, and drop the least recently used ones."""
        with self._lock:
            self.tiles[key] = tile
            self.size += tile.nbytes
            while self.size > self.limit:
                self._drop(next(iter(self.tiles)))

    def forget(self, owner: Hashable) -> None:
        """Drop the tiles of a closed file."""
        with self._lock:
            for key in [key for key in self.tiles if key[0] is owner]:
                self._drop(key)

    def _drop(self, key: tuple[Hashable, Hashable]) -> None:
        self.size -= self.tiles.pop(key).nbytes


TILES = TileCache()


@dataclass(frozen=True)
class PlainTiff:
    """The first directory of a simple file.

    Attributes:
        shape: [height, width] in pixels.
        tile_shape: [height, width] of a tile.
        offsets: First byte of each tile, by rows.
        sizes: Bytes of each tile.
        predictor: 1 for none, 2 for differences along the row.
        transform: Affine coefficients a, b, c, d, e, f; north is up.
        geokeys: The CRS, as it is written in the file.
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

    def tiles(self, row: int, col: int, height: int, width: int) -> Iterator[TilePosition]:
        """Yield the tiles that a window touches, by rows."""
        tile_height, tile_width = self.tile_shape
        for y in range(row // tile_height, -(-(row + height) // tile_height)):
            for x in range(col // tile_width, -(-(col + width) // tile_width)):
                yield y, x

    def range_of(self, position: TilePosition) -> tuple[int, int]:
        """Return the first byte of a tile, and the byte after its last."""
        number = position[0] * -(-self.shape[1] // self.tile_shape[1]) + position[1]
        return self.offsets[number], self.offsets[number] + self.sizes[number]

    def read(
        self, source: Read, owner: Hashable, row: int, col: int, height: int, width: int
    ) -> NDArray[Any]:
        """Read a window.

        A tile that lies completely in the window is not needed by a neighbour; other tiles are
        kept.

        Args:
            source: Returns the file's bytes.
            owner: The open file, for the cache of tiles.
            row: Row of the window's upper left pixel.
            col: Column of the window's upper left pixel.
            height: Height in pixels.
            width: Width in pixels.

        Returns:
            Stored numbers, shape (height, width).

        Raises:
            Unsure: A tile does not agree with the directory, or the window leaves the raster.
        """
        if min(row, col) < 0 or row + height > self.shape[0] or col + width > self.shape[1]:
            raise Unsure("the window leaves the raster")
        pixels = np.empty((height, width), self.dtype)
        tile_height, tile_width = self.tile_shape
        for position in self.tiles(row, col, height, width):
            top, left = position[0] * tile_height - row, position[1] * tile_width - col
            bottom, right = top + tile_height, left + tile_width
            if top >= 0 and left >= 0 and bottom <= height and right <= width:
                self._decode(source, position, pixels[top:bottom, left:right])
                continue
            tile = TILES.get((owner, position))
            if tile is None:
                tile = np.empty(self.tile_shape, self.dtype)
                self._decode(source, position, tile)
                TILES.put((owner, position), tile)
            overlap = tile[max(-top, 0) : height - top, max(-left, 0) : width - left]
            y, x = max(top, 0), max(left, 0)
            pixels[y : y + overlap.shape[0], x : x + overlap.shape[1]] = overlap
        return pixels

    def _decode(self, source: Read, position: TilePosition, into: NDArray[Any]) -> None:
        start, end = self.range_of(position)
        data = source(start, end - start)
        try:
            inflated = imagecodecs.deflate_decode(data, out=into.nbytes)
        except imagecodecs.DeflateError as error:
            raise Unsure(str(error)) from error
        if len(data) != end - start or len(inflated) != into.nbytes:
            raise Unsure("a tile is cut short")
        pixels = np.frombuffer(inflated, into.dtype.newbyteorder("<")).reshape(into.shape)
        if self.predictor == 2:
            imagecodecs.delta_decode(pixels, axis=1, out=into)
        else:
            into[...] = pixels


# The directory


@dataclass(frozen=True)
class _Entry:
    kind: int
    count: int
    value: bytes


@dataclass(frozen=True)
class _File:
    """A little-endian TIFF, classic or big; ``head`` is its beginning."""

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
        """Return the entries by tag, and the offset of the next directory (0 for none)."""
        size, number, room = (8, "Q", 20) if self.big else (2, "I", 12)
        (count,) = struct.unpack("<Q" if self.big else "<H", self.take(offset, size))
        if not 0 < count <= MAX_ENTRIES:
            raise Unsure("an unusual number of entries")
        width = struct.calcsize(number)
        data = self.take(offset + size, count * room + width)
        form = f"<HH{number}{width}s"
        entries: dict[int, _Entry] = {}
        for tag, kind, length, value in struct.iter_unpack(form, data[: count * room]):
            if entries and tag <= next(reversed(entries)):
                raise Unsure("tags out of order")
            entries[tag] = _Entry(kind, length, value)
        return entries, struct.unpack(f"<{number}", data[count * room :])[0]

    def raw(self, entry: _Entry | None) -> bytes:
        """Return the bytes of an entry's values; none if there is no entry."""
        if entry is None:
            return b""
        if entry.kind not in _FORMS or entry.count > MAX_TILES:
            raise Unsure("an unusual entry")
        size = entry.count * struct.calcsize(_FORMS[entry.kind])
        if size <= len(entry.value):
            return entry.value[:size]
        offset = struct.unpack("<Q" if self.big else "<I", entry.value)[0]
        return self.take(offset, size)

    def numbers(self, entry: _Entry | None, kinds: str = "HIQ") -> tuple[Any, ...]:
        """Return the values of an entry."""
        data = self.raw(entry)
        if entry is None:
            return ()
        form = _FORMS[entry.kind]
        if form not in kinds:
            raise Unsure("an entry of another type")
        return struct.unpack(f"<{entry.count}{form}", data)


def parse(read: Read, size: int) -> PlainTiff | None:
    """Parse the directory of a simple file; None if GDAL has to read the file.

    Args:
        read: Returns the file's bytes.
        size: Size of the file, bytes.

    Raises:
        Quarantine: The bytes can't be read.
    """
    try:
        return _parse(read, size)
    except Unsure:
        return None


def _parse(read: Read, size: int) -> PlainTiff:
    head = read(0, HEAD_BYTES)
    if len(head) < 16 or head[:4] not in (b"II*\0", b"II+\0") or size > 2**48:
        raise Unsure("another byte order")
    file = _File(read, head, head[2:3] == b"+")
    if file.big and head[4:8] != b"\x08\0\0\0":
        raise Unsure("unusual offsets")
    (first,) = struct.unpack("<Q" if file.big else "<I", head[8:16] if file.big else head[4:8])
    tags, following = file.directory(first)
    _only_overviews(file, following, {first})
    if not tags.keys() <= _KNOWN:
        raise Unsure("unknown tags")
    values = {tag: _number(file, tags, tag, default) for tag, (default, _) in _NUMBERS.items()}
    if any(values[tag] not in supported for tag, (_, supported) in _NUMBERS.items()):
        raise Unsure("another way to store pixels")
    dtype = _DTYPES.get((_number(file, tags, _BITS, 1), _number(file, tags, _FORMAT, 1)))
    if dtype is None or (values[_PREDICTOR] == 2 and dtype.startswith("float")):
        raise Unsure("another type of pixels")
    height, width, tile_height, tile_width = (
        _number(file, tags, tag, 0) for tag in (_HEIGHT, _WIDTH, _TILE_HEIGHT, _TILE_WIDTH)
    )
    if not (height and width and tile_height and tile_width):
        raise Unsure("no size")
    if tile_height % 16 or tile_width % 16:
        raise Unsure("unusual tiles")
    tile_bytes = tile_height * tile_width * np.dtype(dtype).itemsize
    if tile_bytes > MAX_TILE_BYTES:
        raise Unsure("large tiles")
    count = -(-height // tile_height) * -(-width // tile_width)
    if any(tag not in tags or tags[tag].count != count for tag in (_OFFSETS, _SIZES)):
        raise Unsure("another number of tiles")
    offsets, sizes = file.numbers(tags[_OFFSETS]), file.numbers(tags[_SIZES])
    if not all(offsets) or not all(sizes):
        raise Unsure("tiles that are left out")
    if max(sizes) > 2 * tile_bytes + 1024:
        raise Unsure("tiles that are larger than deflate makes them")
    return PlainTiff(
        shape=(height, width),
        tile_shape=(tile_height, tile_width),
        dtype=dtype,
        offsets=offsets,
        sizes=sizes,
        predictor=values[_PREDICTOR],
        transform=_transform(file, tags),
        nodata=_nodata(file, tags, dtype),
        geokeys=_geokeys(file, tags),
    )


def _number(file: _File, tags: dict[int, _Entry], tag: int, default: int) -> int:
    """Return the only number of a tag."""
    if tag not in tags:
        return default
    numbers = file.numbers(tags[tag])
    if len(numbers) != 1:
        raise Unsure("several numbers instead of one")
    return int(numbers[0])


def _only_overviews(file: _File, following: int, seen: set[int]) -> None:
    """Check that the other directories are overviews, not masks or further pages."""
    while following:
        if following in seen or len(seen) > MAX_DIRECTORIES:
            raise Unsure("directories in a circle")
        seen.add(following)
        tags, following = file.directory(following)
        if _number(file, tags, _KIND, 0) != 1:
            raise Unsure("a mask or another page")


def _transform(file: _File, tags: dict[int, _Entry]) -> tuple[float, ...]:
    pixel, tie = file.numbers(tags.get(_PIXEL), "d"), file.numbers(tags.get(_TIE), "d")
    if len(pixel) != 3 or len(tie) != 6 or tie[:2] != (0.0, 0.0):
        raise Unsure("another georeference")
    if not all(map(math.isfinite, pixel + tie)) or pixel[0] <= 0 or pixel[1] <= 0:
        raise Unsure("an unusual georeference")
    return pixel[0], 0.0, tie[3], 0.0, -pixel[1], tie[4]


def _nodata(file: _File, tags: dict[int, _Entry], dtype: str) -> float | None:
    if _NODATA not in tags:
        return None
    text = file.raw(tags[_NODATA]).rstrip(b"\0 ").decode("latin-1")
    is_integer = np.dtype(dtype).kind in "iu"
    if tags[_NODATA].kind != 2 or not re.fullmatch(r"-?[0-9]{1,9}" if is_integer else "nan", text):
        raise Unsure("unusual nodata")
    value = float(text)
    if is_integer and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
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
