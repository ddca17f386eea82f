"""One optimisation step: crop, teacher, loss, backward, clip, update.

``TrainingStep`` holds the parts that stay the same from step to step. It runs alone or as one of
several processes; ``average_over_processes`` combines their losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from data_catalog.errors import RunError, first_line
from geofm.config.recipe import PretrainSettings
from geofm.pretraining.augment import crop_and_resize
from geofm.pretraining.data import Batch, Corpus
from geofm.pretraining.objective import Losses, Pretrainer
from geofm.pretraining.optimiser import (
    LearningRateSchedule,
    build_optimiser,
    distillation_weight,
    set_learning_rate,
)
from geofm.pretraining.parallel import gather_tensor
from geofm.pretraining.student import derived_seed
from geofm.pretraining.teacher import Teacher, teacher_features

#: Images per forward pass of the teacher when activations are checkpointed to save memory.
TEACHER_MICROBATCH = 16


class OutOfMemory(RunError):
    """The device has too little memory for a step."""


class NotCompiled(RunError):
    """torch.compile cannot translate the network on this machine."""


class TrainingStep:
    """The parts of an optimisation step, set up for the processes of a run.

    Args:
        fabric: Device, precision and process group.
        module: Student, decoder and projector.
        teacher: Teacher that sees each crop; None without distillation or with cached features.
        cached_features: The teacher's feature of every sample, shape (N, C); None if not cached.
        corpus: The dataset.
        settings: The recipe's section ``pretrain``.
        schedule: Learning rates.
        seed: Seed of the run.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: Pretrainer,
        teacher: Teacher | None,
        cached_features: NDArray[np.float32] | None,
        corpus: Corpus,
        settings: PretrainSettings,
        schedule: LearningRateSchedule,
        seed: int,
    ) -> None:
        self.fabric, self.settings, self.schedule, self.seed = fabric, settings, schedule, seed
        self.module = module.train()
        # FSDP2 replaces the parameters, so the optimiser is built after it.
        self._wrapped = fabric.setup_module(module)
        self.optimiser = build_optimiser(module, settings)
        self._wrapped_optimiser: Any = fabric.setup_optimizers(self.optimiser)
        self._teacher, self._cached_features = teacher, cached_features
        self._rgb = list(corpus.rgb)
        self._teacher_spans: list[Any] = []
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=fabric.device)[:, None, None]
            for values in (corpus.mean, corpus.std)
        )

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.fabric.device

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.fabric.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.fabric.world_size

    def run(self, step: int, batch: Batch) -> Tensor:
        """Train on this process's share of a batch.

        Returns:
            Loss, reconstruction term, distillation term and gradient norm, float64, shape (4,), on
            the device. A term that is switched off is NaN.

        Raises:
            OutOfMemory: The device's memory is too small; the message names settings to change.
            NotCompiled: ``pretrain.compile`` is set, and the compiler failed.
        """
        try:
            return self._run(step, batch)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(step, error) from error
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise NotCompiled(
                    f"{self.settings.student} cannot be compiled here "
                    f"({first_line(error)}); set pretrain.compile=false"
                ) from error
            if "can't allocate memory" not in str(error):
                raise
            raise self._out_of_memory(step, error) from error

    def _out_of_memory(self, step: int, error: RuntimeError) -> OutOfMemory:
        images = self.settings.microbatch_size(self.world_size)
        return OutOfMemory(
            f"step {step}: no memory left for {images} images at a time on {self.device} "
            f"({first_line(error)}). Set pretrain.microbatch below {images}, or "
            "pretrain.activation_checkpointing=true: the run goes on from its last checkpoint. "
            "pretrain.precision=bf16 or a smaller pretrain.batch begin a new one"
        )

    def _run(self, step: int, batch: Batch) -> Tensor:
        """Accumulate the gradients of all microbatches, clip them and update the weights."""
        set_learning_rate(self.optimiser, self.schedule.lr(step))
        if self.settings.alpha_end is not None:
            self.module.alpha = distillation_weight(self.settings, step, self.schedule.steps)
        # Random layers are seeded by step and process, so a resumed run draws the same numbers.
        torch.manual_seed(derived_seed(self.seed, f"step {step} of {self.rank}"))
        size = self.settings.microbatch_size(self.world_size)
        count = len(batch.samples) // size
        terms = []
        for number in range(count):
            rows = slice(number * size, (number + 1) * size)
            with self.fabric.no_backward_sync(self._wrapped, enabled=number < count - 1):
                losses = self._losses(batch, rows)
                self.fabric.backward(losses.loss / count)
            terms.append(self._as_numbers(losses))
        grad_norm: Any = self.fabric.clip_gradients(
            self._wrapped,
            self._wrapped_optimiser,
            max_norm=self.settings.clip,
            error_if_nonfinite=False,
        )
        self._wrapped_optimiser.step()
        self._wrapped_optimiser.zero_grad(set_to_none=True)
        return torch.cat([torch.stack(terms).mean(dim=0), gather_tensor(grad_norm).double()[None]])

    def _losses(self, batch: Batch, rows: slice) -> Losses:
        """Losses of some rows of a batch."""
        images, windows, mask = (
            tensor[rows].to(self.device, non_blocking=True)
            for tensor in (batch.images, batch.windows, batch.mask)
        )
        unit = crop_and_resize(images, windows, self.settings.size_px)
        target = self._distillation_target(unit, batch.samples[rows])
        losses: Losses = self._wrapped((unit - self._mean) / self._std, mask, target)
        return losses

    def _distillation_target(self, unit: Tensor, samples: NDArray[np.int64]) -> Tensor | None:
        """Teacher features (B, C) of crops in unit space, cached or computed; None without both."""
        if self._cached_features is not None:
            features = torch.from_numpy(self._cached_features[samples])
            return features.to(self.device, non_blocking=True)
        if self._teacher is None:
            return None
        with self._timed_teacher():
            rgb = unit[:, self._rgb].clamp(0, 1)
            checkpointed = self.settings.activation_checkpointing
            count = TEACHER_MICROBATCH if checkpointed else len(rgb)
            parts = torch.split(rgb, count)
            return torch.cat([teacher_features(self._teacher, part) for part in parts])

    def _as_numbers(self, losses: Losses) -> Tensor:
        """Loss and both terms, float64, shape (3,)."""
        missing = torch.full((), math.nan, device=self.device)
        terms = [missing if t is None else t.detach() for t in (losses.mim, losses.distill)]
        return torch.stack([value.double() for value in (losses.loss.detach(), *terms)])

    @contextmanager
    def _timed_teacher(self) -> Iterator[None]:
        """Record how long the device computes in this block, without waiting for it."""
        if self.device.type == "cpu":
            started = time.perf_counter()
            yield
            self._teacher_spans.append(time.perf_counter() - started)
            return
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._teacher_spans.append((first, last))

    def take_teacher_seconds(self) -> float:
        """Seconds that the teacher has computed since the last call."""
        seconds = [
            span if isinstance(span, float) else span[0].elapsed_time(span[1]) / 1e3
            for span in self._teacher_spans
        ]
        self._teacher_spans.clear()
        return sum(seconds)

    def average_over_processes(self, values: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """Combine the processes' values of some steps.

        Args:
            values: Numbers of n steps of this process, shape (n, 4).
            stop: Whether this process was requested to stop.

        Returns:
            Means over all processes, on the CPU, and whether any process was requested to stop.
        """
        flag = torch.tensor([float(stop)], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            combined: Any = self.fabric.all_reduce(
                torch.cat([values.flatten(), flag]), reduce_op="mean"
            )
            values, flag = combined[:-1].reshape(values.shape), combined[-1:]
        return values.cpu(), bool(flag > 0)
