"""The stages as one graph of Prefect tasks: one task for each stage, with its parts inside.

A stage's task takes the tasks of the stages that it depends on, so the graph in the UI is that of
the stage table, and stages that do not depend on each other run at once. Stages run in threads of
the flow; only their parts go to the task runner of the recipe, else stages would hold the workers
that their parts wait for.

``data_catalog.run`` runs the stage. This module passes it a mapper that submits the parts, and
shows the progress of all stages in the UI.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Cancelled, Completed
from prefect.task_runners import TaskRunner

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError
from data_catalog.progress import follow, watch
from data_catalog.run import JobResult, PartProgress, find, make_job, run_job
from data_catalog.stage import Job, Part, Stage
from data_catalog.stopping import Stopped, ask_to_stop
from data_catalog.store import Store
from flows.forecast import ForecastMeter
from flows.gpu import GPU_POOL, belongs_to_gpu, describe_job, run_in_gpu_pool, trains
from flows.nights import JITTER, PAUSES_S, is_tried_again, turn_to_train
from flows.open_lineage import report_stage
from flows.summary import curves_markdown
from flows.tasks import UNCACHED, JobOfParts, work
from geofm.config.recipe import Recipe
from geofm.stages import get_stage, section_of

#: Most task runs of one stage: the server's database grows with tasks, not with parts.
MOST_TASKS = 32
#: Seconds between two writings of the progress, and between two pictures of a training.
WRITTEN_EVERY_S, DRAWN_EVERY_S = 2.0, 30.0


class WorkerLost(RunError):
    """A worker process ended before its work did."""


@dataclass(frozen=True)
class StageContext:
    """What all stages of one flow run share.

    Attributes:
        wait: Wait while another process runs the same job; else stop.
    """

    recipe: Recipe
    store: Store
    catalogue: Catalogue
    runner: TaskRunner[Any]
    meter: ForecastMeter = field(default_factory=ForecastMeter)
    wait: bool = True


#: What the stages of the flow run share. It is no parameter of their tasks, because Prefect sends
#: the task of a stage, with its parameters, to the workers of its parts. Threads of the flow
#: inherit it.
_context: ContextVar[StageContext] = ContextVar("geofm_stage_context")


def share_context(context: StageContext) -> None:
    """Let the tasks of stages that start from now on find what they share."""
    _context.set(context)


def count_tasks(parts: int, workers: int, at_once: int = 1) -> int:
    """Count the tasks that share the parts of a stage: a few per worker, at most ``MOST_TASKS``.

    A task ends when its last part does, so workers that work on several parts at once get tasks
    with several times as many parts, if there are enough.

    Args:
        parts: Number of parts.
        workers: Number of workers.
        at_once: Parts that one worker works on at once (``Stage.at_once``).
    """
    parts_per_task = 1 if at_once == 1 else 4 * at_once
    per_worker = max(1, min(4, parts // (workers * parts_per_task)))
    return min(parts, MOST_TASKS, workers * per_worker)


class RunProgress:
    """One progress artifact for a whole run: a line for each stage, as the terminal shows it.

    Args:
        recipe: Name of the recipe, for the artifact's key.
        stages: Number of stages of the run.
    """

    def __init__(self, recipe: str, stages: int) -> None:
        self._stages = stages
        self._lock = threading.Lock()
        self._lines: dict[str, str] = {}
        self._shares: dict[str, float] = {}
        self._written = self._drawn = 0.0
        self._values: dict[int, dict[str, float]] = {}
        self._picture = ""
        self._artifact = cast(
            UUID,
            create_progress_artifact(0.0, key=f"geofm-progress-{recipe}", description="begins"),
        )

    def show(self, stage: str, done: int, total: int, note: str) -> None:
        """Note a line, and write all lines to the artifact, at most every ``WRITTEN_EVERY_S``."""
        with self._lock:
            self._lines[stage] = f"- **{stage}** {done:,} of {total:,} {note}"
            self._shares[stage] = done / max(total, 1)
            now = time.monotonic()
            if now - self._written < WRITTEN_EVERY_S and done < total:
                return
            self._written = now
            values = {}
            if now - self._drawn > DRAWN_EVERY_S:
                self._drawn, values = now, dict(self._values)
        picture = curves_markdown(values) if values else ""
        with self._lock:
            self._picture = picture or self._picture
            text = "\n".join([*self._lines.values(), self._picture])
            percent = min(100.0 * sum(self._shares.values()) / self._stages, 100.0)
        # progress is a comfort: a server that is away for a moment must not end the stage
        with suppress(httpx.HTTPError, PrefectException):
            update_progress_artifact(self._artifact, percent, text)

    def note_values(self, _stage: str, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers of a step of training, for a picture of its curves."""
        with self._lock:
            self._values[step] = dict(values)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress of all stages while the block runs."""
        with follow(self.show), watch(self.note_values):
            yield


class TaskMapper:
    """Map the parts of one job over Prefect tasks.

    Task ``k`` of ``n`` works on the parts ``k``, ``k + n``, ...: neighbouring parts (one day, one
    scene) take about as long as each other, so all tasks do.
    """

    def __init__(self, runner: TaskRunner[Any]) -> None:
        self._runner = runner

    def __call__(self, stage: Stage, job: Job, parts: list[Part]) -> Iterator[PartProgress]:
        """Submit the tasks, and report each as it ends.

        Raises:
            WorkerLost: A worker process ended in the middle of a task.
        """
        tasks = count_tasks(len(parts), job.how["workers"], stage.at_once)
        given = {"stage": stage.name, "given": JobOfParts(job), "tasks": tasks}
        futures = {
            self._runner.submit(work, {**given, "number": number}): number
            for number in range(tasks)
        }
        for future in as_completed(list(futures)):
            try:
                computed = future.result()
            except BrokenExecutor as error:
                raise WorkerLost(
                    f"a worker process ended in the middle of {stage.name} (killed by the system, "
                    "perhaps because memory ran out): run again, which goes on with the parts that "
                    "are there; fewer compute.workers need less memory"
                ) from error
            yield PartProgress(len(range(futures[future], len(parts), tasks)), computed)


class StageTasks:
    """The tasks of the stages of a flow run, each of which starts when its inputs are there.

    As a context manager it waits for all tasks. If the block ends by an exception (a stage has
    failed, or the run was stopped), the others are asked to stop first.

    Args:
        context: What the stages share.
        given: Artifacts of earlier runs, by kind, that stages take as inputs.
    """

    def __init__(self, context: StageContext, given: Mapping[str, Artifact] | None = None) -> None:
        share_context(context)
        self._inputs: dict[str, Artifact | PrefectFuture[Any]] = dict(given or {})
        self._futures: dict[str, PrefectFuture[Any]] = {}

    def __enter__(self) -> StageTasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            ask_to_stop()
        for future in self._futures.values():
            future.wait()

    def submit(self, names: Sequence[str]) -> None:
        """Submit the tasks of some stages, given in the order of the pipeline."""
        for name in names:
            stage = get_stage(name)
            inputs = {kind: self._inputs[kind] for kind in stage.inputs}
            named = run_stage_task.with_options(name=name, task_run_name=name)
            future = named.submit(name, inputs, return_state=False)
            self._futures[name] = self._inputs[stage.kind] = future

    def results(self, names: Sequence[str]) -> dict[str, Artifact]:
        """Wait for some stages, and return the artifact of each.

        Args:
            names: The stages, in the order of the pipeline.

        Raises:
            Stopped: A stage was stopped.
            Exception: That of a stage, as soon as one fails; the others may still be working.
        """
        futures = {name: self._futures[name] for name in names}
        for future in as_completed(list(futures.values())):
            future.wait()
            # a stage that lacks the result of a failed one is not ready, and no cause
            if future.state.is_failed() or future.state.is_crashed():
                future.result()
            if future.state.is_cancelled():
                raise Stopped(future.state.message or "a stage was stopped")
        return {name: future.result() for name, future in futures.items()}

    def replace(self, name: str, artifact: Artifact) -> None:
        """Let stages that are submitted from now on take another artifact than a stage's own."""
        self._inputs[get_stage(name).kind] = artifact


