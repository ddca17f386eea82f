"""A sealed artifact: a folder that nobody changes, local or on an object store."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from upath import UPath

from data_catalog.address import folder_setting
from data_catalog.canonical import sha256_file
from data_catalog.errors import CheckError, UsageError
from data_catalog.manifest import Manifest
from data_catalog.tables import read_table

MANIFEST = "manifest.json"


class NotInStore(UsageError):
    """An artifact that the catalogue knows is not in the store that was opened."""


def cache_folder() -> Path:
    """Return the folder for local copies of remote files (``GEOFM_CACHE``, else ~/.cache/geofm)."""
    return folder_setting("GEOFM_CACHE", Path.home() / ".cache" / "geofm")


@dataclass(frozen=True)
class Artifact:
    """An artifact by its address. Reading never trusts more than the manifest says."""

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
        """
        try:
            data = self.path(MANIFEST).read_bytes()
        except FileNotFoundError as error:
            raise NotInStore(
                f"there is no artifact at {self.url}: the catalogue knows it, but it is not in "
                "this store; open the store that holds it with --store or GEOFM_STORE"
            ) from error
        return Manifest.model_validate_json(data)

    @property
    def digest(self) -> str:
        """The digest the folder is named by (``verify`` compares it with the manifest)."""
        return self.root.name

    @property
    def kind(self) -> str:
        """The kind: items, chips, embeddings, decisions, dataset, model, scores or report."""
        return self.manifest.kind

    def path(self, name: str) -> UPath:
        """Address of one file of the artifact."""
        return self.root / name

    def local(self, name: str) -> Path:
        """A local file with the content of ``name``; fetched once from an object store.

        Raises:
            CheckError: when a fetched file does not have the digest of the manifest.
        """
        if self.is_local:
            return Path(self.root.path) / name
        copy = cache_folder() / "artifacts" / self.digest / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            beside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}")  # threads fetch too
            beside.write_bytes(self.path(name).read_bytes())
            expected = {f.path: f.sha256 for f in self.manifest.files}.get(name)
            if expected is not None and sha256_file(beside) != expected:
                beside.unlink()
                raise CheckError(f"{self.path(name)} is damaged: its sha256 is not {expected}")
            beside.replace(copy)
        return copy

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a local file system."""
        return self.root.protocol in ("", "file", "local")

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A Parquet file of the artifact as a frame."""
        return read_table(self.local(name), columns)

    def json(self, name: str) -> Any:
        """A JSON file of the artifact."""
        return json.loads(self.local(name).read_bytes())

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset``, without reading the rest of it."""
        with self.path(name).open("rb") as file:
            file.seek(offset)
            return bytes(file.read(size))
