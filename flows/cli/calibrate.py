"""The work of ``geofm calibrate``: run the data stages up to ``calibrate``, print thresholds."""

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

COLUMNS = ["collection", "cosine from", "source", "duplicate pairs", "other pairs"]


def calibrate_recipe(recipe: Recipe, store: str, catalog: str, json_: bool) -> None:
    """Search, cut, embed and calibrate in this process, and print the thresholds.

    The next run finds the artifacts in the catalogue, and does not make them again.

    Args:
        recipe: settings of the stages.
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
    calibration = made["calibration"]
    thresholds = calibration.manifest.facts["thresholds"]
    if json_:
        artifacts = {name: made[get_stage(name).kind].digest for name in names}
        seconds = round(time.perf_counter() - started, 2)
        print_json({"artifacts": artifacts, "thresholds": thresholds, "seconds": seconds})
        return
    rows = [
        [
            name,
            f"{row['threshold']:.3f}",
            f"{row['source']}: {row['reason']}",
            f"{row['positives']:,}",
            f"{row['negatives']:,}",
        ]
        for name, row in sorted(thresholds.items())
    ]
    print_table(f"{recipe.name}: cosine from which two chips are duplicates", COLUMNS, rows)
    digest = calibration.digest[:12]
    out.print(f"Precision by threshold: curve.parquet in the folder `geofm path {digest}`")
    if recipe.curate.threshold is not None:
        out.print(
            f"The recipe sets curate.threshold={recipe.curate.threshold:g}, which a run uses "
            "instead. To use the table, clear the field with --set curate.threshold="
        )
