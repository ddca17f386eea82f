"""The stages by name, in the order in which each finds its inputs."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from data_catalog.stage import Stage

_HOMES = {
    "search": "geofm.imagery.search",
    "cut": "geofm.imagery.cut",
    "embed": "geofm.curation.embed",
    "describe": "geofm.curation.describe",
    "calibrate": "geofm.curation.calibrate",
    "pool": "geofm.curation.pool",
    "buckets": "geofm.curation.buckets",
    "pairs": "geofm.curation.pairs",
    "alike": "geofm.curation.lookalikes",
    "curate": "geofm.curation.curate",
    "pack": "geofm.shards.pack",
    "pretrain": "geofm.pretraining.stage",
    "evaluate": "geofm.evaluation.stage",
    "report": "geofm.reporting.stage",
}

#: The data half: what a scheduled refresh runs.
DATA_STAGES = tuple(_HOMES)[: tuple(_HOMES).index("pack") + 1]
ALL_STAGES = tuple(_HOMES)


@cache
def get_stage(name: str) -> Stage:
    """The stage called ``name``; its module (and torch, where it needs it) loads on first use."""
    stage: Stage = import_module(_HOMES[name]).STAGE
    return stage


def section_of(name: str) -> str:
    """The recipe's section with a stage's settings."""
    return get_stage(name).section or name
