"""Artifacts: sealed folders, local or on an object store, that are never changed.

An artifact may come from an untrusted source, so its manifest, names and files are checked before
use.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from data_catalog.errors import CheckError, UsageError
from data_catalog.manifest import MANIFEST, Manifest, explain_invalid, safe_name
from data_catalog.storage.address import folder_setting
from data_catalog.storage.atomic import write_atomic
from data_catalog.storage.reach import (
    file_size,
    is_remote,
    out_of_reach,
    reach,
    read_file,
    read_range,
)

if TYPE_CHECKING:
    import pandas as pd

#: Largest manifest (bytes) that is read.
MAX_MANIFEST = 2**28


class NotInStore(UsageError):
    """An artifact that the catalogue records is not in the store that was opened."""


def cache_folder() -> Path:
    """Return the folder of local copies of remote files (``GEOFM_CACHE``, else ~/.cache/geofm)."""
    return folder_setting("GEOFM_CACHE", Path.home() / ".cache" / "geofm")


@dataclass(frozen=True)
class Artifact:
    """An artifact by its address.

    A file name from its manifest or a table means a file inside it, or raises an error; links and
    special files are never followed.
    """

    url: str

    @cached_property
    def root(self) -> UPath:
        """Folder of the artifact."""
        return UPath(self.url)

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest, checked against its schema.

        Raises:
            NotInStore: There is no artifact at this address.
            CheckError: The manifest is damaged.
            OutOfReach: The manifest could not be read.
        """
        try:
            return Manifest.model_validate_json(self.manifest_bytes())
        except FileNotFoundError as error:
            raise NotInStore(
                f"there is no artifact at {self.url}: the catalogue records it, but it is not in "
                "this store; open the store that holds it with --store or GEOFM_STORE"
            ) from error
        except ValueError as error:
            raise CheckError(
                f"{self.path(MANIFEST)} is damaged ({explain_invalid(error)}); run `geofm verify` "
                "and restore it from another copy"
            ) from error

    def manifest_bytes(self) -> bytes:
        """Read the manifest's bytes, unchecked.

        Raises:
            FileNotFoundError: The manifest is missing.
            CheckError: The manifest is a link or a special file, or too large.
            OutOfReach: The manifest could not be read.
        """
        path = self.path(MANIFEST)
        self._require_plain(MANIFEST)
        size = file_size(path)
        if size > MAX_MANIFEST:
            raise CheckError(
                f"{path} has {size:,} bytes, and a manifest has at most {MAX_MANIFEST:,}"
            )
        return read_file(path)

    @property
    def digest(self) -> str:
        """Digest in the folder's name (``verify`` compares it with the manifest)."""
        return self.root.name

    @property
    def kind(self) -> str:
        """Kind of the artifact (``Stage.kind``), e.g. items, chips, dataset or model."""
        return self.manifest.kind

    def path(self, name: str) -> UPath:
        """Return the address of one file of the artifact.

        Raises:
            CheckError: The name is not a path inside the artifact.
        """
        try:
            return self.root / safe_name(name)
        except ValueError as error:
            raise CheckError(f"{self.url}: {error}") from error

    def local(self, name: str) -> Path:
        """Return a local file with the content of ``name``; an object is downloaded once.

        The path of a missing local file is returned all the same: opening it fails.

        Raises:
            CheckError: The file is a link or a special file, or missing on the object store; or a
                downloaded file does not have the digest of the manifest.
            OutOfReach: The file could not be downloaded.
        """
        path = self.path(name)
        if self.is_local:
            self._require_plain(name)
            return Path(path.path)
        copy = cache_folder() / "artifacts" / self.digest / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            sealed = {entry.path: entry for entry in self.manifest.files}.get(name)
            try:
                if sealed is not None and file_size(path) != sealed.size:
                    raise CheckError(f"{path} is damaged: it does not have {sealed.size} bytes")
                data = read_file(path)
            except FileNotFoundError as error:
                raise CheckError(
                    f"{path} is missing, also on a second attempt; run `geofm verify "
                    f"{self.digest[:12]}` and restore it from another copy"
                ) from error
            if sealed is not None and hashlib.sha256(data).hexdigest() != sealed.sha256:
                raise CheckError(f"{path} is damaged: its sha256 is not {sealed.sha256}")
            write_atomic(copy, data)
        return copy

    def _require_plain(self, name: str) -> None:
        """Raise CheckError if a local file, or a folder above it, is a link or special file."""
        if not self.is_local:
            return
        path = Path(self.root.path)
        *folders, last = name.split("/")
        for part, wanted in (*((f, stat.S_ISDIR) for f in folders), (last, stat.S_ISREG)):
            path /= part
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                return  # opening it reports the problem
            except OSError as error:
                raise out_of_reach(path, error) from error
            if not wanted(mode):
                raise CheckError(f"{path} is {kind_of_file(mode)}; it is not opened")

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a local file system."""
        return not is_remote(self.root)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read a Parquet file of the artifact.

        Raises:
            CheckError: The file is missing, or a link or special file.
            OutOfReach: The file could not be read.
        """
        from data_catalog.tables import read_table  # pandas and pyarrow load slowly

        path = self.local(name)
        self._require_readable(path)
        return read_table(path, columns)

    def json(self, name: str) -> Any:
        """Read a JSON file of the artifact.

        Raises:
            CheckError: The file is missing, a link or special file, or no JSON.
            OutOfReach: The file could not be read.
        """
        path = self.local(name)
        self._require_readable(path)
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckError(
                f"{path} is damaged: it is not JSON ({type(error).__name__}); run `geofm verify "
                f"{self.digest[:12]}` and restore it from another copy"
            ) from error

    def _require_readable(self, path: Path) -> None:
        """Raise CheckError for a missing local file, OutOfReach for one that may not be read."""
        try:
            reach(UPath(path), lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        except OSError as error:
            raise CheckError(
                f"{path}: {error.strerror}; run `geofm verify {self.digest[:12]}` and restore it "
                "from another copy"
            ) from error

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of a file from ``offset``, without reading the rest of it.

        Raises:
            CheckError: The file ends before, or is missing, a link or a special file.
            OutOfReach: The file could not be read.
        """
        path = self.path(name)
        self._require_plain(name)
        if offset < 0 or size < 0:
            raise CheckError(f"{path}: {size} bytes from {offset} are not a range of a file")
        try:
            data = read_range(path, offset, size)
        except OSError as error:
            reason = error.strerror or error
            raise CheckError(f"{path} is missing or not a file ({reason})") from error
        if len(data) < size:
            raise CheckError(f"{path} ends before byte {offset + size}")
        return data


def kind_of_file(mode: int) -> str:
    """Describe a file by its mode, for a message on a file of the wrong type."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFREG: "a file in the place of a folder",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")
