"""Take the Prefect server away for minutes while a training runs in the pool of GPU workers.

The script starts a server and workers of its own with `geofm up`, clicks on pretrain with many
epochs, and then takes the server away:

    killed    SIGKILL; `geofm up` starts the server again
    silent    SIGSTOP for the whole time, then SIGCONT: requests hang and answer late

Afterwards the run must be alive, its training must have gone on meanwhile, and a
cancel must end everything within 45 s and leave a checkpoint.

    python benchmarks/outages.py --minutes 6 killed silent
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

TABLE = Path(__file__).parent / "results" / "outages.csv"
COLUMNS = (
    "fault", "minutes", "state_after", "steps_before", "steps_after", "answers_after_s",
    "cancelled_after_s", "checkpoint", "processes_left", "machine", "cores", "versions", "date",
)  # fmt: skip
#: A corner of the demo, and a training that lasts longer than the outage.
CORNER = [
    "search.bbox=5.70,45.07,5.76,45.10", "embed.size_px=64", "pretrain.batch=4",
    "pretrain.checkpoint_steps=20",
]  # fmt: skip
EPOCHS = 10_000


def main() -> None:
    """Try the faults, and add a row for each to the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("faults", nargs="+", choices=("killed", "silent"))
    parser.add_argument("--minutes", type=float, default=6.0, help="length of the outage")
    arguments = parser.parse_args()
    for fault in arguments.faults:
        with tempfile.TemporaryDirectory(prefix="geofm-outage-") as folder:
            row = try_fault(fault, arguments.minutes, Path(folder))
        print(json.dumps(row), flush=True)
        is_new = not TABLE.exists()
        with TABLE.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def try_fault(fault: str, minutes: float, folder: Path) -> dict[str, Any]:
    """Start everything, take the server away, and look at the run afterwards."""
    environment = {
        **os.environ, "GEOFM_HOME": str(folder / "home"), "GEOFM_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    geofm = [sys.executable, "-m", "flows.cli"]
    try:
        up = [*geofm, "up", "--detach", "--store", str(folder / "store")]
        subprocess.run(up, env=environment, cwd=folder, check=True)
        printed = subprocess.run(
            [*geofm, "env", "--json"], env=environment, capture_output=True, check=True
        )
        api = connect(json.loads(printed.stdout))
        with closing(api):
            return watch(fault, minutes, folder, api)
    finally:
        subprocess.run([*geofm, "down"], env=environment, check=False)


def connect(variables: dict[str, str]) -> httpx.Client:
    """Open a client of the server, with what the server asks for."""
    user, _, password = variables["PREFECT_API_AUTH_STRING"].partition(":")
    api = httpx.Client(
        base_url=variables["PREFECT_API_URL"], auth=(user, password), trust_env=False, timeout=20
    )
    token = api.get("/csrf-token", params={"client": "outages"}).raise_for_status().json()
    api.headers.update({"Prefect-Csrf-Client": "outages", "Prefect-Csrf-Token": token["token"]})
    return api


def watch(fault: str, minutes: float, folder: Path, api: httpx.Client) -> dict[str, Any]:
    """Click, wait for the training, take the server away, and look at the run afterwards."""
    deployment = send(api, "GET", "/deployments/name/geofm-pretrain/geofm-pretrain")["id"]
    click = {"parameters": {"epochs": EPOCHS, "changes": CORNER}}
    run = send(api, "POST", f"/deployments/{deployment}/create_flow_run", click)["id"]
    deadline = time.monotonic() + 600
    while not (before := steps(api, run)):
        assert time.monotonic() < deadline, "no training begins"
        time.sleep(2)
    server = json.loads((folder / "home" / "server.json").read_text())["pid"]
    away = time.monotonic()
    os.kill(server, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    if fault == "silent":
        time.sleep(60 * minutes)
        os.kill(server, signal.SIGCONT)
    back = time.monotonic()
    while not answers(api):
        assert time.monotonic() - back < 120, "the server does not answer"
        time.sleep(1)
    answered = time.monotonic()
    # what the outage has broken ends by now
    time.sleep(max(30.0, away + 60 * minutes - answered))
    state = send(api, "GET", f"/flow_runs/{run}")["state"]["name"]
    after = steps(api, run)
    started = time.monotonic()
    cancel = {"state": {"type": "CANCELLING"}}
    send(api, "POST", f"/flow_runs/{run}/set_state", cancel)
    while send(api, "GET", f"/flow_runs/{run}")["state"]["name"] != "Cancelled":
        assert time.monotonic() - started < 300, "the run is not cancelled"
        time.sleep(0.5)
    cancelled = time.monotonic()
    time.sleep(15)
    return {
        "fault": fault,
        "minutes": minutes,
        "state_after": state,
        "steps_before": before,
        "steps_after": after,
        "answers_after_s": round(answered - back, 1),
        "cancelled_after_s": round(cancelled - started, 1),
        "checkpoint": bool(list(folder.rglob("checkpoint*"))),
        "processes_left": engines(folder),
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": " ".join(f"{name} {version(name)}" for name in ("prefect", "torch")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def send(api: httpx.Client, method: str, path: str, content: Any = None) -> Any:
    """Send a request, again while the server says that it is busy, and read the answer."""
    for _ in range(10):
        answer = api.request(method, path, json=content)
        if answer.status_code != 503:
            break
        time.sleep(2)
    return answer.raise_for_status().json()


def answers(api: httpx.Client) -> bool:
    """Tell whether the server answers."""
    try:
        return api.get("/health").is_success
    except httpx.TransportError:
        return False


def steps(api: httpx.Client, run: str) -> int:
    """Read how many steps the training of a run has reported."""
    query = {"artifacts": {"type": {"any_": ["progress"]}}}
    for artifact in send(api, "POST", "/artifacts/filter", query):
        found = re.search(r"([\d,]+) of [\d,]+ steps", artifact["description"] or "")
        if found and artifact["flow_run_id"] == run:
            return int(found[1].replace(",", ""))
    return 0


def engines(folder: Path) -> int:
    """Count the processes of flow runs that work in a folder."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        ours = str(folder).encode() in environment
        count += ours and b"flow-run" in words and b"execute" in words
    return count


if __name__ == "__main__":
    main()
