"""Weights are inputs: the key depends on their bytes, and geofm models have edges."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.hashing import sha256_file
from data_catalog.provenance.costs import lineage_costs
from data_catalog.provenance.licences import licence_union
from data_catalog.provenance.lineage import ancestor, ancestry, walk_lineage
from data_catalog.provenance.verify import verify_chain
from data_catalog.run import make_job, run_stage
from data_catalog.stage import Job, Stage
from data_catalog.store import Store
from geofm.config.recipe import CalibrateSettings, CurateSettings, EmbedSettings, EvaluateSettings
from geofm.dedup import calibrate
from geofm.embeddings import embed
from geofm.embeddings import weights as weight_files
from geofm.embeddings.encoders import LITE0, UnknownEncoder, WeightsMismatch, load_encoder
from geofm.embeddings.weight_inputs import (
    TakenName,
    check_model_title,
    find_weights,
    weights_of_model,
)
from geofm.embeddings.weights import WeightsChanged
from geofm.evaluation import evaluate
from geofm.pool import pool
from geofm.pretraining import pretrain
from geofm.pretraining.student import build_student
from tests.geofm.dedup.synthetic import Chip, make_chips, texture
from tests.geofm.evaluation.test_evaluate import make_task
from tests.geofm.pretraining.conftest import make_dataset, tiny_settings

SIZE = {"size_px": 32, "batch": 4}


def write_weights(file: Path, seed: int, name: str = "test_vit") -> Path:
    """Write the weights of a small timm network to a file."""
    torch.manual_seed(seed)
    save_file(timm.create_model(name).state_dict(), file)
    return file


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights.safetensors", 1)


@pytest.fixture
def chips(store: Store) -> Artifact:
    return make_chips(store, [Chip(texture(n)) for n in range(4)])


@pytest.fixture
def dataset(store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return make_dataset(store, catalogue.url, samples=9)


def embed_chips(store: Store, catalogue: Catalogue, chips: Artifact, encoder: str) -> Artifact:
    settings = EmbedSettings(encoder=encoder, **SIZE)
    return run_stage(embed.STAGE, store, catalogue, {"chips": chips}, settings)


def train(store: Store, catalogue: Catalogue, dataset: Artifact, **fields: Any) -> Artifact:
    settings = tiny_settings(**{"epochs": 1, "warmup_epochs": 0, **fields})
    return run_stage(pretrain.STAGE, store, catalogue, {"dataset": dataset}, settings, 3, "cpu")


def score(
    store: Store, catalogue: Catalogue, model: Artifact, dataset: Artifact, task: Path
) -> Artifact:
    settings = EvaluateSettings(tasks=[str(task)], resamples=100, knn=1)
    inputs = {"model": model, "dataset": dataset}
    return run_stage(evaluate.STAGE, store, catalogue, inputs, settings, 0, "cpu")


def own_parts(stage: Stage, job: Job) -> list[str]:
    """Compute the first part of a job in an empty folder, and return its files."""
    with job.store.staging() as out:
        stage.work(job, stage.plan(job)[0], out)
        return sorted(file.name for file in out.glob("*.npy"))


def cached(catalogue: Catalogue, stage: str) -> list[bool]:
    """For each run of a stage: whether its artifact was found in the catalogue."""
    return [bool(r.metrics.get("cached")) for r in catalogue.runs() if r.stage == stage]


# The bytes of NAME@FILE.


@pytest.mark.parametrize("how", ["renamed over", "written over", "same size and time"])
def test_embeddings_follow_the_bytes_behind_the_file(
    store: Store, catalogue: Catalogue, chips: Artifact, weights: Path, how: str
) -> None:
    first = embed_chips(store, catalogue, chips, f"test_vit@{weights}")
    before = weights.stat()
    other = write_weights(weights.with_name("other.safetensors"), 2)
    if how == "renamed over":
        other.replace(weights)
    else:
        weights.write_bytes(other.read_bytes())
    if how == "same size and time":
        assert weights.stat().st_size == before.st_size
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = embed_chips(store, catalogue, chips, f"test_vit@{weights}")
    assert cached(catalogue, "embed") == [False, False]
    vectors = [np.load(a.local("embeddings.npy")) for a in (first, second)]
    assert not np.array_equal(*vectors)
    assert sha256_file(weights) in json.dumps(second.manifest.model_dump())


def test_the_same_bytes_under_another_name_are_the_same_embeddings(
    store: Store, catalogue: Catalogue, chips: Artifact, weights: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = embed_chips(store, catalogue, chips, f"test_vit@{weights}")
    (tmp_path / "folder with spaces").mkdir()
    copy = tmp_path / "folder with spaces" / "other.v2.safetensors"
    shutil.copyfile(weights, copy)
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link.safetensors"
    link.symlink_to(copy)
    weights.unlink()
    for name in (copy, link, "folder with spaces/other.v2.safetensors"):
        again = embed_chips(store, catalogue, chips, f"test_vit@{name}")
        assert again.digest == first.digest
    assert cached(catalogue, "embed") == [False, True, True, True]
    assert str(tmp_path) not in json.dumps(first.manifest.model_dump())


def test_a_network_is_part_of_the_key_as_well(
    store: Store, catalogue: Catalogue, chips: Artifact, weights: Path
) -> None:
    digests = {
        make_job(embed.STAGE, store, {"chips": chips}, EmbedSettings(encoder=name, **SIZE)).key
        for name in (f"test_vit@{weights}", "random:test_vit", LITE0)
    }
    assert len(digests) == 3


def test_a_file_that_is_replaced_between_look_up_and_read_is_noticed(
    store: Store, weights: Path, monkeypatch: pytest.MonkeyPatch, chips: Artifact
) -> None:
    found = find_weights(f"test_vit@{weights}")
    write_weights(weights, 2)
    with pytest.raises(WeightsChanged, match="changed after they were looked up"):
        load_encoder(found)
    now = find_weights(f"test_vit@{weights}")
    original = weight_files._verify
    calls = []

    def check_then_replace(path: Path, what: Any) -> None:
        original(path, what)
        calls.append(path)
        if len(calls) == 1:
            write_weights(weights, 3)  # replaced while the network is built

    monkeypatch.setattr(weight_files, "_verify", check_then_replace)
    with pytest.raises(WeightsChanged):
        load_encoder(now)
    assert len(calls) == 1


def test_later_stages_read_the_bytes_that_the_chips_were_embedded_by(
    store: Store, catalogue: Catalogue, chips: Artifact, weights: Path, tmp_path: Path
) -> None:
    """Calibration and decontamination use the stored copy, not the user's file."""
    made = embed_chips(store, catalogue, chips, f"test_vit@{weights}")
    weights.unlink()
    folder = tmp_path / "sets"
    make_task(folder / "places", 1)
    settings = CurateSettings(evaluation_sets=str(folder))
    for stage, given in ((calibrate.STAGE, CalibrateSettings()), (pool.STAGE, settings)):
        inputs = {"chips": chips, "descriptors": chips, "embeddings": made}
        job = make_job(stage, store, inputs, given, catalogue=catalogue.url)
        assert own_parts(stage, job)


