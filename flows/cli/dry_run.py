"""The option ``--dry-run``: search, plan the windows, and estimate what a run would fetch."""

from __future__ import annotations

import time

from data_catalog.errors import RunError
from data_catalog.run import make_job, run_stage
from flows.cli.console import out, print_json, print_table, progress_bars
from flows.settings import open_place
from geofm.chips.cut import explain_failure
from geofm.chips.plan import Forecast, forecast, plan_windows, sum_forecasts
from geofm.config.recipe import Recipe
from geofm.planet.catalog.serving import serving_source
from geofm.stages import get_stage


def print_plan(recipe: Recipe, store: str, catalog: str, json_: bool) -> None:
    """Search and plan, and print the requests and bytes that a run would fetch.

    Args:
        recipe: settings of the search and the cut.
        store: store address, or empty; the items are kept there for the run.
        catalog: catalogue address, or empty.
        json_: print one JSON object instead of the tables.
    """
    started = time.perf_counter()
    place = open_place(store, catalog)
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
    counts = {**items.manifest.counts, "dropped": items.manifest.dropped}
    if json_:
        by_collection = {part.collection: part.to_json() for part in parts}
        plan = {**sum_forecasts(parts).to_json(), "collections": by_collection}
        print_json(
            {
                "artifacts": {"search": items.digest},
                "counts": {"search": counts},
                "plan": plan,
                "would_fail": problem or None,
                "unplanned_scenes": len(found.unknown),
                "unusable_scenes": len(found.bad),
                "seconds": round(time.perf_counter() - started, 2),
                "ui": None,
            }
        )
        return
    columns = ["collection", "scenes", "chips", "requests", "GiB", "left out"]
    rows = [_row(part, part.collection) for part in parts]
    if len(parts) > 1:
        rows.append(_row(sum_forecasts(parts), "all"))
    print_table(f"{recipe.name}: the plan; requests and bytes are estimates", columns, rows)
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
    if problem:
        out.print(f"A run would fail: {problem}", highlight=False, markup=False)
        return
    out.print("No imagery was fetched. The same command without --dry-run carries out the plan.")


def _row(plan: Forecast, name: str) -> list[str]:
    """Return a row of the table; bytes in GiB."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in plan.left_out.most_common())
    gibibytes = f"{plan.cost.bytes / 2**30:.2f}"
    counts = [f"{n:,}" for n in (plan.scenes, plan.chips, plan.cost.requests)]
    return [name, *counts, gibibytes, left_out]
