"""The deployments in Prefect: one form for each flow, and a nightly refresh.

What a user has changed in the UI stays: schedules, their parameters, the deployment's own
parameters, tags and limits. An update brings only what comes from the code: form, description,
entry point and work pool.

A deployment names its flow by module, and no folder, so that workers with other installations can
run it. Addresses reach the flow by the worker's environment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    WorkPoolCreate,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow
from prefect.utilities.callables import parameter_schema

from flows.automations import TAG, create_automations, notify_failures
from flows.gpu import CPU_POOL, GPU_POOL
from flows.pipeline import (
    audit_flow,
    evaluate_flow,
    gpu_stage_flow,
    pretrain_flow,
    refresh_flow,
)
from flows.settings import HEARTBEAT_S
from geofm.config.recipe_book import recipe_names

#: Cron expression and time zone of the nightly refresh.
NIGHTLY, TIME_ZONE = "0 3 * * *", "UTC"
#: The pool of each flow.
POOLS: dict[Flow[..., Any], str] = {
    refresh_flow: CPU_POOL,
    pretrain_flow: CPU_POOL,
    evaluate_flow: CPU_POOL,
    audit_flow: CPU_POOL,
    gpu_stage_flow: GPU_POOL,
}


def deploy_all(tell: Callable[[str], None], webhook: str = "", update: bool = True) -> None:
    """Create or update the work pools, the deployment of each flow, and the automations.

    The deployment of a flow has the flow's name. The refresh gets a nightly schedule, which is
    paused until a user switches it on; schedules that are there are left as they are.

    Args:
        tell: Called with a line about each step.
        update: Bring what is there up to date; else only what is missing is created.
        webhook: Address that is sent a message when a run fails; empty leaves the notice as it is.
    """
    with get_client(sync_client=True) as client:
        for pool in (CPU_POOL, GPU_POOL):
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        for flow in POOLS:
            name = f"{flow.name}/{flow.name}"
            tell(f"deployment  {name}: {_deploy(client, flow, update)}")
        if webhook:
            notify_failures(client, webhook, tell)
        if not update:
            return
        create_automations(client, tell)
        for name in _remove_earlier(client):
            tell(f"deployment  {name}: removed, with its schedule; use geofm-refresh instead")


def _deploy(client: SyncPrefectClient, flow: Flow[..., Any], update: bool) -> str:
    """Create or update the deployment of a flow; returns what was done."""
    from_code: dict[str, Any] = {
        "description": flow.description,
        "entrypoint": f"flows.pipeline.{flow.fn.__name__}",
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
        "work_pool_name": POOLS[flow],
        "enforce_parameter_schema": True,
        # also on a worker that `geofm up` has not started
        "job_variables": {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": HEARTBEAT_S}},
    }
    try:
        there = client.read_deployment_by_name(f"{flow.name}/{flow.name}")
    except ObjectNotFound:
        schedules = [
            DeploymentScheduleCreate(
                schedule=CronSchedule(cron=NIGHTLY, timezone=TIME_ZONE),
                active=False,
                slug="nightly",
            )
        ]
        client.create_deployment(
            flow_id=client.create_flow(flow),
            name=flow.name,
            tags=[TAG],
            schedules=schedules if flow is refresh_flow else None,
            **from_code,
        )
        return "created"
    if not update:
        return "as it is"
    client.update_deployment(there.id, DeploymentUpdate(**from_code, pull_steps=None))
    return "up to date"


def _remove_earlier(client: SyncPrefectClient) -> list[str]:
    """Remove the deployments of an earlier version, one for each recipe; returns their names."""
    removed = []
    for deployment in client.read_deployments(limit=200):
        of_file = (deployment.entrypoint or "").startswith("flows/pipeline.py:")
        if TAG in deployment.tags and of_file and deployment.name in recipe_names():
            client.delete_deployment(deployment.id)
            removed.append(deployment.name)
    return removed
