"""Measure what each part of the objective adds, by probes on held-out scenes.

Data: AID (Xia et al. 2017), 30 classes of 110 aerial scenes of 150 px. 40 scenes of each class
(seed ``SPLIT_SEED``) are the test part. The student is pretrained on the other 2,100 without
labels, and the probes are fitted on the same 2,100 with labels. All arms take the same number of
steps; with equal seeds they have equal crops, masks and order.

Rows: the frozen teacher (efficientnet-lite0 with ImageNet weights), the student before its first
step, masked modelling alone (alpha 0), distillation alone (mim_weight 0), and both. The last two
are repeated for one seed with twice the steps.

Cached teacher features (``geofm.pretraining.teacher``): both terms, with the teacher's features of
whole scenes computed before training. In one arm the student sees random crops. In another its only
crop is the whole scene, flipped or not; that arm is compared with a live teacher that sees the same
crops. A live teacher sees the student's 64 px enlarged to 96 px; the cache reduces the scenes from
150 px.

Dropped patches: a small ViT with both terms, once with masked patches replaced by a token and once
with masked patches dropped (``pretrain.masking``). The learning rate was chosen for the Swin only.

Probes (``geofm.evaluation.probes``): k nearest neighbours with k = 20 and 5, and a linear probe
whose C is chosen within the training part. ``distilled`` is the mean over stage 3 with its patch
merging; arms are compared by it. ``final`` is the mean over the last stage. Distillation alone does
not train that stage, so its row carries no information about that arm. Intervals are 95 % bootstrap
intervals over test scenes. Differences are paired scene by scene after averaging over seeds.

Parameters were chosen without the test part: 15 scenes of each class of the pretraining part were
held out for validation, and students were pretrained on the other 1,650 with seed 100, which is not
reported. The learning rate is the same for all arms: the best of three by the mean accuracy of the
linear probe of ``distilled`` over ``masked`` and ``both, teacher once`` after 515 steps
(``--validate``; rows in results/learning-validation.csv; the three are within each other's
intervals). Shorter trials on the same part led to a narrow student, batches of 16 (more and smaller
steps learn faster here) and a teacher that sees 96 px. The number of epochs is limited by an hour
of computing.

``cpu_seconds`` is the CPU time of the process, reading included. ``seconds`` is wall-clock time on
a machine with other work. ``teacher_once_seconds`` is the CPU time of caching the features.

    python benchmarks/learning.py [--aid ../shared/data/aid_scenes] [--work learning-work]
    python benchmarks/learning.py --validate '{"base_lr": 0.02}' --arms both

After SIGTERM the script writes the tables of the finished trials. A restart resumes, training from
its checkpoint. Use OMP_NUM_THREADS=1 for one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import time
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  before torch: both bring an OpenMP
import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from shapely.geometry import box

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.hashing import canonical, digest_of
from data_catalog.progress import listen
from data_catalog.run import run_stage
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.store import open_store
from data_catalog.tables import write_table
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.encoders import encode
from geofm.evaluation.models import EvaluatedModel, FeatureExtractor
from geofm.evaluation.probes import bootstrap_interval, knn_predict, linear_probe
from geofm.evaluation.runner import encode_task
from geofm.evaluation.tasks import LabelledImage, Task, open_task, seeded_order
from geofm.formats.npy import chip_bytes
from geofm.formats.tar import write_tar
from geofm.pretraining.data import Corpus, open_corpus
from geofm.pretraining.export.model import features, model_config, random_model
from geofm.pretraining.loop import Interrupted, train
from geofm.pretraining.parallel import cpu_threads, reproducible_torch
from geofm.pretraining.teacher import encode_corpus, load_teacher

RESULTS = Path(__file__).parent / "results"
RGB = ("red", "green", "blue")
TEST, VALIDATION = 40, 15
SPLIT_SEED, VALIDATION_SEED = 0, 100
SEEDS = (1, 2, 3)
RESAMPLES = 2000
#: Steps that are averaged in a row of the curves.
THIN = 25
BASE: dict[str, Any] = {
    "student": "swin_tiny_patch4_window7_224",
    "student_args": {
        "embed_dim": 32,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
    },
    "teacher": "efficientnet-lite0",
    "teacher_size_px": 96,
    "size_px": 64,
    "mask_patch_px": 16,
    "epochs": 16,
    "warmup_epochs": 1,
    "batch": 16,
    "base_lr": 3.2e-2,
    "precision": "bf16",
    "checkpoint_steps": 500,
}
#: A student that can drop masked patches, with the mask ratio of the recipe ``gfm-vit-s``.
VIT: dict[str, Any] = {
    "student": "vit_tiny_patch16_224",
    "student_args": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "mask_ratio": 0.75,
    "decoder_width": 64,
    "decoder_depth": 2,
}
#: Settings of each arm in addition to ``BASE``.
ARMS: dict[str, dict[str, Any]] = {
    "masked": {"alpha": 0.0},
    "distillation": {"mim_weight": 0.0},
    "both": {},
    "both, whole scene": {"crop_scale": [1.0, 1.0]},
    "both, teacher once": {},
    "both, teacher once, whole scene": {"crop_scale": [1.0, 1.0]},
    "ViT, random": VIT,
    "ViT, masked patches replaced": VIT,
    "ViT, masked patches dropped": {**VIT, "masking": "drop"},
}
#: Arms that show whether longer training changes the order of the arms; one seed each.
LONGER: dict[str, dict[str, Any]] = {
    "distillation, twice the steps": {"mim_weight": 0.0, "epochs": 2 * BASE["epochs"]},
    "both, twice the steps": {"epochs": 2 * BASE["epochs"]},
}
UNTRAINED = ("teacher", "random", "ViT, random")
#: Pairs of arms that are compared on the same test scenes.
PAIRS = (
    ("both", "distillation"),
    ("distillation", "masked"),
    ("both", "masked"),
    ("masked", "random"),
    ("distillation", "random"),
    ("both", "teacher"),
    ("both, twice the steps", "distillation, twice the steps"),
    ("both, teacher once", "both"),
    ("both, whole scene", "both"),
    ("both, teacher once, whole scene", "both, whole scene"),
    ("both, teacher once, whole scene", "both"),
    ("ViT, masked patches dropped", "ViT, masked patches replaced"),
    ("ViT, masked patches dropped", "ViT, random"),
    ("ViT, masked patches replaced", "ViT, random"),
)


class Scenes(BaseModel):
    """Settings of the fake stage ``pack``: files, in the order of their ids."""

    files: list[str]


def _seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    scenes: Scenes = job.settings
    (folder / "shards").mkdir()
    pictures = {}
    for file in scenes.files:
        pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
        pictures[digest_of(file)[:24]] = np.ascontiguousarray(pixels)
    name = "shards/aid-00000.tar"
    members = write_tar(
        folder / name, [(f"{key}.npy", chip_bytes(pixels)) for key, pixels in pictures.items()]
    )
    index = pd.DataFrame(
        {
            "key": list(pictures),
            "chip_id": list(pictures),
            "shard": name,
            "offset": [member.offset for member in members],
            "size": [member.size for member in members],
            "sha256": [member.sha256 for member in members],
        }
    )
    write_table(index, folder / "index.parquet")
    rows = {"chip_id": list(pictures), "scale": [[1.0] * 3] * len(pictures)}
    nowhere = [box(0, 0, 1, 1)] * len(pictures)
    write_table(gpd.GeoDataFrame(rows, geometry=nowhere, crs="EPSG:4326"),
                folder / "samples.parquet")  # fmt: skip
    unit = np.stack(list(pictures.values())).astype(np.float64) / 255
    stats = {
        "bands": list(RGB),
        "mean": unit.mean(axis=(0, 2, 3)).tolist(),
        "std": unit.std(axis=(0, 2, 3)).tolist(),
    }
    (folder / "stats.json").write_bytes(canonical(stats))
    return Sealed(counts={"rows_in": len(index), "rows_out": len(index)}, facts={"name": "aid"})


PACK = Stage("pack", "aid", "dataset", (), ("numpy", "pillow"), no_parts, no_work, _seal)


def pack(images: list[LabelledImage], folder: Path) -> Artifact:
    """Make a dataset artifact of the scenes, without labels."""
    store = open_store(folder / "store")
    catalogue = open_catalogue(f"sqlite:///{folder}/aid.db", store)
    files = sorted(str(image.path) for image in images)
    return run_stage(PACK, store, catalogue, {}, Scenes(files=files))


def hold_out(
    images: list[LabelledImage], each: int, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Split images into those without ``each`` images of every class, and the held-out ones."""
    held: set[str] = set()
    for label in sorted({image.label for image in images}):
        ids = (image.id for image in images if image.label == label)
        held.update(seeded_order(ids, seed, "learning")[:each])
    return (
        [image for image in images if image.id not in held],
        [image for image in images if image.id in held],
    )


