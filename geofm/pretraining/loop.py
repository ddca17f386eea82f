"""The training program, from setting up to the trained model.

In the order in which it runs:

    train              set up, take all steps, return the trained model
    _set_up            build model, teacher and optimiser; load the last checkpoint
    _take_steps        for each step: read a batch, train on it, log, keep a checkpoint
    _log_steps         fetch the losses of the last steps, check them, add them to the history
    _save              write a checkpoint
    _run_metrics       times, rates and memory of the whole run

Then come two parts with a state of their own: ``DivergenceGuard`` stops a run that no longer
learns, ``WeightAverage`` keeps a moving average of the weights.

One step is in ``step.py``, the loss in ``objective.py``, the learning rate in ``optimiser.py``,
batches in ``data.py``, devices and processes in ``parallel.py``. Lightning Fabric provides
precision and process groups and nothing else.
"""

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

from data_catalog.errors import RunError, UsageError, first_line
from data_catalog.hashing import digest_of
from data_catalog.progress import report_values, tick
from data_catalog.stopping import Stopped, is_asked
from geofm.config.recipe import EXECUTION, PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.checkpoint import (
    METRIC_COLUMNS,
    TrainingProgress,
    load_checkpoint,
    read_progress,
    save_checkpoint,
    unusable_checkpoint,
)
from geofm.pretraining.data import Corpus, read_batches, steps_per_epoch
from geofm.pretraining.flops import ComputeSpeed, freeze_unused_parameters, measure_speed
from geofm.pretraining.objective import Pretrainer, build_pretrainer
from geofm.pretraining.optimiser import make_schedule
from geofm.pretraining.parallel import (
    ParallelMode,
    cpu_threads,
    device_name,
    gather_state,
    gather_tensor,
    gather_weights,
    load_gathered_state,
    make_fabric,
    reproducible_torch,
)
from geofm.pretraining.step import TrainingStep
from geofm.pretraining.teacher import Teacher, choose_teacher
from geofm.pretraining.trackers import open_trackers
from geofm.runtime.energy import energy_so_far

log = logging.getLogger("geofm.pretraining")

#: Steps between two reads of the losses. A read makes a GPU wait, so it is rare there.
STEPS_BETWEEN_LOGS = {"cpu": 1, "cuda": 20}
#: Threads that read batches ahead.
READER_THREADS = {"cpu": 1, "cuda": 4}


class Interrupted(Stopped):
    """The run was stopped by a signal; its checkpoint is kept."""


class Diverged(RunError):
    """The loss is not finite, or has lost what the model had learned."""


@dataclass(frozen=True)
class WorkerGroup:
    """How a run is carried out: its processes, how they share the model, and its trackers.

    Attributes:
        processes: Number of processes; more than one must have been started by torchrun.
        parallel: DDP (every process holds the model) or FSDP2 (each holds a shard).
        trackers: Names of trackers that process 0 logs to.
    """

    processes: int = 1
    parallel: ParallelMode = "ddp"
    trackers: tuple[str, ...] = ()


SINGLE_PROCESS = WorkerGroup()


@dataclass(frozen=True)
class ResolvedWeights:
    """Weight files that a run reads. None: the names in the settings are resolved when needed."""

    teacher: Weights | None = None
    student: Weights | None = None


