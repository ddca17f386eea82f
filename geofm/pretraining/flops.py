"""Model FLOP utilisation (MFU): the share of the device's arithmetic that training uses.

``measure_speed`` counts the floating-point operations of one image and times a large matrix
product as the upper bound of the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from geofm.config.recipe import PretrainSettings
from geofm.pretraining.objective import Pretrainer
from geofm.pretraining.teacher import Teacher, teacher_features

#: Edge of the square matrices whose product is timed.
MATRIX_EDGE = {"cpu": 1024, "cuda": 8192}
#: Number of products; the fastest counts.
REPEATS = 5


@dataclass(frozen=True)
class ComputeSpeed:
    """Cost of an image and speed of the hardware.

    Attributes:
        flop_per_image: Floating-point operations of one image, teacher included.
        flop_per_second: Operations per second of all processes' devices together.
    """

    flop_per_image: float
    flop_per_second: float

    def utilisation(self, images_per_second: float) -> float:
        """MFU: share of the speed of large matrix products."""
        return self.flop_per_image * images_per_second / self.flop_per_second


def measure_speed(
    module: Pretrainer, teacher: Teacher | None, settings: PretrainSettings, processes: int
) -> ComputeSpeed:
    """Count the work of one image and time a matrix product.

    The gradients of one backward pass stay in the module, for ``freeze_unused_parameters``.
    """
    device = next(module.parameters()).device
    flop = flop_per_image(module, teacher, settings.size_px, settings.mask_patch_px)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    speed = matmul_speed(device.type, dtype, torch.get_num_threads())
    return ComputeSpeed(flop, speed * processes)


def freeze_unused_parameters(module: Pretrainer) -> None:
    """Freeze parameters without a gradient from a backward pass, and drop all gradients.

    Without reconstruction, parameters after the distilled stage get no gradient. Processes that
    average gradients would wait for them forever.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    module.zero_grad(set_to_none=True)


def flop_per_image(
    module: Pretrainer, teacher: Teacher | None, size_px: int, mask_patch_px: int
) -> float:
    """Count the floating-point operations of one image: forward, backward and teacher.

    Only matrix products and convolutions count, with two operations per multiply-add, as usual.
    """
    device = next(module.parameters()).device
    grid = size_px // mask_patch_px
    images = torch.zeros(1, module.student.bands, size_px, size_px, device=device)
    mask = torch.zeros(1, grid * grid, dtype=torch.bool, device=device)
    mask[:, module.student.visible_patches :] = True
    # Evaluation mode leaves running statistics unchanged and switches activation checkpointing off.
    module.eval()
    with FlopCounterMode(display=False) as counter:
        target = None
        if teacher is not None:
            target = teacher_features(teacher, images[:, [0, 0, 0]])
        elif module.teacher_width:
            target = torch.ones(1, module.teacher_width, device=device)
        module(images, mask.reshape(1, grid, grid), target).loss.backward()
    module.train()
    return float(counter.get_total_flops())


@cache
def matmul_speed(device: str, dtype: torch.dtype, threads: int) -> float:
    """Time a large matrix product; returns operations per second, the best of ``REPEATS``.

    The matrices are random, because a GPU multiplies constant matrices faster than real data.
    ``threads`` is part of the cache's key only.
    """
    edge = MATRIX_EDGE[device]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(edge, edge, generator=generator).to(device, dtype)
    best = 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * edge**3 / (time.perf_counter() - started))
    return best
