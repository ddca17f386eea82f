"""A sealed artifact: a folder that nobody changes, local or on an object store."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from upath import UPath

from data_catalog.errors import CheckError, UsageError
from data_catalog.hashing import sha256_file
from data_catalog.manifest import MANIFEST, Manifest, safe_name, what_is_wrong
from data_catalog.storage.address import folder_setting
from data_catalog.storage.reach import (
    file_size,
    is_remote,
    out_of_reach,
    reach,
    read_file,
    read_range,
)
from data_catalog.tables import read_table

#: Bytes of a manifest at most.
MAX_MANIFEST = 2**28


class NotInStore(UsageError):
    """An artifact that the catalogue knows is not in the store that was opened."""


def cache_folder() -> Path:
    """Return the folder for local copies of remote files (``GEOFM_CACHE``, else ~/.cache/geofm)."""
    return folder_setting("GEOFM_CACHE", Path.home() / ".cache" / "geofm")


@dataclass(frozen=True)
class Artifact:
    """An artifact by its address.

    Somebody else may have made it. A name that its manifest or a table gives is a file inside it,
    or an error; links and special files are never followed.
    """

    url: str

    @cached_property
    def root(self) -> UPath:
        """The folder."""
        return UPath(self.url)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, checked against its schema.

        Raises:
            NotInStore: There is no artifact at this address.
            CheckError: The manifest is damaged.
            OutOfReach: It could not be read.
        """
        try:
            return Manifest.model_validate_json(self.manifest_bytes())
        except FileNotFoundError as error:
            raise NotInStore(
                f"there is no artifact at {self.url}: the catalogue knows it, but it is not in "
                "this store; open the store that holds it with --store or GEOFM_STORE"
            ) from error
        except ValueError as error:
            raise CheckError(
                f"{self.path(MANIFEST)} is damaged ({what_is_wrong(error)}); run `geofm verify` "
                "and restore it from another copy"
            ) from error

    def manifest_bytes(self) -> bytes:
        """The manifest as it lies there.

        Raises:
            FileNotFoundError: It is missing.
            CheckError: It is a link or a special file, or too large for a manifest.
            OutOfReach: It could not be read.
        """
        path = self.path(MANIFEST)
        self._require_plain(MANIFEST)
        size = file_size(path)
        if size > MAX_MANIFEST:
            raise CheckError(f"{path} has {size:,} bytes, too many for a manifest")
        return read_file(path)

    @property
    def digest(self) -> str:
        """The digest the folder is named by (``verify`` compares it with the manifest)."""
        return self.root.name

    @property
    def kind(self) -> str:
        """The kind: items, chips, embeddings, decisions, dataset, model, scores or report."""
        return self.manifest.kind

    def path(self, name: str) -> UPath:
        """Address of one file of the artifact.

        Raises:
            CheckError: The name means no file inside the artifact.
        """
        try:
            return self.root / safe_name(name)
        except ValueError as error:
            raise CheckError(f"{self.url}: {error}") from error

    def local(self, name: str) -> Path:
        """A local file with the content of ``name``; fetched once from an object store.

        A file that is missing locally is an error when it is opened.

        Raises:
            CheckError: It is a link or a special file, or missing on the object store; or a
                fetched file does not have the digest of the manifest.
            OutOfReach: It could not be fetched.
        """
        path = self.path(name)
        if self.is_local:
            self._require_plain(name)
            return Path(path.path)
        copy = cache_folder() / "artifacts" / self.digest / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            beside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}")  # threads fetch too
            sealed = {f.path: f for f in self.manifest.files}.get(name)
            try:
                if sealed is not None and file_size(path) != sealed.size:
                    raise CheckError(f"{path} is damaged: it has not {sealed.size} bytes")
                beside.write_bytes(read_file(path))
            except FileNotFoundError as error:
                raise CheckError(
                    f"{path} is missing, also when asked for again; run `geofm verify "
                    f"{self.digest[:12]}` and restore it from another copy"
                ) from error
            if sealed is not None and sha256_file(beside) != sealed.sha256:
                beside.unlink()
                raise CheckError(f"{path} is damaged: its sha256 is not {sealed.sha256}")
            beside.replace(copy)
        return copy

    def _require_plain(self, name: str) -> None:
        """Raise CheckError where a local name, or a folder above it, is a link or special file."""
        if not self.is_local:
            return
        path = Path(self.root.path)
        *folders, last = name.split("/")
        for part, wanted in (*((f, stat.S_ISDIR) for f in folders), (last, stat.S_ISREG)):
            path /= part
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                return  # reported when it is opened
            except OSError as error:
                raise out_of_reach(path, error) from error
            if not wanted(mode):
                raise CheckError(f"{path} is {kind_of_file(mode)}; it is not opened")

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a local file system."""
        return not is_remote(self.root)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A Parquet file of the artifact as a frame.

        Raises:
            CheckError: It is missing, or a link or special file.
            OutOfReach: It could not be read.
        """
        path = self.local(name)
        self._require_readable(path)
        return read_table(path, columns)

    def json(self, name: str) -> Any:
        """A JSON file of the artifact; raises as ``table``, and CheckError for a damaged file."""
        path = self.local(name)
        self._require_readable(path)
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckError(
                f"{path} is damaged: it is no JSON ({type(error).__name__})"
            ) from error

    def _require_readable(self, path: Path) -> None:
        """Raise the right error for a local file that is missing, or that may not be read."""
        try:
            reach(UPath(path), lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        except OSError as error:
            raise CheckError(
                f"{path}: {error.strerror}; run `geofm verify {self.digest[:12]}` and restore it "
                "from another copy"
            ) from error

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset``, without reading the rest of it.

        Raises:
            CheckError: The file has no such bytes, or is missing, a link or a special file.
            OutOfReach: It could not be read.
        """
        path = self.path(name)
        self._require_plain(name)
        if offset < 0 or size < 0:
            raise CheckError(f"{path} has no {size} bytes from {offset}")
        try:
            data = read_range(path, offset, size)
        except OSError as error:
            raise CheckError(f"{path} is missing or no file ({error.strerror or error})") from error
        if len(data) < size:
            raise CheckError(f"{path} ends before byte {offset + size}")
        return data


def kind_of_file(mode: int) -> str:
    """Say what a file is that is no regular file."""
    kinds = {
        stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
        stat.S_IFREG: "a file in the place of a folder",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "a special file")
