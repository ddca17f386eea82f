"""Files of weights: which bytes a name stands for, and proof that they are the ones that are read.

The digest of a file of weights is part of a stage's key. A file may be replaced at any moment, so
its digest is compared with the one that was looked up, before and after the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from data_catalog.errors import RunError, UsageError
from data_catalog.hashing import sha256_file


class WeightsMissing(RunError):
    """Pretrained weights are neither on this machine nor can they be fetched."""


class WeightsMismatch(UsageError):
    """A file of weights does not belong to the model it was given for."""


class WeightsChanged(RunError):
    """A file of weights does not have the bytes it had when it was looked up."""


@dataclass(frozen=True)
class Weights:
    """Resolved weights: the bytes that a name in the settings stands for.

    ``geofm.embeddings.weight_inputs`` resolves names. The fields are strings and
    numbers, so that a process
    can pass the record to another one as JSON.

    Attributes:
        setting: The name as stages keep it: a digest instead of a path or of a published name.
        network: ``efficientnet-lite0``, a timm name, or ``random:NAME``.
        origin: Where the bytes come from: a Python package, the hub that timm names, a local file,
            a geofm model, or a random generator.
        sha256: Digest of the file; empty for ``random``.
        path: The file on this machine; empty for ``random``.
        config: ``config.json`` of a geofm model; else empty.
        model: Digest of the geofm model that has these weights; else empty.
        channels: Input bands to keep, by position in the file; empty: as the file has them.
    """

    setting: str
    network: str
    origin: Literal["package", "hub", "file", "model", "random"]
    sha256: str = ""
    path: str = ""
    config: str = ""
    model: str = ""
    channels: tuple[int, ...] = ()

    def about(self) -> dict[str, Any]:
        """The content of ``config.json`` of a geofm model."""
        found: dict[str, Any] = json.loads(Path(self.config).read_bytes())
        return found


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a local file; computed again only when the file was touched.

    Raises:
        WeightsChanged: the file was replaced while it was read.
    """
    before = _stamp(path)
    digest = _sha256(path, before)
    if _stamp(path) != before:
        _sha256.cache_clear()
        raise WeightsChanged(f"{path} was replaced while it was read; start again")
    return digest


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, ...]) -> str:
    return sha256_file(path)


@contextmanager
def unchanged(weights: Weights) -> Iterator[Path]:
    """The file of resolved weights, checked before and after the block reads it.

    Raises:
        WeightsChanged: its bytes are not those that were looked up.
    """
    path = Path(weights.path)
    _check_bytes(path, weights)
    yield path
    _check_bytes(path, weights)


def _check_bytes(path: Path, weights: Weights) -> None:
    if not path.is_file() or file_sha256(path) != weights.sha256:
        raise WeightsChanged(
            f"the weights {weights.setting} changed after they were looked up: {path} does not "
            f"have the SHA-256 {weights.sha256[:12]}… any more. Leave the file alone while a run "
            "reads it, and start the run again"
        )


def check_named_file(name: str) -> None:
    """Check the file of ``NAME@FILE.safetensors``; other names pass.

    Raises:
        WeightsMissing, WeightsMismatch: as ``check_file``.
    """
    _, at, after = name.partition("@")
    if at and after.endswith(".safetensors"):
        check_file(Path(after).expanduser())


def check_file(file: Path) -> set[str]:
    """Names of the tensors of a safetensors file, whose header must fit its size.

    Raises:
        WeightsMissing: the file does not exist.
        WeightsMismatch: it is a folder, of another format, unreadable or damaged.
    """
    if file.is_dir():
        raise WeightsMismatch(f"{file} is a folder; give NAME@FILE.safetensors")
    if not file.is_file():
        raise WeightsMissing(f"there is no file of weights {file}; give NAME@FILE.safetensors")
    if file.suffix != ".safetensors":
        raise WeightsMismatch(f"{file} is no .safetensors file; other formats can run code")
    try:
        with safe_open(file, framework="np") as tensors:  # reads the header; needs no torch
            return set(tensors.keys())
    except SafetensorError as error:
        raise WeightsMismatch(f"{file} is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise WeightsMismatch(f"{file} cannot be read ({error.strerror or error})") from error
