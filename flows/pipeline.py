"""The Prefect flows: refresh a dataset, pretrain a model, evaluate a model, audit a dataset.

refresh_flow     the data half: search to pack, then publish a dataset version
pretrain_flow    refresh, or take a published dataset; then pretrain, evaluate and report
evaluate_flow    score a published model on tasks
audit_flow       check a published artifact, and cut samples of it again

Each is one form of plain fields in the UI (flows/form.py). No parameter is an address: store and
catalogue are those of the process, GEOFM_STORE and GEOFM_CATALOG.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas import State
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from pydantic import Field

from data_catalog.artifact import Artifact
from data_catalog.database.lease import LeaseHeld
from data_catalog.errors import GeofmError, UsageError
from data_catalog.provenance.lineage import ancestor
from data_catalog.stopping import SharedEvent, ask_to_stop, new_run, share
from data_catalog.storage.process import end_with_parent
from flows.cli.verify import verify
from flows.forecast import ForecastMeter, log_forecast
from flows.form import (
    AS_IN_RECIPE,
    NO_SEED,
    Amount,
    Changes,
    Form,
    Name,
    RecipeName,
    Reference,
    Runner,
    Seed,
    Whole,
    changes_text,
    recipe_of_form,
)
from flows.gpu import job_of, warn_without_worker
from flows.nights import deployed_run, is_scheduled, is_superseded
from flows.open_lineage import report_flow
from flows.preflight import check_once, check_runner
from flows.run_name import name_of, rename_run
from flows.settings import Place, may_wait, open_place
from flows.stage_flow import (
    RunProgress,
    StageContext,
    StageTasks,
    run_job_task,
    share_context,
)
from flows.summary import (
    PipelineRun,
    pictures_markdown,
    score_rows,
    scores_markdown,
    summary_markdown,
)
from flows.tasks import JobOfParts, log_information
from flows.versions import (
    Published,
    announce,
    publish,
    published_dataset,
    version_markdown,
    waiting_items,
)
from geofm.config.recipe import ComputeSettings, Recipe
from geofm.forecasting.figures import StageForecast
from geofm.planet.catalog.serving import serving_source
from geofm.stages import ALL_STAGES, DATA_STAGES, get_stage

log = logging.getLogger("geofm.run")

#: Options of all flows: stages run in threads of the flow.
FLOW: dict[str, Any] = {"persist_result": False, "task_runner": ThreadPoolTaskRunner()}
#: The stages after the dataset.
MODEL_STAGES = ALL_STAGES[len(DATA_STAGES) :]


def task_runner(compute: ComputeSettings) -> TaskRunner[Any]:
    """Return Prefect's task runner for ``compute.runner`` with ``compute.workers`` workers."""
    if compute.runner == "processes":
        stop = get_context("spawn").Event()
        share(stop)
        return ProcessPoolTaskRunner(
            max_workers=compute.workers, initializer=begin_worker, initargs=(os.getpid(), stop)
        )
    if compute.runner == "dask":
        check_runner(compute)
        from prefect_dask.task_runners import DaskTaskRunner

        local = {"n_workers": compute.workers, "threads_per_worker": 1, "dashboard_address": None}
        address = os.environ.get("GEOFM_DASK")
        return DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=local)
    return ThreadPoolTaskRunner(max_workers=compute.workers)


def begin_worker(parent: int, stop: SharedEvent) -> None:
    """Let a worker process end with its parent, and stop its work when the parent is asked to."""
    end_with_parent(parent)
    share(stop)


@contextmanager
def _logged() -> Iterator[None]:
    """Begin a run, and log why it fails: the UI shows an error's message only beside the logs."""
    log_information()
    new_run()
    try:
        with report_flow():
            yield
    except GeofmError as error:
        log.error("%s", error)
        raise
    finally:
        new_run()  # no stage works any more


