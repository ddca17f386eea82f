"""A run's state on disk: whole or absent, and enough to go on to the last bit."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_catalog.errors import RunError

NAME = "checkpoint.pt"
#: Columns of metrics.parquet that are kept per step.
COLUMNS = ("loss", "mim", "distill", "lr", "grad_norm")


class BadCheckpoint(RunError):
    """A checkpoint cannot be read or belongs to another network."""


@dataclass
class Progress:
    """How far a run is: the next step, its history (a row per step) and the time it took."""

    step: int
    history: list[list[float]]
    seconds: float


def save(
    folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    history = torch.tensor(progress.history, dtype=torch.float64)
    state = {
        "step": progress.step,
        "history": history.reshape(-1, len(COLUMNS)),
        "seconds": progress.seconds,
        "module": module.state_dict(),
        "optimiser": optimiser.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": _cuda_state(),
    }
    beside = folder / f".{NAME}.{os.getpid()}"
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / NAME)


def _cuda_state() -> torch.Tensor | None:
    """Random state of the GPU, where one is in use."""
    used = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
    return torch.cuda.get_rng_state() if used else None


def restore(folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Put the last checkpoint into module, optimiser and random state; step 0 without one.

    Raises:
        BadCheckpoint: it is damaged; says which file to delete.
    """
    path = folder / NAME
    for stale in folder.glob(f".{NAME}.*"):
        stale.unlink(missing_ok=True)
    if not path.exists():
        return Progress(0, [], 0.0)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadCheckpoint(
            f"the checkpoint {path} cannot be used ({str(error).splitlines()[0]}); delete it to "
            "train from the beginning"
        ) from error
    if state["random_cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"])
    return Progress(int(state["step"]), state["history"].tolist(), float(state["seconds"]))