class Trial(BaseModel):
    """An arm with its seed and settings; its results are computed once."""

    arm: str
    seed: int
    settings: PretrainSettings

    @property
    def key(self) -> str:
        """Name of the trial's files."""
        return (
            f"{self.arm.replace(', ', '-').replace(' ', '_')}-{self.seed}-"
            + digest_of(self.settings.model_dump(mode="json"))[:8]
        )


def run(trial: Trial, task: Task, fit: list[LabelledImage], held: list[LabelledImage],
        folder: Path) -> None:  # fmt: skip
    """Pretrain, encode and probe; write predictions, curve and cost of the trial."""
    corpus = open_corpus(pack(fit, folder))
    cost: dict[str, Any] = {"steps": 0, "images": 0, "seconds": 0.0, "cpu_seconds": 0.0,
                            "teacher_once_seconds": 0.0}  # fmt: skip
    if trial.arm in UNTRAINED:
        extract = untrained(trial, corpus)
    else:
        extract, history = trained(trial, corpus, folder, cost)
        history.to_parquet(folder / f"{trial.key}.curve.parquet")
    size = trial.settings.teacher_size_px if trial.arm == "teacher" else trial.settings.size_px
    subject = EvaluatedModel("model", trial.arm, RGB, (0.0,) * 3, size, extract)
    images = [*fit, *held]
    found = encode_task(task, images, subject, batch=50)
    truth = np.array([image.label for image in images], dtype=np.int64)
    n, frames = len(fit), []
    for feature, rows in found.features.items():
        predicted = {f"knn{k}": knn_predict(rows[:n], truth[:n], rows[n:], k) for k in (20, 5)}
        probe = linear_probe(rows[:n], truth[:n], rows[n:], trial.seed)
        for protocol, classes in (predicted | {"linear": probe.predicted}).items():
            frames.append(pd.DataFrame({
                "arm": trial.arm, "seed": trial.seed, "protocol": protocol, "feature": feature,
                "image": [image.id for image in held], "correct": (classes == truth[n:]),
            }))  # fmt: skip
    pd.concat(frames).to_parquet(folder / f"{trial.key}.predictions.parquet")
    # Written last: this file marks a complete trial.
    (folder / f"{trial.key}.json").write_text(json.dumps(cost))


