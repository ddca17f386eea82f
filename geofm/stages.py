"""The stages by name, in the order of the pipeline, and the built-in evaluation tasks.

Modules are named as text and imported on use, so every room may import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from data_catalog.stage import Stage

_MODULES = {
    "search": "geofm.stac.search",
    "cut": "geofm.chips.cut",
    "embed": "geofm.embeddings.embed",
    "describe": "geofm.dedup.describe",
    "calibrate": "geofm.dedup.calibrate",
    "pool": "geofm.pool.pool",
    "buckets": "geofm.dedup.buckets",
    "pairs": "geofm.dedup.pairs",
    "alike": "geofm.dedup.alike",
    "curate": "geofm.selection.curate",
    "pack": "geofm.shards.pack",
    "pretrain": "geofm.pretraining.pretrain",
    "evaluate": "geofm.evaluation.evaluate",
    "report": "geofm.reporting.report",
}

#: Module and function that draw a built-in evaluation task.
_TASKS = {"planet": ("geofm.planet.labelled", "planet_task")}

#: The stages of a scheduled refresh.
DATA_STAGES = tuple(_MODULES)[: tuple(_MODULES).index("pack") + 1]
ALL_STAGES = tuple(_MODULES)


@cache
def get_stage(name: str) -> Stage:
    """Return a stage by name; its module is imported on first use."""
    stage: Stage = import_module(_MODULES[name]).STAGE
    return stage


def section_of(name: str) -> str:
    """Return the section of the recipe that holds the settings of a stage."""
    return get_stage(name).section or name


def built_in_task(name: str) -> Callable[[Path, Sequence[str]], Path]:
    """Return the function that draws a built-in evaluation task.

    Its arguments are the parent folder of tasks and the bands of the model. It returns the task's
    folder.
    """
    module, function = _TASKS[name]
    draw: Callable[[Path, Sequence[str]], Path] = getattr(import_module(module), function)
    return draw