def _run_stages(recipe: Recipe, name: str, data_only: bool, dataset: str = "") -> PipelineRun:
    """Run the data half, or take a published dataset; then train on it, unless ``data_only``.

    Args:
        recipe: Settings of the run.
        name: Name or path of the recipe without its changes.
        data_only: End with the dataset.
        dataset: Reference of a published dataset; the data half does not run.
    """
    log.info("%s", changes_text(recipe, name))
    first_name = name_of(recipe, training=not data_only)
    rename_run(first_name)
    place = open_place()
    place.clean_up()
    meter = ForecastMeter()
    run = PipelineRun(recipe, place.catalogue, meter.comparison)
    version = run.version = _take_dataset(run, place, dataset) if dataset else None
    check_once(recipe, place, data_only=data_only, is_local=deployed_run() is None)
    if not data_only:
        warn_without_worker()
    with ExitStack() as stack:
        progress = RunProgress(recipe.name, len(DATA_STAGES if data_only else ALL_STAGES))
        stack.enter_context(progress.shown())
        stack.enter_context(serving_source(recipe.search.stac))
        runner = stack.enter_context(task_runner(recipe.compute))
        context = StageContext(recipe, place.store, place.catalogue, runner, meter, may_wait())
        tasks = stack.enter_context(StageTasks(context, run.inputs()))
        if version is None:
            wait = may_wait() and not (data_only and is_scheduled())
            later = DATA_STAGES[1:] if data_only else ALL_STAGES[1:]
            version = run.version = _make_dataset(run, place, tasks, wait, meter, later)
        else:
            log_forecast(meter, recipe, place, MODEL_STAGES, run.inputs())
        create_markdown_artifact(version_markdown(version), key=f"geofm-version-{recipe.name}")
        samples = f"{run.artifacts['pack'].manifest.counts['rows_out']:,} chips"
        rename_run(name_of(recipe, samples, training=not data_only), first_name)
        if not data_only:
            tasks.submit(MODEL_STAGES)
            run.artifacts |= tasks.results(["pretrain"])
            run.model = publish(place.catalogue, recipe.model_name, run.artifacts["pretrain"])
            announce(run.model, run.artifacts["pretrain"])
            create_markdown_artifact(version_markdown(run.model), key=f"geofm-model-{recipe.name}")
            run.artifacts |= tasks.results(MODEL_STAGES)
    if "report" in run.artifacts:
        pictures = pictures_markdown(run.artifacts["report"])
        create_markdown_artifact(pictures, key=f"geofm-pictures-{recipe.name}")
    create_markdown_artifact(summary_markdown(run), key=f"geofm-summary-{recipe.name}")
    return run


def _make_dataset(
    run: PipelineRun,
    place: Place,
    tasks: StageTasks,
    wait: bool,
    meter: ForecastMeter,
    forecast_stages: Sequence[str],
) -> Published:
    """Run the data half, and publish its dataset; all stages after the search are forecast."""
    name, search = run.recipe.pack.name, DATA_STAGES[:1]
    # Two refreshes of one dataset at once would publish versions from the same predecessor.
    with place.catalogue.lease(name, wait) as lease:
        log_forecast(meter, run.recipe, place, search, {})
        tasks.submit(search)
        run.artifacts |= tasks.results(search)
        log_forecast(meter, run.recipe, place, forecast_stages, run.inputs())
        tasks.submit(DATA_STAGES[1:])
        run.artifacts |= tasks.results(DATA_STAGES)
        lease.confirm()
        dataset = run.artifacts[DATA_STAGES[-1]]
        version = publish(place.catalogue, name, dataset)
        # If the newest version holds the same samples under another digest, training goes on
        # with that version, so that the same samples are not trained on twice.
        run.artifacts[DATA_STAGES[-1]] = place.catalogue.get(version.row.digest)
        announce(version, run.artifacts[DATA_STAGES[-1]])
        tasks.replace(DATA_STAGES[-1], run.artifacts[DATA_STAGES[-1]])
        return replace(version, waiting=waiting_items(place.catalogue, dataset))


def _take_dataset(run: PipelineRun, place: Place, reference: str) -> Published:
    """Take a published dataset, and the artifacts of the stages that made it.

    Raises:
        UsageError: The reference is no dataset's, or the dataset is smaller than a batch.
    """
    version = published_dataset(place.catalogue, reference)
    dataset = place.catalogue.get(version.row.digest)
    samples, batch = dataset.manifest.counts["rows_out"], run.recipe.pretrain.batch
    if samples < batch:
        raise UsageError(
            f"pretrain.batch is {batch}, but {version.ref} has {samples} samples; set it to at "
            f"most {samples}, or choose another dataset"
        )
    for name in DATA_STAGES:
        kind = get_stage(name).kind
        run.artifacts[name] = (
            dataset if kind == "dataset" else ancestor(place.catalogue, dataset, kind)
        )
    return version


