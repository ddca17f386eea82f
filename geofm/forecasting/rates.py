"""Rates: the seconds, the power and the bytes per row of a stage.

A built-in rate gives the shape: a fixed time, and a time per row that depends on the settings. Runs
in the catalogue give the scale: the time that they took divided by the built-in time of their rows,
the median of the nearest runs. So one small run is enough to forecast a large one. Without a record
the built-in rate counts; training is then measured by a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from data_catalog.provenance.timings import Timing
from geofm.runtime.text import some

#: Records that a rate is taken from: the nearest ones.
NEAREST = 3
#: Power of a machine and of a GPU, if no run in the catalogue was measured (W).
MACHINE_WATTS, GPU_WATTS = 40.0, 500.0
#: Bytes per second that a download takes at best, if no run in the catalogue fetched imagery.
FETCHED_PER_S = 20 * 2**20
#: Settings that the speed of training depends on. Runs that differ in one of them are no record.
TRAINING_SPEED = (
    "student", "student_args", "student_init", "teacher", "teacher_size_px", "teacher_stage",
    "teacher_features", "size_px", "masking", "mask_patch_px", "mask_ratio", "decoder_width",
    "decoder_depth", "distill_stage", "precision", "teacher_precision", "batch",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where a stage will run.

    Attributes:
        host: Name of the machine.
        workers: Number of workers.
        gpus: Number of GPUs that the stage holds.
        processes: Number of processes that train together.
    """

    host: str
    workers: int = 1
    gpus: int = 0
    processes: int = 1


@dataclass(frozen=True)
class BuiltIn:
    """The rate of a stage on two cores, measured on the demo.

    Attributes:
        fixed: Seconds whatever the number of rows.
        per_row: Seconds per row.
        bytes_per_row: Bytes of the artifact per row.
    """

    fixed: float
    per_row: float
    bytes_per_row: float


BUILT_IN = {
    "search": BuiltIn(1.5, 0.03, 5000),
    "cut": BuiltIn(1.0, 0.006, 133_000),
    "embed": BuiltIn(1.0, 0.006, 2600),
    "describe": BuiltIn(0.3, 0.0025, 4600),
    "calibrate": BuiltIn(0.5, 0.028, 60),
    "pool": BuiltIn(0.2, 0.0003, 26),
    "buckets": BuiltIn(0.1, 0.0001, 50),
    "pairs": BuiltIn(0.2, 0.0001, 15),
    "alike": BuiltIn(0.3, 0.0008, 90),
    "curate": BuiltIn(0.3, 0.0005, 160),
    "pack": BuiltIn(0.4, 0.002, 137_000),
    "pretrain": BuiltIn(3.0, 0.017, 0),
    "evaluate": BuiltIn(5.0, 0.03, 0),
    "report": BuiltIn(10.0, 0.001, 0),
}
#: Bytes of an artifact whose size does not depend on its rows, if there is no record.
WHOLE_BYTES = {"evaluate": 100_000, "report": 15_000_000, "pretrain": 400_000_000}
#: Counts that a stage's time depends on: role of the input (empty: its own) and name.
DRIVERS = {
    "calibrate": ("chips", "rows_out"),
    "pretrain": ("", "images"),
    "evaluate": ("", "rows_out"),
    "report": ("chips", "rows_out"),
}


@dataclass(frozen=True)
class Rate:
    """The rate of a stage with certain settings.

    Attributes:
        scale: Time in units of the built-in time.
        bytes_per_row: Bytes of the artifact per row; None if there is no record.
        watts: Power while it runs; None if it was not measured.
        source: Where it comes from, in words.
    """

    scale: float = 1.0
    bytes_per_row: float | None = None
    watts: float | None = None
    source: str = "default"

    @property
    def is_recorded(self) -> bool:
        """Whether it comes from earlier runs."""
        return self.source.startswith("records")


def built_in_seconds(stage: str, rows: float, settings: Mapping[str, Any]) -> float:
    """Return the built-in time of a stage for a number of rows with some settings."""
    rate = BUILT_IN[stage]
    if stage == "calibrate":  # it samples chips of each collection
        rows = min(rows, settings["sample"])
    return rate.fixed + rows * rate.per_row * row_size(stage, settings)


