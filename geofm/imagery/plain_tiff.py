"""The plainest and most usual GeoTIFF, read without GDAL: one band in deflated tiles.

GDAL takes a millisecond to open such a file and inflates with zlib, while its directory is a few
dozen numbers and libdeflate is twice as fast. What is damaged is :class:`Unsure`; then GDAL reads
the file and has the last word, so that pixels and errors are GDAL's (TIFF 6.0, sections 14 and 15).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from geofm.imagery.decoded import DECODED

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
