"""Refresh through a server that fails on purpose; the dataset must be the clean run's, to the bit.

The server answers some requests with 429, 503, half a body, a reset connection, late, or with
another ETag, and lets signed addresses expire. Each seed plans other faults and gets an empty
store. Digests contain the server's address, so it always listens on the same port (``--jobs 2``
uses the next one as well, each with a clean run of its own). A run that ends with items out of
reach (``facts.retry``), or fails, is started again: ``attempts`` counts. Seeds that the table
holds already, beside the same clean digest, are skipped.

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
    """Run the seeds that are missing and add them to the table."""
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
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEOFM_HOME"] = str(Path(folder) / "home")  # a Prefect server of our own
        try:
            every_seed(asked, Path(folder))
        finally:
            subprocess.run([sys.executable, "-m", "flows.cli", "down"], check=False,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    wrong = [row["seed"] for row in known() if row["same"] != "True"]
    if wrong:
        sys.exit(f"another dataset than the clean run's: seeds {', '.join(wrong)}")


def every_seed(asked: argparse.Namespace, folder: Path) -> None:
    """A clean run for each port, then the seeds that the table lacks."""
    clean: Json = {}
    for port in range(asked.port, asked.port + asked.jobs):
        clean[port] = refresh(asked, port, folder / f"clean-{port}", seed=None)
        print(f"clean, port {port}: {clean[port]}", flush=True)
    done = {int(r["seed"]) for r in known()
            if r["clean"] in {row["digest"] for row in clean.values()}}  # fmt: skip
    seeds = [s for s in range(asked.first, asked.first + asked.seeds) if s not in done]
    free: Queue[int] = Queue()
    for port in clean:
        free.put(port)

    def one(seed: int) -> None:
        port = free.get()
        try:
            row = refresh(asked, port, folder / f"seed-{seed}", seed)
        finally:
            free.put(port)
        row |= {"clean": clean[port]["digest"], "same": row["digest"] == clean[port]["digest"]}
        print({key: row[key] for key in COLUMNS[:15]}, flush=True)
        add(row)

    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(one, seeds))


def refresh(asked: argparse.Namespace, port: int, store: Path, seed: int | None) -> Json:
    """The data half into an empty store, started again while something was out of reach.

    Args:
        asked: the command line.
        port: of the server.
        store: the empty store.
        seed: of the faults; None for none.
    """
    faults = [] if seed is None else ["--faults", asked.faults, "--seed", seed]
    serve = [sys.executable, asked.server, asked.world, "--port", port, "--slow", asked.slow,
             "--signed", asked.signed, *faults]  # fmt: skip
    with served(serve) as url:
        command = [sys.executable, "-m", "flows.cli", "refresh", asked.recipe, "--json",
                   "--stac", url, "--store", str(store),
                   *(word for change in asked.set for word in ("--set", change))]  # fmt: skip
        began, digest = time.monotonic(), ""
        for attempt in range(1, asked.attempts + 1):
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
        "faults": asked.faults, "signed_s": asked.signed, "recipe": asked.recipe,
        "settings": " ".join(asked.set), "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": f"geofm {version('geofm')} urllib3 {version('urllib3')}",
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def out_of_reach(store: Path, made: dict[str, str]) -> bool:
    """Whether a stage of the run says that another run may get more."""
    manifests = [next(store.glob(f"artifacts/*/{d}/manifest.json")) for d in made.values()]
    return any(json.loads(file.read_bytes())["facts"].get("retry") for file in manifests)


def known() -> list[dict[str, str]]:
    """The rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def add(row: Json) -> None:
    """Add a row; one of the same seed and another clean run goes."""
    with _writing:
        kept = [r for r in known() if r["seed"] != str(row["seed"])]
        rows = sorted([*kept, row], key=lambda r: int(r["seed"]))
        with TABLE.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
