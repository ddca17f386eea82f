"""Energy and carbon of a piece of work, measured offline by codecarbon.

An NVIDIA GPU's energy is read from its own counter (NVML, total energy since the driver loaded).
Where the processor has no counters codecarbon estimates from its type and load. All of the machine
is measured: two runs at once on one machine each count the other's load.

Carbon is energy times an intensity: that of ``GEOFM_COUNTRY`` (ISO 3166 alpha-3) where it is set,
else 0.475 kg/kWh, the world average behind the GFM paper's own figure.
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
#: Seconds between notes of what was spent so far: as much is lost when a run is killed.
NOTE_S = 30.0

#: kWh of the stage that is being measured, for whoever shows progress.
_now: dict[str, float] = {}


def so_far() -> float | None:
    """Energy of the running stage at its last reading (kWh); None before the first."""
    return _now.get("kwh")


class Meter:
    """Measures stages one after another; costs nothing until the first one starts."""

    def __init__(self, note_s: float = NOTE_S) -> None:
        self._tracker: Any = None
        self._note_s = note_s

    @contextmanager
    def stage(
        self, name: str, keep: Callable[[dict[str, Any]], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Measure a block.

        Args:
            name: of what is measured.
            keep: gets a copy of the readings every ``NOTE_S`` seconds and at the end, also at one
                by an error, so that a run that is killed leaves word of what it has spent.

        Yields:
            A dictionary with ``seconds``, ``kwh``, ``kg_co2e`` and, on GPUs, ``gpu_kwh`` (a part of
            ``kwh``), complete at the block's end. What the caller adds to it is kept too.
        """
        spent: dict[str, Any] = {"seconds": 0.0, "kwh": 0.0, "kg_co2e": 0.0}
        tracker = self._started()
        over = threading.Event()
        tracker.start_task(name)
        started = time.perf_counter()

        def note() -> None:
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
            while not over.wait(self._note_s):
                note()
                tracker.start_task(name)

        watcher = threading.Thread(target=watch, name="geofm-meter", daemon=True)
        watcher.start()
        try:
            yield spent
        finally:
            over.set()
            watcher.join()
            note()
            _now.clear()

    def _started(self) -> Any:
        if self._tracker is None:
            from codecarbon import OfflineEmissionsTracker

            logging.getLogger("codecarbon").setLevel(logging.ERROR)  # importing it resets this

            country = os.environ.get("GEOFM_COUNTRY")
            place: dict[str, Any] = (
                {"country_iso_code": country}
                if country
                else {
                    "country_iso_code": "USA",  # asked for, but not used beside a forced intensity
                    "force_carbon_intensity_g_co2e_kwh": WORLD_G_PER_KWH,
                }
            )
            self._tracker = OfflineEmissionsTracker(
                save_to_file=False,
                log_level="error",
                allow_multiple_runs=True,
                measure_power_secs=5,
                tracking_mode="machine",
                **place,
            )
        return self._tracker
