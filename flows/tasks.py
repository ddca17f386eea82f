"""Prefect task for the parts of a stage.

The task body is one library call. geofm's own record is the cache, so Prefect keeps no results.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from data_catalog.run import read_plan, work_parts
from data_catalog.stage import Job
from geofm.stages import get_stage

UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


class JobOfParts:
    """Hold a job as a parameter of tasks.

    Prefect looks for results of other tasks in a parameter that is a dataclass, and would draw an
    edge from each stage that made an input of the job. It does not look into other objects. (Its
    own ``quote`` reaches a worker of Dask as a tuple.)
    """

    def __init__(self, job: Job) -> None:
        self.job = job


@task(name="parts", task_run_name="{stage} {number} of {tasks}", **UNCACHED)
def work(stage: str, given: JobOfParts, number: int, tasks: int) -> int:
    """Compute the missing parts among every ``tasks``-th part from ``number`` on.

    Returns:
        The number of parts computed.
    """
    log_information()
    return work_parts(get_stage(stage), given.job, read_plan(given.job)[number::tasks])


def log_information() -> None:
    """Let geofm's log lines of level INFO reach the log of the run, also from a worker process.

    Prefect passes on the lines of the loggers in PREFECT_LOGGING_EXTRA_LOGGERS, but leaves their
    level, by which only warnings would pass.
    """
    logger = logging.getLogger("geofm")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
