"""AdamW with the paper's groups, and its learning rate step by step."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geofm.config.recipe import PretrainSettings
from geofm.pretraining.objective import Pretrainer

log = logging.getLogger("geofm.pretraining")

#: Learning rates in the settings are per this many images of batch.
REFERENCE_BATCH = 512
#: Where the warm-up starts, per 512 images.
WARMUP_LR = 1e-6
#: Never decayed, whatever their shape.
PLAIN = ("mask_token", "relative_position_bias_table")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then what is left of half a cosine; rates are for the batch that is used.

    The cosine runs over all steps, warm-up included, and takes over where it then is: as the
    paper's code has it (0.975 of the peak after 10 of 100 epochs).
    """

    start: float
    peak: float
    end: float
    warmup_steps: int
    steps: int

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., ``steps`` - 1."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        return half_cosine(self.peak, self.end, step / max(1, self.steps))


def half_cosine(first: float, last: float, done: float) -> float:
    """From ``first`` at ``done`` = 0 to ``last`` at 1."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * done))


def alpha_at(settings: PretrainSettings, step: int, steps: int) -> float:
    """Weight of distillation at a step."""
    if settings.alpha_end is None:
        return settings.alpha
    return half_cosine(settings.alpha, settings.alpha_end, step / max(1, steps - 1))


def schedule(settings: PretrainSettings, steps_per_epoch: int) -> Schedule:
    """The schedule of a run: rates times batch / 512, warm-up counted in steps.

    A warm-up that is longer than the run is cut to the run.
    """
    factor = settings.batch / REFERENCE_BATCH
    warmup = min(settings.warmup_epochs, float(settings.epochs))
    if warmup < settings.warmup_epochs:
        log.warning(
            "pretrain: warmup_epochs %g is cut to the %d epochs of the run",
            settings.warmup_epochs,
            settings.epochs,
        )
    return Schedule(
        start=WARMUP_LR * factor,
        peak=settings.base_lr * factor,
        end=settings.min_lr * factor,
        warmup_steps=round(warmup * steps_per_epoch),
        steps=settings.epochs * steps_per_epoch,
    )


def decay_groups(module: Pretrainer, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, in the order of the module.

    Not decayed: 1-D tensors and biases, the mask token, relative position biases, and what timm
    says of the backbone (position embedding, class token).
    """
    backbone: Any = module.student.backbone
    said: set[str] = getattr(backbone, "no_weight_decay", set)()  # convolutional ones say nothing
    spared = {f"student.backbone.{name}" for name in said}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        is_plain = parameter.ndim <= 1 or last == "bias" or last in PLAIN or name in spared
        (plain if is_plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def build_optimiser(module: Pretrainer, settings: PretrainSettings) -> torch.optim.AdamW:
    """AdamW, betas 0.9 and 0.999, eps 1e-8; ``set_lr`` gives it a rate before each step."""
    groups = decay_groups(module, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_lr(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimiser.param_groups:
        group["lr"] = rate
