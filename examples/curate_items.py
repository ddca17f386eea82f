"""Curate a folder of STAC items: find duplicates and keep a diverse subset.

    python examples/curate_items.py scenes/catalog.json --bands red,green,blue --budget 0.5

The folder holds a static STAC catalogue: a catalog.json or collection.json that links to items,
and the GeoTIFFs of the items. The script runs the stages from `search` to `curate` in this
process; it needs no server. A second run with the same arguments computes nothing again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_catalog.catalogue import open_catalogue
from data_catalog.run import run_stage
from data_catalog.store import open_store
from geofm.config.recipe import CurateSettings, CutSettings, Recipe, SearchSettings
from geofm.stages import DATA_STAGES, get_stage, section_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages and print the decision on each chip."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("catalog", help="catalog.json or collection.json of the folder")
    parser.add_argument("--store", default="geofm-store", type=Path, help="folder for results")
    parser.add_argument("--bands", default="red,green,blue", help="common names of the bands")
    parser.add_argument("--size-px", default=128, type=int, help="edge of a chip in pixels")
    parser.add_argument("--budget", default=0.5, type=float, help="share of the chips to keep")
    options = parser.parse_args(arguments)

    recipe = Recipe(
        search=SearchSettings(stac=options.catalog),
        cut=CutSettings(bands=options.bands.split(","), size_px=options.size_px),
        curate=CurateSettings(budget=options.budget),
    )
    store = open_store(options.store)
    catalogue = open_catalogue(f"sqlite:///{options.store.absolute()}/catalogue.db", store)

    # Each stage turns sealed artifacts into one sealed artifact; inputs are passed by kind.
    artifacts = {}
    for name in DATA_STAGES[: DATA_STAGES.index("curate") + 1]:
        stage, settings = get_stage(name), getattr(recipe, section_of(name))
        artifact = run_stage(stage, store, catalogue, artifacts, settings, recipe.compute.seed)
        artifacts[stage.kind] = artifact
        print(f"{name:10} {artifact.digest[:12]}  {artifact.manifest.counts}")

    decisions = artifacts["decisions"].table("decisions.parquet")
    for row in decisions.itertuples():
        witness = f", witness {row.witness_id}" if row.witness_id else ""
        print(f"{row.chip_id}  {row.decision}: {row.rule}{witness}")


if __name__ == "__main__":
    main()
