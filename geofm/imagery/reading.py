"""Opening remote rasters safely: the driver is chosen here, and nothing beside the file is read.

GDAL opens whatever it recognises; a VRT named ``.tif`` then reads files of this machine. So the
first bytes decide (TIFF or JPEG 2000, nothing else), the driver is pinned, and GDAL sees only a
memory file or one Python file object: no directory, no sidecar, no address of its own to follow.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.windows import Window

from geofm.imagery.hosts import Access, Signing
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.ranges import Range, RangeFile, RangeSource
from geofm.imagery.remote import Piece, remote

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
    """An open raster; ``read`` is the only way to its pixels. For one thread at a time.

    As a context it closes itself.
    """

    dataset: Any
    known: Fetched
    where: str
    source: RangeSource | None
    closing: ExitStack

    def __enter__(self) -> Raster:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.closing.close()

    @property
    def fetched(self) -> Fetched:
        """What is known of the bytes by now: an ETag may have been a passing fault."""
        if self.source is None or self.known.sha256:
            return self.known
        return replace(self.known, etag=self.source.etag)

    def ranges(self, band: int, window: Window) -> list[Range]:
        """Byte ranges of the compressed blocks that a window touches; empty where nobody knows.

        Raises:
            Quarantine: ``truncated`` when a block lies beyond the end of the file.
        """
        if self.source is None:
            return []
        data, found = self.dataset, []
        height, width = data.block_shapes[band - 1]
        for row in range(window.row_off // height, -(-(window.row_off + window.height) // height)):
            for col in range(window.col_off // width, -(-(window.col_off + window.width) // width)):
                block = [
                    int(data.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=band) or 0)
                    for what in ("OFFSET", "SIZE")
                ]
                if all(block):
                    found.append((block[0], sum(block)))
        if any(end > self.source.size for _, end in found):
            raise Quarantine("truncated", f"{self.where} ends before its pixels do")
        return found

    def read(self, band: int, window: Window) -> NDArray[Any]:
        """Pixels [height, width] of one band (counted from 1) inside the raster.

        Raises:
            Quarantine: ``truncated`` when the file is damaged, or what the network says.
        """
        what = f"pixels at {window.col_off},{window.row_off}"
        return self._ask(lambda: np.asarray(self.dataset.read(band, window=window)), what)

    def mask(self, band: int, window: Window) -> NDArray[np.bool_]:
        """Where the file itself (mask or alpha band) says that a pixel is valid.

        Raises:
            Quarantine: as ``read``.
        """
        return self._ask(lambda: np.asarray(self.dataset.read_masks(band, window=window)) > 0,
                         "its mask")  # fmt: skip

    def _ask(self, call: Callable[[], NDArray[Any]], what: str) -> NDArray[Any]:
        """What GDAL reads; a fault of the network is one, whatever GDAL makes of it."""
        try:
            found = call()
        except (RasterioError, ValueError, MemoryError) as error:
            check_source(self.source)
            raise Quarantine("truncated", f"{self.where}: {what} can't be read") from error
        check_source(self.source)
        return found


def check_source(source: RangeSource | None) -> None:
    """Raise what went wrong while GDAL was reading, which it may have taken for an end of file.

    Raises:
        Quarantine: as the network said.
    """
    if source is not None and source.error is not None:
        raise source.error


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


def fetch(href: str, access: Access, signing: Signing, whole: bool = True) -> Piece | RangeSource:
    """An asset's bytes, or its beginning; any thread may wait for them.

    Args:
        href: as stored in the item.
        access: what may be read, and how.
        signing: how the source signs.
        whole: read files up to ``access.whole_max`` whole; False reads ranges only.

    Raises:
        Quarantine: with the reason.
    """
    asset = remote(href, access, signing)
    piece = asset.whole(access.whole_max) if whole and access.whole_max else None
    return piece or RangeSource(asset, access.retries, where_is(href))


def where_is(href: str) -> str:
    """An address as messages show it."""
    return href.partition("?")[0][:200]


def open_raster(fetched: Piece | RangeSource, href: str, declared_sha256: str = "") -> Raster:
    """Open what was fetched, in the thread that will read it, within ``rasterio.Env(**GDAL)``.

    Args:
        fetched: by ``fetch``.
        href: as stored in the item.
        declared_sha256: hex, from the item; compared where the file was read whole.

    Raises:
        Quarantine: with the reason.
    """
    if isinstance(fetched, RangeSource):
        return _open_ranges(fetched, where_is(href), declared_sha256)
    return _open_bytes(fetched, where_is(href), declared_sha256)


def _open_bytes(piece: Piece, where: str, declared: str) -> Raster:
    sha256 = hashlib.sha256(piece.data).hexdigest()
    driver = driver_of(piece.data[:16], where)
    if declared and declared != sha256:
        raise Quarantine("wrong_checksum", f"{where} does not have the sha256 that its item states")
    fetched = Fetched(sha256, "computed", "", piece.total)
    memory, closing = MemoryFile(piece.data), ExitStack()
    closing.callback(memory.close)
    dataset = closing.enter_context(_open(memory.name, driver, where, None))
    return Raster(dataset, fetched, where, None, closing)


def _open_ranges(source: RangeSource, where: str, declared: str) -> Raster:
    driver = driver_of(source.head[:16], where)
    name = f"asset{id(source)}"

    def opener(path: str, mode: str = "rb") -> RangeFile:
        if path != name or mode not in ("r", "rb"):
            raise FileNotFoundError(path)
        return RangeFile(source)

    fetched = Fetched(
        declared, "declared" if declared else "", "" if declared else source.etag, source.size
    )
    closing = ExitStack()
    dataset = closing.enter_context(_open(name, driver, where, source, opener=opener))
    return Raster(dataset, fetched, where, source, closing)


def _open(name: str, driver: str, where: str, source: RangeSource | None, **more: Any) -> Any:
    """Open by a pinned driver; what GDAL says becomes a quarantine."""
    try:
        dataset = rasterio.open(name, driver=driver, **more)
    except (RasterioError, OSError) as error:
        check_source(source)
        raise Quarantine("not_a_tiff", f"{where} can't be opened as {driver}") from error
    if source is not None and source.error is not None:
        dataset.close()
        raise source.error
    return dataset
