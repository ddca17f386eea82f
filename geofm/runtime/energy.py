"""Energy and carbon of a stage, measured offline by codecarbon.

The energy of an NVIDIA GPU is read from its own counter (NVML, total energy since the driver was
loaded). For a processor without counters codecarbon estimates it from type and load. The whole
machine is measured: two runs on one machine each count the other's load as well.

Carbon is energy times the intensity of ``GEOFM_COUNTRY`` (ISO 3166 alpha-3). If it is not set, the
intensity is 0.475 kg/kWh, the world average behind the figure in the GFM paper.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WORLD_G_PER_KWH = 475.0
#: Seconds between readings; a killed run loses at most the energy of this interval.
READING_S = 30.0

#: Energy (kWh) of the stages that are being measured, the one that began last at the end.
_now: dict[int, float] = {}


def energy_so_far() -> float | None:
    """Return the energy (kWh) of the running stage at its last reading; None before the first."""
    return next(reversed(_now.values()), None)


@dataclass(eq=False)
class _Stage:
    """A stage that is being measured."""

    name: str
    keep: Callable[[dict[str, Any]], None] | None
    started: float = field(default_factory=time.perf_counter)
    spent: dict[str, Any] = field(
        default_factory=lambda: {"seconds": 0.0, "kwh": 0.0, "kg_co2e": 0.0}
    )


class Meter:
    """Measures stages; codecarbon is loaded when the first stage starts.

    Stages that run at the same time share the energy of the machine equally.
    """

    def __init__(self, reading_s: float = READING_S) -> None:
        self._tracker: Any = None
        self._reading_s = reading_s
        self._lock = threading.Lock()
        self._running: list[_Stage] = []

    @contextmanager
    def stage(
        self, name: str, keep: Callable[[dict[str, Any]], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Measure a block.

        Args:
            name: Name of the stage.
            keep: Callback that gets a copy of the readings every ``READING_S`` seconds and at the
                end, also after an error, so that a killed run leaves its last readings.

        Yields:
            A dictionary with ``seconds``, ``kwh``, ``kg_co2e`` and, on GPUs, ``gpu_kwh`` (a part of
            ``kwh``); complete after the block. Entries that the caller adds are kept too.
        """
        stage = _Stage(name, keep)
        done = threading.Event()
        with self._lock:
            self._take_reading()
            self._running.append(stage)
            self._measure_on()

        def watch() -> None:
            while not done.wait(self._reading_s):
                with self._lock:
                    self._take_reading()
                    self._measure_on()

        watcher = threading.Thread(target=watch, name="geofm-meter", daemon=True)
        watcher.start()
        try:
            yield stage.spent
        finally:
            done.set()
            watcher.join()
            with self._lock:
                self._take_reading()
                self._running.remove(stage)
                self._measure_on()
            _now.pop(id(stage), None)

    def _take_reading(self) -> None:
        """Divide the energy since the last reading among the stages that run."""
        if not self._running:
            return
        data = self._tracker.stop_task()
        share = 1 / len(self._running)
        for stage in self._running:
            spent = stage.spent
            spent["seconds"] = time.perf_counter() - stage.started
            spent["kwh"] += share * float(data.energy_consumed)
            spent["kg_co2e"] += share * float(data.emissions)
            if data.gpu_count:
                spent["gpu_kwh"] = spent.get("gpu_kwh", 0.0) + share * float(data.gpu_energy)
            _now[id(stage)] = spent["kwh"]
            if stage.keep is not None:
                stage.keep(dict(spent))

    def _measure_on(self) -> None:
        """Begin the next reading, if a stage runs."""
        if self._running:
            self._start_tracker().start_task(self._running[-1].name)

    def _start_tracker(self) -> Any:
        """Start codecarbon on first use."""
        if self._tracker is None:
            from codecarbon import OfflineEmissionsTracker

            logging.getLogger("codecarbon").setLevel(logging.ERROR)  # importing it resets this

            country = os.environ.get("GEOFM_COUNTRY")
            location: dict[str, Any] = (
                {"country_iso_code": country}
                if country
                else {
                    "country_iso_code": "USA",  # required; unused beside an intensity
                    "force_carbon_intensity_g_co2e_kwh": WORLD_G_PER_KWH,
                }
            )
            self._tracker = OfflineEmissionsTracker(
                save_to_file=False,
                log_level="error",
                allow_multiple_runs=True,
                measure_power_secs=5,
                tracking_mode="machine",
                **location,
            )
        return self._tracker
