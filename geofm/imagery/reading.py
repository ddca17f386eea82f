"""Opening remote rasters safely: the driver is chosen here, and nothing beside the file is read.

GDAL opens whatever it recognises; a VRT named ``.tif`` then reads files of this machine. So the
first bytes decide (TIFF or JPEG 2000, nothing else), the driver is pinned, and GDAL sees only a
memory file or one Python file object: no directory, no sidecar, no address of its own to follow.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache
from typing import Any

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from geofm.imagery.hosts import Access, Signing
from geofm.imagery.plain_tiff import PlainTiff, Read
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.ranges import BLOCK, RangeFile, RangeSource
from geofm.imagery.raster import Fetched, Raster, check_source, opened
from geofm.imagery.remote import Piece, Remote, beginning, remote
from geofm.imagery.sent import Call, Later, Sent
from geofm.imagery.tiff_directory import parse

#: Assets opened at once in a process: opening waits for the network.
OPENERS = 24
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
    return _fetch(remote(href, access, signing), href, access, whole)


def _fetch(
    asset: Remote, href: str, access: Access, whole: bool, sent: Sent | None = None
) -> Piece | RangeSource:
    piece = None
    if whole and access.whole_max:
        piece, sent = asset.whole(access.whole_max, sent), None
    return piece or RangeSource(asset, access.retries, where_is(href), sent)


def begin(
    href: str, access: Access, signing: Signing, whole: bool = True, size: int = 0
) -> Call[Piece | RangeSource]:
    """Begin to ``fetch``; what is wrong shows in the result.

    ``size`` is the file's bytes as its item says, 0 where it doesn't: what takes one request is
    asked for at once where that is possible, and all else by a thread.
    """
    whole = whole and access.whole_max > 0 and size <= access.whole_max
    first = beginning(access.whole_max) if whole else BLOCK
    if not whole or 0 < size <= first:
        with suppress(Quarantine):
            asset = remote(href, access, signing)
            sent = asset.send(0, first)
            if sent is not None:
                return Later(sent, lambda sent: _fetch(asset, href, access, whole, sent))
    return openers(os.getpid()).submit(fetch, href, access, signing, whole)


@lru_cache(maxsize=2)
def openers(process: int) -> ThreadPoolExecutor:
    """The threads of a process that open assets (a fork can't use its parent's)."""
    return ThreadPoolExecutor(OPENERS, thread_name_prefix="geofm-open")


def where_is(href: str) -> str:
    """An address as messages show it."""
    return href.partition("?")[0][:200]


def open_raster(fetched: Piece | RangeSource, href: str, declared_sha256: str = "") -> Raster:
    """Open what was fetched, in the thread that will read it.

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
    closing = ExitStack()

    def by_gdal() -> Any:
        memory = MemoryFile(piece.data)
        closing.callback(memory.close)
        return closing.enter_context(_open(memory.name, driver, where, None))

    def bytes_at(offset: int, size: int) -> bytes:
        return piece.data[offset : offset + size]

    fetched = Fetched(sha256, "computed", "", piece.total)
    plain = _plain(driver, bytes_at, piece.total)
    return opened(Raster(by_gdal, bytes_at, plain, fetched, where, None, closing))


def _open_ranges(source: RangeSource, where: str, declared: str) -> Raster:
    driver = driver_of(source.head[:16], where)
    name, closing = f"asset{id(source)}", ExitStack()

    def opener(path: str, mode: str = "rb") -> RangeFile:
        if path != name or mode not in ("r", "rb"):
            raise FileNotFoundError(path)
        return RangeFile(source)

    def by_gdal() -> Any:
        return closing.enter_context(_open(name, driver, where, source, opener=opener))

    fetched = Fetched(
        declared, "declared" if declared else "", "" if declared else source.etag, source.size
    )
    plain = _plain(driver, source.read, source.size)
    closing.callback(source.close)
    return opened(Raster(by_gdal, source.read, plain, fetched, where, source, closing))


def _plain(driver: str, bytes_at: Read, size: int) -> PlainTiff | None:
    return parse(bytes_at, size) if driver == "GTiff" else None


def _open(name: str, driver: str, where: str, source: RangeSource | None, **more: Any) -> Any:
    """Open by a pinned driver; what GDAL says becomes a quarantine."""
    try:
        dataset = rasterio.open(name, driver=driver, **more)
    except (RasterioError, OSError, UnicodeDecodeError) as error:  # the last: of a CRS's name
        check_source(source)
        raise Quarantine("not_a_tiff", f"{where} can't be opened as {driver}") from error
    if source is not None and source.error is not None:
        dataset.close()
        raise source.error
    return dataset
