"""The training loop: Lightning Fabric for precision and processes, everything else in sight."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_catalog.errors import RunError, UsageError
from data_catalog.hashing import digest_of
from data_catalog.progress import tick
from geofm.config.recipe import EXECUTION, PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.checkpoint import COLUMNS, Progress, load, progress_of, refused, save
from geofm.pretraining.data import Corpus, batches, steps_per_epoch
from geofm.pretraining.flops import Speed, freeze_what_never_learns, measure
from geofm.pretraining.objective import Pretrainer, build_pretrainer
from geofm.pretraining.optimiser import schedule
from geofm.pretraining.parallel import (
    Parallel,
    arithmetic,
    cpu_threads,
    device_name,
    load_whole_state,
    make_fabric,
    whole,
    whole_state,
    whole_weights,
)
from geofm.pretraining.step import Stepper
from geofm.pretraining.teacher import Teacher, who_teaches
from geofm.pretraining.trackers import tracking
from geofm.runtime.energy import so_far

# A running mean of the weights, which is often a better model than the last of them.


class RunningMean:
    """Exponential moving average of a module's weights and statistics (shards under FSDP2).

    Early on the decay is smaller, (1 + step) / (10 + step), or the random start would stay in it.

    Args:
        module: starts from its present weights.
        decay: share of the old mean that a step keeps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        held = module.state_dict(keep_vars=True)
        self._of = {name: t for name, t in held.items() if t.is_floating_point()}
        self._mean = {name: t.detach().clone() for name, t in self._of.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self._mean.items():
            mean.lerp_(self._of[name].detach(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name."""
        return {name: whole(mean).cpu() for name, mean in self._mean.items()}

    @torch.no_grad()
    def give(self) -> None:
        """Put the mean in the place of the weights."""
        for name, mean in self._mean.items():
            self._of[name].copy_(mean)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for name, mean in self._mean.items():
            mean.copy_(like(state[name], mean))


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as the target holds it: on its device, or spread over its processes."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return tensor.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(target.device), mesh, target.placements)  # type: ignore[attr-defined]


# When a run should not go on: losses that are no numbers, or that lost what had been learned.

#: Steps whose mean loss counts as where a run began.
FIRST = 10
#: Spreads (median absolute deviations) a run must have learned before it can lose it.
SURE = 6.0

REMEDY = (
    "lower pretrain.base_lr or pretrain.clip, use more pretrain.warmup_epochs, or "
    "pretrain.precision fp32"
)


class Diverged(RunError):
    """The loss is no number any more, or far above what it had been."""


def check_numbers(step: int, steps: int, loss: float, norm: float, rate: float) -> None:
    """Refuse a step whose loss or gradient is infinite or not a number.

    Raises:
        Diverged: with the remedy.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"the loss is {loss} and the gradient norm {norm} at step {step} of {steps} (learning "
            f"rate {rate:.2e}): {REMEDY}"
        )


class Guard:
    """Watches the sum of both terms; knows of a run only its losses, so a resumed one is the same.

    Of each window of losses the median counts. A run is lost when the last window lies more than
    half way back from the best one to where the run began. What had been learned must stand out
    from the noise of the best window, or nothing is said.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._losses: list[float] = []
        self._best = math.inf
        self._spread = 0.0

    def add(self, loss: float) -> None:
        """Take the next step's loss in."""
        self._losses.append(loss)
        count, window = len(self._losses), self._window
        if window and count % window == 0:
            last = self._losses[-window:]
            middle = median(last)
            if middle < self._best:
                self._best = middle
                self._spread = median(abs(x - middle) for x in last)

    @property
    def limit(self) -> float:
        """Losses above this have lost half of what was learned; infinite while that is unsure."""
        if self._best == math.inf:
            return math.inf
        begin = self._losses[:FIRST]
        learned = sum(begin) / len(begin) - self._best
        if learned <= SURE * self._spread:
            return math.inf
        return self._best + learned / 2

    @property
    def healthy(self) -> bool:
        """Whether the last few losses are below the limit: worth a checkpoint."""
        return not self._losses or median(self._losses[-FIRST:]) <= self.limit

    def check(self, steps: int, rate: float) -> None:
        """Stop a run that lost what it had learned, and did not come back for a whole window.

        Raises:
            Diverged: with the remedy.
        """
        window = self._window
        if not window or len(self._losses) < 2 * window:
            return
        now = median(self._losses[-window:])
        if now > self.limit:
            raise Diverged(
                f"the loss rose from {self._best:.4f} to {now:.4f} and stayed there for {window} "
                f"steps (step {len(self._losses)} of {steps}, learning rate {rate:.2e}): {REMEDY}. "
                "The last good checkpoint is kept; pretrain.spike_steps=0 turns this check off"
            )


log = logging.getLogger("geofm.pretraining")

#: A GPU is asked for its losses only so often (steps): each question makes it wait.
FLUSH = {"cpu": 1, "cuda": 20}
#: Threads that read ahead.
READERS = {"cpu": 1, "cuda": 4}


class Interrupted(RunError):
    """The run was asked to stop, and has kept its state."""


@dataclass(frozen=True)
class Team:
    """Processes that train together, how they share the model, and who else is told of steps."""

    processes: int = 1
    parallel: Parallel = "ddp"
    trackers: tuple[str, ...] = ()


ALONE = Team()


@dataclass(frozen=True)
class Sources:
    """Resolved weights of a run; None: they are found by the names in the settings."""

    teacher: Weights | None = None
    student: Weights | None = None


BY_NAME = Sources()


@dataclass(frozen=True)
class Trained:
    """A finished run: the module on the CPU, its teacher, a row per step, and what it cost.

    There is no teacher without distillation, nor where its features were given.
    """

    module: Pretrainer
    teacher: Teacher | None
    history: pd.DataFrame
    metrics: dict[str, Any]


@dataclass
class _Run:
    """What a run has: its pieces, and how far it is."""

    settings: PretrainSettings
    corpus: Corpus
    seed: int
    folder: Path
    stepper: Stepper
    speed: Speed
    mean: RunningMean | None
    guard: Guard
    progress: Progress
    pending: list[Tensor] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """What a checkpoint must have been written for."""
        return identity_of(self.corpus, self.settings, self.seed)


def identity_of(corpus: Corpus, settings: PretrainSettings, seed: int) -> str:
    """Digest of what a run computes: dataset, settings, seed; not how it is carried out."""
    fixed = settings.model_dump(mode="json", exclude=set(EXECUTION))
    return digest_of([corpus.digest, fixed, seed])


def train(
    corpus: Corpus,
    settings: PretrainSettings,
    seed: int,
    device: str,
    folder: Path,
    threads: int | None = None,
    team: Team = ALONE,
    taught: NDArray[np.float32] | None = None,
    sources: Sources = BY_NAME,
) -> Trained:
    """Pretrain a student; goes on from the checkpoint in ``folder`` if there is one.

    Args:
        corpus: the dataset.
        settings: the recipe's section.
        seed: decides initial weights, order, crops and masks.
        device: ``cpu`` or ``cuda``.
        folder: of this very run; keeps the checkpoint.
        threads: of the CPU; all that this process may use when not given.
        team: more processes than one must have been started by torchrun (``launch``).
        taught: the teacher's feature of every sample [N, C]; then no teacher is loaded.
        sources: weights of the teacher and of the student's start, if they are resolved already.

    Raises:
        TooFewSamples, BadStudent, WeightsMissing: before the first step, with the remedy.
        Diverged: the loss became infinite, NaN, or lost what had been learned.
        OutOfMemory: on the device; says which settings need less.
        CheckpointNotWritten, BadCheckpoint: the disk is full, or holds another run's state.
        Interrupted: SIGTERM came (main thread only); the state is kept.
    """
    with arithmetic(device, seed, threads or cpu_threads()), sigterm() as stopped:
        per_epoch = steps_per_epoch(corpus, settings.batch)
        plan = schedule(settings, per_epoch)
        # first of all: it gives each process its device
        fabric = make_fabric(device, settings.precision, team.processes, team.parallel)
        teacher, width = who_teaches(settings, fabric.device, taught, sources.teacher)
        module = build_pretrainer(settings, len(corpus.bands), seed, width, sources.student)
        check_pieces(module, settings, team.processes)
        module.to(fabric.device)
        speed = measure(module, teacher, settings, team.processes)
        freeze_what_never_learns(module)
        if settings.compile:
            module.student.compile(dynamic=False)
        content = load(folder, identity_of(corpus, settings, seed))
        stepper = Stepper(fabric, module, teacher, taught, corpus, settings, plan, seed)
        mean = RunningMean(stepper.module, settings.ema) if settings.ema else None
        progress = Progress()
        if content is not None:
            progress = _restore(folder, content, stepper, mean)
            log.info("pretrain: going on after step %d of %d", progress.step, plan.steps)
        guard = Guard(settings.spike_steps)
        for row in progress.history:
            guard.add(_unweighted(row))
        run = _Run(settings, corpus, seed, folder, stepper, speed, mean, guard, progress)
        names = team.trackers if fabric.is_global_zero else ()
        known = settings.model_dump(mode="json")
        name = f"{settings.student.partition('@')[0]}-{run.identity[:8]}"
        with tracking(names, name, known, progress.step) as tell:
            _take_steps(run, stopped, tell)
        if mean is not None:
            mean.give()
        weights = whole_weights(module)
        history = history_of(progress, per_epoch)
        metrics = _metrics(run)
    finished = build_pretrainer(settings, len(corpus.bands), seed, width, sources.student)
    finished.load_state_dict(weights)
    return Trained(finished.eval(), teacher, history, metrics)


def check_pieces(module: Pretrainer, settings: PretrainSettings, processes: int) -> None:
    """Refuse a batch that does not divide, or whose statistics would be those of its pieces.

    Raises:
        UsageError: names the settings.
    """
    at_once = settings.at_once(processes)
    if not at_once or settings.batch % (processes * at_once):
        raise UsageError(
            f"pretrain.batch {settings.batch} does not divide among compute.processes {processes} "
            f"in pieces of pretrain.microbatch {at_once}"
        )
    if at_once == settings.batch:
        return
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise UsageError(
            f"{settings.student} has batch normalisation, which would see pieces of a batch: "
            "leave compute.processes at 1 and pretrain.microbatch empty, or take another student"
        )


def _restore(
    folder: Path, content: dict[str, Any], stepper: Stepper, mean: RunningMean | None
) -> Progress:
    try:
        load_whole_state(stepper.module, stepper.optimiser, content)
        if mean is not None:
            mean.load(content["mean"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise refused(folder, str(error).splitlines()[0]) from error
    return progress_of(content)


def _take_steps(run: _Run, stopped: Callable[[], bool], tell: Callable[..., None]) -> None:
    """All steps that are left, with checkpoints."""
    stepper, progress, settings = run.stepper, run.progress, run.settings
    device, steps, first = stepper.device.type, stepper.plan.steps, progress.step
    before, started = progress.seconds, time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    share = stepper.share
    reading = batches(
        run.corpus, settings, run.seed, first, steps, READERS[device], share, device == "cuda"
    )
    with closing(reading):
        for step in range(first, steps):
            asked = time.perf_counter()
            batch = next(reading)
            progress.waited += time.perf_counter() - asked
            run.pending.append(stepper.take(step, batch))
            if run.mean is not None:
                run.mean.update(step)
            progress.step = step + 1
            last = progress.step == steps
            kept = progress.step % settings.checkpoint_steps == 0
            if not (last or kept or len(run.pending) >= FLUSH[device]):
                continue
            stop = _settle(run, stopped(), tell)
            progress.seconds = before + time.perf_counter() - started
            _tick(run, steps, (progress.step - first) / max(progress.seconds - before, 1e-9))
            if last or ((kept or stop) and run.guard.healthy):
                _save(run)
            if stop and not last:
                raise Interrupted(
                    f"stopped by SIGTERM after step {progress.step} of {steps}; the state is "
                    "kept, start the same run again to go on"
                )


def _settle(run: _Run, stopped: bool, tell: Callable[..., None]) -> bool:
    """Fetch the losses of the last steps, of all processes; whether any was asked to stop."""
    progress, plan, stepper = run.progress, run.stepper.plan, run.stepper
    values, stop = stepper.meet(torch.stack(run.pending), stopped)
    run.pending.clear()
    progress.teaching += stepper.teaching()
    for numbers in values.tolist():
        number = len(progress.history)
        row = dict(zip(COLUMNS, [*numbers[:3], plan.lr(number), numbers[3]], strict=True))
        check_numbers(number, plan.steps, row["loss"], row["grad_norm"], row["lr"])
        progress.history.append(list(row.values()))
        run.guard.add(_unweighted(progress.history[-1]))
        run.guard.check(plan.steps, row["lr"])
        tell(number, {name: value for name, value in row.items() if not math.isnan(value)})
    return stop


def _unweighted(row: list[float]) -> float:
    """Both terms of a step without their weights, which may have schedules."""
    return sum(term for term in row[1:3] if not math.isnan(term))


def _save(run: _Run) -> None:
    state = whole_state(run.stepper.module, run.stepper.optimiser)
    if run.mean is not None:
        state["mean"] = run.mean.state()
    if run.stepper.fabric.is_global_zero:
        save(run.folder, run.identity, state, run.progress)


def _tick(run: _Run, steps: int, rate: float) -> None:
    if not run.stepper.fabric.is_global_zero:
        return
    progress, batch = run.progress, run.settings.batch
    left = (steps - progress.step) / max(rate, 1e-9)
    waited = progress.waited / max(progress.seconds, 1e-9)
    note = (
        f"loss {progress.history[-1][0]:.4f}, {rate * batch:.0f} images/s, MFU "
        f"{run.speed.used(rate * batch):.0%}, {waited:.0%} waiting for data, {left:.0f} s left"
    )
    energy = so_far()
    if energy is not None:
        note += f", {energy * 1e3:.1f} Wh"
    tick("pretrain", progress.step, steps, note)


def _metrics(run: _Run) -> dict[str, Any]:
    """Times, rates and memory of all sessions of a run."""
    progress, stepper = run.progress, run.stepper
    steps, seconds = stepper.plan.steps, max(progress.seconds, 1e-9)
    gpu = stepper.device.type == "cuda"
    rate = steps * run.settings.batch / seconds
    return {
        "steps": steps,
        "images_per_second": rate,
        "seconds": progress.seconds,
        "gpu_seconds": progress.seconds * stepper.share[1] if gpu else 0.0,
        "teacher_seconds": progress.teaching,
        "data_wait_share": progress.waited / seconds,
        "gflop_per_image": run.speed.flop_per_image / 1e9,
        "mfu": run.speed.used(rate),
        "processes": stepper.share[1],
        "device": device_name(stepper.device.type),
        **({"peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20} if gpu else {}),
    }


def history_of(progress: Progress, per_epoch: int) -> pd.DataFrame:
    """A row per step, as ``metrics.parquet`` has it."""
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
