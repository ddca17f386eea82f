"""Run a stage in the pool of GPU workers: training, and embedding and evaluation on CUDA.

A run that a deployment started works in the pool ``geofm-cpu``, which may be on a machine without a
GPU, and a machine with one must not wait for downloads. So the stage becomes a child run of the
deployment ``geofm-stage`` in the pool ``geofm-gpu``, and this module waits for it. Only a
description of the job is sent: its inputs are in the store and the catalogue, which both workers
share. A command in a terminal runs all stages in its own process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling
from pydantic import ValidationError

from data_catalog.catalogue import Catalogue, UnknownReference
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.progress import say
from data_catalog.run import make_job
from data_catalog.stage import Job, Stage
from data_catalog.stopping import Stopped
from data_catalog.store import Store
from flows.nights import deployed_run
from geofm.config.recipe import Recipe
from geofm.stages import get_stage, section_of

log = logging.getLogger("geofm.run")

CPU_POOL, GPU_POOL = "geofm-cpu", "geofm-gpu"
#: The deployment that runs one stage in the GPU pool, as FLOW/DEPLOYMENT.
STAGE_DEPLOYMENT = "geofm-stage/geofm-stage"
#: Seconds between two looks at a child run, and seconds without a server after which it is lost.
LOOK_S, SERVER_AWAY_S = 2.0, 900.0


class ChildFailed(RunError):
    """A stage failed in the GPU pool."""


def trains(stage: Stage) -> bool:
    """Tell whether a stage trains a network: one at a time on a GPU, with checkpoints."""
    return stage.exclusive and stage.device is not None


def belongs_to_gpu(stage: Stage, job: Job) -> bool:
    """Tell whether a job runs in the GPU pool: one that trains, or that asks for CUDA or finds it.

    A command in a terminal works where it is.
    """
    if stage.device is None or deployed_run() is None:
        return False
    return trains(stage) or stage.device(job.device) == "cuda"


def describe_job(job: Job) -> dict[str, Any]:
    """Describe a job as a parameter of a child run, without addresses of this machine."""
    return {
        "stage": job.stage,
        "settings": job.settings.model_dump(mode="json"),
        "inputs": {role: artifact.digest for role, artifact in job.inputs.items()},
        "reads": job.reads,
        "compute": job.how,
        "key": job.key,
    }


def job_of(description: Mapping[str, Any], store: Store, catalogue: Catalogue) -> Job:
    """Make the job of a description.

    Raises:
        UsageError: An input is not in the catalogue of this worker.
        CheckError: The job has another key here, because this worker has another geofm.
    """
    stage = get_stage(description["stage"])
    section = type(getattr(Recipe(name="stage"), section_of(stage.name)))
    compute = description["compute"]
    try:
        inputs = {role: catalogue.get(digest) for role, digest in description["inputs"].items()}
    except UnknownReference as error:
        raise UsageError(
            f"{error}. The worker of the pool {GPU_POOL} needs the store and the catalogue of the "
            "other workers: start it with their GEOFM_STORE and GEOFM_CATALOG"
        ) from error
    other_version = CheckError(
        f"the worker of the pool {GPU_POOL} has another version of geofm than the run that asks "
        "for this stage: install the same version on both machines"
    )
    try:
        settings = section.model_validate(description["settings"])
    except ValidationError as error:
        raise other_version from error
    # the run that made the description has looked up the weights, and copied them to the store
    resolved = replace(
        stage, inputs=tuple(inputs), reads=lambda _: description["reads"], resolve=None
    )
    job = make_job(
        resolved,
        store,
        inputs,
        settings,
        compute["seed"],
        compute["device"],
        catalogue.url,
        compute,
    )
    if job.key != description["key"]:
        raise other_version
    return job


def run_in_gpu_pool(description: Mapping[str, Any], recipe: str) -> None:
    """Run a job in the GPU pool, and wait for its end.

    The child run is cancelled when the caller is stopped; a training writes its checkpoint first.

    Args:
        description: The job, from ``describe_job``; its artifact is in the catalogue afterwards.
        recipe: Name of the recipe, for the name of the child run.

    Raises:
        ChildFailed: The child run failed, crashed or was cancelled; the message says why.
        Stopped: The caller is to stop.
    """
    parent, stage = deployed_run(), description["stage"]
    with get_client(sync_client=True) as client:
        child = cast(
            FlowRun,
            run_deployment(
                STAGE_DEPLOYMENT,
                parameters={"description": dict(description)},
                flow_run_name=f"{stage} · {recipe}",
                timeout=0,
                # Prefect returns a run with the same key, whatever its state
                idempotency_key=(
                    f"{parent.id} {parent.run_count} {description['key']}" if parent else None
                ),
            ),
        )
        log.info("%s: runs in the pool %s as %r", stage, GPU_POOL, child.name)
        try:
            # a server that is away is asked again there, where a request to stop is heard
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                ended = _wait(client, child, stage)
        except Stopped:
            _cancel(client, child)
            raise
    state = ended.state
    if state is not None and state.type is StateType.COMPLETED:
        return
    if state is not None and state.type is StateType.CANCELLED:
        raise Stopped(f"{stage}: the run {child.name!r} was cancelled; what is done is kept")
    text = state.message if state is not None and state.message else "no reason is recorded"
    raise ChildFailed(f"{stage} failed in the run {child.name!r}: {text}")


def _cancel(client: SyncPrefectClient, child: FlowRun) -> None:
    """Cancel a child run; a server that is away now must not hide why the parent ends."""
    try:
        client.set_flow_run_state(child.id, Cancelling(message="the parent run was stopped"))
    except httpx.HTTPError as error:
        log.warning("the run %r could not be cancelled (%s); cancel it yourself", child.name, error)


def _wait(client: SyncPrefectClient, child: FlowRun, stage: str) -> FlowRun:
    """Wait for the end of a child run, and show its progress as that of the stage.

    Raises:
        Stopped: The caller is to stop.
        httpx.HTTPError: The server has been away for ``SERVER_AWAY_S``.
    """
    answered = time.monotonic()
    while True:
        try:
            run = client.read_flow_run(child.id)
            if run.state is not None and run.state.is_final():
                say(stage, 100, 100, f"% in the run {child.name!r}: {run.state.name}")
                return run
            share, note = _progress(client, child.id)
            state = run.state.name if run.state is not None else "Scheduled"
            say(stage, share, 100, note or f"% in the run {child.name!r}: {state}")
            answered = time.monotonic()
        except httpx.HTTPError:
            if time.monotonic() - answered > SERVER_AWAY_S:
                raise
            say(stage, 0, 100, "waiting for the Prefect server")
        time.sleep(LOOK_S)


def _progress(client: SyncPrefectClient, run: UUID) -> tuple[int, str]:
    """Return how far a child run is in percent, and its own line of progress with its picture."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run]),
            type=ArtifactFilterType(any_=["progress"]),
        ),
        limit=1,
    )
    if not found:
        return 0, ""
    line = (found[0].description or "").partition("** ")[2]
    return int(float(str(found[0].data or 0))), f"%: {line}" if line else ""


def warn_without_worker() -> None:
    """Warn in the log, in a run of a deployment, if no worker of the GPU pool has reported lately.

    The run goes on: the worker may be started meanwhile.
    """
    if deployed_run() is None:
        return
    try:
        with get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(GPU_POOL)
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("the workers of the pool %s are not known (%s)", GPU_POOL, error)
        return
    if not any(worker.status == "ONLINE" for worker in workers):
        log.warning(
            "no worker of the pool %s is online, so the training will wait for one; start it on "
            "the machine with the GPU: geofm up --only gpu",
            GPU_POOL,
        )
