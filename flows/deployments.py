"""Deployments in Prefect: every recipe as a form in the UI, with a nightly refresh."""

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

from geofm.config.recipe_book import load_recipe, recipe_names

#: Name of the work pool, whose worker `geofm up` starts.
POOL = "geofm"
#: Folder that the package ``flows`` is in: the source tree, or site-packages.
ROOT = Path(__file__).resolve().parents[1]
#: Cron expression of the nightly refresh: 03:00 UTC.
NIGHTLY = "0 3 * * *"


def deploy_all(store: str) -> list[str]:
    """Create or update the work pool and two deployments for each recipe.

    The deployments are ``geofm-pretrain/<recipe>`` and ``geofm-refresh/<recipe>``. Their forms are
    filled in with the recipe's values. The refresh has a nightly schedule, which is paused until a
    user switches it on. A run that would overlap with another one of its deployment is dropped.

    Args:
        store: address of the store, a parameter of every deployment.

    Returns:
        The names of the deployments.
    """
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    pretrain, refresh = _with_source("pretrain_flow"), _with_source("refresh_flow")
    names = []
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
        with redirect_stdout(sys.stderr):  # Prefect prints; stdout is for results
            pretrain.deploy(**common)
            refresh.deploy(**common, schedule=nightly)
        names += [f"geofm-pretrain/{name}", f"geofm-refresh/{name}"]
    return names


def _with_source(name: str) -> Any:
    """Return a flow of ``flows.pipeline`` that workers load from this installation."""
    return Flow.from_source(source=str(ROOT), entrypoint=f"flows/pipeline.py:{name}")
