"""Opening remote rasters safely: the driver is chosen here, and nothing beside the file is read.

GDAL opens whatever it recognises; a VRT named ``.tif`` then reads files of this machine. So the
first bytes decide (TIFF or JPEG 2000, nothing else), the driver is pinned, and GDAL sees only a
memory file or one Python file object: no directory, no sidecar, no address of its own to follow.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.windows import Window

from geofm.imagery.hosts import Access, Signing
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.remote import Fault, Piece, Remote, patiently, remote

#: Bytes that are read at once by range, and how many of these blocks are kept.
BLOCK = 64 * 1024
KEPT_BLOCKS = 512
#: Only what is inside the file counts, and damage is an error rather than a warning.
GDAL: dict[str, str | int] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "VSI_CACHE": "FALSE",
    "GDAL_NUM_THREADS": "1",
    "GDAL_CACHEMAX": 256 * 2**20,
}
_MAGIC = {
    b"II*\x00": "GTiff",
    b"MM\x00*": "GTiff",
    b"II+\x00": "GTiff",
    b"MM\x00+": "GTiff",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}


# A file without georeference is a quarantine, not a warning among others.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


@dataclass(frozen=True)
class Fetched:
    """What is known of an asset's bytes.

    Attributes:
        sha256: hex, or empty.
        sha256_from: ``computed`` over all bytes, ``declared`` by the item, or empty.
        etag: as the server told, only where there is no sha256.
        size: bytes.
    """

    sha256: str
    sha256_from: str
    etag: str
    size: int


@dataclass(frozen=True)
class Raster:
    """An open raster; ``read`` is the only way to its pixels."""

    dataset: Any
    fetched: Fetched
    where: str
    source: RangeSource | None = None

    def read(self, band: int, window: Window) -> NDArray[Any]:
        """Pixels [height, width] of one band (counted from 1) inside the raster.

        Raises:
            Quarantine: ``truncated`` when the file is damaged, or what the network says.
        """
        try:
            return np.asarray(self.dataset.read(band, window=window))
        except (RasterioError, ValueError, MemoryError) as error:
            if self.source is not None and self.source.error is not None:
                raise self.source.error from error
            raise Quarantine(
                "truncated",
                f"{self.where}: pixels at {window.col_off},{window.row_off} can't be read",
            ) from error

    def mask(self, band: int, window: Window) -> NDArray[np.bool_]:
        """Where the file itself (mask or alpha band) says that a pixel is valid."""
        try:
            return np.asarray(self.dataset.read_masks(band, window=window)) > 0
        except RasterioError as error:
            raise Quarantine("truncated", f"{self.where}: its mask can't be read") from error


def driver_of(head: bytes, where: str) -> str:
    """The GDAL driver by the first bytes of a file.

    Raises:
        Quarantine: ``not_a_tiff`` with what it looks like instead.
    """
    for magic, driver in _MAGIC.items():
        if head.startswith(magic):
            return driver
    looks = head.lstrip()[:9].lower()
    kind = "an HTML page" if looks.startswith((b"<!doctype", b"<html")) else "something else"
    kind = "a VRT" if looks.startswith(b"<vrt") else kind
    raise Quarantine("not_a_tiff", f"{where} is neither TIFF nor JPEG 2000 but {kind}")


class RangeSource:
    """Blocks of a remote file, read by range and kept for a while. For one thread."""

    def __init__(self, asset: Remote, retries: int, where: str) -> None:
        self.asset, self.retries, self.where = asset, retries, where
        self.blocks: OrderedDict[int, bytes] = OrderedDict()
        self.error: Quarantine | None = None
        first = asset.part(0, BLOCK)
        self.size, self.etag = first.total, first.etag
        self.head = self.blocks[0] = first.data

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file; fewer only at its end."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        first, last = offset // BLOCK, (end - 1) // BLOCK
        missing = [n for n in range(first, last + 1) if n not in self.blocks]
        found = dict(self._fetch(missing[0], missing[-1])) if missing else {}
        pieces = []
        for number in range(first, last + 1):
            block = found.get(number) or self.blocks[number]
            self.blocks[number] = block
            self.blocks.move_to_end(number)
            pieces.append(block)
        while len(self.blocks) > KEPT_BLOCKS:
            self.blocks.popitem(last=False)
        return b"".join(pieces)[offset - first * BLOCK : end - first * BLOCK]

    def _fetch(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Ask for neighbouring blocks at once; a file that changes meanwhile is a fault."""

        def attempt() -> Piece:
            piece = self.asset.part(first * BLOCK, (last + 1) * BLOCK)
            if piece.total != self.size or (piece.etag != self.etag and not self._same(piece)):
                raise Fault("the file changed while it was read")
            return piece

        data = patiently(attempt, self.retries, self.where).data
        for number in range(first, last + 1):
            start = (number - first) * BLOCK
            yield number, data[start : start + BLOCK]

    def _same(self, piece: Piece) -> bool:
        """Whether only the ETag is another one: then the file still begins as it did."""
        begin = self.asset.part(0, BLOCK)
        if begin.data != self.head or begin.total != self.size or begin.etag != piece.etag:
            return False
        self.etag = piece.etag
        return True