def row_size(stage: str, settings: Mapping[str, Any]) -> float:
    """Return the size of a row in units of the demo's, if the settings of the stage state it."""
    if stage == "cut":
        samples: int = len(settings["bands"]) * settings["size_px"] ** 2
        return samples / (4 * 128 * 128)
    size_px: int = settings["size_px"] if stage == "embed" else 64
    return size_px * size_px / (64 * 64)


def rows_of(stage: str, timing: Timing) -> float:
    """Return the rows that a run worked on."""
    role, name = DRIVERS.get(stage, ("", "rows_in"))
    counts = timing.inputs.get(role, {}) if role else timing.manifest["counts"]
    return timing.share * float(counts.get(name, 0))


def rate_of(
    stage: str,
    timings: Sequence[Timing],
    settings: Mapping[str, Any],
    machine: Machine,
) -> Rate:
    """Take the rate of a stage from the nearest records.

    Records of another kind of device do not count, nor does training of other networks. Of the
    others, those with the same settings, on the same machine and with as many workers come first.

    Args:
        stage: Name of the stage.
        timings: Runs of the stage, the newest first.
        settings: Settings that the stage depends on, as a manifest has them.
        machine: Where the stage will run.
    """
    usable = [t for t in timings if (t.gpu_seconds > 0) == (machine.gpus > 0)]
    if stage == "pretrain":
        usable = [t for t in usable if t.processes == machine.processes]
        usable = [t for t in usable if _trains_alike(t.manifest["settings"], settings)]
    if not usable:
        return Rate()

    def distance(timing: Timing) -> int:
        other = timing.manifest["settings"] != settings and stage != "pretrain"
        elsewhere = timing.host != machine.host
        # A dry run searches too. It measures no energy, and starts less than a run does.
        dry = timing.kwh is None
        return 8 * other + 4 * elsewhere + 2 * (timing.workers != machine.workers) + dry

    best = min(distance(timing) for timing in usable)
    nearest = [timing for timing in usable if distance(timing) == best][:NEAREST]
    measured = [t.kwh * 3.6e6 / t.seconds for t in nearest if t.kwh and t.seconds]
    scales = [
        t.seconds / built_in_seconds(stage, rows_of(stage, t), t.manifest["settings"])
        for t in nearest
    ]
    remark = ", other settings" if best >= 8 else ", other machine" if best >= 4 else ""
    return Rate(
        scale=median(scales),
        bytes_per_row=median(_bytes_per_row(stage, t, settings) for t in nearest),
        watts=median(measured) if measured else None,
        source=f"records ({some(len(nearest), 'run')}{remark})",
    )


def typical_watts(timings: Mapping[str, Sequence[Timing]], on_gpu: bool) -> float | None:
    """Return the power of the measured runs of all stages; None if no run was measured."""
    alike = [t for runs in timings.values() for t in runs if (t.gpu_seconds > 0) == on_gpu]
    measured = [t.kwh * 3.6e6 / t.seconds for t in alike if t.kwh and t.seconds > 1]
    return median(measured) if measured else None


def _bytes_per_row(stage: str, timing: Timing, settings: Mapping[str, Any]) -> float:
    """Return the bytes of an artifact per row of its size with other settings."""
    if stage in WHOLE_BYTES:
        return float(timing.bytes)
    counts = timing.manifest["counts"]
    rows: int = max(counts.get("rows_in", 0), 1)
    if stage != "cut":
        return timing.bytes / rows
    own = timing.manifest["settings"]
    return timing.bytes / rows * row_size(stage, settings) / row_size(stage, own)


def _trains_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two trainings take the same time per image."""
    teaches = [bool(settings.get("alpha")) for settings in (one, other)]
    without = {"teacher", "teacher_size_px", "teacher_stage", "teacher_features"}
    names = [n for n in TRAINING_SPEED if teaches[0] or n not in without]
    return teaches[0] == teaches[1] and all(one.get(n) == other.get(n) for n in names)
