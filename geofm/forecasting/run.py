"""The forecast of a run, stage by stage.

forecast_run     walk along the stages of a recipe
  find_result      a stage whose job the catalogue has is unchanged, and its artifact is an input of
                   the next one; from the first stage without a result on, rows are estimated
  _count_rows      rows that the stage will compute
  _estimate        time, energy and bytes of these rows, by the rate of the stage       (rates.py)

Nothing is fetched. The only work is the probe of training, if training will happen and the
catalogue has no record of such a training.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import GeofmError
from data_catalog.provenance.timings import Timing, timings_of
from data_catalog.run import find, finished_parts, make_job, with_previous
from data_catalog.stage import Job, Stage
from data_catalog.store import Store
from geofm.chips.cut import part_of, windows_by_item
from geofm.chips.fetch_cost import fetch_cost_of
from geofm.chips.plan import CutPlan, plan_windows
from geofm.config.recipe import Recipe
from geofm.forecasting.figures import UNCHANGED, RunForecast, StageForecast
from geofm.forecasting.limits import available_memory, check_disk, explain_memory, free_disk
from geofm.forecasting.rates import (
    BUILT_IN,
    FETCHED_PER_S,
    GPU_WATTS,
    MACHINE_WATTS,
    WHOLE_BYTES,
    Machine,
    Rate,
    built_in_seconds,
    rate_of,
    row_size,
    typical_watts,
)
from geofm.runtime.device import check_device
from geofm.stages import get_stage, section_of

if TYPE_CHECKING:
    from geofm.embeddings.weights import Weights

log = logging.getLogger("geofm.forecast")

#: Stages whose parts cover chips: a part of unchanged chips is found in the store.
BY_CHIPS = ("embed", "describe", "calibrate")
#: Stages that hold the vectors of all chips in memory.
COMPARE_VECTORS = ("buckets", "pairs", "curate")
#: Numbers of a vector, if no chips were embedded before.
TYPICAL_WIDTH = 1280
#: Bytes per parameter of a model and its checkpoint: weights twice, and two moments.
BYTES_PER_PARAMETER = 16
#: Images of a task that have not been evaluated before.
TYPICAL_IMAGES = 500


class _Records(dict[str, list[Timing]]):
    """The timings of each stage, read when they are first needed."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self._catalogue = catalogue

    def __missing__(self, stage: str) -> list[Timing]:
        """Read the timings of a stage."""
        self[stage] = timings_of(self._catalogue, stage)
        return self[stage]


@dataclass
class _Walk:
    """A walk along the stages, with what is expected of the run so far.

    Attributes:
        artifacts: Artifacts of unchanged stages, by kind.
        chips: Number of usable chips.
        new_share: Share of them that no earlier run has cut.
        new_vectors: Share of them that no earlier run has embedded.
        selected: Number of samples of the dataset.
        probes: Whether a training without a record is probed.
    """

    recipe: Recipe
    store: Store
    catalogue: Catalogue
    records: _Records
    artifacts: dict[str, Artifact]
    chips: int = 0
    new_share: float = 1.0
    new_vectors: float = 1.0
    selected: int = 0
    probes: bool = True
    stages: list[StageForecast] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def forecast_run(
    recipe: Recipe,
    store: Store,
    catalogue: Catalogue,
    stages: Sequence[str],
    given: Mapping[str, Artifact],
    cut_plan: CutPlan | None = None,
    trains_here: bool = True,
) -> RunForecast:
    """Forecast the stages of a run.

    Args:
        recipe: Settings of the run.
        store: Store of the run.
        catalogue: Record of earlier runs.
        stages: Names of the stages, in the order of the pipeline.
        given: Artifacts by kind that are there already: items, or a dataset and its ancestors.
        cut_plan: The plan of the stage ``cut``; None: it is made here, if it is needed.
        trains_here: Whether this machine trains; if not, its GPU is not looked for, and no
            training is probed.
    """
    walk = _Walk(recipe, store, catalogue.at(store), _Records(catalogue), dict(given))
    if "chips" in given:
        walk.chips = given["chips"].manifest.counts["rows_out"]
    if "dataset" in given:
        walk.selected = given["dataset"].manifest.counts["rows_out"]
    walk.probes = trains_here
    if trains_here:
        _check_gpu(walk)
    else:
        _forecast_on_cpu(walk)
    for name in stages:
        _add_stage(name, walk, cut_plan)
    computed = {entry.stage for entry in walk.stages if entry.source != UNCHANGED}
    if computed & set(COMPARE_VECTORS):
        text = explain_memory(walk.chips, _vector_width(walk), available_memory())
        walk.warnings += [text] if text else []
    made = RunForecast(tuple(walk.stages))
    try:
        check_disk(made.total().disk_bytes, free_disk(store))
    except GeofmError as error:
        walk.problems.append(str(error))
    return RunForecast(made.stages, tuple(walk.problems), tuple(walk.warnings))


