"""The three tasks every stage is made of. A task body is one library call."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from data_catalog.artifact import Artifact
from data_catalog.run import plan_parts, read_plan, seal, work_parts
from data_catalog.stage import Job
from geofm.stages import get_stage

#: geofm's own record is the cache; Prefect keeps no results.
PLAIN: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@task(name="plan", task_run_name="plan {job.stage}", **PLAIN)
def plan(job: Job) -> int:
    """List the parts of a stage; returns how many there are."""
    return len(plan_parts(get_stage(job.stage), job))


@task(name="work", task_run_name="work {job.stage} {number} of {tasks}", **PLAIN)
def work(job: Job, number: int, tasks: int) -> int:
    """Compute every ``tasks``-th part from ``number`` on where missing; returns how many were."""
    return work_parts(get_stage(job.stage), job, read_plan(job)[number::tasks])


@task(name="seal", task_run_name="seal {job.stage}", **PLAIN)
def seal_stage(job: Job) -> tuple[Artifact, dict[str, Any]]:
    """Write, hash and publish the stage's artifact."""
    return seal(get_stage(job.stage), job, read_plan(job))
