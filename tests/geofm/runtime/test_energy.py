"""The meter: notes while it runs, and a GPU's own energy counter at the edge where NVML is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geofm.runtime.energy import Meter

#: Stands in for nvidia-ml-py on a machine without a GPU: two devices with energy counters (mJ).
NVML = """
import ctypes, pathlib
class NVMLError(Exception): pass
class NVMLError_NotSupported(NVMLError): pass
class Memory(ctypes.Structure): total = free = used = 8 * 2**30
NVML_TEMPERATURE_GPU = 0
counters = [7_200_000, 500]
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetTotalEnergyConsumption(i): return counters[i]
def nvmlDeviceGetName(i): return "Pretended GPU"
def nvmlDeviceGetUUID(i): return f"GPU-{i}"
def nvmlDeviceGetMemoryInfo(i): return Memory()
def nvmlDeviceGetTemperature(i, kind): return 40
def nvmlDeviceGetPowerUsage(i): return 100_000
def nvmlDeviceGetEnforcedPowerLimit(i): return 300_000
def nvmlDeviceGetComputeMode(i): return 0
def nvmlDeviceGetComputeRunningProcesses(i): return []
def nvmlDeviceGetGraphicsRunningProcesses(i): return []
class Utilisation: gpu = 50
def nvmlDeviceGetUtilizationRates(i): return Utilisation()
"""
ON_A_GPU = """
import json, pynvml
from geofm.runtime.energy import Meter
readings = []
meter = Meter()
with meter.stage("warm"):
    pass
pynvml.counters[0] += 10**9
with meter.stage("pretrain", readings.append) as spent:
    pynvml.counters[0] += 3_600_000
    pynvml.counters[1] += 1_800_000
assert readings == [spent]
print(json.dumps(spent))
"""


def test_a_gpus_energy_is_what_its_counter_gained_during_the_stage(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text(NVML)
    tool = tmp_path / "nvidia-smi"  # by which codecarbon tells that there is a GPU
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    hidden = ("CUDA_VISIBLE_DEVICES", "GEOFM_COUNTRY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU], env=environment, cwd=tmp_path, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    spent = json.loads(done.stdout.strip().splitlines()[-1])
    assert spent["gpu_kwh"] == pytest.approx(0.0015)  # 5.4 kJ are 1.5 Wh
    assert spent["kwh"] >= spent["gpu_kwh"]
    assert spent["kg_co2e"] == pytest.approx(spent["kwh"] * 0.475)


def test_it_notes_what_was_spent_while_it_runs_and_when_it_fails() -> None:
    readings: list[dict[str, Any]] = []
    twice = threading.Event()

    def keep(spent: dict[str, Any]) -> None:
        readings.append(spent)
        if len(readings) >= 2:
            twice.set()

    with pytest.raises(KeyError), Meter(reading_s=0.05).stage("cut", keep) as spent:
        spent["parts_worked"] = 3
        assert twice.wait(60)
        raise KeyError("stopped here")
    assert len(readings) >= 3
    seconds = [reading["seconds"] for reading in readings]
    assert 0 < seconds[0] < seconds[1] < seconds[-1] == spent["seconds"]
    energy = [reading["kwh"] for reading in readings]
    assert energy == sorted(energy)
    assert energy[-1] == spent["kwh"] > 0
    assert readings[-1]["parts_worked"] == 3
    assert "gpu_kwh" not in spent or spent["gpu_kwh"] <= spent["kwh"]
    assert not any(t.name == "geofm-meter" for t in threading.enumerate())


def test_stages_that_run_at_once_share_the_energy() -> None:
    """What the machine spends is counted once."""

    class Tracker:
        def start_task(self, name: str) -> None:
            pass

        def stop_task(self) -> Any:
            return SimpleNamespace(energy_consumed=1.0, emissions=0.5, gpu_count=0)

    meter = Meter(reading_s=1000)
    meter._tracker = Tracker()
    with meter.stage("pool") as pool:
        with meter.stage("calibrate") as calibrate:
            pass
        with meter.stage("buckets") as buckets:
            pass
    # five readings of 1 kWh: alone, both, alone, both, alone
    assert [calibrate["kwh"], buckets["kwh"], pool["kwh"]] == [0.5, 0.5, 4.0]
    assert pool["kg_co2e"] == 2.0
