"""A run's state on disk: whole or absent, and enough to go on to the last bit.

What is random in a step is drawn from (seed, step, process), so no state of a generator is kept.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_catalog.errors import RunError
from data_catalog.storage.lock import is_in_use, mark_in_use

NAME = "checkpoint.pt"
#: Columns of metrics.parquet that are kept per step.
COLUMNS = ("loss", "mim", "distill", "lr", "grad_norm")


class BadCheckpoint(RunError):
    """A checkpoint cannot be read or belongs to another run."""


class CheckpointNotWritten(RunError):
    """There was no room for a checkpoint; the one before is still whole."""


@dataclass
class Progress:
    """How far a run is: the next step, its history (a row per step) and where the time went.

    ``seconds`` is all of it, ``waited`` what the loop waited for data, ``teaching`` what the
    teacher took; all sessions of a run together.
    """

    step: int = 0
    history: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    teaching: float = 0.0


def save(folder: Path, identity: str, state: dict[str, Any], progress: Progress) -> None:
    """Write a checkpoint beside the old one, then put it in its place.

    Args:
        folder: of the run.
        identity: of the run, so that another one refuses the file.
        state: weights and optimiser, whole, by name.
        progress: of the run.

    Raises:
        CheckpointNotWritten: the disk is full or read-only.
    """
    history = torch.tensor(progress.history, dtype=torch.float64)
    times = torch.tensor([progress.seconds, progress.waited, progress.teaching]).double()
    content = {
        **state,
        "identity": identity,
        "step": progress.step,
        "history": history.reshape(-1, len(COLUMNS)),
        "times": times,
    }
    try:
        with whole_file(folder / NAME) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch wraps what the file system says
        last = "the one before is intact" if (folder / NAME).exists() else "there is none yet"
        raise CheckpointNotWritten(
            f"the checkpoint of step {progress.step} could not be written to {folder} "
            f"({str(error).splitlines()[0]}); {last}. Make room and start the same run again"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its place, and put it there whole or not at all.

    It is locked while it is written, so that ``load`` knows it from what a killed process left.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            mark_in_use(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(folder: Path, identity: str) -> dict[str, Any] | None:
    """The last checkpoint's content, or None without one.

    Raises:
        BadCheckpoint: it is damaged or another run's; says which file to delete.
    """
    path = folder / NAME
    for stale in folder.glob(f".{NAME}.*"):
        if not is_in_use(stale):
            stale.unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        # mapped, not read: of several processes only the first needs what is in it
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        held = content["identity"]
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise refused(folder, str(error).splitlines()[0]) from error
    if held != identity:
        raise refused(folder, "it belongs to another dataset, other settings or another seed")
    return content


def refused(folder: Path, why: str) -> BadCheckpoint:
    """The error for a checkpoint that is of no use."""
    return BadCheckpoint(
        f"the checkpoint {folder / NAME} cannot be used ({why}); delete it to train from the "
        "beginning"
    )


def progress_of(content: dict[str, Any]) -> Progress:
    """How far the run was when it wrote this."""
    return Progress(int(content["step"]), content["history"].tolist(), *content["times"].tolist())
