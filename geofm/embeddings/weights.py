"""Weight files: the record of a resolved file, and the check that the file has not changed.

The digest of a weight file is part of a stage's key. A file can be replaced at any time, so its
digest is compared with the resolved one before and after it is read.
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
    """Pretrained weights are not on this machine and cannot be downloaded."""


class WeightsMismatch(UsageError):
    """A weight file does not belong to the network it was given for."""


class WeightsChanged(RunError):
    """A weight file no longer has the bytes it had when it was resolved."""


@dataclass(frozen=True)
class Weights:
    """A weight file, resolved from a name in the settings.

    ``geofm.embeddings.weight_inputs`` resolves names. The fields are strings and numbers, so that
    a process can pass the record to another one as JSON.

    Attributes:
        setting: The name as stages keep it: a digest instead of a path or a published name.
        network: ``efficientnet-lite0``, a timm name, or ``random:NAME``.
        origin: Origin of the bytes: a Python package, the hub that timm names, a local file, a
            geofm model, or a random generator.
        sha256: Digest of the file; empty for ``random``.
        path: Path of the file on this machine; empty for ``random``.
        config: ``config.json`` of a geofm model; otherwise empty.
        model: Digest of the geofm model that has these weights; otherwise empty.
        channels: Positions of the input bands to keep; empty: all bands of the file.
    """

    setting: str
    network: str
    origin: Literal["package", "hub", "file", "model", "random"]
    sha256: str = ""
    path: str = ""
    config: str = ""
    model: str = ""
    channels: tuple[int, ...] = ()

    def read_config(self) -> dict[str, Any]:
        """Read ``config.json`` of a geofm model."""
        config: dict[str, Any] = json.loads(Path(self.config).read_bytes())
        return config


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hex; cached until the file is modified.

    Raises:
        WeightsChanged: The file was replaced while it was read.
    """
    before = _file_state(path)
    digest = _cached_sha256(path, before)
    if _file_state(path) != before:
        _cached_sha256.cache_clear()
        raise WeightsChanged(f"{path} was replaced while it was read; start again")
    return digest


def _file_state(path: Path) -> tuple[int, ...]:
    """Values that change when a file is written or replaced."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=64)
def _cached_sha256(path: Path, state: tuple[int, ...]) -> str:
    return sha256_file(path)


@contextmanager
def verified_file(weights: Weights) -> Iterator[Path]:
    """Yield the path of resolved weights, and verify the file before and after the block.

    Raises:
        WeightsChanged: The file does not have the resolved digest.
    """
    path = Path(weights.path)
    _verify(path, weights)
    yield path
    _verify(path, weights)


def _verify(path: Path, weights: Weights) -> None:
    if not path.is_file() or file_sha256(path) != weights.sha256:
        raise WeightsChanged(
            f"the weights {weights.setting} changed after they were looked up: {path} does not "
            f"have the SHA-256 {weights.sha256[:12]}… any more. Leave the file alone while a run "
            "reads it, and start the run again"
        )


def check_named_file(name: str) -> None:
    """Check the file of ``NAME@FILE.safetensors``; other names pass.

    Raises:
        WeightsMissing, WeightsMismatch: See ``check_weights_file``.
    """
    _, at, after = name.partition("@")
    if at and after.endswith(".safetensors"):
        check_weights_file(Path(after).expanduser())


def check_weights_file(file: Path) -> set[str]:
    """Check that a file is an intact safetensors file, by its header and size.

    Returns:
        Names of its tensors.

    Raises:
        WeightsMissing: The file does not exist.
        WeightsMismatch: It is a folder, has another format, or is unreadable or damaged.
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
