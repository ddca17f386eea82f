"""Run the data half on 100,000 chips and more, as a user would, and measure every stage.

    python -m benchmarks.scale FOLDER                        25 scenes, 102,400 chips of 64 pixels
    python -m benchmarks.scale FOLDER --add 1                the same store, one scene more
    python -m benchmarks.scale FOLDER --drop 7               the same store, without scene 7
    python -m benchmarks.scale FOLDER --scenes 74 --store S  303,104 chips

Each call draws the scenes that are missing (`scale_scenes.py`), runs ``geofm refresh`` on their
catalogue with the default recipe, and checks what became of the known copies. It adds one row to
``results/scale.csv`` for each stage that was computed: seconds, processor seconds and cores of all
processes of the run, the largest resident size of one process, chips per second, and the longest
silence on stderr. Stages that do not depend on each other run at once: then the processor seconds
and the memory of an interval are those of all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sqlalchemy import select

from benchmarks.scale_scenes import make_scenes, original_of, scene_id, write_catalogue
from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import RunRow
from flows.settings import open_place
from geofm.stages import DATA_STAGES

RESULTS = Path(__file__).parent / "results" / "scale.csv"
CHIP_PX, CHIPS_OF_SCENE = 64, 4096
SAMPLE_S = 0.1
TICKS = os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """Processor seconds of all processes so far, and the resident size of the largest, MiB."""

    time_s: float
    cpu_s: float
    largest_mib: float


def main() -> None:
    """Run, measure, check, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="scenes, about 60 MB each")
    parser.add_argument("--scenes", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the run")
    parser.add_argument("--store", type=Path, help="default: FOLDER/store-SEED")
    parser.add_argument("--add", type=int, default=0, help="scenes beyond --scenes")
    parser.add_argument("--drop", type=int, nargs="*", default=[], help="scenes to leave out")
    parser.add_argument("--set", action="append", default=[], help="as for geofm refresh")
    parser.add_argument("--runner", choices=("threads", "processes", "dask"), default="threads")
    parser.add_argument("--name", default="", help="first column; default: from the options")
    options = parser.parse_args()
    count = options.scenes + options.add
    world = options.folder / f"world-{options.seed}"
    make_scenes(world, count, options.seed)
    numbers = [number for number in range(count) if number not in options.drop]
    catalog = write_catalogue(world, numbers)
    store = options.store or options.folder / f"store-{options.seed}"
    command = [
        str(Path(sys.executable).parent / "geofm"), "refresh", str(recipe(options.folder)),
        "--stac", str(catalog), "--store", str(store), "--runner", options.runner,
        "--set", f"compute.seed={options.seed}", "--json",
    ]  # fmt: skip
    for change in options.set:
        command += ["--set", change]
    run = measure(command)
    name = options.name or f"{len(numbers)} scenes, seed {options.seed}, {options.runner}"
    place = open_place(str(store), "")
    rows = list(stage_rows(name, run, place.catalogue, len(numbers) * CHIPS_OF_SCENE))
    if run.exit_code == 0:
        rows[-1]["note"] = json.dumps(check_copies(place.catalogue, numbers))
    for row in rows:
        print({key: value for key, value in row.items() if value != ""}, flush=True)
    write_rows(rows)
    raise SystemExit(run.exit_code)


def recipe(folder: Path) -> Path:
    """Write the recipe: the default one with a name and the chip's size."""
    path = folder / "scale.yaml"
    path.write_text(f"name: scale\npack: {{name: scale}}\ncut: {{size_px: {CHIP_PX}}}\n")
    return path


class Run(NamedTuple):
    """What was seen of a run: samples of its processes, and the times of its lines on stderr."""

    exit_code: int
    started: float
    ended: float
    samples: list[Sample]
    lines: list[tuple[float, str]]


def measure(command: list[str]) -> Run:
    """Run a command, and watch it and all processes that it starts."""
    print(" ".join(command), flush=True)
    samples: list[Sample] = []
    lines: list[tuple[float, str]] = []
    started = time.time()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        stream = process.stderr

        def read() -> None:
            for line in stream:
                lines.append((time.time(), line))
                print(f"{time.time() - started:7.1f}  {line}", end="", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        ended_cpu: dict[int, float] = {}
        while process.poll() is None:
            samples.append(_sample(process.pid, ended_cpu))
            time.sleep(SAMPLE_S)
        reader.join(2)  # a server that the run has started keeps the pipe open
    return Run(process.returncode, started, time.time(), samples, lines)


def _sample(root: int, cpu: dict[int, float]) -> Sample:
    """Add up a process and its descendants; those that have ended keep their last figure."""
    parents: dict[int, int] = {}
    figures: dict[int, tuple[float, float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(folder.name)
        parents[pid] = int(fields[1])
        ticks = int(fields[11]) + int(fields[12])
        figures[pid] = ticks / TICKS, int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    largest = 0.0
    for pid, (seconds, mib) in figures.items():
        ancestor = pid
        while ancestor not in (root, 0):
            ancestor = parents.get(ancestor, 0)
        if ancestor == root:
            cpu[pid] = seconds
            largest = max(largest, mib)
    return Sample(time.time(), sum(cpu.values()), largest)


def stage_rows(name: str, run: Run, catalogue: Catalogue, chips: int) -> Iterator[dict[str, Any]]:
    """Yield the measures of each stage, and of the whole run."""
    since = datetime.fromtimestamp(run.started, UTC)
    with catalogue.session() as session:
        rows = [row for row in session.scalars(select(RunRow)) if _utc(row.started_at) >= since]
        spans = {
            row.stage: (_utc(row.started_at).timestamp(), _utc(row.finished_at).timestamp())
            for row in rows
            if row.finished_at is not None and not row.metrics.get("cached")
        }
    for stage in DATA_STAGES:
        if stage in spans:
            yield _row(name, stage, run, *spans[stage], chips)
    yield _row(name, "all", run, run.started, run.ended, chips) | {"exit_code": run.exit_code}


def _utc(time_of: datetime) -> datetime:
    """Return a time of the catalogue, which SQLite keeps without a zone, in UTC."""
    return time_of if time_of.tzinfo else time_of.replace(tzinfo=UTC)


def _row(name: str, stage: str, run: Run, first: float, last: float, chips: int) -> dict[str, Any]:
    """Measure an interval of a run."""
    times = np.array([sample.time_s for sample in run.samples])
    cpu = np.interp([first, last], times, [sample.cpu_s for sample in run.samples])
    inside = [s.largest_mib for s in run.samples if first <= s.time_s <= last + SAMPLE_S]
    said = [first, *(at for at, _ in run.lines if first <= at <= last), last]
    seconds = last - first
    return {
        "run": name, "stage": stage, "chips": chips, "seconds": round(seconds, 1),
        "cpu_s": round(float(cpu[1] - cpu[0]), 1),
        "cores": round(float(cpu[1] - cpu[0]) / max(seconds, 1e-9), 2),
        "peak_mib": round(max(inside, default=0)), "chips_per_s": round(chips / seconds, 1),
        "longest_silence_s": round(max(np.diff(said)), 1), "exit_code": "", "note": "",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": " ".join(f"{p} {version(p)}" for p in ("geofm", "numpy", "torch", "faiss-cpu")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def check_copies(catalogue: Catalogue, numbers: list[int]) -> dict[str, Any]:
    """Count what became of the chips of twins and near copies, and check every witness."""
    newest = catalogue.newest("scale")
    assert newest is not None
    lineage = catalogue.lineage([newest.digest])
    found = {entry.stage: catalogue.get(digest) for digest, entry in lineage.items()}
    chips = found["cut"].table("chips.parquet", ["chip_id", "item_id", "row", "col"])
    decisions = found["curate"].table("decisions.parquet")
    table = decisions.merge(chips, on="chip_id", validate="one_to_one")
    place = table["item_id"] + "/" + _place_in_scene(table)
    group = dict(zip(place, table["cluster"], strict=True))
    kept = dict(zip(place, table["decision"] == "keep", strict=True))
    counts: dict[str, Any] = {}
    for number in numbers:
        original = original_of(number)
        if original == number or original not in numbers:
            continue
        kind = "twin" if number % 25 > 22 else "near_copy"
        for spot in _place_in_scene(table[table["item_id"] == scene_id(number)]):
            copied, first = f"{scene_id(number)}/{spot}", f"{scene_id(original)}/{spot}"
            counts[f"{kind}s"] = counts.get(f"{kind}s", 0) + 1
            same = group[copied] == group[first] != ""
            counts[f"{kind}s_in_group"] = counts.get(f"{kind}s_in_group", 0) + int(same)
            twice = kept[copied] and kept[first]
            counts[f"{kind}s_kept_twice"] = counts.get(f"{kind}s_kept_twice", 0) + int(twice)
    counts["rules"] = table["rule"].value_counts().to_dict()
    counts["pairs_compared"] = found["alike"].manifest.facts["compared"]
    counts["witnesses_not_stored"] = _not_stored(table, found)
    return counts


def _not_stored(table: pd.DataFrame, found: dict[str, Artifact]) -> int:
    """Count dropped chips whose rule and witness are not those of a stored pair.

    Chips with equal vectors, or with equal pixels, stand for each other.
    """
    row_of = pd.Index(table["chip_id"])
    first = np.arange(len(table))
    same = found["pairs"].table("identical.parquet")  # equal vectors
    first[row_of.get_indexer(same["chip_id"])] = row_of.get_indexer(same["same_as"])
    pool = found["pool"].table("pool.parquet", ["chip_id", "rule", "witness_id"])
    pool = pool[pool["rule"] == "identical"]  # equal pixels
    first[row_of.get_indexer(pool["chip_id"])] = first[row_of.get_indexer(pool["witness_id"])]

    def codes(left: pd.Series, right: pd.Series) -> NDArray[np.int64]:
        a, b = first[row_of.get_indexer(left)], first[row_of.get_indexer(right)]
        return np.where(a == b, -1, np.minimum(a, b) * len(table) + np.maximum(a, b))

    stored = {
        "near_duplicate": [
            found["pairs"].table("pairs.parquet", ["left", "right"]),
            found["curate"].table("dense_pairs.parquet", ["left", "right"]),
        ],
        "pixel_duplicate": [found["alike"].table("alike.parquet", ["left", "right"])],
    }
    wrong = 0
    for rule, tables in stored.items():
        pairs = np.unique(np.concatenate([codes(t["left"], t["right"]) for t in tables]))
        rows = table[table["rule"] == rule]
        named = codes(rows["chip_id"], rows["witness_id"])
        wrong += int((~np.isin(named, pairs) & (named >= 0)).sum())
    return wrong


def _place_in_scene(table: pd.DataFrame) -> pd.Series:
    """Return the row and column of each chip in its scene, as text."""
    return table["row"].astype(str) + "," + table["col"].astype(str)


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Add rows to the results; those of the same run are replaced."""
    old = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if row["run"] != rows[0]["run"]]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([*old, *rows])


if __name__ == "__main__":
    main()