@flow(name="geofm-refresh", **FLOW)
def refresh_flow(
    recipe: RecipeName = "demo",
    dataset: Name = "",
    max_chips: Whole = 0,
    budget: Amount = 0.0,
    runner: Runner = AS_IN_RECIPE,
    workers: Whole = 0,
    seed: Seed = NO_SEED,
    changes: Changes = [],  # noqa: B006  Prefect shows the default, and nothing changes it
) -> PipelineRun | State[Any]:
    """Find what is new, fetch only that, and publish a dataset version.

    Args:
        recipe: Recipe of the dataset, by name.
        dataset: Name under which the dataset is published. Empty: as in the recipe.
        max_chips: Most chips to cut, spread evenly over place and season. 0: as in the recipe.
        budget: Chips to keep: up to 1 a share of those left after the duplicates, above that a
            number of chips. 0: as in the recipe.
        runner: What works on the parts of a stage.
        workers: Parts worked on at the same time. 0: as in the recipe.
        seed: Seed of all random numbers. -1: as in the recipe.
        changes: Any other setting, as section.field=value, one per line, such as
            search.bbox=2,48,3,49; `geofm recipes` and docs/recipe.md list them.
    """
    with _logged():
        form = Form(
            dataset=dataset,
            max_chips=max_chips,
            budget=budget,
            runner=runner,
            workers=workers,
            seed=seed,
        )
        made = recipe_of_form(recipe, form, changes)
        if is_superseded():
            return Completed(name="Skipped", message="a later run of the schedule is due")
        try:
            return _run_stages(made, recipe, data_only=True)
        except LeaseHeld:
            if not is_scheduled():
                raise
            text = f"another run refreshes {made.pack.name}; the next one of the schedule will too"
            return Completed(name="Skipped", message=text)


@flow(name="geofm-pretrain", **FLOW)
def pretrain_flow(
    recipe: RecipeName = "demo",
    dataset: Reference = "",
    budget: Amount = 0.0,
    epochs: Annotated[int, Field(ge=0, le=10_000)] = 0,
    batch: Annotated[int, Field(ge=0, le=65_536)] = 0,
    teacher: str = "",
    student: str = "",
    tasks: str = "",
    runner: Runner = AS_IN_RECIPE,
    workers: Whole = 0,
    seed: Seed = NO_SEED,
    changes: Changes = [],  # noqa: B006  Prefect shows the default, and nothing changes it
) -> PipelineRun:
    """Pretrain a model on a dataset, score it, and write a report.

    Args:
        recipe: Recipe of the run, by name.
        dataset: Published dataset to train on, NAME or NAME@VERSION, without a search. Empty: the
            recipe's dataset is refreshed first.
        budget: Chips to keep: up to 1 a share of those left after the duplicates, above that a
            number of chips. 0: as in the recipe. Without effect on a published dataset.
        epochs: Passes over the dataset; the warm-up is shortened with them. 0: as in the recipe.
        batch: Images per step, over all devices. 0: as in the recipe.
        teacher: Frozen teacher: a timm model, NAME@FILE.safetensors, or a geofm model. Empty: as in
            the recipe.
        student: Network to pretrain, a timm model. Empty: as in the recipe.
        tasks: Evaluation tasks, separated by commas: planet, or folders. Empty: as in the recipe.
        runner: What works on the parts of a stage.
        workers: Parts worked on at the same time. 0: as in the recipe.
        seed: Seed of all random numbers. -1: as in the recipe.
        changes: Any other setting, as section.field=value, one per line, such as
            pretrain.alpha=0; `geofm recipes` and docs/recipe.md list them.
    """
    with _logged():
        form = Form(
            budget=budget,
            epochs=epochs,
            batch=batch,
            teacher=teacher,
            student=student,
            tasks=tasks,
            runner=runner,
            workers=workers,
            seed=seed,
        )
        made = recipe_of_form(recipe, form, changes)
        return _run_stages(made, recipe, data_only=False, dataset=dataset)


