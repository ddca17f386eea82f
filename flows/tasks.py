"""Prefect tasks: the work on parts, and the plan and seal of a stage for the UI.

A task body is one library call. geofm's own record is the cache, so Prefect keeps no results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from data_catalog.run import read_plan, work_parts
from data_catalog.stage import Job, Stage
from geofm.stages import get_stage

UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@task(name="work", task_run_name="work {job.stage} {number} of {tasks}", **UNCACHED)
def work(job: Job, number: int, tasks: int) -> int:
    """Compute the missing parts among every ``tasks``-th part from ``number`` on.

    Returns:
        The number of parts computed.
    """
    return work_parts(get_stage(job.stage), job, read_plan(job)[number::tasks])


def show_steps(stage: Stage) -> Stage:
    """Return the stage with its plan and its seal as task runs in the Prefect UI."""
    plan = task(name="plan", task_run_name=f"plan {stage.name}", **UNCACHED)(stage.plan)
    seal = task(name="seal", task_run_name=f"seal {stage.name}", **UNCACHED)(stage.seal)
    return replace(stage, plan=plan, seal=seal)
