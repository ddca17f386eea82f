"""The manifest: what an artifact is, what it was made from and with, and every file's digest."""

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
#: A kind of artifact, which is the name of a folder.
KIND = r"^[a-z][a-z0-9_-]{0,31}$"
#: Folders of a path in an artifact at most.
MAX_DEPTH = 32
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]|^[A-Za-z]:")


def what_is_wrong(error: Exception) -> str:
    """Return the first thing that is wrong with a manifest, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return (str(error).splitlines() or [type(error).__name__])[0]


class ConservationError(RunError):
    """Rows went missing or were doubled in a stage."""


def safe_name(name: str) -> str:
    """Return the path of a file in an artifact, if it can only mean a file inside it.

    Raises:
        ValueError: It is empty, absolute or too long, goes upwards, or has a backslash, a drive
            letter or a control character.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 255 for part in parts)
        or len(parts) > MAX_DEPTH
        or _UNSAFE.search(name)
    ):
        shown = repr(name) if len(name) < 200 else f"{name[:200]!r}…"
        raise ValueError(f"{shown} is no path of a file in an artifact")
    return name


def folders_of(names: Iterable[str]) -> set[str]:
    """Return every folder that these paths go through."""
    found: set[str] = set()
    for name in names:
        while (name := name.rpartition("/")[0]) and name not in found:
            found.add(name)
    return found


class FileEntry(BaseModel):
    """One data file: path relative to the artifact, SHA-256 (hex), size in bytes."""

    model_config = ConfigDict(frozen=True)

    path: Annotated[str, AfterValidator(safe_name)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0, lt=2**63)]


class Manifest(BaseModel):
    """Everything about an artifact that may not change. Times and hosts are in the run record.

    ``inputs`` maps a role to the digest of an input artifact; ``counts`` holds at least
    ``rows_in`` and ``rows_out``; ``dropped`` says how many rows fell for which reason;
    ``facts`` is what the stage alone knows (encoder, certificate, bands, ...).
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
            raise ValueError("two files have one path, perhaps in other letters")
        if MANIFEST in names:
            raise ValueError(f"{MANIFEST} lists itself")
        both = folders_of(names) & names
        if both:
            raise ValueError(f"{min(both)!r} is a file and a folder")
        return files

    def to_bytes(self) -> bytes:
        """The canonical bytes that are written and hashed."""
        return canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """The artifact's name: SHA-256 (hex) of the canonical manifest."""
        return digest_of(self.model_dump(mode="json"))

    def check_conservation(self) -> None:
        """Rows in = rows out + rows dropped, each drop with a reason.

        Raises:
            ConservationError: when the sum does not hold.
        """
        rows_in, rows_out = self.counts.get("rows_in", 0), self.counts.get("rows_out", 0)
        dropped = sum(self.dropped.values())
        if rows_in != rows_out + dropped:
            raise ConservationError(
                f"stage {self.stage}: {rows_in} rows in, but {rows_out} out and {dropped} dropped "
                f"({self.dropped}); this is a defect of the stage, nothing was published"
            )


def software_versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of the packages that can influence a stage's bytes."""
    found = {}
    for name in sorted(packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