def untrained(trial: Trial, corpus: Corpus) -> FeatureExtractor:
    """Return the extractor of the frozen teacher, or of the student before its first step."""
    settings = trial.settings
    if trial.arm == "teacher":
        exact = settings.model_copy(update={"teacher_precision": "fp32"})
        teacher = load_teacher(exact, "cpu")
        return lambda images: {"final": encode(teacher.encoder, images)}
    config = model_config(settings, corpus)
    model = random_model(config, trial.seed)
    return lambda images: features(model, config, images)


def trained(
    trial: Trial, corpus: Corpus, folder: Path, cost: dict[str, Any]
) -> tuple[FeatureExtractor, pd.DataFrame]:
    """Pretrain; return the student's extractor and its losses by step. Fills in ``cost``."""
    settings, taught = trial.settings, None
    if "once" in trial.arm:
        taught, cost["teacher_once_seconds"] = taught_once(corpus, settings, folder)
    place = folder / f"{trial.key}.run"
    place.mkdir(exist_ok=True)
    began = time.process_time()
    done = train(corpus, settings, trial.seed, "cpu", place, cached_features=taught)
    cost["cpu_seconds"] = time.process_time() - began
    cost["seconds"] = done.metrics["seconds"]
    cost["steps"] = len(done.history)
    cost["images"] = len(done.history) * settings.batch
    config, backbone = model_config(settings, corpus), done.module.student.backbone
    return lambda images: features(backbone, config, images), done.history


