"""Measure the peak memory of a training step, with and without activation checkpointing.

Each row is a process of its own that takes two real training steps on chips in memory; teachers are
untrained. ``state_mib`` is the memory between two steps (weights, AdamW's moments, teacher, code).
``step_mib`` is the additional memory at the peak of a step: gradients (exactly ``gradients_mib``)
and activations. ``of_full`` is the ratio of ``step_mib`` without gradients to that of the row
without checkpointing.

    python benchmarks/pretrain_memory.py [--device cuda] [--batches 8 16]
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results" / "pretrain_memory.csv"
PRESETS = ["demo", "gfm-vit-s", "gfm-hiera-b", "gfm-swin-b"]


def main() -> None:
    """Measure all rows, or one of them in this process (``--one``)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 16])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_row(options)))
        return
    from benchmarks.pretrain_step import in_process, write_dataset

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), 128)
        for preset in options.presets:
            for batch in options.batches:
                full = None
                for few in (False, True):
                    one = ["--one", f"{preset}:{batch}:{int(few)}", "--dataset", dataset]
                    row = in_process(__file__, *one, "--device", options.device)
                    activations = row["step_mib"] - row["gradients_mib"]
                    full = full or activations
                    rows.append(
                        {"preset": preset, "batch": batch, "checkpointing": few, **row,
                         "of_full": round(activations / full, 2), **about()}
                    )  # fmt: skip
                    print(rows[-1], file=sys.stderr, flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(options.out.read_text(encoding="utf-8"))


def one_row(options: argparse.Namespace) -> dict[str, Any]:
    """Measure peak and resting memory of two steps, in MiB."""
    import torch

    from benchmarks.pretrain_step import untrained
    from data_catalog.artifact import Artifact
    from geofm.config.recipe_book import load_recipe
    from geofm.pretraining.data import open_corpus, read_batches, steps_per_epoch
    from geofm.pretraining.objective import build_pretrainer
    from geofm.pretraining.optimiser import make_schedule
    from geofm.pretraining.parallel import make_fabric
    from geofm.pretraining.step import TrainingStep
    from geofm.pretraining.teacher import load_teacher

    preset, batch, few = options.one.split(":")
    given = load_recipe(preset).pretrain
    settings = given.model_copy(
        update={
            "teacher": untrained(given.teacher),
            "batch": int(batch),
            "activation_checkpointing": few == "1",
            "compile": False,
        }
    )
    corpus = open_corpus(Artifact(options.dataset))
    teacher = load_teacher(settings, options.device)
    module = build_pretrainer(settings, len(corpus.bands), 0, teacher.width)
    fabric = make_fabric(options.device, settings.precision, 1, "ddp")
    plan = make_schedule(settings, steps_per_epoch(corpus, settings.batch))
    stepper = TrainingStep(fabric, module, teacher, None, corpus, settings, plan, 0)
    gpu = options.device == "cuda"
    for step, pictures in enumerate(read_batches(corpus, settings, 0, 0, 2, 1)):
        stepper.run(step, pictures)
    if gpu:
        rest, peak = (
            torch.cuda.memory_allocated() / 2**20,
            torch.cuda.max_memory_allocated() / 2**20,
        )
    else:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system before the measurement
        rest, peak = (memory(name) for name in ("VmRSS", "VmHWM"))
    return {
        "precision": settings.precision, "peak_mib": round(peak), "state_mib": round(rest),
        "step_mib": round(peak - rest),
        "gradients_mib": sum(p.numel() * 4 for p in module.parameters()) >> 20,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }  # fmt: skip


def memory(name: str) -> float:
    """Read a line of /proc/self/status, in MiB."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) / 2**10


def about() -> dict[str, Any]:
    """Return the columns that describe machine and versions."""
    return {
        "machine": platform.machine(),
        "versions": " ".join(f"{p} {version(p)}" for p in ("geofm", "torch", "timm")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


if __name__ == "__main__":
    main()
