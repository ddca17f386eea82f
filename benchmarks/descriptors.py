"""Measure the speed of describing chips, beside an embedding pass and beside the bare model.

Chips of 256 px and 4 bands are in the tars of a real store. ``describe`` and ``embed`` are the
whole stages (plan, reading, work, seal) with one process and with one process per core, each with a
share of the parts, as the runners do it. ``model`` is the bare forward pass of the same encoder on
images in memory, in the batches of the stage. ``cpu_ms_per_chip`` is the CPU time of all processes;
``cheaper_than_embed`` is the CPU time of embedding divided by it.

    python benchmarks/descriptors.py [--chips 2048] [--embed-chips 1024]
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
BANDS = ["red", "green", "blue", "nir"]
SIZE, PER_TAR = 256, 64


def main() -> None:
    """Write the medians of ``--repeats`` rounds; each round runs every kind of work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chips", type=int, default=2048)
    parser.add_argument("--embed-chips", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    counts = {"describe": options.chips, "embed": options.embed_chips, "model": options.embed_chips}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for count in {*counts.values(), PER_TAR}:
            write_chips(place / str(count), count)
        os.sync()  # wait until the disk has written the chips
        for workers in sorted({1, cores}):
            with started(workers) as pool:
                measure(dict.fromkeys(counts, PER_TAR), place, workers, pool)  # untimed
                rounds = [measure(counts, place, workers, pool) for _ in range(options.repeats)]
            rows += [row(what, workers, counts[what], rounds) for what in counts]
    with (RESULTS / "descriptors.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(
    counts: dict[str, int], place: Path, workers: int, pool: ProcessPoolExecutor
) -> dict[str, tuple[float, float]]:
    """Measure chips per second and CPU seconds per chip of each kind of work in turn."""
    found = {}
    for what, count in counts.items():
        if what == "model":
            found[what] = bare(count // workers, workers, pool)
        else:
            found[what] = timed(what, place / str(count), workers, pool)
    told = {what: f"{rate:.0f}/s, {cpu * 1e3:.3f} ms" for what, (rate, cpu) in found.items()}
    print(workers, told, flush=True)
    return found


def row(what: str, workers: int, chips: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a line of the table; ratios are medians of the ratios of each round."""
    names = ("geofm", "numpy", "torch", "timm")
    rates = [one[what][0] for one in rounds]
    of_model, of_embed = (
        float(np.median([one[what][0] / one[base][0] for one in rounds]))
        for base in ("model", "embed")
    )
    cpu = float(np.median([one[what][1] for one in rounds]))
    cheaper = float(np.median([one["embed"][1] / one[what][1] for one in rounds]))
    return {
        "what": what, "processes": workers, "chips": chips, "size_px": SIZE, "bands": len(BANDS),
        "chips_per_s": round(float(np.median(rates)), 1), "of_model": round(of_model, 3),
        "of_embed": round(of_embed, 2), "cpu_ms_per_chip": round(cpu * 1e3, 3),
        "cheaper_than_embed": round(cheaper, 2),
        "slowest": round(min(rates), 1), "fastest": round(max(rates), 1),
        "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "versions": " ".join(f"{name} {version(name)}" for name in names),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def write_chips(folder: Path, count: int) -> None:
    """Make a store with a chips artifact of noisy smooth images."""
    from data_catalog.store import open_store
    from tests.geofm.dedup.synthetic import Chip, make_chips, texture

    few = [texture(seed, SIZE, len(BANDS)) for seed in range(32)]
    draw = np.random.default_rng(0)
    chips = [
        Chip(few[n % 32] + np.uint16(draw.integers(0, 500)), bands=BANDS) for n in range(count)
    ]
    art = make_chips(open_store(folder), chips, per_part=PER_TAR)
    (folder / "digest").write_text(art.digest)


def the_job(stage: str, folder: Path, place: Path) -> tuple[Any, Any]:
    """Make a job of a stage on the chips, in a store of its own, so that nothing is reused."""
    from data_catalog.run import make_job
    from data_catalog.store import open_store
    from geofm.config.recipe import EmbedSettings, RecipeSection
    from geofm.dedup import describe
    from geofm.embeddings import embed

    chips = open_store(folder).artifact("chips", (folder / "digest").read_text())
    one = {"describe": describe.STAGE, "embed": embed.STAGE}[stage]
    settings = EmbedSettings() if stage == "embed" else RecipeSection()
    return one, make_job(one, open_store(place), {"chips": chips}, settings)


def share(stage: str, folder: Path, place: Path, first: int, step: int) -> float:
    """Work on every ``step``-th part; return the CPU time in seconds."""
    from data_catalog.run import read_plan, work_parts

    began = time.process_time()
    one, job = the_job(stage, folder, place)
    work_parts(one, job, read_plan(job)[first::step])
    return time.process_time() - began


def warm() -> None:
    """Import, build and try everything that a worker does once."""
    forward(16)


@contextmanager
def started(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that have imported and built everything they need."""
    ready = get_context("spawn").Barrier(workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer, (ready,)) as pool:
        for call in [pool.submit(os.getpid) for _ in range(workers)]:
            call.result()
        warm()  # this process plans and seals
        yield pool


def initializer(ready: Any) -> None:
    """Run in each process before its first task; the first task waits for all processes."""
    warm()
    ready.wait(120)


def timed(stage: str, folder: Path, workers: int, pool: ProcessPoolExecutor) -> tuple[float, float]:
    """Measure a stage: plan, reading, work and seal."""
    from data_catalog.run import plan_parts, seal

    with tempfile.TemporaryDirectory() as store:
        one, job = the_job(stage, folder, Path(store))
        began, used = time.perf_counter(), time.process_time()
        parts = plan_parts(one, job)
        calls = [
            pool.submit(share, stage, folder, Path(store), first, workers)
            for first in range(workers)
        ]
        spent = sum(call.result() for call in calls)
        artifact, _ = seal(one, job, parts)
        count = int(artifact.manifest.counts["rows_out"])
        took, spent = time.perf_counter() - began, spent + time.process_time() - used
        return count / took, spent / count


def bare(count: int, workers: int, pool: ProcessPoolExecutor) -> tuple[float, float]:
    """Measure the model alone, from the start of the first process to the end of the last."""
    calls = [pool.submit(forward, count) for _ in range(workers)]
    done, began, ended, used = zip(*(call.result() for call in calls), strict=True)
    return float(sum(done) / (max(ended) - min(began))), float(sum(used) / sum(done))


def forward(count: int) -> tuple[int, float, float, float]:
    """Run the encoder on batches in memory; return chips, start, end and CPU time."""
    import torch

    from geofm.embeddings import embed
    from geofm.embeddings.encoders import features
    from geofm.runtime.threads import one_torch_thread

    encoder = embed.chip_encoder("efficientnet-lite0", 128, "cpu")
    images = torch.rand(embed.CPU_BATCH, 3, 128, 128).to(memory_format=torch.channels_last)
    batches = count // len(images)
    with one_torch_thread():
        began, used = time.perf_counter(), time.process_time()
        for _ in range(batches):
            features(encoder, images)
        ended = time.perf_counter()
        return batches * len(images), began, ended, time.process_time() - used


if __name__ == "__main__":
    main()
