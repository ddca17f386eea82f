"""One stage under Prefect: from the catalogue, or planned, mapped over workers and sealed."""

from __future__ import annotations

import logging
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from functools import partial
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
from data_catalog.database.schema import RunRow
from data_catalog.errors import RunError
from data_catalog.progress import tick
from data_catalog.run import (
    attempt,
    gpus_held,
    make_job,
    note_states,
    peak_memory_mib,
    with_previous,
)
from data_catalog.stage import Job
from data_catalog.store import Store
from flows.tasks import plan, seal_stage, work
from flows.versions import Published
from geofm.config.recipe import Recipe
from geofm.runtime.energy import Meter
from geofm.stages import get_stage, section_of

log = logging.getLogger("geofm.flow")

#: Task runs per stage at most: the server's database grows by rows per task, not per part.
MOST_TASKS = 32


class WorkerLost(RunError):
    """A worker process ended before its work did."""


@dataclass
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    store: Store
    catalogue: Catalogue
    runner: TaskRunner[Any]
    made: dict[str, Artifact] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    version: Published | None = None
    model: Published | None = None
    #: Wait while another process runs the same job; else stop.
    wait: bool = True


def count_tasks(parts: int, workers: int, at_once: int = 1) -> int:
    """Tasks that share the parts: a few per worker, never more than ``MOST_TASKS``.

    A task ends when its last part does, so one that works on several at once gets several times as
    many where there are enough. Task ``k`` of ``n`` works on the parts ``k``, ``k + n``, ...:
    neighbours are alike (one day, one scene), and so the tasks are.
    """
    each = 1 if at_once == 1 else 4 * at_once
    return min(parts, MOST_TASKS, workers * max(1, min(4, parts // (workers * each))))


def run_stage(name: str, run: Run) -> Artifact:
    """Run one stage: the artifact is the catalogue's if this very job was done before."""
    stage, recipe = get_stage(name), run.recipe
    inputs = {get_stage(s).kind: a for s, a in run.made.items()}
    job = make_job(
        stage,
        run.store,
        inputs,
        getattr(recipe, section_of(name)),
        recipe.compute.seed,
        recipe.compute.device,
        run.catalogue.url,
    )
    job = replace(with_previous(stage, job, run.catalogue), how=recipe.compute.model_dump())
    with attempt(stage, job, run.catalogue, run.wait) as (record, found, confirm):
        if found is None:
            artifact, record.metrics = _make(job, run, record)
            if run.catalogue.knows(artifact.digest):
                # a stage that looks at the outside world found it as it was
                record.metrics = {"cached": True, **record.metrics}
            confirm()
            run.catalogue.record(artifact, job.key)
        else:
            artifact, record.metrics = found, {"cached": True}
        note_states(stage, job, artifact, run.catalogue, found is None)
        record.artifact = artifact.digest
    what = "unchanged" if found is None else "found in the catalogue"
    tick(name, 1, 1, what if record.metrics.get("cached") else "done")
    run.made[name] = artifact
    create_markdown_artifact(_card(name, artifact, record.metrics), key=f"geofm-{name}")
    return artifact


def _make(job: Job, run: Run, record: RunRow) -> tuple[Artifact, dict[str, Any]]:
    """Plan, map and seal one job; ``record`` learns what it spends while it runs."""
    key = f"geofm-{job.stage}-progress"
    bar = cast(UUID, create_progress_artifact(0.0, key=key, description=job.stage))
    workers = run.recipe.compute.workers
    with run.meter.stage(job.stage, partial(run.catalogue.keep, record)) as spent:
        parts = plan(job)
        spent.update(parts=parts, parts_worked=0)
        done, tasks = 0, count_tasks(parts, workers, get_stage(job.stage).at_once)
        futures = {
            run.runner.submit(work, {"job": job, "number": k, "tasks": tasks}): k
            for k in range(tasks)
        }
        for future in as_completed(list(futures)):
            try:
                spent["parts_worked"] += future.result()
            except BrokenExecutor as error:
                raise WorkerLost(
                    f"a worker process ended in the middle of {job.stage} (killed by the system, "
                    "perhaps for want of memory?): run again, which goes on with the parts that "
                    "are there; fewer compute.workers need less memory"
                ) from error
            done += len(range(futures[future], parts, tasks))
            tick(job.stage, done, parts + 1, "parts")
            update_progress_artifact(bar, 100.0 * done / (parts + 1))
        artifact, metrics = seal_stage(job)
    update_progress_artifact(bar, 100.0)
    usual = {
        "gpu_seconds": spent["seconds"] * gpus_held(get_stage(job.stage), job),
        "workers": workers,
        "peak_mib": peak_memory_mib(),
    }
    return artifact, {**spent, **usual, **metrics}


def _card(name: str, artifact: Artifact, metrics: dict[str, Any]) -> str:
    """A stage's result as Markdown for the UI."""
    manifest = artifact.manifest
    rows = [f"| {k} | {v:,} |" for k, v in manifest.counts.items()]
    rows += [f"| dropped: {k} | {v:,} |" for k, v in manifest.dropped.items()]
    spent = "found in the catalogue" if metrics.get("cached") else f"{metrics['seconds']:.1f} s"
    table = "\n".join(["| what | how many |", "|---|---:|", *rows])
    return f"### {name}: {spent}\n\n`{manifest.kind} {artifact.digest}`\n\n{table}\n"
