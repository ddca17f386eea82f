"""The checkpoint of a run: one file, written atomically, that allows an exact resume.

Random numbers of a step follow from (seed, step, process), so a checkpoint holds no state of a
random generator.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_catalog.errors import RunError, first_line
from data_catalog.storage.atomic import atomic_file
from data_catalog.storage.lock import is_in_use

#: Name of the file in the folder of a run.
CHECKPOINT_FILE = "checkpoint.pt"
#: Columns of ``metrics.parquet`` that the history keeps for each step.
METRIC_COLUMNS = ("loss", "mim", "distill", "lr", "grad_norm")


class BadCheckpoint(RunError):
    """A checkpoint cannot be read, or belongs to another run."""


class CheckpointNotWritten(RunError):
    """A checkpoint could not be written; the previous one is intact."""


@dataclass
class TrainingProgress:
    """Progress of a run, over all its sessions.

    Attributes:
        step: Next step.
        history: One row of ``METRIC_COLUMNS`` per step.
        seconds: Wall-clock seconds in total.
        data_seconds: Seconds of waiting for batches.
        teacher_seconds: Seconds of the teacher's forward passes.
    """

    step: int = 0
    history: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    data_seconds: float = 0.0
    teacher_seconds: float = 0.0


def save_checkpoint(
    folder: Path, identity: str, state: dict[str, Any], progress: TrainingProgress
) -> None:
    """Replace the checkpoint of a run.

    Args:
        folder: Folder of the run.
        identity: Identity of the run; loading with another one fails.
        state: Weights and optimiser state as whole tensors by name.
        progress: Progress of the run.

    Raises:
        CheckpointNotWritten: The disk is full or read-only.
    """
    history = torch.tensor(progress.history, dtype=torch.float64)
    times = [progress.seconds, progress.data_seconds, progress.teacher_seconds]
    content = {
        **state,
        "identity": identity,
        "step": progress.step,
        "history": history.reshape(-1, len(METRIC_COLUMNS)),
        "times": torch.tensor(times).double(),
    }
    try:
        with atomic_file(folder / CHECKPOINT_FILE, sync=True, lock=True) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        exists = (folder / CHECKPOINT_FILE).exists()
        previous = "the one before is intact" if exists else "there is none yet"
        raise CheckpointNotWritten(
            f"the checkpoint of step {progress.step} could not be written to {folder} "
            f"({first_line(error)}); {previous}. Make room and start the same run again"
        ) from error


def load_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    """Load the checkpoint of a run, and remove temporary files of killed processes.

    Returns:
        Its content, or None if there is no checkpoint.

    Raises:
        BadCheckpoint: It is damaged or another run's; the message names the file to delete.
    """
    path = folder / CHECKPOINT_FILE
    for temporary in folder.glob(f".{CHECKPOINT_FILE}.*"):
        if not is_in_use(temporary):
            temporary.unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        # Mapped into memory: of several processes only process 0 reads the tensors.
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found_identity = content["identity"]
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise unusable_checkpoint(folder, first_line(error)) from error
    if found_identity != identity:
        reason = "it belongs to another dataset, other settings or another seed"
        raise unusable_checkpoint(folder, reason)
    return content


def unusable_checkpoint(folder: Path, reason: str) -> BadCheckpoint:
    """The error for a checkpoint that cannot be used."""
    return BadCheckpoint(
        f"the checkpoint {folder / CHECKPOINT_FILE} cannot be used ({reason}); delete it to train "
        "from the beginning"
    )


def read_progress(content: dict[str, Any]) -> TrainingProgress:
    """The progress that a checkpoint holds."""
    history, times = content["history"].tolist(), content["times"].tolist()
    return TrainingProgress(int(content["step"]), history, *times)