UNRESOLVED = ResolvedWeights()


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        module: The trained model on the CPU, in evaluation mode.
        teacher: The teacher; None without distillation and with cached features.
        history: One row per step, the columns of ``metrics.parquet``.
        metrics: Seconds, rates and memory for the run record.
    """

    module: Pretrainer
    teacher: Teacher | None
    history: pd.DataFrame
    metrics: dict[str, Any]


@dataclass
class _Run:
    """The parts of a run and its progress."""

    corpus: Corpus
    settings: PretrainSettings
    seed: int
    folder: Path
    trainer: TrainingStep
    teacher: Teacher | None
    teacher_width: int | None
    speed: ComputeSpeed
    average: WeightAverage | None
    guard: DivergenceGuard
    progress: TrainingProgress
    unread_losses: list[Tensor] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """The identity that a checkpoint of this run carries."""
        return run_identity(self.corpus, self.settings, self.seed)


def train(
    corpus: Corpus,
    settings: PretrainSettings,
    seed: int,
    device: str,
    folder: Path,
    threads: int | None = None,
    workers: WorkerGroup = SINGLE_PROCESS,
    cached_features: NDArray[np.float32] | None = None,
    weights: ResolvedWeights = UNRESOLVED,
) -> TrainingResult:
    """Pretrain a student; resume from the checkpoint in the run's folder if there is one.

    Args:
        corpus: The dataset.
        settings: The recipe's section ``pretrain``.
        seed: Seed of the initial weights, the order of samples, crops and masks.
        device: ``cpu`` or ``cuda``.
        folder: Folder of this run, which holds its checkpoint.
        threads: CPU threads; default: all that this process may use.
        workers: The processes of the run.
        cached_features: The teacher's feature of every sample, shape (N, C). If given, no teacher
            is loaded.
        weights: Resolved weight files of the teacher and of the student's initial state.

    Raises:
        TooFewSamples, BadStudent, WeightsMissing: before the first step, with the remedy.
        Diverged: The loss became infinite or NaN, or lost what the model had learned.
        OutOfMemory: The device's memory is too small; the message names settings that need less.
        CheckpointNotWritten, BadCheckpoint: The disk is full, or holds another run's checkpoint.
        Interrupted: SIGTERM arrived, or the run is to stop; the checkpoint is kept.
    """
    with (
        reproducible_torch(device, seed, threads or cpu_threads()),
        catch_sigterm() as stop_requested,
    ):
        run = _set_up(corpus, settings, seed, device, folder, workers, cached_features, weights)
        trackers = workers.trackers if run.trainer.rank == 0 else ()
        title = f"{settings.student.partition('@')[0]}-{run.identity[:8]}"
        logged_settings = settings.model_dump(mode="json")
        with open_trackers(trackers, title, logged_settings, run.progress.step) as log_metrics:
            _take_steps(run, stop_requested, log_metrics)
        if run.average is not None:
            run.average.copy_to_model()
        state = gather_weights(run.trainer.module)
        history = history_table(run.progress, steps_per_epoch(corpus, settings.batch))
        metrics = _run_metrics(run)
    trained = build_pretrainer(
        settings, len(corpus.bands), seed, run.teacher_width, weights.student
    )
    trained.load_state_dict(state)
    return TrainingResult(trained.eval(), run.teacher, history, metrics)


def _set_up(
    corpus: Corpus,
    settings: PretrainSettings,
    seed: int,
    device: str,
    folder: Path,
    workers: WorkerGroup,
    cached_features: NDArray[np.float32] | None,
    weights: ResolvedWeights,
) -> _Run:
    """Build the parts of a run and load its last checkpoint; the arguments are those of train."""
    schedule = make_schedule(settings, steps_per_epoch(corpus, settings.batch))
    # Fabric comes first: it assigns a device to each process.
    fabric = make_fabric(device, settings.precision, workers.processes, workers.parallel)
    teacher, teacher_width = choose_teacher(
        settings, fabric.device, cached_features, weights.teacher
    )
    module = build_pretrainer(settings, len(corpus.bands), seed, teacher_width, weights.student)
    check_microbatches(module, settings, workers.processes)
    module.to(fabric.device)
    # The measurement runs one backward pass. Its gradients show which parameters are in use.
    speed = measure_speed(module, teacher, settings, workers.processes)
    freeze_unused_parameters(module)
    if settings.compile:
        module.student.compile(dynamic=False)
    checkpoint = load_checkpoint(folder, run_identity(corpus, settings, seed))
    trainer = TrainingStep(
        fabric, module, teacher, cached_features, corpus, settings, schedule, seed
    )
    average = WeightAverage(trainer.module, settings.ema) if settings.ema else None
    progress = TrainingProgress()
    if checkpoint is not None:
        progress = _restore(folder, checkpoint, trainer, average)
        log.info("pretrain: resuming after step %d of %d", progress.step, schedule.steps)
        for step, row in enumerate(progress.history):
            report_values("pretrain", step, dict(zip(METRIC_COLUMNS, row, strict=True)))
    guard = DivergenceGuard(settings.spike_steps)
    for row in progress.history:
        guard.add(_unweighted_loss(row))
    return _Run(
        corpus=corpus,
        settings=settings,
        seed=seed,
        folder=folder,
        trainer=trainer,
        teacher=teacher,
        teacher_width=teacher_width,
        speed=speed,
        average=average,
        guard=guard,
        progress=progress,
    )


def check_microbatches(module: nn.Module, settings: PretrainSettings, processes: int) -> None:
    """Check that a batch divides into equal microbatches, and that the student allows it.

    Raises:
        UsageError: The batch does not divide, or batch normalisation would see microbatches.
    """
    size = settings.microbatch_size(processes)
    if not size or settings.batch % (processes * size):
        raise UsageError(
            f"pretrain.batch {settings.batch} does not divide among compute.processes {processes} "
            f"in pieces of pretrain.microbatch {size}"
        )
    if size == settings.batch:
        return
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise UsageError(
            f"{settings.student} has batch normalisation, which would see pieces of a batch: "
            "leave compute.processes at 1 and pretrain.microbatch empty, or take another student"
        )


def run_identity(corpus: Corpus, settings: PretrainSettings, seed: int) -> str:
    """Digest of dataset, settings and seed, without settings of how the run is carried out."""
    fixed = settings.model_dump(mode="json", exclude=set(EXECUTION))
    return digest_of([corpus.digest, fixed, seed])


def _restore(
    folder: Path,
    checkpoint: dict[str, Any],
    trainer: TrainingStep,
    average: WeightAverage | None,
) -> TrainingProgress:
    """Load a checkpoint into the model, the optimiser and the average; return its progress."""
    try:
        load_gathered_state(trainer.module, trainer.optimiser, checkpoint)
        if average is not None:
            average.load(checkpoint["mean"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise unusable_checkpoint(folder, first_line(error)) from error
    return read_progress(checkpoint)


def _take_steps(
    run: _Run, stop_requested: Callable[[], bool], log_metrics: Callable[..., None]
) -> None:
    """Take the remaining steps.

    Raises:
        Interrupted: A stop was requested; the checkpoint was written before.
    """
    trainer, progress, settings = run.trainer, run.progress, run.settings
    device, steps, first = trainer.device.type, trainer.schedule.steps, progress.step
    earlier_seconds, started = progress.seconds, time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batches = read_batches(
        run.corpus,
        settings,
        run.seed,
        first,
        steps,
        READER_THREADS[device],
        trainer.rank,
        trainer.world_size,
        pin=device == "cuda",
    )
    with closing(batches):
        for step in range(first, steps):
            requested = time.perf_counter()
            batch = next(batches)
            progress.data_seconds += time.perf_counter() - requested
            run.unread_losses.append(trainer.run(step, batch))
            if run.average is not None:
                run.average.update(step)
            progress.step = step + 1
            is_last = progress.step == steps
            checkpoint_due = progress.step % settings.checkpoint_steps == 0
            log_due = len(run.unread_losses) >= STEPS_BETWEEN_LOGS[device]
            if not (is_last or checkpoint_due or log_due):
                continue
            stop = _log_steps(run, stop_requested(), log_metrics)
            progress.seconds = earlier_seconds + time.perf_counter() - started
            if is_last or ((checkpoint_due or stop) and run.guard.healthy):
                _save(run)
            if stop and not is_last:
                raise Interrupted(
                    f"stopped after step {progress.step} of {steps}; the state is kept, start the "
                    "same run again to go on"
                )
            session_seconds = max(progress.seconds - earlier_seconds, 1e-9)
            _report_progress(run, (progress.step - first) / session_seconds)


def _log_steps(run: _Run, stop_requested: bool, log_metrics: Callable[..., None]) -> bool:
    """Fetch the losses of the last steps, averaged over all processes, and check them.

    Returns:
        Whether any process was requested to stop.

    Raises:
        Diverged: See ``check_finite_loss`` and ``DivergenceGuard.check``.
    """
    progress, schedule, trainer = run.progress, run.trainer.schedule, run.trainer
    values, stop = trainer.average_over_processes(torch.stack(run.unread_losses), stop_requested)
    run.unread_losses.clear()
    progress.teacher_seconds += trainer.take_teacher_seconds()
    for loss, mim, distill, grad_norm in values.tolist():
        step = len(progress.history)
        rate = schedule.lr(step)
        check_finite_loss(step, schedule.steps, loss, grad_norm, rate)
        row = dict(zip(METRIC_COLUMNS, (loss, mim, distill, rate, grad_norm), strict=True))
        progress.history.append(list(row.values()))
        run.guard.add(_unweighted_loss(progress.history[-1]))
        run.guard.check(schedule.steps, rate)
        known = {name: value for name, value in row.items() if not math.isnan(value)}
        log_metrics(step, known)
        report_values("pretrain", step, known)
    return stop


def _unweighted_loss(row: list[float]) -> float:
    """Sum of both loss terms without their weights, because the weights may have a schedule."""
    return sum(term for term in row[1:3] if not math.isnan(term))


def _save(run: _Run) -> None:
    """Write a checkpoint; every process takes part in gathering the state."""
    state = gather_state(run.trainer.module, run.trainer.optimiser)
    if run.average is not None:
        state["mean"] = run.average.state()
    if run.trainer.rank == 0:
        save_checkpoint(run.folder, run.identity, state, run.progress)


def _report_progress(run: _Run, steps_per_second: float) -> None:
    """Report loss, speed, waiting share, time left and energy through ``progress.tick``."""
    if run.trainer.rank != 0:
        return
    progress, steps = run.progress, run.trainer.schedule.steps
    images_per_second = steps_per_second * run.settings.batch
    seconds_left = (steps - progress.step) / max(steps_per_second, 1e-9)
    waiting_share = progress.data_seconds / max(progress.seconds, 1e-9)
    note = (
        f"loss {progress.history[-1][0]:.4f}, {images_per_second:.0f} images/s, MFU "
        f"{run.speed.utilisation(images_per_second):.0%}, {waiting_share:.0%} waiting for data, "
        f"{seconds_left:.0f} s left"
    )
    kwh = energy_so_far()
    if kwh is not None:
        note += f", {kwh * 1e3:.1f} Wh"
    tick("pretrain", progress.step, steps, note)


def _run_metrics(run: _Run) -> dict[str, Any]:
    """Times, rates and memory, of all sessions of a run together."""
    progress, trainer = run.progress, run.trainer
    steps, seconds = trainer.schedule.steps, max(progress.seconds, 1e-9)
    on_gpu = trainer.device.type == "cuda"
    images_per_second = steps * run.settings.batch / seconds
    return {
        "steps": steps,
        "images_per_second": images_per_second,
        "seconds": progress.seconds,
        "gpu_seconds": progress.seconds * trainer.world_size if on_gpu else 0.0,
        "teacher_seconds": progress.teacher_seconds,
        "data_wait_share": progress.data_seconds / seconds,
        "gflop_per_image": run.speed.flop_per_image / 1e9,
        "mfu": run.speed.utilisation(images_per_second),
        "processes": trainer.world_size,
        "device": device_name(trainer.device.type),
        **({"peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20} if on_gpu else {}),
    }


def history_table(progress: TrainingProgress, steps_per_epoch: int) -> pd.DataFrame:
    """One row per step, with the columns of ``metrics.parquet``."""
    table = pd.DataFrame(progress.history, columns=list(METRIC_COLUMNS))
    table.insert(0, "step", range(len(table)))
    table.insert(1, "epoch", table["step"] // steps_per_epoch)
    return table


@contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM in this block; yields a function that says whether the work is to stop.

    Signals reach only the main thread. In other threads the function says what the main thread asks
    (``data_catalog.stopping``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield is_asked
        return
    arrived = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: arrived.set())
    try:
        yield lambda: arrived.is_set() or is_asked()
    finally:
        signal.signal(signal.SIGTERM, previous)


#: Steps whose mean loss counts as the loss at the start of a run.
FIRST_STEPS = 10
#: Noise (in median absolute deviations) that the learned amount must exceed before it can be lost.
SIGNIFICANT_DEVIATIONS = 6.0

DIVERGENCE_REMEDY = (
    "lower pretrain.base_lr or pretrain.clip, use more pretrain.warmup_epochs, or "
    "pretrain.precision fp32"
)


def check_finite_loss(step: int, steps: int, loss: float, grad_norm: float, rate: float) -> None:
    """Check that the loss and the gradient norm of a step are finite.

    Raises:
        Diverged: A value is infinite or NaN; the message names the remedy.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(
            f"the loss is {loss} and the gradient norm {grad_norm} at step {step} of {steps} "
            f"(learning rate {rate:.2e}): {DIVERGENCE_REMEDY}"
        )


