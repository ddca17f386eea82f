"""Energy and carbon of a piece of work, measured offline by codecarbon.

Where the processor has no counters codecarbon estimates from its type and load. Carbon is energy
times an intensity: that of ``GEOFM_COUNTRY`` (ISO 3166 alpha-3) where it is set, else 0.475 kg/kWh,
the world average behind the GFM paper's own figure (93.3 V100-hours = 13.3 kg, Table 1).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: kg CO2e per V100-hour in the paper: 0.30 kW times 0.475 kg/kWh.
PAPER_KG_PER_V100_HOUR = 0.1425
WORLD_G_PER_KWH = 475.0


class Meter:
    """Measures stages one after another; costs nothing until the first one starts."""

    def __init__(self) -> None:
        self._tracker: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, float]]:
        """Measure a block; the dictionary is filled with ``kwh`` and ``kg_co2e`` at its end."""
        reading: dict[str, float] = {}
        tracker = self._started()
        tracker.start_task(name)
        try:
            yield reading
        finally:
            data = tracker.stop_task(name)
            reading["kwh"] = float(data.energy_consumed)
            reading["kg_co2e"] = float(data.emissions)

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
