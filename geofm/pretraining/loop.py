"""The training loop: Lightning Fabric for precision and device, everything else in plain sight."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from data_catalog.errors import RunError
from data_catalog.progress import tick
from geofm.pretraining.arithmetic import arithmetic, cpu_threads, device_name
from geofm.pretraining.augment import crop
from geofm.pretraining.checkpoint import COLUMNS, Progress, restore, save
from geofm.pretraining.data import Batch, Corpus, batches, steps_per_epoch
from geofm.pretraining.objective import Losses, Pretrainer, build_pretrainer
from geofm.pretraining.optimiser import Schedule, build_optimiser, schedule, set_lr
from geofm.pretraining.teacher import Teacher, load_teacher, teach
from geofm.settings import PretrainSettings

log = logging.getLogger("geofm.pretraining")

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}
#: A GPU is asked for its losses only so often (steps): each question makes it wait.
FLUSH = {"cpu": 1, "cuda": 20}
#: Threads that read ahead.
READERS = {"cpu": 1, "cuda": 4}


class Diverged(RunError):
    """The loss is no number any more."""


class Interrupted(RunError):
    """The run was asked to stop, and has kept its state."""


@dataclass(frozen=True)
class Trained:
    """A finished run: the module on the CPU, its teacher, a row per step, and what it cost."""

    module: Pretrainer
    teacher: Teacher | None
    history: pd.DataFrame
    metrics: dict[str, Any]


def train(
    corpus: Corpus,
    settings: PretrainSettings,
    seed: int,
    device: str,
    folder: Path,
    threads: int | None = None,
    taught: NDArray[np.float32] | None = None,
) -> Trained:
    """Pretrain a student; goes on from the checkpoint in ``folder`` if there is one.

    Args:
        corpus: the dataset.
        settings: the recipe's section.
        seed: decides initial weights, order, crops and masks.
        device: ``cpu`` or ``cuda``.
        folder: of this very run; keeps the checkpoint.
        threads: of the CPU; all that this process may use when not given.
        taught: the teacher's features of the whole chips, [N, C] with a row per sample of the
            corpus (``geofm.pretraining.taught``). No teacher is then loaded or run.

    Raises:
        TooFewSamples, BadStudent, WeightsMissing: before the first step, with the remedy.
        Diverged: the loss became infinite or NaN.
        Interrupted: SIGTERM came (main thread only); the state is kept.
    """
    with arithmetic(device, seed, threads or cpu_threads()), sigterm() as stopped:
        per_epoch = steps_per_epoch(corpus, settings.batch)
        plan = schedule(settings, per_epoch)
        teacher = None
        if settings.alpha > 0 and taught is None:
            stage, size = settings.distill_stage, settings.teacher_size_px
            teacher = load_teacher(settings.teacher, stage, size, device)
        width = teacher.width if teacher else None if taught is None else taught.shape[1]
        module = build_pretrainer(settings, len(corpus.bands), seed, width)
        fabric = Fabric(accelerator=device, devices=1, precision=PRECISION[settings.precision])
        module.to(fabric.device)
        optimiser = build_optimiser(module, settings)
        progress = restore(folder, module, optimiser)
        if progress.step:
            log.info("pretrain: going on after step %d of %d", progress.step, plan.steps)
        run = _Run(fabric, module, optimiser, teacher, taught, corpus, settings, plan, folder)
        metrics = run.finish(progress, seed, stopped)
        history = _history(progress, per_epoch)
    return Trained(module.to("cpu").eval(), teacher, history, metrics)


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        fabric: Fabric,
        module: Pretrainer,
        optimiser: torch.optim.Optimizer,
        teacher: Teacher | None,
        taught: NDArray[np.float32] | None,
        corpus: Corpus,
        settings: PretrainSettings,
        plan: Schedule,
        folder: Path,
    ) -> None:
        self.fabric, self.settings, self.plan, self.folder = fabric, settings, plan, folder
        self.module, self.optimiser = module.train(), optimiser
        self.wrapped, self.stepper = fabric.setup(module, optimiser)
        self.teacher, self.taught, self.corpus = teacher, taught, corpus
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=fabric.device)[:, None, None]
            for values in (corpus.mean, corpus.std)
        )

    def finish(self, progress: Progress, seed: int, stopped: Callable[[], bool]) -> dict[str, Any]:
        """Take all steps that are left; returns times, rates and memory."""
        device = self.fabric.device.type
        steps, first, before = self.plan.steps, progress.step, progress.seconds
        started = time.perf_counter()
        pending: list[Tensor] = []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def settle() -> None:
            """Fetch the losses of the last steps; refuse to go on without numbers."""
            _settle(progress, pending, self.plan)
            progress.seconds = before + time.perf_counter() - started

        reading = batches(self.corpus, self.settings, seed, first, steps, READERS[device])
        with closing(reading):
            for step, batch in enumerate(reading, start=first):
                pending.append(self.step(step, batch))
                progress.step = step + 1
                last, stop = progress.step == steps, stopped()
                due = last or stop or progress.step % self.settings.checkpoint_steps == 0
                if due or len(pending) >= FLUSH[device]:
                    settle()
                    images = (progress.step - first) * self.settings.batch
                    rate = images / max(progress.seconds - before, 1e-9)
                    _tick(progress, steps, rate, self.settings.batch)
                if due:
                    save(self.folder, self.module, self.optimiser, progress)
                if stop and not last:
                    raise Interrupted(
                        f"stopped by SIGTERM after step {progress.step} of {steps}; the state is "
                        "kept, start the same run again to go on"
                    )
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
        return {
            "steps": steps,
            "images_per_second": steps * self.settings.batch / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "gpu_seconds": progress.seconds if device == "cuda" else 0.0,
            "device": device_name(device),
            **({} if peak is None else {"peak_gpu_mib": peak}),
        }

    def step(self, step: int, batch: Batch) -> Tensor:
        """One optimisation step; loss, terms, rate and gradient norm as a tensor [5]."""
        device = self.fabric.device
        rate = self.plan.lr(step)
        set_lr(self.optimiser, rate)
        images, rows, columns, mask = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (batch.images, batch.rows, batch.columns, batch.mask)
        )
        unit = crop(images, rows, columns)
        taught = None
        if self.teacher is not None:
            with self.fabric.autocast():
                taught = teach(self.teacher, unit[:, list(self.corpus.rgb)].clamp(0, 1))
        elif self.taught is not None and self.settings.alpha > 0:
            taught = torch.from_numpy(self.taught[batch.samples]).to(device, non_blocking=True)
        losses: Losses = self.wrapped((unit - self.mean) / self.std, mask, taught)
        self.fabric.backward(losses.loss)
        norm: Any = self.fabric.clip_gradients(
            self.wrapped, self.stepper, max_norm=self.settings.clip, error_if_nonfinite=False
        )
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        nothing = torch.full((), math.nan, device=device)
        terms = [nothing if t is None else t.detach() for t in (losses.mim, losses.distill)]
        values = [losses.loss.detach(), *terms, torch.full((), rate, device=device), norm]
        return torch.stack([value.double() for value in values])


def _settle(progress: Progress, pending: list[Tensor], plan: Schedule) -> None:
    if not pending:
        return
    first = len(progress.history)
    for number, values in enumerate(torch.stack(pending).tolist(), start=first):
        row = dict(zip(COLUMNS, values, strict=True))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise Diverged(
                f"the loss is {row['loss']} and the gradient norm {row['grad_norm']} at step "
                f"{number} of {plan.steps} (learning rate {row['lr']:.2e}): lower pretrain.base_lr "
                "or pretrain.clip, use more pretrain.warmup_epochs, or pretrain.precision fp32"
            )
        progress.history.append([*values[:3], plan.lr(number), values[4]])
    pending.clear()


def _tick(progress: Progress, steps: int, rate: float, batch: int) -> None:
    left = (steps - progress.step) * batch / max(rate, 1e-9)
    note = f"loss {progress.history[-1][0]:.4f}, {rate:.0f} images/s, {left:.0f} s left"
    tick("pretrain", progress.step, steps, note)


def _history(progress: Progress, per_epoch: int) -> pd.DataFrame:
    frame = pd.DataFrame(progress.history, columns=list(COLUMNS))
    frame.insert(0, "step", range(len(frame)))
    frame.insert(1, "epoch", frame["step"] // per_epoch)
    return frame


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a question the loop can ask; only where signals arrive."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
