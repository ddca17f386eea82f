"""``--dry-run``: the search and the sampling plan with its cost; no imagery is fetched."""

from __future__ import annotations

import time

from data_catalog.errors import RunError
from data_catalog.run import make_job, run_stage
from flows.cli.console import out, print_json, print_table, progress_bars
from flows.settings import open_place
from geofm.chips.cut import why_not
from geofm.chips.plan import Forecast, forecast, survey, total
from geofm.config.recipe import Recipe
from geofm.planet.catalog.serving import serving_source
from geofm.stages import get_stage


def print_plan(recipe: Recipe, store: str, catalog: str, json_: bool) -> None:
    """Search, plan, and print what a run would fetch.

    Args:
        recipe: what to search and cut.
        store: store address, or empty; the items found are kept there.
        catalog: catalogue address, or empty.
        json_: print one JSON object instead of the tables.
    """
    started = time.perf_counter()
    place = open_place(store, catalog)
    with progress_bars(), serving_source(recipe.search.stac):
        items = run_stage(get_stage("search"), place.store, place.catalogue, {}, recipe.search)
        job = make_job(get_stage("cut"), place.store, {"items": items}, recipe.cut)
        found = survey(job, look=False) if items.manifest.counts["rows_out"] else None
    if found is None:
        raise RunError("the search kept no item, so there is nothing to cut; widen the search")
    parts = forecast(found, recipe.cut)
    problem = why_not(found, recipe.cut)
    counts = {**items.manifest.counts, "dropped": items.manifest.dropped}
    if json_:
        by_collection = {one.collection: one.to_json() for one in parts}
        plan = {**total(parts).to_json(), "collections": by_collection}
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
    rows = [_row(one, one.collection) for one in parts]
    if len(parts) > 1:
        rows.append(_row(total(parts), "all"))
    print_table(f"{recipe.name}: the plan; requests and bytes are estimates", columns, rows)
    if found.unknown:
        out.print(
            f"{len(found.unknown)} scenes do not state where their pixels lie; their headers are "
            "read when the run starts, and they come on top"
        )
    if found.bad:
        example = next(iter(found.bad.values()))
        out.print(
            f"{len(found.bad)} scenes are not usable, e.g. {example}", highlight=False, markup=False
        )
    if problem:
        out.print(f"A run would fail: {problem}", highlight=False, markup=False)
        return
    out.print("Nothing was fetched. The same command without --dry-run carries the plan out.")


def _row(one: Forecast, name: str) -> list[str]:
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in one.left_out.most_common())
    cost = one.cost
    return [name, f"{one.scenes:,}", f"{one.chips:,}", f"{cost.requests:,}",
            f"{cost.bytes / 2**30:.2f}", left_out]  # fmt: skip
