"""Measure the speed of cutting chips from COGs by HTTP, beside peers and beside the bare bytes.

Servers run on loopback and share the machine's cores with the readers. Every row is a process of
its own (or two). It has done the same work once before, geofm into another store, the peers from
other addresses, so start-up is not measured and no cache contains the data. The server counts bytes
and requests. All readers run once in each of ``--repeats`` rounds, because the speed of a machine
changes. ``seconds`` is the median of a reader's rounds; ``ours_is_x_times`` is the median over
rounds of the ratio to the first row. ``seconds`` of geofm's rows covers the work on all parts
without the search, with pixel digests, measures and tars; ``stage_seconds`` adds plan and seal.
``touched_bytes`` is the size of the compressed blocks that the windows touch, each counted once.
The stores of the test world are deleted at the end: ext4 checks recently freed inodes one by one,
so a deletion would slow the next run.

    python benchmarks/cut.py --peers PYTHON [--world DIR --server serve_world.py] [--only big]

``--world`` and ``--server`` are a folder and a script that serves it (``SCRIPT DIR --port 0``
prints the address first and answers ``/__stats``). Peers: see ``cut_peers.py``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from loopback import served

Json = dict[str, Any]
HERE = Path(__file__).parent
RESULTS = HERE / "results"
BANDS = ["red", "green", "blue", "nir"]
SIZE = 256
#: Windows of the large scenes that slow peers read.
FEW = 400
PEERS = ("odc-stac", "rio-tiler", "rasterio", "local GDAL", "bare fetch", "bare fetch + zlib",
         "bare fetch + zlib, headers, kept", "bare fetch + libdeflate")  # fmt: skip
#: Rows of geofm: name, ``cut.whole_max_mib`` (None: default), processes that share the threads.
OURS = {
    "geofm, windows": (0, 2),
    "geofm, windows, 1 process": (0, 1),
    "geofm, default": (None, 2),
    "geofm, default, 1 process": (None, 1),
}
COLUMNS = ("reader", "world", "chips", "seconds", "chips_per_s", "ours_is_x_times", "stage_seconds",
           "requests", "bytes", "touched_bytes", "amplification", "peak_rss_mib", "threads", "note",
           "server", "machine", "cores", "versions", "date")  # fmt: skip


def main() -> None:
    """Run the requested worlds and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="Python with the peers installed")
    parser.add_argument("--world", type=Path, help="a folder of test scenes")
    parser.add_argument("--server", type=Path, help="the script that serves it")
    parser.add_argument("--work", type=Path, help="folder for generated scenes and stores")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all readers")
    parser.add_argument("--only", choices=("dev", "big", "growth"), action="append")
    parser.add_argument("--scenes", type=int, default=4, help="large scenes, of 1,764 chips each")
    parser.add_argument("--growth", default="10,30,100,300", help="items of 100 chips each")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(json.loads(options.ours.read_bytes()))))
        return
    parts = options.only or ["dev", "big", "growth"]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        place = Path(folder)
        scenes = options.work or place
        rows: list[Json] = []
        # Cells from the scene's corner are aligned with the files' blocks; ground cells are not.
        for anchor in ("scene", "ground"):
            where = [f"cut.anchor={anchor}"]
            if "dev" in parts and options.world and options.server:
                command = [sys.executable, options.server, options.world, "--port", "0"]
                name = f"{options.server.name} (uvicorn)"
                only = [*where, "search.collections=sentinel-2-l1c"]
                rows += compare(f"dev, {anchor} cells", command, name, options.world, only, options,
                                place)  # fmt: skip
            if "big" in parts:
                make_scenes(scenes / "big", 10_980, 17)
                command = [sys.executable, HERE / "range_server.py", scenes / "big",
                           "--items", options.scenes]  # fmt: skip
                name = "range_server.py (asyncio)"
                rows += compare(
                    f"big, {anchor} cells", command, name, scenes / "big", where, options, place
                )
        if rows:
            write("cut.csv", COLUMNS, rows, keep="world")
        if "growth" in parts:
            make_scenes(scenes / "small", 2815, 300)
            rows = growth(
                scenes / "small", [int(n) for n in options.growth.split(",")], options, place
            )
            write("cut-growth.csv", tuple(rows[0]), rows)


def make_scenes(folder: Path, edge: int, items: int) -> None:
    """Generate the world, unless it exists."""
    from big_scenes import make_world

    folder.mkdir(exist_ok=True)
    make_world(folder, edge, items)


