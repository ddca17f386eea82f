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
from typing import Any

WORLD_G_PER_KWH = 475.0
#: Seconds between readings; a killed run loses at most the energy of this interval.
READING_S = 30.0

#: Energy (kWh) of the stage that is being measured, for displays of progress.
_now: dict[str, float] = {}


def energy_so_far() -> float | None:
    """Return the energy (kWh) of the running stage at its last reading; None before the first."""
    return _now.get("kwh")


class Meter:
    """Measures stages one after another; codecarbon is loaded when the first stage starts."""

    def __init__(self, reading_s: float = READING_S) -> None:
        self._tracker: Any = None
        self._reading_s = reading_s

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
        spent: dict[str, Any] = {"seconds": 0.0, "kwh": 0.0, "kg_co2e": 0.0}
        tracker = self._start_tracker()
        done = threading.Event()
        tracker.start_task(name)
        started = time.perf_counter()

        def take_reading() -> None:
            data = tracker.stop_task()
            spent["seconds"] = time.perf_counter() - started
            spent["kwh"] += float(data.energy_consumed)
            spent["kg_co2e"] += float(data.emissions)
            if data.gpu_count:
                spent["gpu_kwh"] = spent.get("gpu_kwh", 0.0) + float(data.gpu_energy)
            _now["kwh"] = spent["kwh"]
            if keep is not None:
                keep(dict(spent))

        def watch() -> None:
            while not done.wait(self._reading_s):
                take_reading()
                tracker.start_task(name)

        watcher = threading.Thread(target=watch, name="geofm-meter", daemon=True)
        watcher.start()
        try:
            yield spent
        finally:
            done.set()
            watcher.join()
            take_reading()
            _now.clear()

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