def _check_gpu(walk: _Walk) -> None:
    """Note a GPU that is not there, and forecast the run on the CPU instead."""
    if walk.recipe.compute.device != "cuda":  # the check imports torch, which takes seconds
        return
    try:
        check_device("cuda")
    except GeofmError as error:
        walk.problems.append(str(error))
        _forecast_on_cpu(walk)


def _forecast_on_cpu(walk: _Walk) -> None:
    """Forecast the run as if this machine had no GPU."""
    compute = walk.recipe.compute.model_copy(update={"device": "cpu"})
    walk.recipe = walk.recipe.model_copy(update={"compute": compute})


def _add_stage(name: str, walk: _Walk, cut_plan: CutPlan | None) -> None:
    """Add the forecast of a stage, and what it means for those after it."""
    stage = get_stage(name)
    weights = _find_weights(name, walk)
    job = None
    if set(stage.inputs) <= walk.artifacts.keys() and not _lacks_weights(weights):
        job = _make_job(stage, walk)
    artifact = find_result(stage, job, walk.catalogue) if job is not None else None
    if artifact is not None:
        _add_unchanged(stage, artifact, walk)
        return
    settings = _settings(stage, walk.recipe, weights) if job is None else job.identity["settings"]
    fetched = 0
    if name == "cut" and job is not None:
        planned, rows, fetched = _count_cut(job, cut_plan)
        # windows in which the file has no data are dropped when they are read
        walk.chips = round(planned * _kept_share(walk.records[name], settings))
        walk.new_share = rows / max(planned, 1)
    else:
        rows = _count_rows(name, settings, walk)
    machine = _machine(stage, walk.recipe)
    rate = rate_of(name, walk.records[name], settings, machine)
    if rate.watts is None:
        default = MACHINE_WATTS + machine.gpus * GPU_WATTS
        rate = replace(rate, watts=typical_watts(walk.records, machine.gpus > 0) or default)
    if name == "pack":  # samples are chips, whose size is a setting of the cut
        size = row_size("cut", walk.recipe.cut.model_dump())
        rate = replace(rate, bytes_per_row=BUILT_IN["pack"].bytes_per_row * size)
    made = _estimate(name, rows, fetched, settings, rate, machine, walk)
    if walk.probes and name == "pretrain" and rows and not rate.is_recorded and weights is not None:
        made = _probe(made, weights, rate, machine, walk)
    walk.stages.append(made)


def _add_unchanged(stage: Stage, artifact: Artifact, walk: _Walk) -> None:
    """Note that the result of a stage is there."""
    rows = artifact.manifest.counts["rows_out"]
    walk.artifacts[stage.kind] = artifact
    walk.stages.append(StageForecast(stage.name, rows, source=UNCHANGED))
    if stage.name == "cut":
        walk.chips, walk.new_share = rows, 0.0
    if stage.name == "embed":
        walk.new_vectors = 0.0
    if stage.name in ("curate", "pack"):
        walk.selected = rows


# Results that are there


def find_result(stage: Stage, job: Job, catalogue: Catalogue) -> Artifact | None:
    """Find the artifact of a job that would compute nothing; the search always asks its source.

    Any other live stage runs every time too, but all its parts are there if its last run had the
    same inputs and settings.
    """
    if stage.name == "search":
        return None
    job = with_previous(stage, job, catalogue)
    return job.previous if stage.live else find(stage, job, catalogue)


def _make_job(stage: Stage, walk: _Walk) -> Job:
    """Make the job of a stage as a run does."""
    compute, section = walk.recipe.compute, getattr(walk.recipe, section_of(stage.name))
    return make_job(
        stage,
        walk.store,
        walk.artifacts,
        section,
        compute.seed,
        compute.device,
        walk.catalogue.url,
        compute.model_dump(),
    )


