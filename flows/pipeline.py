"""The two Prefect flows.

refresh_flow     the data half: search to pack, then publish a dataset version
pretrain_flow    all stages: the data half, then pretrain, evaluate and report
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from pydantic import Field

from data_catalog.redaction import NO_PASSWORD
from data_catalog.storage.process import end_with_parent
from flows.preflight import check_once, check_runner
from flows.settings import open_place, refuse_typed_password
from flows.stage_flow import StageContext, run_in_flow
from flows.summary import PipelineRun, summary_markdown
from flows.versions import publish, version_markdown, waiting_items
from geofm.config.recipe import ComputeSettings, Recipe
from geofm.planet.catalog.serving import serving_source
from geofm.stages import ALL_STAGES, DATA_STAGES

#: An address in the form. Prefect refuses a password in it before it stores the parameters.
Address = Annotated[str, Field(json_schema_extra={"pattern": NO_PASSWORD})]


def task_runner(compute: ComputeSettings) -> TaskRunner[Any]:
    """Return Prefect's task runner for ``compute.runner`` with ``compute.workers`` workers."""
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


def _run_stages(
    stages: tuple[str, ...], recipe: Recipe, store: str, catalog: str, wait: bool
) -> PipelineRun:
    """Run stages in their order, publish the dataset after the data half, and the model."""
    refuse_typed_password(catalog)
    place = open_place(store, catalog)
    place.clean_up()
    name = recipe.pack.name
    check_once(recipe, place, data_only=stages == DATA_STAGES)
    with serving_source(recipe.search.stac), task_runner(recipe.compute) as runner:
        context = StageContext(recipe, place.store, place.catalogue, runner, wait=wait)
        run = PipelineRun(recipe, place.catalogue)
        # Two refreshes of one dataset at once would publish versions from the same predecessor.
        with place.catalogue.lease(name, wait) as lease:
            for stage in DATA_STAGES:
                run.artifacts[stage] = run_in_flow(stage, run.inputs(), context)
            lease.confirm()
            dataset = run.artifacts[DATA_STAGES[-1]]
            version = publish(place.catalogue, name, dataset)
            run.version = replace(version, waiting=waiting_items(place.catalogue, dataset))
            # If the newest version holds the same samples under another digest, training goes on
            # with that version, so that the same samples are not trained on twice.
            run.artifacts[DATA_STAGES[-1]] = place.catalogue.get(run.version.row.digest)
        create_markdown_artifact(version_markdown(run.version), key="geofm-version")
        for stage in stages[len(DATA_STAGES) :]:
            run.artifacts[stage] = run_in_flow(stage, run.inputs(), context)
            if stage == "pretrain":
                run.model = publish(place.catalogue, recipe.model_name, run.artifacts[stage])
                create_markdown_artifact(version_markdown(run.model), key="geofm-model")
    create_markdown_artifact(summary_markdown(run), key="geofm-summary")
    return run


@flow(name="geofm-pretrain", flow_run_name="{recipe.name}", persist_result=False)
def pretrain_flow(
    recipe: Recipe, store: Address = "", catalog: Address = "", wait: bool = True
) -> PipelineRun:
    """Go from a STAC search to a pretrained model with scores and a report.

    Args:
        recipe: Settings of all stages.
        store: Store address; empty means GEOFM_STORE, else ./geofm-store.
        catalog: Catalogue address without a password (set GEOFM_CATALOG for one); empty means
            GEOFM_CATALOG, else the store's own.
        wait: Wait while another run refreshes the same dataset or trains the same model; else
            stop at once.
    """
    return _run_stages(ALL_STAGES, recipe, store, catalog, wait)


@flow(name="geofm-refresh", flow_run_name="{recipe.name}", persist_result=False)
def refresh_flow(
    recipe: Recipe, store: Address = "", catalog: Address = "", wait: bool = True
) -> PipelineRun:
    """Run the data half: find what is new, fetch only that, publish a dataset version.

    Args:
        recipe: Settings of all stages; those of the data stages are used.
        store: Store address; empty means GEOFM_STORE, else ./geofm-store.
        catalog: Catalogue address without a password (set GEOFM_CATALOG for one); empty means
            GEOFM_CATALOG, else the store's own.
        wait: Wait while another run refreshes the same dataset or trains the same model; else
            stop at once.
    """
    return _run_stages(DATA_STAGES, recipe, store, catalog, wait)


def report_page(run: PipelineRun) -> Path | None:
    """Return the local path of the run's report; None if no report was made."""
    report = run.artifacts.get("report")
    return None if report is None else report.local("report.html")