class DivergenceGuard:
    """Detects a run that has lost what it had learned.

    The losses are divided into windows, and each window is represented by its median. A run has
    diverged if its last window is more than half way back from the best window to the loss at the
    start. No verdict is given before the difference between start and best window stands out from
    the noise of the best window.

    The guard's state follows from the losses alone, so a resumed run gives the same verdicts.

    Args:
        window: Number of steps in a window; 0 turns the guard off.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._losses: list[float] = []
        self._best = math.inf
        self._spread = 0.0

    def add(self, loss: float) -> None:
        """Add the loss of the next step: the sum of both terms without their weights."""
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
        """Loss above which half of what was learned is lost; infinite before a verdict."""
        if self._best == math.inf:
            return math.inf
        start = self._losses[:FIRST_STEPS]
        learned = sum(start) / len(start) - self._best
        if learned <= SIGNIFICANT_DEVIATIONS * self._spread:
            return math.inf
        return self._best + learned / 2

    @property
    def healthy(self) -> bool:
        """Whether the last losses are below the limit, so that a checkpoint is worth keeping."""
        return not self._losses or median(self._losses[-FIRST_STEPS:]) <= self.limit

    def check(self, steps: int, rate: float) -> None:
        """Stop a run whose loss was above the limit for a whole window.

        Args:
            steps: Number of steps of the run, for the message.
            rate: Learning rate of this step, for the message.

        Raises:
            Diverged: The loss rose and stayed; the message names the remedy.
        """
        window = self._window
        if not window or len(self._losses) < 2 * window:
            return
        now = median(self._losses[-window:])
        if now > self.limit:
            raise Diverged(
                f"the loss rose from {self._best:.4f} to {now:.4f} and stayed there for {window} "
                f"steps (step {len(self._losses)} of {steps}, learning rate {rate:.2e}): "
                f"{DIVERGENCE_REMEDY}. The last good checkpoint is kept; pretrain.spike_steps=0 "
                "turns this check off"
            )


class WeightAverage:
    """Exponential moving average (EMA) of a module's weights and floating-point buffers.

    In early steps the decay is (1 + step) / (10 + step) if that is smaller, because otherwise the
    random initial weights would dominate the average. Under FSDP2 each process averages its shards.

    Args:
        module: Module whose present weights are the initial average.
        decay: Share of the previous average that a step keeps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        state = module.state_dict(keep_vars=True)
        self._weights = {name: t for name, t in state.items() if t.is_floating_point()}
        self._average = {name: t.detach().clone() for name, t in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the present weights to the average, after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._weights[name].detach(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The average as whole tensors on the CPU, by name."""
        return {name: gather_tensor(value).cpu() for name, value in self._average.items()}

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the module's weights by their average."""
        for name, average in self._average.items():
            self._weights[name].copy_(average)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Continue from an average that ``state`` returned."""
        for name, average in self._average.items():
            average.copy_(_placed_like(state[name], average))


def _placed_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor on the device of a target, sharded if the target is sharded."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return tensor.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(target.device), mesh, target.placements)  # type: ignore[attr-defined]
