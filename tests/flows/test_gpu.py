"""A job that is described for the GPU pool, and what comes back from there."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from data_catalog.catalogue import Catalogue
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.run import make_job, run_job
from data_catalog.stage import Job, Stage
from data_catalog.store import Store
from flows import gpu, stage_flow
from flows.gpu import belongs_to_gpu, describe_job, job_of
from flows.stage_flow import StageContext
from geofm.config.recipe_book import load_recipe
from geofm.stages import get_stage
from tests.data_catalog.helpers import NUMBERS, Settings


def a_job(store: Store, catalogue: Catalogue, *changes: str) -> Job:
    """A job of a real stage that has no inputs."""
    recipe = load_recipe("demo", changes)
    compute = recipe.compute
    return make_job(
        get_stage("search"), store, {}, recipe.search, compute.seed, compute.device,
        catalogue.url, compute.model_dump(),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [(), ("search.bbox=5.70,45.07,5.76,45.10", "compute.workers=3", "compute.seed=7")],
)
def test_a_job_is_the_same_on_the_other_machine(
    store: Store, catalogue: Catalogue, changes: tuple[str, ...]
) -> None:
    job = a_job(store, catalogue, *changes)
    sent = json.loads(json.dumps(describe_job(job)))
    made = job_of(sent, store, catalogue)
    assert (made.key, made.identity, made.seed) == (job.key, job.identity, job.seed)
    assert (made.how, made.device) == (json.loads(json.dumps(job.how)), job.device)
    assert store.url not in json.dumps(sent) and catalogue.url not in json.dumps(sent)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "0" * 64},
        {"settings": {"a_field_of_a_later_version": 1}},
    ],
)
def test_another_version_of_geofm_is_an_error(
    store: Store, catalogue: Catalogue, change: dict[str, Any]
) -> None:
    sent = {**describe_job(a_job(store, catalogue)), **change}
    with pytest.raises(CheckError, match="another version of geofm"):
        job_of(sent, store, catalogue)


def test_another_catalogue_is_an_error_with_the_remedy(store: Store, catalogue: Catalogue) -> None:
    sent = {**describe_job(a_job(store, catalogue)), "inputs": {"items": "0" * 64}}
    with pytest.raises(UsageError, match="GEOFM_STORE and GEOFM_CATALOG"):
        job_of(sent, store, catalogue)


@pytest.mark.parametrize(
    ("is_deployed", "found", "asked", "belongs"),
    [
        (True, "cuda", "auto", True), (True, "cpu", "auto", False), (False, "cuda", "auto", False),
        (True, "cpu", "cuda", True),
    ],
)  # fmt: skip
def test_what_belongs_to_the_gpu_pool(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, is_deployed: bool,
    found: str, asked: str, belongs: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "deployed_run", lambda: object() if is_deployed else None)
    computes = replace(NUMBERS, device=lambda device: found if device == "auto" else device)
    job = make_job(computes, store, {}, Settings(), device=asked)
    assert belongs_to_gpu(computes, job) is belongs
    assert belongs_to_gpu(replace(computes, exclusive=True), job) is is_deployed
    assert not belongs_to_gpu(replace(computes, device=None), job)


@pytest.mark.parametrize("live", [False, True])
def test_the_result_of_the_other_machine_is_found(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    stage = replace(NUMBERS, live=live)
    job = make_job(stage, store, {}, Settings(), catalogue=catalogue.url)
    context = StageContext(load_recipe("demo"), store, catalogue, runner=None)  # type: ignore[arg-type]
    made = []

    def elsewhere(description: dict[str, Any], recipe: str) -> None:
        assert (description["key"], recipe) == (job.key, "demo")
        made.append(run_job(stage, job, catalogue).artifact)

    monkeypatch.setattr(stage_flow, "run_in_gpu_pool", elsewhere)
    result = stage_flow._run_in_gpu_pool(stage, job, context)
    assert [result.artifact] == made
    assert context.meter.took[stage.name] >= 0


def test_a_result_in_another_store_is_an_error(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage: Stage = NUMBERS
    job = make_job(stage, store, {}, Settings(), catalogue=catalogue.url)
    context = StageContext(load_recipe("demo"), store, catalogue, runner=None)  # type: ignore[arg-type]
    monkeypatch.setattr(stage_flow, "run_in_gpu_pool", lambda *_: None)
    with pytest.raises(RunError, match="is not in the store"):
        stage_flow._run_in_gpu_pool(stage, job, context)
