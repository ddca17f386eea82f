"""``geofm calibrate``: the data half as far as the thresholds, and what they come from."""

from __future__ import annotations

import time
from typing import Any

from data_catalog.run import run_stage
from flows.cli.console import out, print_json, print_table, progress_bars
from flows.settings import open_place
from geofm.config.recipe import Recipe
from geofm.planet.catalog.serving import serving_source
from geofm.runtime.energy import Meter
from geofm.stages import DATA_STAGES, get_stage, section_of

COLUMNS = ["collection", "cosine from", "source", "like pairs", "unlike pairs"]


def calibrate_recipe(recipe: Recipe, store: str, catalog: str, json_: bool) -> None:
    """Search, cut, embed and calibrate in this process; print the thresholds.

    What is made here is found again by the next run.

    Args:
        recipe: what to search, cut and embed, and how to calibrate.
        store: store address, or empty.
        catalog: catalogue address, or empty.
        json_: print one JSON object instead of the table.
    """
    started = time.perf_counter()
    place = open_place(store, catalog)
    place.clean_up()
    made: dict[str, Any] = {}
    meter = Meter()
    names = DATA_STAGES[: DATA_STAGES.index("calibrate") + 1]
    with progress_bars(), serving_source(recipe.search.stac):
        for name in names:
            stage, settings = get_stage(name), getattr(recipe, section_of(name))
            seed, device = recipe.compute.seed, recipe.compute.device
            made[stage.kind] = run_stage(
                stage, place.store, place.catalogue, made, settings, seed, device, meter.stage
            )
    found = made["calibration"]
    thresholds = found.manifest.facts["thresholds"]
    if json_:
        artifacts = {name: made[get_stage(name).kind].digest for name in names}
        seconds = round(time.perf_counter() - started, 2)
        print_json({"artifacts": artifacts, "thresholds": thresholds, "seconds": seconds})
        return
    rows = [
        [name, f"{one['threshold']:.3f}", f"{one['source']}: {one['reason']}",
         f"{one['positives']:,}",
         f"{one['negatives']:,}"]
        for name, one in sorted(thresholds.items())
    ]  # fmt: skip
    print_table(f"{recipe.name}: from which similarity two chips are duplicates", COLUMNS, rows)
    out.print(f"The curve: curve.parquet of {found.digest[:12]} (geofm path {found.digest[:12]})")
    if recipe.curate.threshold is not None:
        out.print(
            f"The recipe sets curate.threshold={recipe.curate.threshold:g}, which is used "
            "instead; empty it (--set curate.threshold=) to use these."
        )