def test_a_teacher_file_decides_training_and_scores(
    store: Store, catalogue: Catalogue, dataset: Artifact, weights: Path, tmp_path: Path
) -> None:
    task = make_task(tmp_path / "task", 4)
    first = train(store, catalogue, dataset, teacher=f"test_vit@{weights}")
    scores = score(store, catalogue, first, dataset, task)
    copy = tmp_path / "same.safetensors"
    shutil.copyfile(weights, copy)
    assert train(store, catalogue, dataset, teacher=f"test_vit@{copy}").digest == first.digest
    assert cached(catalogue, "pretrain") == [False, True]
    write_weights(weights, 2)
    # the sealed artifact remains valid although the file is deleted
    assert score(store, catalogue, first, dataset, task).digest == scores.digest
    second = train(store, catalogue, dataset, teacher=f"test_vit@{weights}")
    assert cached(catalogue, "pretrain") == [False, True, False]
    again = score(store, catalogue, second, dataset, task)
    digests = [a.manifest.facts["weights"]["teacher"]["sha256"] for a in (first, second)]
    assert digests == [sha256_file(copy), sha256_file(weights)]
    assert again.manifest.facts["weights"]["teacher"]["sha256"] == digests[1]


def test_weights_of_the_hub_are_known_by_their_bytes(
    store: Store, chips: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repo = tmp_path / "models--timm--test_vit.r160_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    file = repo / "snapshots" / commit / "model.safetensors"
    file.parent.mkdir(parents=True)
    keys = []
    for seed in (1, 2):
        write_weights(file, seed)
        settings = EmbedSettings(encoder="test_vit", **SIZE)
        job = make_job(embed.STAGE, store, {"chips": chips}, settings)
        assert job.reads == {"encoder": sha256_file(file)}
        keys.append(job.key)
    assert keys[0] != keys[1]


# Students with pretrained initial weights.


def test_the_first_weights_of_a_student_are_in_key_and_manifest(
    store: Store, catalogue: Catalogue, dataset: Artifact, tmp_path: Path
) -> None:
    fields = {
        "student_args": {}, "size_px": 64, "mask_patch_px": 16, "student_init": "pretrained",
    }  # fmt: skip
    file = write_weights(tmp_path / "student.safetensors", 1)
    first = train(store, catalogue, dataset, student=f"test_vit@{file}", **fields)
    known = first.manifest.facts["weights"]["student"]
    assert known["sha256"] == sha256_file(file)
    assert first.manifest.facts["student"] == "test_vit"
    write_weights(file, 2)
    second = train(store, catalogue, dataset, student=f"test_vit@{file}", **fields)
    assert cached(catalogue, "pretrain") == [False, False]
    assert second.manifest.facts["weights"]["student"]["sha256"] == sha256_file(file)
    assert str(tmp_path) not in json.dumps(second.manifest.model_dump())


# Geofm models as inputs.


@pytest.fixture
def model(store: Store, catalogue: Catalogue, dataset: Artifact) -> Artifact:
    made = train(store, catalogue, dataset, teacher=LITE0)
    catalogue.publish("small-model", made, "2026-11-30")
    return made


def reference(model: Artifact, how: str) -> str:
    return {
        "name": "small-model",
        "version": "small-model@2026-11-30",
        "digest": model.digest,
        "prefix": model.digest[:10],
        "file": f"swin_tiny_patch4_window7_224@{model.local('model.safetensors')}",
    }[how]


@pytest.mark.parametrize("how", ["name", "version", "digest", "prefix"])
def test_a_geofm_model_as_encoder_is_an_input(
    store: Store, catalogue: Catalogue, chips: Artifact, model: Artifact, how: str, tmp_path: Path
) -> None:
    made = embed_chips(store, catalogue, chips, reference(model, how))
    assert made.manifest.inputs == {"chips": chips.digest, "encoder": model.digest}
    assert made.manifest.settings["encoder"] == model.digest
    assert catalogue.parents(made.digest)["encoder"] == model.digest
    assert np.load(made.local("embeddings.npy")).std() > 0
    folder = tmp_path / "sets"
    make_task(folder / "places", 1)
    settings = CurateSettings(evaluation_sets=str(folder))
    inputs = {"chips": chips, "descriptors": chips, "embeddings": made}
    for stage, given in ((calibrate.STAGE, CalibrateSettings()), (pool.STAGE, settings)):
        job = make_job(stage, store, inputs, given, catalogue=catalogue.url)
        assert job.inputs["encoder"].digest == model.digest
        assert own_parts(stage, job)


def test_a_model_teaches_and_its_lineage_is_followed(
    store: Store, catalogue: Catalogue, model: Artifact, tmp_path: Path
) -> None:
    other = make_dataset(store, catalogue.url, samples=10)
    made = train(store, catalogue, other, teacher="small-model")
    assert made.manifest.inputs == {"dataset": other.digest, "teacher": model.digest}
    found = {node.artifact.digest for node in walk_lineage(ancestry(catalogue, made))}
    assert found >= {made.digest, other.digest, model.digest, model.manifest.inputs["dataset"]}
    assert ancestor(catalogue, made, "dataset").digest == other.digest
    assert {cost.digest for cost in lineage_costs(catalogue, [made.digest])} == found
    assert verify_chain(catalogue, made) == []
    with model.local("model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert any("model.safetensors" in problem for problem in verify_chain(catalogue, made))


def test_a_models_file_is_its_model(
    store: Store, catalogue: Catalogue, model: Artifact, dataset: Artifact, tmp_path: Path
) -> None:
    copy = tmp_path / "downloaded.safetensors"
    shutil.copyfile(model.local("model.safetensors"), copy)
    found = find_weights(f"swin_tiny_patch4_window7_224@{copy}", catalogue)
    assert found.model == model.digest
    made = train(
        store, catalogue, dataset, alpha=0, student_init="pretrained",
        student=f"swin_tiny_patch4_window7_224@{copy}",
    )  # fmt: skip
    assert made.manifest.inputs["student"] == model.digest


@pytest.mark.parametrize("how", ["name", "digest"])
def test_a_model_is_where_a_student_starts(
    store: Store, catalogue: Catalogue, model: Artifact, dataset: Artifact, how: str
) -> None:
    named = {"student": reference(model, how), "student_init": "pretrained", "student_args": {}}
    made = train(store, catalogue, dataset, alpha=0, **named)
    assert made.manifest.inputs == {"dataset": dataset.digest, "student": model.digest}
    assert made.manifest.facts["student"] == "swin_tiny_patch4_window7_224"
    assert made.json("config.json")["model_args"]["embed_dim"] == 24


def test_a_student_starts_from_exactly_the_models_weights_on_the_bands_of_the_dataset(
    model: Artifact,
) -> None:
    from geofm.embeddings.weight_inputs import select_input_bands
    from geofm.pretraining.student import student_settings

    found = select_input_bands(weights_of_model(model), ["nir", "red"])
    assert found.channels == (3, 0)
    named = tiny_settings(student=model.digest, student_init="pretrained", student_args={})
    student = build_student(student_settings(named, found), 2, 0, found)
    held = load_file(model.local("model.safetensors"))
    state = student.backbone.state_dict()
    first = "patch_embed.proj.weight"
    assert torch.equal(state[first], held[first][:, [3, 0]])
    assert all(torch.equal(state[name], held[name]) for name in held if name != first)
    with pytest.raises(WeightsMismatch, match="no weights for swir"):
        select_input_bands(weights_of_model(model), ["red", "swir"])


def test_a_model_as_encoder_sees_its_other_bands_at_their_mean(model: Artifact) -> None:
    from geofm.pretraining import features, load_model

    encoder = load_encoder(weights_of_model(model))
    rgb = torch.rand(3, 3, 32, 32)
    backbone, config = load_model(model)
    mean = config["pretrained_cfg"]["mean"][3]
    images = torch.cat([rgb, torch.full((3, 1, 32, 32), mean)], dim=1)
    from geofm.embeddings.encoders import encode

    wanted = features(backbone, config, images)["final"]
    torch.testing.assert_close(encode(encoder, rgb), wanted, atol=1e-5, rtol=1e-5)


def test_licences_pass_through_a_teacher(
    store: Store, catalogue: Catalogue, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    import geopandas as gpd

    other = make_dataset(store, catalogue.url, samples=10)
    made = train(store, catalogue, other, teacher=model.digest)

    tables = {
        other.digest: ("CC0-1.0", "ours"),
        model.manifest.inputs["dataset"]: ("CC-BY-NC-4.0", "theirs"),
    }
    real = Artifact.table

    def table(self: Artifact, name: str, columns: Any = None) -> Any:
        frame = real(self, name)
        if self.digest in tables and name == "samples.parquet":
            licence, collection = tables[self.digest]
            return gpd.GeoDataFrame(frame).assign(
                licence=licence, collection=collection, item_id="i"
            )
        return frame

    monkeypatch.setattr(Artifact, "table", table)
    rows = licence_union(catalogue, made)
    assert [(r["licence"], r["collection"], r["samples"]) for r in rows[:2]] == [
        ("CC0-1.0", "ours", 10), ("CC-BY-NC-4.0", "theirs", 9),
    ]  # fmt: skip
    # the teacher of the teacher
    assert [(r["licence"], r["weights"]) for r in rows[2:]] == [("Apache-2.0", LITE0)]


# Names of models.


def test_what_follows_the_at_is_a_file_or_a_version(
    store: Store, catalogue: Catalogue, model: Artifact, dataset: Artifact, tmp_path: Path
) -> None:
    torch.save({}, tmp_path / "weights.bin")
    (tmp_path / "folder.safetensors").mkdir()
    cases = {
        "test_vit@2026-11-30": "no .safetensors file",
        f"test_vit@{tmp_path}/weights.bin": "other formats can run code",
        f"{LITE0}@v2": "no .safetensors file",
        f"test_vit@{tmp_path}/folder.safetensors": "is a folder",
        "small-model@2025-01-01": "geofm list",
        "smal-model": "geofm list",
        dataset.digest[:12]: "kind dataset",
        "": "names no artifact",
    }
    for name, words in cases.items():
        with pytest.raises((UnknownEncoder, WeightsMismatch), match=words):
            find_weights(name, catalogue)


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", LITE0, "vit_tiny_patch16_224.x"])
def test_no_model_takes_the_name_of_a_network(name: str) -> None:
    with pytest.raises(TakenName, match=r"pretrain\.name"):
        check_model_title(name)
    check_model_title(f"my-{name}")
