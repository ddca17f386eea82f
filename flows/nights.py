"""Runs of schedules and clicks: which are left out, which take turns, which faults are tried again.

A terminal shows a fault to a person who can decide. A night has nobody: it tries again after a
fault that may pass, leaves out work that another run does, and trains one model after the other.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import urllib3
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext

from data_catalog.catalogue import Catalogue
from data_catalog.database.lease import CatalogueAway
from data_catalog.errors import CheckError, UsageError
from data_catalog.storage.reach import OutOfReach

#: Pauses (s) before the attempts after the first, and the share by which they vary. Each is short,
#: because a run that is cancelled waits for the end of a pause.
PAUSES_S, JITTER = (5, 10, 15, 15, 15, 15), 0.3
#: Faults that may pass by themselves.
PASSING = (
    ConnectionError,
    TimeoutError,
    httpx.TransportError,
    urllib3.exceptions.HTTPError,
    CatalogueAway,
    OutOfReach,
)
_LIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]


def deployed_run() -> FlowRun | None:
    """Return the flow run of the caller, if a deployment started it."""
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    return run if run is not None and run.deployment_id is not None else None


def is_scheduled() -> bool:
    """Tell whether a schedule started the run of the caller, and no person."""
    run = deployed_run()
    return run is not None and bool(run.auto_scheduled)


def is_tried_again(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Tell whether a stage is tried again: in a run without a terminal, after a passing fault.

    Args:
        state: The failed state; its data is the exception.
    """
    return deployed_run() is not None and isinstance(state.data, Exception) and passes(state.data)


def passes(error: BaseException) -> bool:
    """Tell whether a fault may pass by itself: it, or one of its causes, is the network's."""
    if isinstance(error, UsageError | CheckError):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PASSING):
            return True
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code >= 500:
            return True  # a server that is busy, or starts
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def turn_to_train(catalogue: Catalogue) -> Iterator[None]:
    """Wait until no other run of a deployment trains on the devices of this process.

    Two clicks thus give two models, one after the other, and not two runs out of memory. A command
    in a terminal does not wait: its user knows the machine.
    """
    if deployed_run() is None:
        yield
        return
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all devices")
    name = f"training on {platform.node()}, {devices}"
    with catalogue.lease(name, verb="done"):
        yield


def is_superseded() -> bool:
    """Tell whether a later run of the same schedule is due, which does the work of this one.

    After a night without a worker several runs are late; the last one does the work of all.
    """
    run = deployed_run()
    if run is None or not is_scheduled() or run.expected_start_time is None:
        return False
    with get_client(sync_client=True) as client:
        live = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_LIVE)),
                expected_start_time=FlowRunFilterExpectedStartTime(
                    after_=run.expected_start_time, before_=datetime.now(UTC)
                ),
            ),
        )
    return any(
        other.id != run.id
        and other.auto_scheduled
        and other.parameters == run.parameters
        and other.expected_start_time is not None
        and other.expected_start_time > run.expected_start_time
        for other in live
    )
