"""What a step costs in arithmetic, and what the device could do: the share that is used (MFU)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from geofm.config.recipe import PretrainSettings
from geofm.pretraining.objective import Pretrainer
from geofm.pretraining.teacher import Teacher, teach

#: Edge of the square matrices whose product is timed, and how often.
EDGE = {"cpu": 1024, "cuda": 8192}
REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Operations per image, and operations per second of all processes' devices together."""

    flop_per_image: float
    flop_per_second: float

    def used(self, images_per_second: float) -> float:
        """Model FLOP utilisation: the share of what large matrix products reach."""
        return self.flop_per_image * images_per_second / self.flop_per_second


def measure(
    module: Pretrainer, teacher: Teacher | None, settings: PretrainSettings, processes: int
) -> Speed:
    """Count the work of one image and time a matrix product; leaves its gradients behind."""
    device = next(module.parameters()).device
    flop = flop_per_image(module, teacher, settings.size_px, settings.mask_patch_px)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return Speed(flop, ceiling(device.type, dtype, torch.get_num_threads()) * processes)


def freeze_what_never_learns(module: Pretrainer) -> None:
    """Freeze parameters that a backward pass left without a gradient, and drop the gradients.

    Without reconstruction those after the distilled stage get none, and processes that share
    gradients would wait for them.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    module.zero_grad(set_to_none=True)


def flop_per_image(
    module: Pretrainer, teacher: Teacher | None, size_px: int, mask_patch_px: int
) -> float:
    """Floating-point operations of one image: forward, backward and teacher.

    Two per multiplication and addition, of matrix products and convolutions alone, as is usual.
    """
    device = next(module.parameters()).device
    grid = size_px // mask_patch_px
    images = torch.zeros(1, module.student.bands, size_px, size_px, device=device)
    mask = torch.zeros(1, grid * grid, dtype=torch.bool, device=device)
    mask[:, module.student.shown :] = True
    module.eval()  # what is kept for normalisation stays as it is, nothing is computed twice
    with FlopCounterMode(display=False) as counter:
        taught = None
        if teacher is not None:
            taught = teach(teacher, images[:, [0, 0, 0]])
        elif module.teacher_width:
            taught = torch.ones(1, module.teacher_width, device=device)
        module(images, mask.reshape(1, grid, grid), taught).loss.backward()
    module.train()
    return float(counter.get_total_flops())


@cache
def ceiling(device: str, dtype: torch.dtype, threads: int) -> float:
    """Operations per second of a large matrix product on this device, the best of a few.

    Of random numbers: a GPU multiplies equal ones faster than it could any real ones.
    """
    edge = EDGE[device]
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(edge, edge, generator=generator).to(device, dtype)
    best = 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(left, left)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * edge**3 / (time.perf_counter() - started))
    return best
