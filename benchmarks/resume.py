"""Kill a run at random moments, restart it, and compare the dataset with that of a clean run.

The data stages of a recipe run once without interruption. Then, each time in an empty store, a run
is killed by SIGKILL at a random moment and restarted to its end. Finally every runner and number of
workers gets a store of its own. Each row of the CSV is a run; seconds are those of the last start.

    python benchmarks/resume.py --kills 10
    python benchmarks/resume.py --recipe sentinel2-concise --stac http://127.0.0.1:8080
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
RUNNERS = (("threads", 1), ("threads", 2), ("processes", 1), ("processes", 2), ("dask", 2))


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--stac", default="", help="another STAC API than the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "flows.cli", "refresh", options.recipe, "--json"]
    command += ["--stac", options.stac] if options.stac else []
    command += [word for change in options.set for word in ("--set", change)]

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        stores = Path(folder)
        subprocess.run(
            [*command, "--store", stores / "warm"], check=True, stdout=subprocess.DEVNULL
        )
        clean, seconds = finish(command, stores / "clean")
        rows.append({"run": "clean", "seconds": seconds, "killed_after_s": "", "digest": clean})
        draw = random.Random(options.seed)
        for number in range(options.kills):
            store, moment = stores / f"killed-{number}", draw.uniform(0.15, 0.95) * seconds
            while not kill(
                command, store, moment
            ):  # the run was faster this time, so kill it earlier
                store, moment = stores / f"killed-{number}-{moment:.0f}", moment * 0.8
            digest, took = finish(command, store)
            rows.append(
                {"run": f"kill {number + 1}", "seconds": took,
                 "killed_after_s": round(moment, 2), "digest": digest}
            )  # fmt: skip
        for runner, workers in RUNNERS:
            how = ["--runner", runner, "--workers", str(workers)]
            digest, took = finish([*command, *how], stores / f"{runner}-{workers}")
            rows.append(
                {
                    "run": f"{runner} {workers}",
                    "seconds": took,
                    "killed_after_s": "",
                    "digest": digest,
                }
            )
    for row in rows:
        row["same_as_clean"] = row["digest"] == clean if row["digest"] else ""
        row |= {"recipe": options.recipe, "cores": os.cpu_count(), "machine": platform.machine(),
                "python": platform.python_version(), "prefect": version("prefect")}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"resume-{options.recipe}.csv"
    with target.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        print(
            row["run"],
            row["killed_after_s"],
            row["seconds"],
            str(row["digest"])[:12],
            row["same_as_clean"],
        )
    if any(row["same_as_clean"] is False for row in rows):
        sys.exit("a run ended with another dataset than the clean one")


def finish(command: list[str], store: Path) -> tuple[str, float]:
    """Run to the end; return the dataset's digest and the seconds of this start."""
    started = time.perf_counter()
    done = subprocess.run([*command, "--store", store], check=True, capture_output=True, text=True)
    seconds = round(time.perf_counter() - started, 2)
    return json.loads(done.stdout.strip().splitlines()[-1])["artifacts"]["pack"], seconds


def kill(command: list[str], store: Path, after_s: float) -> bool:
    """Start a run and kill it with its children; return False if it had already finished."""
    process = subprocess.Popen(
        [*command, "--store", store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(after_s)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


if __name__ == "__main__":
    main()
