"""The device that networks run on: the processor, or one GPU."""

from __future__ import annotations

from data_catalog.errors import UsageError
from geofm.runtime.native import torch


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
    """Return ``cpu`` or ``cuda``; ``auto`` takes a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
