"""Files of a catalogue that lies in a local folder: read below that folder and nowhere else."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from geofm.imagery.quarantine import Quarantine
from geofm.imagery.remote import Piece
from geofm.imagery.sent import Sent

#: Scheme of hrefs below the catalogue's own folder, as ``planet:`` is of the planet's.
SCHEME = "catalog"


def is_local(stac: str) -> bool:
    """Whether a catalogue's address is a path of this machine."""
    return stac.startswith("/")


def folder_of(stac: str) -> str:
    """The folder of a local catalogue, which is that of its root file."""
    path = Path(stac)
    return str(path if path.is_dir() else path.parent)


@dataclass
class LocalAsset:
    """A file below the folder of the catalogue that lists it.

    ``href`` is ``catalog:/path/below/it``; links that lead out of the folder are not followed.
    """

    href: str
    stac: str

    def whole(self, most: int, sent: Sent | None = None) -> Piece | None:
        """All bytes; None when there are more than ``most``."""
        path, size, mark = self._file()
        return Piece(path.read_bytes(), size, mark) if size <= most else None

    def send(self, start: int, end: int) -> Sent | None:
        """Nothing: a disk is read when it is wanted."""
        return None

    def part(self, start: int, end: int, sent: Sent | None = None) -> Piece:
        """Bytes from ``start`` up to ``end`` (or to the end of the file)."""
        path, size, mark = self._file()
        with path.open("rb") as file:
            file.seek(start)
            return Piece(file.read(max(min(end, size) - start, 0)), size, mark)

    def _file(self) -> tuple[Path, int, str]:
        """The file, its size in bytes and a mark that changes when the file does.

        Raises:
            Quarantine: ``bad_href`` for a path out of the folder, ``not_found`` where no file is.
        """
        relative = self.href.removeprefix(f"{SCHEME}:").lstrip("/")
        try:
            folder = Path(folder_of(self.stac)).resolve()
            path = (folder / relative).resolve()
            inside = path.is_relative_to(folder)
            info = path.stat() if inside else None
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte in the path
            raise Quarantine("not_found", f"{self.href!a:.120} does not exist") from error
        if info is None:
            raise Quarantine("bad_href", f"{self.href!a:.120} is not below the catalogue's folder")
        if not stat.S_ISREG(info.st_mode):
            raise Quarantine("not_found", f"{self.href!a:.120} is no file")
        return path, info.st_size, f"{info.st_size}-{info.st_mtime_ns}"
