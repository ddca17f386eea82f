"""geofm: curate satellite imagery into a dataset and pretrain a geospatial foundation model on it.

A run is a sequence of stages. Each stage turns sealed artifacts into one sealed artifact and
belongs to one package ("room") of geofm. A room imports only rooms above it in this list:

    config          the recipe: all settings of a run, checked; area of interest; credentials
    formats         file layouts: tar, npy, model and dataset cards
    runtime         thread pool, memory, energy, cost, splitting a stage into parts
    remote          reading untrusted hosts: URL policy, HTTP, retry, byte ranges, assets
    stac            stage `search`: find items in an API, a static catalogue or stac-geoparquet
    raster          from an asset to pixels: TIFF, scene, grid, radiometry, resampling
    chips           stage `cut`: choose windows, read them, write chips
    embeddings      stage `embed`: one vector per chip, by a frozen encoder
    dedup           stages `describe`, `calibrate`, `buckets`, `pairs`, `alike`: near-duplicates
    pool            stage `pool`: the candidates of selection: gates, decontamination
    selection       stage `curate`: the decision on each chip
    shards          stage `pack`: WebDataset shards and their reader
    pretraining     stage `pretrain`: distillation and masked image modelling
    evaluation      stage `evaluate`: downstream tasks with frozen features
    forecasting     the forecast of a run: rows, time, energy, bytes of each stage
    reporting       stage `report`: one HTML page per run
    planet          a procedural Earth behind a STAC API, for demo and tests

`geofm.stages` lists the stages with their modules; `geofm.types` holds the shared array types.

Entry points:
    geofm.config.recipe_book.load_recipe    read a recipe by name or from a YAML file
    geofm.stages.get_stage                  the stage of a name, to run with `data_catalog.run`
    data_catalog.store.Store                open artifacts and read their manifests
    flows.cli                               the command `geofm`
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__: str


def __getattr__(name: str) -> Any:
    """Look up ``__version__`` when it is first read; importing geofm stays cheap."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("importlib.metadata").version("geofm")
