"""The figures of a forecast, for a stage and for a run, and the tables that show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from geofm.runtime.text import duration, size
from geofm.types import Json

#: Source of the figures of a stage whose result is in the store.
UNCHANGED = "unchanged"
#: Stages that take less than this (seconds) are not judged: their time is mostly chance.
JUDGED_S = 2.0

HEAD = ("Stage", "Rows", "To fetch", "Disk", "Time", "GPU time", "Energy", "From")
COMPARED = ("Stage", "Rows", "Forecast", "Took", "Took / forecast", "From")


@dataclass(frozen=True)
class StageForecast:
    """The forecast of a stage.

    Attributes:
        rows: Rows that it computes; rows of parts that are in the store do not count.
        gpu_seconds: Number of GPUs held times the seconds they are held.
        fetch_bytes: Bytes of imagery to fetch.
        disk_bytes: Bytes that it adds to the store.
        source: Where the rate comes from: records, a probe, or a built-in default.
    """

    stage: str
    rows: int = 0
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    watt_hours: float = 0.0
    fetch_bytes: int = 0
    disk_bytes: int = 0
    source: str = ""

    def to_json(self) -> Json:
        """Return the figures as JSON, for scripts and for the record of a run."""
        return asdict(self)

    @classmethod
    def from_json(cls, stage: str, noted: Json) -> StageForecast:
        """Read figures that a run noted; fields of other versions are ignored."""
        known = {item.name for item in fields(cls)} - {"stage"}
        return cls(stage, **{name: noted[name] for name in noted.keys() & known})

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table, with the columns of ``HEAD``."""
        if self.source == UNCHANGED:
            return (self.stage, _rows(self.rows), "", "", "", "", "", UNCHANGED)
        return (
            self.stage,
            _rows(self.rows),
            size(self.fetch_bytes) if self.fetch_bytes else "",
            size(self.disk_bytes),
            duration(self.seconds),
            duration(self.gpu_seconds) if self.gpu_seconds else "",
            _energy(self.watt_hours),
            self.source,
        )


@dataclass(frozen=True)
class RunForecast:
    """The forecast of a run.

    Attributes:
        stages: Forecasts in the order of the stages.
        problems: Why the run is certain to fail, each with its remedy.
        warnings: Why it may fail, or what the figures leave out.
    """

    stages: Sequence[StageForecast] = ()
    problems: Sequence[str] = ()
    warnings: Sequence[str] = field(default=())

    def of(self, stage: str) -> StageForecast | None:
        """Return the forecast of a stage."""
        return next((entry for entry in self.stages if entry.stage == stage), None)

    def total(self) -> StageForecast:
        """Return the sum over the stages, as if each waited for the one before it."""
        return StageForecast(
            stage="all",
            seconds=sum(entry.seconds for entry in self.stages),
            gpu_seconds=sum(entry.gpu_seconds for entry in self.stages),
            watt_hours=sum(entry.watt_hours for entry in self.stages),
            fetch_bytes=sum(entry.fetch_bytes for entry in self.stages),
            disk_bytes=sum(entry.disk_bytes for entry in self.stages),
        )

    def rows(self) -> list[list[str]]:
        """Return the rows of a table, with the columns of ``HEAD`` and the sum at the end."""
        stage, _, *sums = self.total().cells()
        return [*(list(entry.cells()) for entry in self.stages), [stage, "", *sums]]

    def lines(self) -> list[str]:
        """Return the forecast as lines of a log, the sum in the last one."""
        lines = []
        for entry in [*self.stages, *([self.total()] if len(self.stages) > 1 else [])]:
            stage, rows, fetched, disk, time, gpu, energy, source = entry.cells()
            named = [("rows", rows), ("to fetch", fetched), ("on disk", disk), ("GPU", gpu)]
            given = [f"{text} {name}" for name, text in named if text and text != "0"]
            given = [time, *given, energy] if time else given
            lines.append(f"forecast of {stage}: {', '.join(given)}" + f" ({source})" * bool(source))
        return lines

    def to_json(self) -> Json:
        """Return the forecast as JSON, for scripts."""
        total = self.total().to_json()
        return {
            "stages": {entry.stage: _without_name(entry.to_json()) for entry in self.stages},
            "total": {k: v for k, v in total.items() if k not in ("stage", "rows", "source")},
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


def _without_name(noted: Json) -> dict[str, Any]:
    return {key: value for key, value in noted.items() if key != "stage"}


def _rows(number: int) -> str:
    """Format a number of rows; a report has none."""
    return f"{number:,}" if number else ""


def _energy(watt_hours: float) -> str:
    """Format an energy; an estimate of less than a tenth of a watt hour has no digits to show."""
    if watt_hours < 0.1:
        return "< 0.1 Wh"
    return f"{watt_hours:,.1f} Wh" if watt_hours < 1000 else f"{watt_hours / 1000:,.1f} kWh"


@dataclass(frozen=True)
class StageComparison:
    """Forecast and outcome of a stage.

    Attributes:
        took: Wall-clock seconds; None if the stage was unchanged.
    """

    forecast: StageForecast
    took: float | None

    @property
    def ratio(self) -> float | None:
        """Time taken divided by the forecast; None if both are short, or one is missing."""
        expected = self.forecast.seconds
        if self.took is None or not expected or max(self.took, expected) < JUDGED_S:
            return None
        return self.took / expected

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table, with the columns of ``COMPARED``."""
        entry = self.forecast
        return (
            entry.stage,
            _rows(entry.rows),
            duration(entry.seconds),
            UNCHANGED if self.took is None else duration(self.took),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            entry.source,
        )

    def to_json(self) -> Json:
        """Return the figures as JSON, for scripts."""
        return {**self.forecast.to_json(), "took": self.took}


def compare(forecasts: Iterable[StageForecast], took: Mapping[str, float]) -> list[StageComparison]:
    """Compare the forecasts of stages with what came.

    Args:
        forecasts: Forecasts; those of unchanged stages that did not run are left out.
        took: Wall-clock seconds of the stages that ran, by name.
    """
    pairs = [StageComparison(entry, took.get(entry.stage)) for entry in forecasts]
    return [p for p in pairs if p.took is not None or p.forecast.source != UNCHANGED]
