"""The two flows: the data half that a schedule refreshes, and the whole way to a scored model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from pydantic import Field

from data_catalog.artifact import Artifact
from data_catalog.redaction import NO_PASSWORD
from data_catalog.storage.process import end_with_parent
from flows.preflight import check_once, check_runner
from flows.settings import open_place, refuse_typed_password
from flows.stage_flow import Run, run_stage
from flows.summary import summary_markdown
from flows.versions import publish, version_markdown, waiting_items
from geofm.config.recipe import ComputeSettings, Recipe
from geofm.planet.catalog.serving import serving_source
from geofm.stages import ALL_STAGES, DATA_STAGES

#: An address in the form. Prefect refuses a password in it before it stores the parameters.
Address = Annotated[str, Field(json_schema_extra={"pattern": NO_PASSWORD})]


def task_runner(compute: ComputeSettings) -> TaskRunner[Any]:
    """Prefect's task runner for ``compute.runner`` with ``compute.workers`` workers."""
    if compute.runner == "processes":
        return ProcessPoolTaskRunner(
            max_workers=compute.workers, initializer=end_with_parent, initargs=(os.getpid(),)
        )
    if compute.runner == "dask":
        check_runner(compute)
        from prefect_dask.task_runners import DaskTaskRunner

        local = {"n_workers": compute.workers, "threads_per_worker": 1, "dashboard_address": None}
        address = os.environ.get("GEOFM_DASK")
        return DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=local)
    return ThreadPoolTaskRunner(max_workers=compute.workers)


def _run(stages: tuple[str, ...], recipe: Recipe, store: str, catalog: str, wait: bool) -> Run:
    refuse_typed_password(catalog)
    place = open_place(store, catalog)
    place.clean_up()
    name = recipe.pack.name
    check_once(recipe, place, data_only=stages == DATA_STAGES)
    with serving_source(recipe.search.stac), task_runner(recipe.compute) as runner:
        run = Run(recipe, place.store, place.catalogue, runner, wait=wait)
        # two refreshes of one dataset at once would compete for what comes next
        with place.catalogue.lease(name, wait) as lease:
            for stage in DATA_STAGES:
                run_stage(stage, run)
            lease.confirm()
            dataset = run.made[DATA_STAGES[-1]]
            version = publish(place.catalogue, name, dataset)
            run.version = replace(version, waiting=waiting_items(place.catalogue, dataset))
            # the same samples under another digest would be trained on once more
            run.made[DATA_STAGES[-1]] = place.catalogue.get(run.version.row.digest)
        create_markdown_artifact(version_markdown(run.version), key="geofm-version")
        for stage in stages:
            if stage not in DATA_STAGES:
                run_stage(stage, run)
            if stage == "pretrain":
                run.model = publish(place.catalogue, recipe.model_name, run.made[stage])
                create_markdown_artifact(version_markdown(run.model), key="geofm-model")
    create_markdown_artifact(summary_markdown(run), key="geofm-summary")
    return run


@flow(name="geofm-pretrain", flow_run_name="{recipe.name}", persist_result=False)
def pretrain_flow(
    recipe: Recipe, store: Address = "", catalog: Address = "", wait: bool = True
) -> Run:
    """From a STAC search to a pretrained model with scores and a report.

    Args:
        recipe: What to search, cut, curate, train and evaluate.
        store: Store address; empty means GEOFM_STORE, else ./geofm-store.
        catalog: Catalogue address without a password (set GEOFM_CATALOG for one); empty means
            GEOFM_CATALOG, else the store's own.
        wait: Wait while another run refreshes the same dataset or trains the same model; else
            stop at once.
    """
    return _run(ALL_STAGES, recipe, store, catalog, wait)


@flow(name="geofm-refresh", flow_run_name="{recipe.name}", persist_result=False)
def refresh_flow(
    recipe: Recipe, store: Address = "", catalog: Address = "", wait: bool = True
) -> Run:
    """The data half: find what is new, fetch only that, publish a dataset version.

    Args:
        recipe: What to search, cut, curate and pack.
        store: Store address; empty means GEOFM_STORE, else ./geofm-store.
        catalog: Catalogue address without a password (set GEOFM_CATALOG for one); empty means
            GEOFM_CATALOG, else the store's own.
        wait: Wait while another run refreshes the same dataset or trains the same model; else
            stop at once.
    """
    return _run(DATA_STAGES, recipe, store, catalog, wait)


def report_page(run: Run) -> Path | None:
    """Local path of the run's report, if it made one."""
    report: Artifact | None = run.made.get("report")
    return None if report is None else report.local("report.html")