def taught_once(
    corpus: Corpus, settings: PretrainSettings, folder: Path
) -> tuple[NDArray[np.float32], float]:
    """Cache the teacher's features; return them and the CPU seconds of the first time."""
    teacher = load_teacher(settings, "cpu")
    note = folder / f"taught-{corpus.digest[:12]}-{teacher.size_px}.json"
    began = time.process_time()
    with reproducible_torch("cpu", 0, cpu_threads()):
        taught = encode_corpus(corpus, teacher, "cpu", folder)
    if not note.exists():  # later trials read the features from disk
        note.write_text(json.dumps(time.process_time() - began))
    return taught, json.loads(note.read_text())


def correct(frame: pd.DataFrame, arm: str, protocol: str, feature: str) -> pd.DataFrame:
    """Return 1 for correct and 0 for wrong test scenes: a row per scene, a column per seed."""
    rows = frame[(frame["arm"] == arm) & (frame["protocol"] == protocol)]
    rows = rows[rows["feature"] == ("final" if arm == "teacher" else feature)]
    return rows.pivot(index="image", columns="seed", values="correct").astype(float)


def minus(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Subtract scene by scene, over the seeds that both have."""
    shared = one.columns.intersection(other.columns)
    if len(shared):
        return one[shared] - other[shared]
    return one.sub(other.mean(axis=1), axis=0)  # the teacher has no seed


def summary(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Compute means over seeds by arm, and paired differences, with intervals over test scenes."""
    found = []
    arms = list(dict.fromkeys(frame["arm"]))
    for feature in ("distilled", "final"):
        for protocol in ("linear", "knn20", "knn5"):
            each = {arm: correct(frame, arm, protocol, feature) for arm in arms}
            lines = dict(each)
            for one, other in PAIRS:
                untold = feature == "final" and "distillation" in f"{one} {other}"
                if one in each and other in each and not untold:
                    lines[f"{one} - {other}"] = minus(each[one], each[other])
            found += [
                _line(feature, protocol, what, table)
                for what, table in lines.items()
                if not table.empty
            ]
    return found


def _line(feature: str, protocol: str, what: str, table: pd.DataFrame) -> dict[str, Any]:
    it = bootstrap_interval(table.mean(axis=1).to_numpy(), RESAMPLES, SPLIT_SEED)
    by_seed = table.mean(axis=0)
    return {
        "feature": feature, "protocol": protocol, "what": what, "value": round(it.value, 4),
        "ci_low": round(it.low, 4), "ci_high": round(it.high, 4), "n": it.n,
        "lowest_seed": round(float(by_seed.min()), 4),
        "highest_seed": round(float(by_seed.max()), 4), "seeds": len(by_seed),
    }  # fmt: skip


def score_rows(frame: pd.DataFrame, cost: dict[str, Any]) -> list[dict[str, Any]]:
    """Make a row per feature and protocol of a trial."""
    rows = []
    for (arm, seed, protocol, feature), group in frame.groupby(
        ["arm", "seed", "protocol", "feature"], sort=False
    ):
        it = bootstrap_interval(group["correct"].to_numpy(), RESAMPLES, SPLIT_SEED)
        rows.append({
            "arm": arm, "seed": seed, "protocol": protocol, "feature": feature,
            "value": round(it.value, 4), "ci_low": round(it.low, 4),
            "ci_high": round(it.high, 4), "n": it.n,
            **{name: round(value, 1) for name, value in cost.items()},
        })  # fmt: skip
    return rows


def curve_rows(trial: Trial, folder: Path) -> list[dict[str, Any]]:
    """Average the losses of a finished trial over ``THIN`` steps."""
    path = folder / f"{trial.key}.curve.parquet"
    if not path.exists():
        return []
    history = pd.read_parquet(path)
    thin = history.groupby(history["step"] // THIN)[["loss", "mim", "distill", "lr"]].mean()
    thin.insert(0, "step", (thin.index + 1) * THIN)
    rows = thin.round({"loss": 4, "mim": 4, "distill": 4, "lr": 7}).to_dict("records")
    return [{"arm": trial.arm, "seed": trial.seed, **row} for row in rows]


@lru_cache(maxsize=1)
def measured_on() -> dict[str, Any]:
    """Return the columns that describe machine and versions."""
    names = ("geofm", "torch", "timm", "scikit-learn", "numpy")
    return {
        "machine": platform.machine(), "cores": os.cpu_count(), "threads": cpu_threads(),
        "versions": " ".join(f"{name} {version(name)}" for name in names),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a result with the machine it was measured on."""
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*rows[0], *measured_on()])))
        writer.writeheader()
        writer.writerows(measured_on() | row for row in rows)


def append(name: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to a result."""
    path = RESULTS / name
    before = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    mine = {f"{row['arm']} {row['settings']}" for row in rows}
    write(name, [row for row in before if f"{row['arm']} {row['settings']}" not in mine] + rows)


def say(what: str, done: int, total: int, note: str) -> None:
    """Print the progress every hundred steps."""
    if done % 100 == 0 or done == total:
        print(f"{datetime.now(UTC):%H:%M:%S} {what} {done}/{total} {note}", flush=True)


def collect(trials: list[Trial], folder: Path) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Collect scores and predictions of the finished trials."""
    rows, frames = [], []
    for trial in trials:
        if (folder / f"{trial.key}.json").exists():
            frame = pd.read_parquet(folder / f"{trial.key}.predictions.parquet")
            rows += score_rows(frame, json.loads((folder / f"{trial.key}.json").read_text()))
            frames.append(frame)
    return rows, pd.concat(frames)


def main() -> None:
    """Run the missing trials, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--aid", default="../shared/data/aid_scenes", help="folder of the scenes")
    parser.add_argument("--work", default="learning-work", help="where trials are kept")
    parser.add_argument("--validate", default="", help="settings (JSON) to try on validation")
    parser.add_argument("--arms", default="", help="of --validate, separated by semicolons")
    options = parser.parse_args()
    task = open_task(Path(options.aid))
    fit, held = hold_out(list(task.images), TEST, SPLIT_SEED)
    folder = Path(options.work).resolve()
    listen(say)
    if options.validate:
        fit, held = hold_out(fit, VALIDATION, VALIDATION_SEED)
        tried = json.loads(options.validate)
        arms = options.arms.split(";") if options.arms else [*UNTRAINED[:2], *ARMS]
        folder = folder / "validation"
        trials = [_trial(arm, VALIDATION_SEED, tried) for arm in arms]
    else:
        trials = [_trial("teacher", 0, {})]
        trials += [_trial(arm, seed, {}) for arm in ("random", *ARMS) for seed in SEEDS]
        trials += [_trial(arm, SEEDS[0], {}) for arm in LONGER]
    folder.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that an early stop leaves complete seeds.
    try:
        for trial in sorted(trials, key=_when):
            if not (folder / f"{trial.key}.json").exists():
                run(trial, task, fit, held, folder)
            for row in collect([trial], folder)[0]:
                print({k: row[k] for k in list(row)[:10]}, flush=True)
    except Interrupted as stopped:  # the tables then contain the finished trials
        print(stopped, flush=True)
    if options.validate:
        tries = [
            {
                **{name: row[name] for name in row if "seconds" not in name},
                "settings": json.dumps(tried),
            }
            for row in collect(trials, folder)[0]
        ]
        append("learning-validation.csv", tries)
        return
    rows, frame = collect(trials, folder)
    write("learning.csv", rows)
    write("learning-summary.csv", summary(frame))
    curves = [row for t in trials if t.arm not in UNTRAINED for row in curve_rows(t, folder)]
    write("learning-curves.csv", curves)


def _when(trial: Trial) -> tuple[bool, bool, bool, int]:
    """Sort key of a trial: the main arms seed by seed, then the others."""
    arm = trial.arm
    return "whole" in arm and "once" not in arm, arm in LONGER, "whole" in arm, trial.seed


def _trial(arm: str, seed: int, tried: dict[str, Any]) -> Trial:
    settings = PretrainSettings.model_validate({**BASE, **(ARMS | LONGER).get(arm, {}), **tried})
    return Trial(arm=arm, seed=seed, settings=settings)


if __name__ == "__main__":
    main()