@flow(name="geofm-evaluate", **FLOW)
def evaluate_flow(
    model: Reference,
    tasks: str = "planet",
    knn: Annotated[int, Field(ge=1, le=200)] = 5,
    max_images: Annotated[int, Field(ge=20, le=10_000_000)] = 5000,
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.3,
    workers: Annotated[int, Field(ge=1, le=1024)] = 2,
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0,
) -> Artifact:
    """Score a published model on downstream tasks with frozen features.

    Args:
        model: Published model, NAME or NAME@VERSION.
        tasks: Tasks, separated by commas: planet, or folders with one sub-folder per class.
        knn: Neighbours of the kNN protocol.
        max_images: Most images used per task, balanced by class.
        test_share: Share of the images held out for testing.
        workers: Parts worked on at the same time.
        seed: Seed of splits and resamples.
    """
    with _logged():
        names = [task.strip() for task in tasks.split(",") if task.strip()]
        if not names:
            raise UsageError("tasks: name at least one task: planet, or a folder of images")
        place = open_place()
        place.clean_up()
        trained = place.catalogue.resolve(model)
        if trained.manifest.kind != "model":
            raise UsageError(f"model: {model} is a {trained.manifest.kind}; give a model's name")
        recipe = Recipe.model_validate(
            {
                "name": "evaluate",
                "evaluate": {
                    "tasks": names,
                    "knn": knn,
                    "max_images": max_images,
                    "test_share": test_share,
                },
                "compute": {"workers": workers, "seed": seed},
            }
        )
        log.info("model %s, tasks %s", model, ", ".join(recipe.evaluate.tasks))
        rename_run(f"{model} · {', '.join(Path(task).name for task in recipe.evaluate.tasks)}")
        given = {"model": trained, "dataset": ancestor(place.catalogue, trained, "dataset")}
        with task_runner(recipe.compute) as runner:
            context = StageContext(recipe, place.store, place.catalogue, runner, wait=may_wait())
            with StageTasks(context, given) as stages:
                stages.submit(["evaluate"])
                scores = stages.results(["evaluate"])["evaluate"]
        create_markdown_artifact(scores_markdown(score_rows(scores)), key="geofm-scores")
        return scores


@flow(name="geofm-audit", **FLOW)
def audit_flow(
    reference: Reference,
    deep: bool = True,
    recut: Annotated[int, Field(ge=0, le=100_000)] = 10,
    seed: Seed = NO_SEED,
) -> str:
    """Check that a published dataset or model is as it was sealed, and cut samples again.

    Args:
        reference: What to check: NAME, NAME@VERSION or a digest.
        deep: Check everything that it was made from, too.
        recut: Samples that are fetched and cut again, and compared with the packed pixels.
        seed: Seed that chooses these samples. -1: another one each time.
    """
    with _logged():
        rename_run(f"{reference} · {'deep' if deep else 'own files'} · {recut} cut again")
        place = open_place(write=False)
        found = verify(place.catalogue, reference, deep, recut, None if seed < 0 else seed)
        create_markdown_artifact(found.markdown(), key="geofm-audit")
        found.check()
        log.info("%s", found.headline())
        return found.headline()


@flow(name="geofm-stage", **FLOW)
def gpu_stage_flow(description: dict[str, Any]) -> State[Any]:
    """Run one stage that a run of another flow asks for. It is not for clicks.

    Args:
        description: The job (flows/gpu.py).
    """
    # The stage runs in the main thread: a training hears SIGTERM there, and writes a checkpoint.
    with _logged():
        place = open_place()
        place.clean_up()
        job = job_of(description, place.store, place.catalogue)
        recipe = Recipe.model_validate({"name": job.stage, "compute": job.how})
        with ExitStack() as stack:
            stack.enter_context(RunProgress(job.stage, 1).shown())
            runner = stack.enter_context(task_runner(recipe.compute))
            meter = ForecastMeter()
            if forecast := description.get("forecast"):
                meter.stages[job.stage] = StageForecast.from_json(job.stage, forecast)
            share_context(StageContext(recipe, place.store, place.catalogue, runner, meter))
            stack.push(_stop_others)
            named = run_job_task.with_options(task_run_name=job.stage)
            state: State[Any] = named(JobOfParts(job), return_state=True)
            if not state.is_cancelled():
                state.result()  # raises why it failed
            return state


def _stop_others(kind: type[BaseException] | None, *_: object) -> None:
    """Ask the threads of a run to stop if its main thread ends by an exception."""
    if kind is not None:
        ask_to_stop()


def report_page(run: PipelineRun) -> Path | None:
    """Return the local path of the run's report; None if no report was made."""
    report = run.artifacts.get("report")
    return None if report is None else report.local("report.html")
