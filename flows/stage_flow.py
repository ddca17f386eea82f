"""One stage in a Prefect flow: its parts are mapped over tasks, its result is shown in the UI.

``data_catalog.run`` runs the stage. This module passes it a mapper that submits tasks to the flow's
task runner, and writes the progress and the card of the stage for the UI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.futures import as_completed
from prefect.task_runners import TaskRunner

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError
from data_catalog.run import JobResult, PartProgress, make_job, run_job
from data_catalog.stage import Job, Part, Stage
from data_catalog.store import Store
from flows.tasks import show_steps, work
from geofm.config.recipe import Recipe
from geofm.runtime.energy import Meter
from geofm.stages import get_stage, section_of

#: Most task runs of one stage: the server's database grows with tasks, not with parts.
MOST_TASKS = 32


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
    meter: Meter = field(default_factory=Meter)
    wait: bool = True


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


class TaskMapper:
    """Map the parts of one job over Prefect tasks, with a progress artifact in the UI.

    Task ``k`` of ``n`` works on the parts ``k``, ``k + n``, ...: neighbouring parts (one day, one
    scene) take about as long as each other, so all tasks do.
    """

    def __init__(self, runner: TaskRunner[Any]) -> None:
        self._runner = runner
        self._progress: UUID | None = None

    def __call__(self, stage: Stage, job: Job, parts: list[Part]) -> Iterator[PartProgress]:
        """Submit the tasks, and report each as it ends.

        Raises:
            WorkerLost: A worker process ended in the middle of a task.
        """
        key = f"geofm-{stage.name}-progress"
        self._progress = cast(UUID, create_progress_artifact(0.0, key=key, description=stage.name))
        tasks = count_tasks(len(parts), job.how["workers"], stage.at_once)
        futures = {
            self._runner.submit(work, {"job": job, "number": number, "tasks": tasks}): number
            for number in range(tasks)
        }
        finished = 0
        for future in as_completed(list(futures)):
            try:
                computed = future.result()
            except BrokenExecutor as error:
                raise WorkerLost(
                    f"a worker process ended in the middle of {stage.name} (killed by the system, "
                    "perhaps because memory ran out): run again, which goes on with the parts that "
                    "are there; fewer compute.workers need less memory"
                ) from error
            number_of_parts = len(range(futures[future], len(parts), tasks))
            finished += number_of_parts
            yield PartProgress(number_of_parts, computed)
            update_progress_artifact(self._progress, 100.0 * finished / (len(parts) + 1))

    def close(self) -> None:
        """Set the progress to 100 %, if anything was mapped."""
        if self._progress is not None:
            update_progress_artifact(self._progress, 100.0)


def run_in_flow(name: str, inputs: Mapping[str, Artifact], context: StageContext) -> Artifact:
    """Run one stage in a Prefect flow and return its artifact.

    Args:
        name: Name of the stage.
        inputs: Artifacts by kind; those that the stage does not name are ignored.
        context: The recipe, store, catalogue and task runner of the flow run.
    """
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
    mapper = TaskMapper(context.runner)
    result = run_job(
        show_steps(stage), job, context.catalogue, mapper, context.meter.stage, context.wait
    )
    mapper.close()
    create_markdown_artifact(_card(name, result), key=f"geofm-{name}")
    return result.artifact


def _card(name: str, result: JobResult) -> str:
    """Return a stage's result as Markdown for the UI."""
    manifest, metrics = result.artifact.manifest, result.metrics
    rows = [f"| {k} | {v:,} |" for k, v in manifest.counts.items()]
    rows += [f"| dropped: {k} | {v:,} |" for k, v in manifest.dropped.items()]
    spent = "found in the catalogue" if metrics.get("cached") else f"{metrics['seconds']:.1f} s"
    table = "\n".join(["| what | how many |", "|---|---:|", *rows])
    return f"### {name}: {spent}\n\n`{manifest.kind} {result.artifact.digest}`\n\n{table}\n"
