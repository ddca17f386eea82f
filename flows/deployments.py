"""Deployments: every recipe as a form in the Prefect UI, and a refresh on a schedule."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import Flow
from prefect.schedules import Cron

from flows.pipeline import pretrain_flow, refresh_flow
from geofm.config.recipe_book import load_recipe, recipe_names

POOL = "geofm"
ROOT = Path(__file__).resolve().parents[1]
#: Nightly, paused until somebody switches it on.
NIGHTLY = "0 3 * * *"


def deploy_all(store: str) -> list[str]:
    """Create or update the work pool and all deployments; returns the deployments' names.

    Each recipe gets ``geofm-pretrain/<recipe>`` and ``geofm-refresh/<recipe>``, the form filled
    in with the recipe's values; the refresh has a nightly schedule that starts paused, and runs
    that would overlap are dropped.
    """
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    made = []
    for name in recipe_names():
        recipe = load_recipe(name)
        common: dict[str, Any] = {
            "name": name,
            "description": recipe.description,
            "parameters": {"recipe": recipe.model_dump(mode="json"), "store": store},
            "tags": ["geofm"],
            "work_pool_name": POOL,
            "concurrency_limit": ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            "print_next_steps": False,
            "ignore_warnings": True,
        }
        nightly = Cron(NIGHTLY, active=False)
        with redirect_stdout(sys.stderr):  # stdout is for results
            _source(pretrain_flow, "pretrain_flow").deploy(**common)
            _source(refresh_flow, "refresh_flow").deploy(**common, schedule=nightly)
        made += [f"geofm-pretrain/{name}", f"geofm-refresh/{name}"]
    return made


def _source(flow: Flow[..., Any], name: str) -> Any:
    """The flow as found in this installation's own folder."""
    return flow.from_source(source=str(ROOT), entrypoint=f"flows/pipeline.py:{name}")