def _find_weights(stage: str, walk: _Walk) -> dict[str, Weights] | None:
    """Find the weights that the settings of a stage name, by field; None if some do not exist."""
    recipe, training = walk.recipe, walk.recipe.pretrain
    names: dict[str, str] = {}
    if stage == "embed":
        names["encoder"] = recipe.embed.encoder
    if stage == "pretrain" and training.alpha > 0:
        names["teacher"] = training.teacher
    if stage == "pretrain" and training.student_init == "pretrained":
        names["student"] = training.student
    if not names:
        return {}
    from geofm.embeddings.weight_inputs import find_weights_offline

    try:
        weights = {
            field: find_weights_offline(name, walk.catalogue) for field, name in names.items()
        }
    except GeofmError as error:
        walk.problems.append(str(error))
        return None
    walk.warnings += [
        f"the weights of {found.setting} are fetched from the hub first; no figure counts them"
        for found in weights.values()
        if _is_on_hub(found)
    ]
    return weights


def _is_on_hub(weights: Weights) -> bool:
    """Return whether only the hub has the weights."""
    return weights.origin == "random" and not weights.setting.startswith("random:")


def _lacks_weights(weights: Mapping[str, Weights] | None) -> bool:
    """Return whether weights are missing here, so that the job cannot be looked up."""
    return weights is None or any(_is_on_hub(found) for found in weights.values())


def _settings(
    stage: Stage, recipe: Recipe, weights: Mapping[str, Weights] | None
) -> dict[str, Any]:
    """Return the settings of a stage as its manifest will have them."""
    section = getattr(recipe, section_of(stage.name))
    fields = None if stage.fields is None else set(stage.fields)
    settings: dict[str, Any] = section.model_dump(mode="json", include=fields)
    return {**settings, **{field: found.setting for field, found in (weights or {}).items()}}


# Rows


def _count_cut(job: Job, cut_plan: CutPlan | None) -> tuple[int, int, int]:
    """Count the chips of a plan and those to cut; return them with the bytes to fetch."""
    if not job.inputs["items"].manifest.counts["rows_out"]:
        return 0, 0, 0  # the run ends with the reason
    plan = cut_plan or plan_windows(job, read_headers=False)
    windows = windows_by_item(plan)
    parts = {number: part_of(job, number, windows[number]) for number in windows}
    there = finished_parts(job, list(parts.values()))
    missing = {number for number, part in parts.items() if part.key not in there}
    fetched = sum(
        fetch_cost_of(item, grid, plan.windows.chosen(candidate), job.settings).bytes
        for candidate, (item, grid) in enumerate(zip(plan.items, plan.grids, strict=True))
        if item.number in missing
    )
    planned = sum(part.rows for part in parts.values())
    return planned, sum(parts[number].rows for number in missing), fetched


def _kept_share(timings: Sequence[Timing], settings: Mapping[str, Any]) -> float:
    """Return the share of its rows that the last run of a stage kept, best with its settings."""
    alike = [t for t in timings if t.manifest["settings"] == settings]
    for timing in alike or timings:
        counts = timing.manifest["counts"]
        return float(counts["rows_out"] / max(counts["rows_in"], 1))
    return 1.0


def _count_rows(name: str, settings: Mapping[str, Any], walk: _Walk) -> int:
    """Estimate the rows that a stage computes."""
    recipe, timings = walk.recipe, walk.records[name]
    if name == "search":
        listed = [t for t in timings if t.manifest["settings"] == settings]
        return int(listed[0].manifest["counts"]["rows_in"]) if listed else 0
    if name in BY_CHIPS:
        share = walk.new_vectors if name == "calibrate" else walk.new_share
        rows = round(walk.chips * (share if _is_repeated(name, settings, timings) else 1.0))
        if name == "embed":
            walk.new_vectors = rows / max(walk.chips, 1)
        return rows
    if name == "curate":
        walk.selected = _count_selected(recipe.curate.budget, timings, walk.chips)
    if name == "pack":
        return walk.selected
    if name == "pretrain":
        return _count_images(walk)
    if name == "evaluate":
        same = [t for t in timings if t.manifest["settings"].get("tasks") == settings["tasks"]]
        used = int(same[0].manifest["counts"]["rows_in"]) if same else 0
        typical = TYPICAL_IMAGES * len(recipe.evaluate.tasks)
        return min(used or typical, recipe.evaluate.max_images * len(recipe.evaluate.tasks))
    return walk.chips


def _is_repeated(name: str, settings: Mapping[str, Any], timings: Sequence[Timing]) -> bool:
    """Return whether an earlier run had these settings: the parts of its chips are there."""
    version = get_stage(name).version
    manifests = [timing.manifest for timing in timings]
    return any(m["settings"] == settings and m["version"] == version for m in manifests)