#: Options of the tasks that run a stage.
STAGE_TASK: dict[str, Any] = {
    "retries": len(PAUSES_S),
    "retry_delay_seconds": list(PAUSES_S),
    "retry_jitter_factor": JITTER,
    "retry_condition_fn": is_tried_again,
    **UNCACHED,
}


@task(**STAGE_TASK)
def run_stage_task(name: str, inputs: dict[str, Artifact]) -> Any:
    """Run one stage; a stage whose result is there already ends as ``Unchanged``."""
    try:
        result = run_in_flow(name, inputs)
    except Stopped as stopped:
        return Cancelled(message=str(stopped))
    if result.metrics.get("cached"):
        message = f"{result.artifact.manifest.kind} {result.artifact.digest[:12]}"
        return Completed(name="Unchanged", message=message, data=result.artifact)
    return result.artifact


@task(**STAGE_TASK)
def run_job_task(given: JobOfParts) -> Any:
    """Run a job that another flow run asks for (flows/gpu.py)."""
    try:
        result = _run_here(get_stage(given.job.stage), given.job, _context.get())
    except Stopped as stopped:
        return Cancelled(message=str(stopped))
    return Completed(message=f"{result.artifact.kind} {result.artifact.digest[:12]}")


def run_in_flow(name: str, inputs: Mapping[str, Artifact]) -> JobResult:
    """Run one stage, with its parts in Prefect tasks, or in the pool of GPU workers.

    Args:
        name: Name of the stage.
        inputs: Artifacts by kind; those that the stage does not name are ignored.
    """
    context = _context.get()
    stage, recipe = get_stage(name), context.recipe
    job = make_job(
        stage,
        context.store,
        inputs,
        getattr(recipe, section_of(name)),
        recipe.compute.seed,
        recipe.compute.device,
        context.catalogue.url,
        recipe.compute.model_dump(),
    )
    names = {"dataset": recipe.pack.name, "model": recipe.model_name}
    with report_stage(stage, job, context.catalogue, names) as note:
        if belongs_to_gpu(stage, job) and find(stage, job, context.catalogue) is None:
            return note(_run_in_gpu_pool(stage, job, context))
        return note(_run_here(stage, job, context))


def _run_in_gpu_pool(stage: Stage, job: Job, context: StageContext) -> JobResult:
    """Run a job in the pool of GPU workers.

    Raises:
        RunError: The child run failed, or the result is not in this catalogue.
    """
    started, forecast = time.monotonic(), context.meter.stages.get(stage.name)
    note = {} if forecast is None else {"forecast": forecast.to_json()}
    run_in_gpu_pool({**describe_job(job), **note}, context.recipe.name)
    context.meter.note(stage.name, time.monotonic() - started)
    catalogue = context.catalogue.at(job.store)
    artifact = catalogue.last_made(job.key) or catalogue.find(job.key)
    if artifact is None:
        raise RunError(
            f"{stage.name} has ended in the pool {GPU_POOL}, but its result is not in the store "
            f"{context.store.url}"
        )
    return JobResult(artifact, {})


def _run_here(stage: Stage, job: Job, context: StageContext) -> JobResult:
    """Run a job on this machine."""
    waits = trains(stage) and find(stage, job, context.catalogue) is None
    turn = turn_to_train(context.catalogue) if waits else nullcontext()
    with turn:
        mapper = TaskMapper(context.runner)
        return run_job(stage, job, context.catalogue, mapper, context.meter.stage, context.wait)
