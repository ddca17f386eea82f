"""Measure the speed of a training step, beside a plain implementation of the published step.

``published`` is the step of the paper's code, implemented again: the teacher runs with autograd at
224 px inside the module, everything is eager, masks and learning rate are the same, and batches are
in memory; in fp32 and in bf16 autocast (the code's apex AMP). ``ours`` is the whole training loop
on a real dataset artifact (reading, cropping, masking; no checkpoints), by preset. Student and
teacher are the same and untrained: no hub is needed, and the arithmetic does not depend on the
weights. Each row is a process of its own; each repeat runs all rows. ``of_ceiling`` is the share of
the speed of a large matrix product in the same process, counting forward, backward and teacher
once.

    python benchmarks/pretrain_step.py                                  on the CPU, Swin-B, minutes
    python benchmarks/pretrain_step.py --device cuda --batch 128 --steps 60
    python benchmarks/pretrain_step.py --rows published:fp32 ours:gfm-swin-b:fp32
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results" / "pretrain_step.csv"
ROWS = {
    "cpu": [
        "published:fp32", "ours:gfm-swin-b:fp32", "published:bf16", "ours:gfm-swin-b:bf16",
        "ours:gfm-vit-s:bf16", "ours:gfm-hiera-b:bf16",
    ],
    "cuda": [
        "published:fp32", "published:bf16", "ours:gfm-swin-b:bf16", "ours:gfm-swin-b-fast:bf16",
        "ours:gfm-vit-s:bf16", "ours:gfm-vit-s:bf16:compile", "ours:gfm-hiera-b:bf16",
    ],
}  # fmt: skip


def main() -> None:
    """Measure all rows, or one of them in this process (``--one``)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--steps", type=int, default=5, help="steps that count; one more warms up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="*", help="KIND[:PRESET]:PRECISION[:compile]")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_row(options)))
        return
    rows = options.rows or ROWS[options.device]
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), max(128, options.batch * 2))
        for repeat in range(options.repeats):
            for row in rows:
                one = ["--one", row, "--dataset", dataset, "--device", options.device]
                size = ["--batch", str(options.batch), "--steps", str(options.steps)]
                found[row].append(in_process(__file__, *one, *size))
                print(f"{repeat} {row}: {found[row][-1]}", file=sys.stderr, flush=True)
    write(options, found)


def in_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script in a process of its own, and return the JSON in its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def untrained(teacher: str) -> str:
    """Return the name of the untrained network; the network of a package keeps its weights."""
    return teacher if teacher == "efficientnet-lite0" else "random:" + teacher.partition(".")[0]


def write_dataset(folder: Path, samples: int) -> str:
    """Make a dataset artifact of 256 px, 3 bands, uint8, by the real stage; return its URL."""
    from benchmarks.shards_world import make_world
    from data_catalog.catalogue import open_catalogue
    from data_catalog.run import run_stage
    from data_catalog.store import open_store
    from geofm.config.recipe import PackSettings
    from geofm.stages import get_stage

    store = open_store(folder / "store")
    made = make_world(store, samples, (3, 256, 256), "uint8", 64)
    catalogue = open_catalogue(f"sqlite:///{folder}/catalogue.db", store)
    return run_stage(get_stage("pack"), store, catalogue, made, PackSettings()).url


def one_row(options: argparse.Namespace) -> dict[str, Any]:
    """Measure images per second, memory and arithmetic of one kind of step."""
    import torch

    from geofm.config.recipe_book import load_recipe

    kind, *rest = options.one.split(":")
    preset, precision, *more = rest if kind == "ours" else ["gfm-swin-b", *rest]
    settings = load_recipe(preset).pretrain
    settings = settings.model_copy(
        update={
            "teacher": untrained(settings.teacher),
            "batch": options.batch,
            "precision": precision,
            "checkpoint_steps": 10**9,
            "epochs": 10**4,
            "compile": (settings.compile and options.device == "cuda") or "compile" in more,
        }
    )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = ours if kind == "ours" else published
    result = run(options, settings)
    if options.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        from data_catalog.storage.process import peak_memory_mib

        memory = peak_memory_mib()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {**result, "peak_mib": round(memory), "device": name}


class _Enough(Exception):
    """Raised after the requested number of steps."""


@dataclass(frozen=True)
class Pace:
    """Timing of a part of a training run.

    Attributes:
        started: Start of the run, by ``time.perf_counter`` (seconds).
        ticks: Number of finished steps and time of each report (seconds).
        speed: Operations of an image, and of the device per second.
        waited: Share of the time that the loop waited for data, without the first report.
    """

    started: float
    ticks: list[tuple[int, float]]
    speed: Any
    waited: float

    def images_per_s(self, batch: int, first: int) -> float:
        """Compute images per second after step ``first``."""
        counted = [(done, at) for done, at in self.ticks if done >= first]
        return (counted[-1][0] - counted[0][0]) * batch / (counted[-1][1] - counted[0][1])