def _count_selected(budget: float | None, timings: Sequence[Timing], chips: int) -> int:
    """Estimate the chips that are kept, from the share that the duplicates left last time."""
    left = chips
    for timing in timings[:1]:
        counts = timing.manifest["counts"]
        left = round(chips * counts.get("leaders", counts["rows_in"]) / max(counts["rows_in"], 1))
    if budget is None:
        return left
    return round(left * budget) if budget <= 1 else min(left, int(budget))


def _count_images(walk: _Walk) -> int:
    """Count the images of a training, with those that the last batch of an epoch lacks left out."""
    settings = walk.recipe.pretrain
    dataset = walk.artifacts.get("dataset")
    samples = round(walk.selected * (1 - walk.recipe.pack.holdout))
    if dataset is not None:
        counts = dataset.manifest.counts
        samples = counts.get("train", counts["rows_out"])
    if samples < settings.batch:
        walk.warnings.append(
            f"pretrain.batch is {settings.batch}, and about {samples} samples are expected: lower "
            "pretrain.batch, or keep more chips (curate.budget)"
        )
    return samples // settings.batch * settings.batch * settings.epochs


# Figures


def _machine(stage: Stage, recipe: Recipe) -> Machine:
    """Return where a stage will run."""
    compute, processes, gpus = recipe.compute, 1, 0
    on_gpu = stage.device is not None and stage.device(compute.device) == "cuda"
    if stage.name == "pretrain":
        from geofm.pretraining.launch import choose_workers

        device = "cuda" if on_gpu else "cpu"
        processes = choose_workers(compute.model_dump(), device).processes
    if on_gpu:
        gpus = processes
    return Machine(socket.gethostname(), compute.workers, gpus, processes)


def _estimate(
    name: str,
    rows: int,
    fetched: int,
    settings: Mapping[str, Any],
    rate: Rate,
    machine: Machine,
    walk: _Walk,
) -> StageForecast:
    """Multiply the rows of a stage by its rate."""
    seconds = rate.scale * built_in_seconds(name, rows, settings)
    if not rate.is_recorded:
        seconds = max(seconds, fetched / FETCHED_PER_S)
    per_row = rate.bytes_per_row
    if name in WHOLE_BYTES:
        disk = per_row or WHOLE_BYTES[name]
        # weights twice in the checkpoint, with two moments each
        disk *= 4 if name == "pretrain" and per_row else 1
    else:
        per_row = per_row or BUILT_IN[name].bytes_per_row * row_size(name, settings)
        # An artifact of chips is made of its parts; a table of chips is written anew, beside them.
        disk = per_row * (rows + (walk.chips if name in BY_CHIPS else 0))
    return StageForecast(
        stage=name,
        rows=rows,
        seconds=seconds,
        gpu_seconds=seconds * machine.gpus,
        watt_hours=seconds * (rate.watts or 0) / 3600,
        fetch_bytes=fetched,
        disk_bytes=round(disk),
        source=rate.source,
    )


def _probe(
    made: StageForecast, weights: Mapping[str, Weights], rate: Rate, machine: Machine, walk: _Walk
) -> StageForecast:
    """Forecast training from a probe; the built-in rate stays if memory runs out."""
    from geofm.pretraining.probe import OutOfMemory, probe_training

    recipe, settings = walk.recipe, walk.recipe.pretrain
    if "student" in weights and not _is_on_hub(weights["student"]):
        from geofm.pretraining.student import student_settings

        settings = student_settings(settings, weights["student"])
    log.info("forecast: no record of such a training; some steps are timed")
    how, chip_px = recipe.compute.model_dump(), recipe.cut.size_px
    try:
        probe = probe_training(settings, recipe.cut.bands, how, chip_px, weights.get("teacher"))
    except OutOfMemory as error:
        walk.warnings.append(str(error))
        return made
    seconds = BUILT_IN["pretrain"].fixed + made.rows / probe.images_per_second
    if probe.teacher_images_per_second:
        seconds += walk.selected / probe.teacher_images_per_second
    return replace(
        made,
        seconds=seconds,
        gpu_seconds=seconds * machine.gpus,
        watt_hours=seconds * (rate.watts or 0) / 3600,
        disk_bytes=probe.parameters * BYTES_PER_PARAMETER,
        source=f"probe ({probe.steps} steps)",
    )


def _vector_width(walk: _Walk) -> int:
    """Return the numbers of a vector, as the last run embedded chips."""
    dims = [timing.manifest["facts"].get("dim") for timing in walk.records["embed"]]
    return next((int(dim) for dim in dims if dim), TYPICAL_WIDTH)
