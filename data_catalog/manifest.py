"""The manifest: what an artifact is, what it was made from and with, and every file's digest."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from data_catalog.canonical import canonical, digest_of
from data_catalog.errors import RunError


class ConservationError(RunError):
    """Rows went missing or were doubled in a stage."""


class FileEntry(BaseModel):
    """One data file: path relative to the artifact, SHA-256 (hex), size in bytes."""

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str
    size: int


class Manifest(BaseModel):
    """Everything about an artifact that may not change. Times and hosts are in the run record.

    ``inputs`` maps a role to the digest of an input artifact; ``counts`` holds at least
    ``rows_in`` and ``rows_out``; ``dropped`` says how many rows fell for which reason;
    ``facts`` is what the stage alone knows (encoder, certificate, bands, ...).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["geofm/1"] = "geofm/1"
    kind: str
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
