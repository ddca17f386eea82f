"""Refresh through a server that fails on purpose; the dataset must equal that of a clean run.

The server answers some requests with 429, 503, half a body, a reset connection, a delay, or another
ETag, and lets signed addresses expire. Each seed plans other faults and gets an empty store.
Digests contain the server's address, so the server always listens on the same port (``--jobs 2``
uses the next port too, each with a clean run of its own). A run that ends with unreachable items,
or fails, is started again; ``attempts`` counts the starts. Seeds in the table with the same clean
digest are skipped.

    python benchmarks/faults.py --server serve_world.py --world DIR --seeds 50
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any

from loopback import served

Json = dict[str, Any]
TABLE = Path(__file__).parent / "results" / "faults.csv"
FAULTS = "429=0.05,503=0.05,truncate=0.02,reset=0.02,slow=0.02,etag=0.01"
KINDS = ("429", "503", "truncate", "reset", "slow", "etag")
COLUMNS = (
    "seed", *KINDS, "refused_403", "requests", "asset_requests", "asset_bytes", "seconds",
    "attempts", "digest", "same", "clean", "port", "faults", "signed_s", "recipe", "settings",
    "machine", "cores", "versions", "date",
)  # fmt: skip
_writing = threading.Lock()


def main() -> None:
    """Run the missing seeds and add them to the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--server", type=Path, required=True, help="serves a world with faults")
    parser.add_argument("--world", type=Path, required=True, help="folder of the world")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="runs at once")
    parser.add_argument("--attempts", type=int, default=3, help="starts of one run at most")
    parser.add_argument("--port", type=int, default=18_811)
    parser.add_argument("--faults", default=FAULTS)
    parser.add_argument("--signed", default="5", help="seconds that a signed address lives")
    parser.add_argument("--slow", default="0.5", help="seconds that a slow answer waits")
    parser.add_argument("--recipe", default="sentinel2-concise")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEOFM_HOME"] = str(Path(folder) / "home")  # a Prefect server of this benchmark
        try:
            every_seed(options, Path(folder))
        finally:
            subprocess.run([sys.executable, "-m", "flows.cli", "down"], check=False,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    wrong = [row["seed"] for row in known() if row["same"] != "True"]
    if wrong:
        sys.exit(f"another dataset than the clean run's: seeds {', '.join(wrong)}")


def every_seed(options: argparse.Namespace, folder: Path) -> None:
    """Run a clean run for each port, then the missing seeds."""
    clean: Json = {}
    for port in range(options.port, options.port + options.jobs):
        clean[port] = refresh(options, port, folder / f"clean-{port}", seed=None)
        print(f"clean, port {port}: {clean[port]}", flush=True)
    done = {int(r["seed"]) for r in known()
            if r["clean"] in {row["digest"] for row in clean.values()}}  # fmt: skip
    seeds = [s for s in range(options.first, options.first + options.seeds) if s not in done]
    free: Queue[int] = Queue()
    for port in clean:
        free.put(port)

    def one(seed: int) -> None:
        port = free.get()
        try:
            row = refresh(options, port, folder / f"seed-{seed}", seed)
        finally:
            free.put(port)
        row |= {"clean": clean[port]["digest"], "same": row["digest"] == clean[port]["digest"]}
        print({key: row[key] for key in COLUMNS[:15]}, flush=True)
        add(row)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, seeds))


def refresh(options: argparse.Namespace, port: int, store: Path, seed: int | None) -> Json:
    """Run the data stages into an empty store; start again while items are unreachable.

    Args:
        options: Options of the command line.
        port: Port of the server.
        store: The empty store.
        seed: Seed of the faults; None: no faults.
    """
    faults = [] if seed is None else ["--faults", options.faults, "--seed", seed]
    serve = [sys.executable, options.server, options.world, "--port", port, "--slow", options.slow,
             "--signed", options.signed, *faults]  # fmt: skip
    with served(serve) as url:
        command = [sys.executable, "-m", "flows.cli", "refresh", options.recipe, "--json",
                   "--stac", url, "--store", str(store),
                   *(word for change in options.set for word in ("--set", change))]  # fmt: skip
        began, digest = time.monotonic(), ""
        for attempt in range(1, options.attempts + 1):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 2:
                sys.exit(done.stderr)
            if done.returncode:
                print(f"seed {seed}, attempt {attempt}: {done.stderr[-600:]}", flush=True)
                continue
            made = json.loads(done.stdout.strip().splitlines()[-1])["artifacts"]
            digest = made["pack"]
            if not out_of_reach(store, made):
                break
            print(f"seed {seed}, attempt {attempt}: items were out of reach", flush=True)
        seconds = round(time.monotonic() - began, 1)
        stats = json.loads(urllib.request.build_opener(urllib.request.ProxyHandler({}))
                           .open(url + "__stats").read())  # fmt: skip
    return {
        "seed": seed, "seconds": seconds, "attempts": attempt, "digest": digest, "port": port,
        **{kind: stats["fault"].get(kind, 0) for kind in KINDS},
        "refused_403": stats["status"].get("403", 0), "requests": stats["requests"]["total"],
        "asset_requests": stats["requests"].get("assets", 0),
        "asset_bytes": stats["bytes"].get("assets", 0),
        "faults": options.faults, "signed_s": options.signed, "recipe": options.recipe,
        "settings": " ".join(options.set), "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": f"geofm {version('geofm')} urllib3 {version('urllib3')}",
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def out_of_reach(store: Path, made: dict[str, str]) -> bool:
    """Return whether a stage dropped items or chips because a server did not answer."""
    manifests = [next(store.glob(f"artifacts/*/{d}/manifest.json")) for d in made.values()]
    return any("unreachable" in json.loads(file.read_bytes())["dropped"] for file in manifests)


def known() -> list[dict[str, str]]:
    """Read the rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def add(row: Json) -> None:
    """Add a row; it replaces a row of the same seed with another clean run."""
    with _writing:
        kept = [r for r in known() if r["seed"] != str(row["seed"])]
        rows = sorted([*kept, row], key=lambda r: int(r["seed"]))
        with TABLE.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
