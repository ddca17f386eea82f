"""The manifest of an artifact: kind, inputs, settings, software, counts, and its files' digests.

The manifest determines the artifact's digest. Times and hosts differ from run to run, so they are
in the run record and never in a manifest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal
from unicodedata import normalize

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from data_catalog.errors import RunError
from data_catalog.hashing import canonical, digest_of

MANIFEST = "manifest.json"
#: Pattern of a kind of artifact; it is also the name of a folder.
KIND = r"^[a-z][a-z0-9_-]{0,31}$"
#: Most names in the path of a file in an artifact.
MAX_DEPTH = 32
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]|^[A-Za-z]:")


def explain_invalid(error: Exception) -> str:
    """Return the first problem of an invalid manifest, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        return f"{field}: {first['msg']}" if field else str(first["msg"])
    return (str(error).splitlines() or [type(error).__name__])[0]


class ConservationError(RunError):
    """A stage lost or doubled rows."""


def safe_name(name: str) -> str:
    """Return the path of a file in an artifact unchanged, if it can only mean a file inside it.

    Raises:
        ValueError: The path is empty, absolute or too long, goes upwards, or has a backslash, a
            drive letter or a control character.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 255 for part in parts)
        or len(parts) > MAX_DEPTH
        or _UNSAFE.search(name)
    ):
        shown = repr(name) if len(name) < 200 else f"{name[:200]!r}…"
        raise ValueError(f"{shown} is not a path of a file in an artifact")
    return name


def folders_of(names: Iterable[str]) -> set[str]:
    """Return all folders on these paths."""
    folders: set[str] = set()
    for name in names:
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    return folders


class FileEntry(BaseModel):
    """A data file: path relative to the artifact, SHA-256 (hex), size in bytes."""

    model_config = ConfigDict(frozen=True)

    path: Annotated[str, AfterValidator(safe_name)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0, lt=2**63)]


class Manifest(BaseModel):
    """The properties of an artifact that determine its digest.

    Attributes:
        inputs: Digests of the input artifacts, by role.
        settings: The settings that the stage depends on.
        seed: Seed of the random numbers; 0 if the stage draws none.
        software: Versions of the packages that can change the bytes.
        counts: Numbers of rows; at least ``rows_in`` and ``rows_out``.
        dropped: Numbers of dropped rows, by reason.
        facts: Results that only this stage has (encoder, certificate, bands, ...).
        deterministic: Whether the same inputs, settings and seed give the same bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["geofm/1"] = "geofm/1"
    kind: Annotated[str, StringConstraints(pattern=KIND)]
    stage: str
    version: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    seed: int
    software: dict[str, str]
    counts: dict[str, int]
    dropped: dict[str, int]
    facts: dict[str, Any]
    deterministic: bool
    files: list[FileEntry]

    @field_validator("files")
    @classmethod
    def _each_file_once(cls, files: list[FileEntry]) -> list[FileEntry]:
        """Refuse paths that are one file, or a file and a folder, on some file system."""
        names = {normalize("NFC", entry.path).casefold() for entry in files}
        if len(names) != len(files):
            raise ValueError("two files have one path, perhaps in upper and lower case")
        if MANIFEST in names:
            raise ValueError(f"{MANIFEST} lists itself")
        both = folders_of(names) & names
        if both:
            raise ValueError(f"{min(both)!r} is a file and a folder")
        return files

    def to_bytes(self) -> bytes:
        """Return the canonical bytes, which are written and hashed."""
        return canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Digest of the artifact: SHA-256 (hex) of the canonical manifest."""
        return digest_of(self.model_dump(mode="json"))

    def check_conservation(self) -> None:
        """Check that rows in = rows out + rows dropped.

        Raises:
            ConservationError: The sum does not hold.
        """
        rows_in, rows_out = self.counts.get("rows_in", 0), self.counts.get("rows_out", 0)
        dropped = sum(self.dropped.values())
        if rows_in != rows_out + dropped:
            raise ConservationError(
                f"stage {self.stage}: {rows_in} rows in, but {rows_out} out and {dropped} dropped "
                f"({self.dropped}); this is a defect of the stage, nothing was published"
            )


def software_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of packages; ``absent`` for a package that is not installed."""
    versions = {}
    for name in sorted(packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions
