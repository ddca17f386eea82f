"""The arithmetic of a run: threads, determinism and random state, put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic

from data_catalog.errors import UsageError
from data_catalog.process import cores


def check_device(device: str) -> None:
    """Refuse a GPU that PyTorch does not find.

    Raises:
        UsageError: names the field and the remedy.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise UsageError(
            f"compute.device is cuda, but PyTorch {torch.__version__}, which {built}, finds no GPU "
            "here; set compute.device to auto or cpu, or check the driver with nvidia-smi"
        )


def pick_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def device_name(device: str) -> str:
    """What the run record calls the device."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def cpu_threads() -> int:
    """Threads of the processor: ``OMP_NUM_THREADS``, or every core this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return cores()


def threads_each(processes: int) -> int:
    """Threads of each of so many processes that share the processor."""
    return max(1, cpu_threads() // processes)


@contextmanager
def arithmetic(device: str, seed: int, threads: int) -> Iterator[None]:
    """Fixed threads, a seeded random state and, on the CPU, deterministic algorithms only."""
    memory: Any = deterministic
    before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    fill = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):  # a GPU's is set anew at every step
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        if device == "cpu":
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            memory.fill_uninitialized_memory = fill
            torch.set_num_threads(before)
