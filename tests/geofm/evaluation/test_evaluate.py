"""The stage on a small task: three networks, paired, repeatable, without repeated work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import save_file

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.manifest import Manifest
from data_catalog.run import make_job, plan_parts, run_stage
from data_catalog.store import Store, list_files
from data_catalog.tables import write_table
from geofm.config.recipe import EvaluateSettings, PretrainSettings
from geofm.embeddings.encoders import WeightsMissing
from geofm.evaluation import models
from geofm.evaluation.evaluate import STAGE, open_tasks
from geofm.evaluation.scores import paired_differences
from geofm.evaluation.tasks import TaskError
from geofm.formats.npy import pixel_sha256
from geofm.pretraining.student import random_backbone
from tests.geofm.pretraining.conftest import SWIN

TIMM = "swin_tiny_patch4_window7_224"
COLOURS = {"field": (200, 190, 120), "forest": (30, 80, 40), "water": (20, 60, 140)}


def make_task(root: Path, per_class: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(colour, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def put(store: Store, folder: Path, kind: str, settings: dict[str, Any], **more: Any) -> Artifact:
    manifest = Manifest(
        kind=kind, stage=kind, version="1", inputs={}, settings=settings, seed=more["seed"],
        software={}, counts={"rows_in": 1, "rows_out": 1}, dropped={}, facts=more["facts"],
        deterministic=True, files=list_files(folder),
    )  # fmt: skip
    return store.publish(folder, manifest)


def make_inputs(store: Store, work: Path, digests: list[str], **changed: Any) -> dict[str, Any]:
    folder = work / "model"
    folder.mkdir(parents=True)
    weights = random_backbone(TIMM, SWIN, 99).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    config = {
        "architecture": TIMM, "model_args": SWIN,
        "pretrained_cfg": {"input_size": [4, 32, 32], "mean": [0.4] * 4, "std": [0.2] * 4},
        "geofm": {"bands": ["red", "green", "blue", "nir"], "distill_stage": 3},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    settings = PretrainSettings(
        student=TIMM, teacher="efficientnet-lite0", teacher_size_px=32, size_px=32,
        mask_patch_px=8, **changed,
    )  # fmt: skip
    facts = {"teacher": "efficientnet-lite0", "teacher_weights_sha256": "f" * 64}
    model = put(store, folder, "model", settings.model_dump(mode="json"), seed=5, facts=facts)
    folder = work / "dataset"
    folder.mkdir()
    write_table(pd.DataFrame({"pixel_sha256": digests}), folder / "samples.parquet")
    dataset = put(store, folder, "dataset", {}, seed=0, facts={})
    return {"model": model, "dataset": dataset}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return make_task(tmp_path / "cover")


def settings_for(*tasks: Path) -> EvaluateSettings:
    return EvaluateSettings(tasks=[str(t) for t in tasks], resamples=200, knn=3, max_images=30)


def test_scores_of_three_networks(
    store: Store, catalogue: Catalogue, task: Path, tmp_path: Path
) -> None:
    (task / "field" / "zz.png").write_bytes(b"not a picture")
    leaked = [pixel_sha256(np.asarray(Image.open(p)).transpose(2, 0, 1))
              for p in sorted((task / "water").glob("*.png"))]  # fmt: skip
    inputs = make_inputs(store, tmp_path / "made", leaked)
    settings = EvaluateSettings(tasks=[str(task)], resamples=200, knn=3, max_images=100)
    made = run_stage(STAGE, store, catalogue, inputs, settings, seed=1)

    scores = made.table("scores.parquet")
    assert list(dict.fromkeys(scores["model"])) == ["teacher", "random", "model"]
    rows = set(zip(scores["model"], scores["feature"], scores["protocol"], strict=True))
    students = {(m, f, p) for m in ("random", "model") for f in ("distilled", "final")
                for p in ("knn3", "linear")}  # fmt: skip
    assert rows == students | {("teacher", "final", "knn3"), ("teacher", "final", "linear")}
    assert (scores["ci_low"] <= scores["value"]).all()
    assert (scores["value"] <= scores["ci_high"]).all()
    assert scores[scores["model"] == "teacher"]["value"].min() > 0.6

    manifest = made.manifest
    assert manifest.counts["rows_in"] == 37
    assert manifest.dropped == {"unreadable": 1}
    facts = manifest.facts["tasks"][0]
    assert facts["filled_bands"] == ["nir"]
    assert facts["unreadable"] == ["field/zz.png"]
    water = [i for i in made.table("predictions.parquet")["image_id"].unique() if "water" in i]
    assert facts["leakage"]["identical"] == len(water) > 0
    assert len(manifest.facts["differences"]) == 8
    assert manifest.deterministic


def test_again_is_the_same_artifact_and_computes_nothing(
    store: Store,
    catalogue: Catalogue,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(store, tmp_path / "made", [])
    first = run_stage(STAGE, store, catalogue, inputs, settings_for(task))

    def refuse(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("geofm.evaluation.runner.evaluate_on_task", refuse)
    assert run_stage(STAGE, store, catalogue, inputs, settings_for(task)).digest == first.digest
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(task / "water" / "00.png")
    with pytest.raises(AssertionError, match="computed again"):
        run_stage(STAGE, store, catalogue, inputs, settings_for(task))


def test_the_teachers_part_serves_every_student(store: Store, task: Path, tmp_path: Path) -> None:
    keys = []
    for name, alpha in (("a", 1.0), ("b", 2.0)):
        inputs = make_inputs(store, tmp_path / name, [], alpha=alpha)
        job = make_job(STAGE, store, inputs, settings_for(task))
        keys.append([part.key for part in plan_parts(STAGE, job)])
    assert keys[0][0] == keys[1][0]
    assert not set(keys[0][1:]) & set(keys[1][1:])


def test_without_distillation_a_teacher_that_is_not_there_is_left_out(
    store: Store, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise WeightsMissing("no weights")

    monkeypatch.setattr(models, "load_encoder", absent)
    plain = make_inputs(store, tmp_path / "a", [], alpha=0.0)
    assert models.list_roles(plain["model"]) == ["random", "model"]
    distilled = make_inputs(store, tmp_path / "b", [])["model"]
    with pytest.raises(WeightsMissing):
        models.load_evaluated_model(distilled, models.list_roles(distilled)[0], "cpu")


def test_two_tasks_of_one_name_are_refused(
    store: Store, catalogue: Catalogue, task: Path, tmp_path: Path
) -> None:
    other = make_task(tmp_path / "elsewhere" / "cover", 3)
    inputs = make_inputs(store, tmp_path / "made", [])
    with pytest.raises(TaskError, match="two tasks are called 'cover'"):
        run_stage(STAGE, store, catalogue, inputs, settings_for(task, other))


def test_the_planet_is_drawn_on_the_bands_that_it_shares_with_the_model(
    store: Store, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def drawn(root: Path, bands: list[str]) -> Path:
        asked.append(bands)
        return task

    monkeypatch.setattr("geofm.planet.labelled.labelled_folder", drawn)
    inputs = make_inputs(store, tmp_path / "made", [])
    job = make_job(STAGE, store, inputs, EvaluateSettings(tasks=["planet"]))
    assert [t.name for t in open_tasks(job)] == ["cover"]
    for bands in (["swir22", "nir"], ["vv", "vh"]):
        config = {"geofm": {"bands": bands}, "pretrained_cfg": {"mean": [0.4] * 2}}
        inputs["model"].local("config.json").write_text(json.dumps(config))
        open_tasks(job)
    assert asked == [["red", "green", "blue", "nir"], ["nir"], ["red", "green", "blue"]]


def test_differences_are_paired() -> None:
    ids = [f"a/{i}" for i in range(100)]
    truth = np.zeros(100, dtype=int)

    def rows(model: str, wrong: int) -> pd.DataFrame:
        predicted = (np.arange(100) < wrong).astype(int)
        return pd.DataFrame(
            {
                "model": model, "task": "t", "image_id": ids, "feature": "final",
                "protocol": "linear", "truth": truth, "predicted": predicted,
            }
        )  # fmt: skip

    table = pd.concat([rows("teacher", 20), rows("random", 60), rows("model", 20)])
    found = {d["against"]: d for d in paired_differences(table, 500, 0)}
    assert found["random"]["value"] == pytest.approx(0.4)
    assert found["random"]["certain"]
    # both are wrong on the same images, so the difference is exactly zero
    assert (found["teacher"]["value"], found["teacher"]["ci_high"]) == (0.0, 0.0)
    assert not found["teacher"]["certain"]
