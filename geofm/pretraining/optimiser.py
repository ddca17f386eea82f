"""AdamW with the paper's parameter groups, and the learning rate of each step.

The constants are those of the paper's code: betas 0.9 and 0.999, eps 1e-8, no weight decay on 1-D
tensors, biases, the mask token and relative position biases.
"""

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

#: Learning rates in the settings are for a batch of this many images.
REFERENCE_BATCH = 512
#: Learning rate at the start of the warm-up, for the reference batch.
WARMUP_LR = 1e-6
#: Parameters without weight decay, whatever their shape.
UNDECAYED = ("mask_token", "relative_position_bias_table")


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up followed by a cosine; all rates are for the run's own batch.

    The cosine runs over all steps, warm-up included, so it starts below its peak: at 0.975 of it
    after 10 of 100 epochs. The paper's code does the same.

    Attributes:
        start: Rate at step 0.
        peak: Rate at the end of the warm-up, and at the start of the cosine.
        end: Rate at the end of the cosine.
        warmup_steps: Number of warm-up steps.
        steps: Number of steps of the run.
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


def half_cosine(first: float, last: float, progress: float) -> float:
    """Half a cosine from ``first`` at progress 0 to ``last`` at progress 1."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_schedule(settings: PretrainSettings, steps_per_epoch: int) -> LearningRateSchedule:
    """Make the schedule of a run.

    Rates are scaled by batch / 512. A warm-up longer than the run is cut to the run.
    """
    factor = settings.batch / REFERENCE_BATCH
    warmup = min(settings.warmup_epochs, float(settings.epochs))
    if warmup < settings.warmup_epochs:
        log.warning(
            "pretrain: warmup_epochs %g is cut to the %d epochs of the run",
            settings.warmup_epochs,
            settings.epochs,
        )
    return LearningRateSchedule(
        start=WARMUP_LR * factor,
        peak=settings.base_lr * factor,
        end=settings.min_lr * factor,
        warmup_steps=round(warmup * steps_per_epoch),
        steps=settings.epochs * steps_per_epoch,
    )


def distillation_weight(settings: PretrainSettings, step: int, steps: int) -> float:
    """Weight alpha of distillation at a step: constant, or half a cosine to ``alpha_end``."""
    if settings.alpha_end is None:
        return settings.alpha
    return half_cosine(settings.alpha, settings.alpha_end, step / max(1, steps - 1))


def build_optimiser(module: Pretrainer, settings: PretrainSettings) -> torch.optim.AdamW:
    """Build AdamW; ``set_learning_rate`` gives it a rate before each step."""
    groups = decay_groups(module, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def decay_groups(module: Pretrainer, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters into those with and those without weight decay.

    Without are 1-D tensors, biases, the mask token, relative position biases, and parameters that
    timm's model excludes itself (position embedding, class token).

    Returns:
        Two parameter groups for an optimiser, in the order of the module's parameters.
    """
    backbone: Any = module.student.backbone
    # Convolutional networks have no such method.
    excluded_by_timm: set[str] = getattr(backbone, "no_weight_decay", set)()
    excluded = {f"student.backbone.{name}" for name in excluded_by_timm}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        plain = parameter.ndim <= 1 or last == "bias" or last in UNDECAYED or name in excluded
        (undecayed if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = rate