class RangeFile(io.RawIOBase):
    """A range source as a file object, which is all that GDAL gets to see."""

    def __init__(self, source: RangeSource) -> None:
        self.source, self.place = source, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the cursor."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.source.size}[whence]
        self.place = base + offset
        return self.place

    def tell(self) -> int:
        """The cursor."""
        return self.place

    def read(self, size: int = -1) -> bytes:
        """Bytes from the cursor; an error is kept for the caller, GDAL can only be told of none."""
        want = self.source.size - self.place if size < 0 else size
        try:
            data = self.source.read(self.place, want)
        except Quarantine as error:
            self.source.error = error
            return b""
        self.place += len(data)
        return data


@contextmanager
def open_asset(
    href: str,
    access: Access,
    signing: Signing | None = None,
    declared_sha256: str = "",
    whole: bool = True,
) -> Iterator[Raster]:
    """Open an asset's raster.

    Args:
        href: as stored in the item.
        access: what may be read, and how.
        signing: how the source signs.
        declared_sha256: hex, from the item; compared where the file is read whole.
        whole: read files up to ``access.whole_max`` whole; False reads ranges only.

    Raises:
        Quarantine: with the reason.
    """
    where = href.partition("?")[0][:200]
    asset = remote(href, access, signing or Signing())
    piece = asset.whole(access.whole_max) if whole else None
    if piece is not None:
        with _open_bytes(piece, where, declared_sha256) as raster:
            yield raster
        return
    source = RangeSource(asset, access.retries, where)
    with _open_ranges(source, where, declared_sha256) as raster:
        yield raster


@contextmanager
def _open_bytes(piece: Piece, where: str, declared: str) -> Iterator[Raster]:
    sha256 = hashlib.sha256(piece.data).hexdigest()
    driver = driver_of(piece.data[:16], where)
    if declared and declared != sha256:
        raise Quarantine("wrong_checksum", f"{where} does not have the sha256 that its item states")
    fetched = Fetched(sha256, "computed", "", piece.total)
    with rasterio.Env(**GDAL), MemoryFile(piece.data) as memory:
        dataset = _open(memory.name, driver, where, None)
        with dataset:
            yield Raster(dataset, fetched, where)


@contextmanager
def _open_ranges(source: RangeSource, where: str, declared: str) -> Iterator[Raster]:
    driver = driver_of(source.head[:16], where)
    name = f"asset{id(source)}"

    def opener(path: str, mode: str = "rb") -> RangeFile:
        if path != name or mode not in ("r", "rb"):
            raise FileNotFoundError(path)
        return RangeFile(source)

    fetched = Fetched(
        declared, "declared" if declared else "", "" if declared else source.etag, source.size
    )
    with rasterio.Env(**GDAL):
        dataset = _open(name, driver, where, source, opener=opener)
        with dataset:
            yield Raster(dataset, fetched, where, source)


def _open(name: str, driver: str, where: str, source: RangeSource | None, **more: Any) -> Any:
    """Open by a pinned driver; what GDAL says becomes a quarantine."""
    try:
        return rasterio.open(name, driver=driver, **more)
    except (RasterioError, OSError) as error:
        if source is not None and source.error is not None:
            raise source.error from error
        raise Quarantine("not_a_tiff", f"{where} can't be opened as {driver}") from error
