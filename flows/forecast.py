"""The forecast of a flow run: logged before its stages begin, and noted in the record of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from data_catalog.artifact import Artifact
from flows.nights import deployed_run
from flows.preflight import CannotBegin
from flows.settings import Place
from geofm.config.recipe import Recipe
from geofm.forecasting.figures import (
    RunForecast,
    StageComparison,
    StageForecast,
    compare,
)
from geofm.forecasting.run import forecast_run
from geofm.runtime.energy import Meter

log = logging.getLogger("geofm.run")

#: Name of a stage's forecast in the metrics of its run.
NOTED = "forecast"


class ForecastMeter(Meter):
    """Measures stages, and notes the forecast of each beside its measurement.

    Attributes:
        stages: Forecasts of the stages, by name.
        took: Seconds that the stages took which computed something, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, StageForecast] = {}
        self.took: dict[str, float] = {}

    @contextmanager
    def stage(
        self, name: str, keep: Callable[[dict[str, Any]], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Measure a block; see ``Meter.stage``."""
        with super().stage(name, keep) as spent:
            if name in self.stages:
                spent[NOTED] = self.stages[name].to_json()
            yield spent
        self.took[name] = spent["seconds"]

    def note(self, name: str, seconds: float) -> None:
        """Note how long a stage took on another machine."""
        self.took[name] = seconds

    def comparison(self) -> list[StageComparison]:
        """Compare the forecast of each stage with what came."""
        return compare(self.stages.values(), self.took)


def log_forecast(
    meter: ForecastMeter,
    recipe: Recipe,
    place: Place,
    stages: Sequence[str],
    given: Mapping[str, Artifact],
) -> RunForecast:
    """Forecast stages that have not begun, log the forecast, and note it in the meter.

    Args:
        meter: Meter of the run.
        recipe: Settings of the run.
        place: Store and catalogue of the run.
        stages: Names of the stages, in the order of the pipeline.
        given: Artifacts by kind that are there already.

    Raises:
        CannotBegin: The run is certain to fail; the message has the remedy.
    """
    is_local = deployed_run() is None  # else training may run on another machine
    forecast = forecast_run(
        recipe, place.store, place.catalogue, stages, given, trains_here=is_local
    )
    meter.stages |= {entry.stage: entry for entry in forecast.stages}
    for line in forecast.lines():
        log.info("%s", line)
    for text in forecast.warnings:
        log.warning("%s", text)
    if forecast.problems:
        raise CannotBegin("\n  ".join(forecast.problems))
    return forecast