def run_loop(dataset: str, settings: Any, device: str, steps: int) -> Pace:
    """Run the training loop for a number of steps, then leave it."""
    from data_catalog.artifact import Artifact
    from data_catalog.progress import listen
    from geofm.pretraining import loop
    from geofm.pretraining.data import open_corpus

    ticks: list[tuple[int, float]] = []
    seen: list[Any] = []
    log_steps = loop._log_steps

    def watched(run: Any, *others: Any) -> bool:
        seen.append((run.speed, run.progress.data_seconds, time.perf_counter()))
        return log_steps(run, *others)

    def tick(what: str, done: int, total: int, note: str) -> None:
        if what == "pretrain":
            ticks.append((done, time.perf_counter()))
            if done >= steps:
                raise _Enough

    corpus = open_corpus(Artifact(dataset))
    loop.STEPS_BETWEEN_LOGS["cuda"] = 10
    loop._log_steps = watched
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder, listen(tick), suppress(_Enough):
            loop.train(corpus, settings, 0, device, Path(folder))
    finally:
        loop._log_steps = log_steps
    waited = (seen[-1][1] - seen[0][1]) / max(seen[-1][2] - seen[0][2], 1e-9)
    return Pace(started, ticks, seen[-1][0], waited)


def ours(options: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """Measure the training loop between two of its progress reports."""
    first = 1 if options.device == "cpu" else 20
    pace = run_loop(options.dataset, settings, options.device, first + options.steps)
    rate = pace.images_per_s(options.batch, first)
    return {
        "images_per_s": rate, "of_ceiling": pace.speed.utilisation(rate), "waited": pace.waited,
        "gflop_per_image": pace.speed.flop_per_image / 1e9,
        "ceiling_gflops": pace.speed.flop_per_second / 1e9,
    }  # fmt: skip


def published(options: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """Measure the published step: one module, gradients recorded everywhere."""
    import torch
    from torch import nn
    from torch.nn import functional

    from benchmarks.published_step import Published
    from geofm.pretraining.flops import matmul_speed

    device, batch = options.device, options.batch
    torch.manual_seed(0)
    module = Published(settings.student_args).to(device).train()
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups: Any = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-6)
    images = torch.randn(batch, 3, 256, 256)
    half = settings.precision == "bf16"

    def step() -> None:
        crops = functional.interpolate(images.to(device), (192, 192), mode="bilinear")
        mask = torch.rand(batch, 36, device=device).argsort(1).argsort(1) < 22
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = module(crops, mask.reshape(batch, 6, 6).int())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimiser.step()
        loss.item()

    for _ in range(1 if device == "cpu" else 20):
        step()
    started = time.perf_counter()
    for _ in range(options.steps):
        step()
    rate = options.steps * batch / (time.perf_counter() - started)
    top = matmul_speed(device, torch.bfloat16 if half else torch.float32, torch.get_num_threads())
    return {"images_per_s": rate, "ceiling_gflops": top / 1e9}


def write(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write the medians as CSV, each with its ratio to the published step of equal precision."""
    rates = {row: statistics.median(r["images_per_s"] for r in runs) for row, runs in found.items()}
    packages = ("geofm", "torch", "timm", "lightning-fabric")
    about = {
        "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip
    table = []
    for row, runs in found.items():
        same = rates.get(f"published:{row.split(':')[-1].replace('compile', 'bf16')}")
        middle = {
            key: round(statistics.median(r[key] for r in runs), 4)
            for key in ("images_per_s", "gflop_per_image", "of_ceiling", "ceiling_gflops", "waited")
            if key in runs[0]
        }
        every = [r["images_per_s"] for r in runs]
        table.append(
            {"row": row, "batch": options.batch, "steps": options.steps, "repeats": len(runs),
             **dict.fromkeys(("images_per_s", "gflop_per_image", "of_ceiling", "ceiling_gflops",
                              "waited"), ""),
             **middle, "slowest": round(min(every), 3), "fastest": round(max(every), 3),
             "of_published": "" if same is None else round(rates[row] / same, 2),
             "of_published_fp32": round(rates[row] / rates["published:fp32"], 2)
             if "published:fp32" in rates else "",
             "peak_mib": max(r["peak_mib"] for r in runs), "device": runs[0]["device"], **about}
        )  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