def compare(
    world: str, command: list[Any], server: str, files: Path, settings: list[str],
    options: argparse.Namespace, place: Path,
) -> list[Json]:  # fmt: skip
    """Measure the rows of a world."""
    found: dict[str, list[Json]] = {name: [] for name in (*OURS, *PEERS)}
    jobs: dict[str, Json] = {}
    with served(command) as url:
        for _ in range(options.repeats):
            for name, (most, processes) in OURS.items():
                whole = [f"cut.whole_max_mib={most}"] if most is not None else []
                more = [*settings, *whole, *options.set]
                row = run_ours(url, more, options, place, processes, keep=world.startswith("dev"))
                if not jobs:
                    jobs = {peer: job_of(row, peer, world, files) for peer in PEERS}
                row["note"] = (f"work {row['seconds']:.2f} s, plan {row['plan_seconds']:.2f} s, "
                               f"seal {row['seal_seconds']:.2f} s")  # fmt: skip
                row["threads"] = f"{processes} x {options.threads // processes}"
                found[name].append(row)
            for name in PEERS:
                found[name].append(run_peer(name, jobs[name], url, options, place))
    first, *_ = found.values()
    rows = []
    for name, rounds in found.items():
        blocks = jobs[name if name in jobs else "bare fetch"]["blocks"]
        touched = sum(block["size"] for block in blocks)
        row = {"world": world, "server": server, "threads": options.threads, **median(rounds),
               "reader": name, "touched_bytes": touched}  # fmt: skip
        if name == "local GDAL":
            row.update(requests=0, bytes=0)
        if row.get("seconds"):
            times = [pace(a) / pace(b) for a, b in zip(rounds, first, strict=True)]
            row.update(chips_per_s=round(1 / pace(row), 2),
                       ours_is_x_times=round(statistics.median(times), 2),
                       amplification=round(row["bytes"] / touched, 4),
                       seconds=round(row["seconds"], 3),
                       peak_rss_mib=round(row["peak_rss_mib"]))  # fmt: skip
        print({key: row.get(key) for key in COLUMNS[:12]}, row.get("note", ""), flush=True)
        rows.append(row)
    return rows


def pace(row: Json) -> float:
    """Return seconds per chip."""
    return float(row["seconds"] / row["chips"])


def job_of(row: Json, peer: str, world: str, files: Path) -> Json:
    """Return the job of a peer: the windows of a geofm run, and the blocks that they touch."""
    job: Json = json.loads(Path(row["job"]).read_bytes())
    if world.startswith("big") and peer in ("odc-stac", "rio-tiler"):
        job["windows"] = few(job["windows"])
    job["blocks"] = touched_blocks(job, files, layers=peer.startswith("bare"))
    return job


def few(windows: list[Json]) -> list[Json]:
    """Select some windows of each item, neighbours together."""
    names = sorted({window["item"] for window in windows})
    share = FEW // len(names)
    return [w for name in names for w in [w for w in windows if w["item"] == name][:share]]


def median(rows: list[Json]) -> Json:
    """Return the run with the median time."""
    timed = [row for row in rows if "seconds" in row]
    if not timed:
        return rows[0]
    middle = statistics.median_low(row["seconds"] for row in timed)
    return next(row for row in timed if row["seconds"] == middle)


