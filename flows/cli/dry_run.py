"""The option ``--dry-run``: search, plan the windows, and forecast what the run would take."""

from __future__ import annotations

import time

from data_catalog.errors import RunError
from data_catalog.provenance.lineage import ancestor
from data_catalog.run import make_job, run_stage
from flows.cli.console import out, print_json, print_table, progress_bars
from flows.settings import Place, open_place
from flows.versions import published_dataset
from geofm.chips.cut import explain_failure
from geofm.chips.plan import CutPlan, Forecast, forecast, plan_windows, sum_forecasts
from geofm.config.recipe import Recipe
from geofm.forecasting.figures import HEAD, RunForecast
from geofm.forecasting.run import forecast_run
from geofm.planet.catalog.serving import serving_source
from geofm.stages import ALL_STAGES, DATA_STAGES, get_stage
from geofm.types import Json


def print_plan(
    recipe: Recipe, store: str, catalog: str, json_: bool, data_only: bool, dataset: str = ""
) -> None:
    """Print what a run would fetch, and the forecast of its stages.

    Args:
        recipe: settings of the run.
        store: store address, or empty; the items are kept there for the run.
        catalog: catalogue address, or empty.
        json_: print one JSON object instead of the tables.
        data_only: the run ends with the dataset.
        dataset: published dataset to train on, without a search.
    """
    started = time.perf_counter()
    place = open_place(store, catalog)
    if dataset:
        _print_training(recipe, place, dataset, json_, started)
        return
    with progress_bars(), serving_source(recipe.search.stac):
        items = run_stage(get_stage("search"), place.store, place.catalogue, {}, recipe.search)
        job = make_job(get_stage("cut"), place.store, {"items": items}, recipe.cut)
        found = plan_windows(job, read_headers=False) if items.manifest.counts["rows_out"] else None
    if found is None:
        raise RunError(
            "the search kept no item, so there is nothing to cut; widen search.bbox or "
            "search.datetime"
        )
    parts = forecast(found, recipe.cut)
    problem = explain_failure(found, recipe.cut)
    stages = DATA_STAGES if data_only else ALL_STAGES
    given = {"items": items}
    made = forecast_run(recipe, place.store, place.catalogue, stages, given, found)
    if json_:
        by_collection = {part.collection: part.to_json() for part in parts}
        counts = {**items.manifest.counts, "dropped": items.manifest.dropped}
        print_json(
            {
                "artifacts": {"search": items.digest},
                "counts": {"search": counts},
                "plan": {**sum_forecasts(parts).to_json(), "collections": by_collection},
                "would_fail": problem or None,
                "unplanned_scenes": len(found.unknown),
                "unusable_scenes": len(found.bad),
                **_as_json(made, started),
            }
        )
        return
    columns = ["collection", "scenes", "chips", "requests", "GiB", "left out"]
    rows = [_row(part, part.collection) for part in parts]
    if len(parts) > 1:
        rows.append(_row(sum_forecasts(parts), "all"))
    print_table(f"{recipe.name}: the plan; requests and bytes are estimates", columns, rows)
    _print_scenes_left_out(found)
    _print_forecast(recipe, made)
    if problem:
        out.print(f"A run would fail: {problem}", highlight=False, markup=False)
    elif not made.problems:
        out.print(
            "No imagery was fetched. The same command without --dry-run carries out the plan."
        )


def _print_training(
    recipe: Recipe, place: Place, reference: str, json_: bool, started: float
) -> None:
    """Print the forecast of a run that trains on a published dataset."""
    version = published_dataset(place.catalogue, reference)
    dataset = place.catalogue.get(version.row.digest)
    kinds = [get_stage(name).kind for name in DATA_STAGES[:-1]]
    given = {kind: ancestor(place.catalogue, dataset, kind) for kind in kinds}
    given["dataset"] = dataset
    stages = ALL_STAGES[len(DATA_STAGES) :]
    made = forecast_run(recipe, place.store, place.catalogue, stages, given)
    if json_:
        print_json({"artifacts": {"pack": dataset.digest}, **_as_json(made, started)})
        return
    _print_forecast(recipe, made)


def _as_json(made: RunForecast, started: float) -> Json:
    """Return the fields of ``--json`` that every dry run has."""
    seconds = round(time.perf_counter() - started, 2)
    return {"forecast": made.to_json(), "seconds": seconds, "ui": None}


def _print_forecast(recipe: Recipe, made: RunForecast) -> None:
    """Print the table of the stages, and what stands in the way of the run."""
    print_table(f"{recipe.name}: the forecast", list(HEAD), made.rows())
    for text in made.warnings:
        out.print(f"Note: {text}", highlight=False, markup=False)
    for text in made.problems:
        out.print(f"A run would fail: {text}", highlight=False, markup=False)


def _print_scenes_left_out(found: CutPlan) -> None:
    """Print how many scenes are not in the plan, and why."""
    if found.unknown:
        out.print(
            f"{len(found.unknown)} scenes do not state their grid. A run reads it from their "
            "headers first; they are not in the estimate"
        )
    if found.bad:
        example = next(iter(found.bad.values()))
        out.print(
            f"{len(found.bad)} scenes cannot be used, such as {example}",
            highlight=False,
            markup=False,
        )


def _row(plan: Forecast, name: str) -> list[str]:
    """Return a row of the table; bytes in GiB."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in plan.left_out.most_common())
    gibibytes = f"{plan.cost.bytes / 2**30:.2f}"
    counts = [f"{n:,}" for n in (plan.scenes, plan.chips, plan.cost.requests)]
    return [name, *counts, gibibytes, left_out]