def counted(url: str, reset: bool = False) -> Json:
    """Return requests and bytes of assets since the last reset."""
    request = urllib.request.Request(  # noqa: S310
        url + ("__reset" if reset else "__stats"), method="POST" if reset else "GET"
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    told = json.loads(direct.open(request).read())
    return {} if reset else {key: told[key].get("assets", 0) for key in ("requests", "bytes")}


def run_ours(
    url: str, settings: list[str], options: argparse.Namespace, place: Path, processes: int = 1,
    keep: bool = False,
) -> Json:  # fmt: skip
    """Run the stage ``cut`` in a process, into an empty store, which is deleted unless ``keep``."""
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(dir=place)
        if not keep:
            stack.callback(shutil.rmtree, folder)
        file = Path(folder) / "options.json"
        job = place / f"job-{Path(folder).name}.json"
        what = {"url": url, "settings": settings, "threads": options.threads // processes,
                "processes": processes}  # fmt: skip
        file.write_text(json.dumps({**what, "store": folder, "job": str(job)}))
        done = subprocess.run([sys.executable, __file__, "--ours", file], capture_output=True,
                              text=True, check=False)  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return {**json.loads(done.stdout.splitlines()[-1]), "job": str(job)}


def run_peer(name: str, job: Json, url: str, options: argparse.Namespace, place: Path) -> Json:
    """Run a peer in a process; return its error if it fails."""
    if options.peers is None:
        return {"note": "missing: give --peers"}
    file = place / "peer.json"
    file.write_text(
        json.dumps(
            {**job, "threads": options.threads, "reset": url + "__reset", "scratch": str(place)}
        )
    )
    done = subprocess.run([options.peers, HERE / "cut_peers.py", name, file], capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]
        return {"note": f"failed or missing: {' '.join(why)}"[:200]}
    return {**json.loads(done.stdout.splitlines()[-1]), **counted(url)}


def ours(options: Json) -> Json:
    """Search and prepare untimed, then time the cut; runs in a process of its own."""
    from data_catalog.catalogue import open_catalogue
    from data_catalog.run import make_job, plan_parts, run_stage, seal
    from data_catalog.store import open_store
    from geofm.config.recipe_book import load_recipe
    from geofm.stages import ALL_STAGES, get_stage

    recipe = load_recipe(
        "sentinel2-concise",
        ["search.collections=", "search.bbox=", "search.datetime=", f"search.stac={options['url']}",
         "cut.bands=" + ",".join(BANDS), f"cut.size_px={SIZE}", "cut.max_failed=1",
         *options["settings"]],
    )  # fmt: skip
    folder = Path(options["store"])
    store = open_store(folder / "store")
    catalogue = open_catalogue(f"sqlite:///{folder}/c.db", store)
    made: Json = {}
    for name in ALL_STAGES[: ALL_STAGES.index("cut")]:
        stage = get_stage(name)
        made[stage.kind] = run_stage(stage, store, catalogue, made, getattr(recipe, name))
    stage = get_stage("cut")
    job = make_job(stage, store, made, recipe.cut, catalogue=catalogue.url)
    job = replace(job, how={"workers": options["processes"]})
    with workers(options, store.url, made, recipe.cut) as run_parts:
        os.sync()  # otherwise this run waits for the disk to write the data of earlier runs
        counted(options["url"], reset=True)
        times = [time.perf_counter()]
        parts = plan_parts(stage, job)
        times.append(time.perf_counter())
        peak = run_parts(job, len(parts))
        times.append(time.perf_counter())
        chips, _ = seal(stage, job, parts)
        times.append(time.perf_counter())  # before the workers end
    plan_s, work_s, seal_s = (b - a for a, b in pairwise(times))
    counts = counted(options["url"])
    good = chips.table("chips.parquet").query("status == 'ok'")
    Path(options["job"]).write_text(json.dumps(windows_of(good, made["items"])))
    return {"chips": len(good), "seconds": work_s, "plan_seconds": plan_s,
            "seal_seconds": seal_s, "stage_seconds": round(plan_s + work_s + seal_s, 3),
            "peak_rss_mib": peak, **counts}  # fmt: skip


@contextmanager
def workers(
    options: Json, store: str, made: Json, settings: Any
) -> Iterator[Callable[[Any, int], float]]:
    """Yield a function that cuts the planned parts of a job.

    Each worker has cut all parts elsewhere before. The function returns the largest resident size
    of a worker, in MiB.
    """
    from data_catalog.run import make_job, plan_parts
    from data_catalog.store import open_store
    from geofm.stages import get_stage

    threads, processes = options["threads"], options["processes"]
    spare = [
        replace(make_job(get_stage("cut"), open_store(f"{store}-warm-{n}"), made, settings),
                how={"workers": processes})
        for n in range(processes)
    ]  # fmt: skip
    counts = [len(plan_parts(get_stage("cut"), job)) for job in spare]
    if processes == 1:
        cut_share(spare[0], 0, 1, threads)
        yield lambda job, _: cut_share(job, 0, 1, threads)
        return
    from flows.stage_flow import count_tasks

    spawned = multiprocessing.get_context("spawn")
    ready = (spawned.Barrier(processes), spare, counts, threads)
    with ProcessPoolExecutor(processes, spawned, initializer=warm, initargs=ready) as many:
        deque(many.map(int, range(processes)), 0)

        def run_parts(job: Any, count: int) -> float:
            tasks = count_tasks(count, processes, threads)
            calls = [many.submit(cut_share, job, k, tasks, threads) for k in range(tasks)]
            return max(call.result() for call in calls)

        yield run_parts


def warm(barrier: Any, jobs: list[Any], counts: list[int], threads: int) -> None:
    """Cut all parts in each worker; a barrier makes all workers take part."""
    from flows.stage_flow import count_tasks

    number = barrier.wait()
    tasks = count_tasks(counts[number], len(jobs), threads)
    for k in range(tasks):
        cut_share(jobs[number], k, tasks, threads)
    barrier.wait()


def cut_share(job: Any, number: int, tasks: int, threads: int) -> float:
    """Cut the parts of a task; return the largest resident size of the process, in MiB."""
    from data_catalog.run import read_plan, work_parts
    from data_catalog.storage.process import peak_memory_mib
    from geofm.stages import get_stage

    stage = replace(get_stage("cut"), at_once=threads)
    work_parts(stage, job, read_plan(job)[number::tasks])
    return peak_memory_mib()


def windows_of(chips: Any, items: Any) -> Json:
    """Return the cut windows and the items' addresses, for the peers."""
    used = set(chips["item_id"])
    frozen = {}
    for row in items.table("items.parquet").query("status == 'ok'").itertuples():
        if row.item_id in used:
            item = {"links": [], **json.loads(row.item_json)}
            hrefs = {band: item["assets"][band]["href"] for band in BANDS}
            layer = item["assets"].get("scl", {}).get("href", "")
            frozen[row.item_id] = {"stac": item, "hrefs": hrefs, "layer": layer}
    windows = [
        {"item": row.item_id, "row": int(row.row), "col": int(row.col), "crs": row.crs,
         "transform": list(row.transform)}
        for row in chips.itertuples()
    ]  # fmt: skip
    return {"items": frozen, "windows": windows, "bands": BANDS, "size": SIZE}


def local_file(href: str, files: Path) -> Path:
    """Return the file behind an address of a server."""
    path = href.split("/assets/", 1)[1]
    for candidate in (files / "assets" / Path(path).name, files / path.partition("/")[2]):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(href)


def touched_blocks(job: Json, files: Path, layers: bool) -> list[Json]:
    """Return the compressed blocks that the windows touch; add local files to the job's items.

    Args:
        job: Windows and items.
        files: The served folder.
        layers: Whether to include the cloud layer, which geofm also reads.
    """
    import rasterio

    found = []
    for name, item in job["items"].items():
        item["files"] = {b: str(local_file(h, files)) for b, h in item["hrefs"].items()}
        hrefs = [*item["hrefs"].values(), *([item["layer"]] if layers and item["layer"] else [])]
        windows = [w for w in job["windows"] if w["item"] == name]
        gsd = rasterio.open(item["files"]["red"]).transform.a
        for href in hrefs:
            with rasterio.open(local_file(href, files)) as file:
                edge = file.block_shapes[0][0]
                step = edge * file.transform.a / gsd  # size of a block, in pixels of the windows
                blocks = {
                    (x, y)
                    for w in windows
                    for x in range(int(w["col"] // step), int((w["col"] + SIZE - 1) // step) + 1)
                    for y in range(int(w["row"] // step), int((w["row"] + SIZE - 1) // step) + 1)
                }
                for x, y in blocks:
                    tag = f"{x}_{y}"
                    offset = file.get_tag_item(f"BLOCK_OFFSET_{tag}", "TIFF", bidx=1)
                    size = file.get_tag_item(f"BLOCK_SIZE_{tag}", "TIFF", bidx=1)
                    if offset:
                        found.append({"href": href, "offset": int(offset), "size": int(size),
                                      "edge": edge, "dtype": file.dtypes[0]})  # fmt: skip
    return found


def growth(files: Path, sizes: list[int], options: argparse.Namespace, place: Path) -> list[Json]:
    """Measure the whole stage for more and more items, and the exponent of its time."""
    rows = []
    for items in sizes:
        free = shutil.disk_usage(place).free / 2**30
        if free < items * 100 * SIZE * SIZE * len(BANDS) * 2 / 2**30 + 5:
            sys.exit(f"only {free:.0f} GiB free: give --work a larger disk or --growth fewer items")
        command = [sys.executable, HERE / "range_server.py", files, "--items", str(items)]
        with served(command) as url:
            row = run_ours(url, ["cut.whole_max_mib=0", *options.set], options, place)
        rows.append({"chips": row["chips"], "items": items, "stage_seconds": row["stage_seconds"],
                     "plan_s": round(row["plan_seconds"], 3), "work_s": round(row["seconds"], 3),
                     "seal_s": round(row["seal_seconds"], 3),
                     "peak_rss_mib": round(row["peak_rss_mib"]),
                     "threads": options.threads})  # fmt: skip
        print(rows[-1], flush=True)
    if len(rows) > 1:
        chips, seconds = ([math.log(r[key]) for r in rows] for key in ("chips", "stage_seconds"))
        slope = round(float(np.polyfit(chips, seconds, 1)[0]), 3)
        for row in rows:
            row["exponent"] = slope
    return [{**row, **about()} for row in rows]


def about() -> Json:
    """Return machine, versions and date."""
    names = ("geofm", "rasterio", "imagecodecs", "numpy", "urllib3")
    return {"machine": platform.machine(), "cores": os.cpu_count(),
            "versions": " ".join(f"{name} {version(name)}" for name in names),
            "date": datetime.now(UTC).date().isoformat()}  # fmt: skip


def write(name: str, columns: tuple[str, ...], rows: list[Json], keep: str = "") -> None:
    """Write a table; rows of an earlier table with another value in column ``keep`` stay."""
    target = RESULTS / name
    old = []
    if keep and target.exists():
        with target.open(newline="") as file:
            new = {row[keep] for row in rows}
            old = [row for row in csv.DictReader(file) if row[keep] not in new]
    with target.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows([*old, *({**about(), **row} for row in rows)])


if __name__ == "__main__":
    main()
