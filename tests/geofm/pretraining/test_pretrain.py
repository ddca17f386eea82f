from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.provenance.verify import verify_artifact
from data_catalog.run import make_job, run_stage
from data_catalog.store import open_store
from geofm.pretraining import features, load_model, random_model
from geofm.pretraining.data import Corpus
from geofm.pretraining.export.model import OldModel, model_config, write_model
from geofm.pretraining.loop import train
from geofm.pretraining.pretrain import STAGE
from geofm.raster.radiometry import to_unit
from tests.geofm.pretraining.conftest import make_dataset, tiny_settings


def _run(folder: Path, dataset: Artifact, seed: int = 3, **fields: object) -> Artifact:
    settings, store = tiny_settings(**fields), open_store(folder / "store")
    catalogue = open_catalogue(f"sqlite:///{folder}/catalogue.db", store)
    return run_stage(STAGE, store, catalogue, {"dataset": dataset}, settings, seed, "cpu")


@pytest.fixture(scope="module")
def one_core() -> pytest.MonkeyPatch:
    """Set the number of threads, which the stage reads from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="module")
def model(
    dataset: Artifact, tmp_path_factory: pytest.TempPathFactory, one_core: pytest.MonkeyPatch
) -> Artifact:
    """A model artifact."""
    return _run(tmp_path_factory.mktemp("model"), dataset)


def test_the_artifact_is_sealed_with_its_facts(model: Artifact, dataset: Artifact) -> None:
    manifest = model.manifest
    assert verify_artifact(model) == []
    assert manifest.inputs == {"dataset": dataset.digest}
    assert not manifest.deterministic  # the last bits depend on the number of threads
    assert manifest.facts["arithmetic"].startswith("cpu, ")
    assert manifest.counts == {"rows_in": 22, "rows_out": 21, "steps": 10, "images": 40}
    assert manifest.dropped == {"never drawn": 1}
    assert {file.path for file in manifest.files} == {
        "model.safetensors",
        "objective.safetensors",
        "config.json",
        "metrics.parquet",
        "README.md",
    }
    facts = manifest.facts
    assert facts["teacher"] == "random:test_vit"
    assert len(facts["teacher_weights_sha256"]) == 64
    assert facts["alpha"] == facts["mim_weight"] == 1
    assert facts["bands"] == ["red", "green", "blue", "nir"]
    assert facts["arithmetic"] == "cpu, 1 threads"


def test_another_store_gives_the_same_digest(
    model: Artifact, dataset: Artifact, tmp_path: Path
) -> None:
    assert _run(tmp_path, dataset).digest == model.digest


STUDENTS: dict[str, dict[str, object]] = {
    "swin": {},
    "vit": {"student": "test_vit", "student_args": {}, "size_px": 64, "mask_patch_px": 16},
    "hiera": {
        "student": "hiera_tiny_224", "student_args": {"embed_dim": 16, "stages": [1, 1, 2, 1]},
        "size_px": 64, "mask_patch_px": 32, "masking": "drop",
    },
    "convnext": {"student": "test_convnext", "student_args": {}, "size_px": 64},
}  # fmt: skip


@pytest.mark.parametrize("student", STUDENTS)
def test_timm_gives_the_features_of_the_trained_module_bit_for_bit(
    corpus: Corpus, tmp_path: Path, student: str
) -> None:
    settings = tiny_settings(epochs=1, **STUDENTS[student])
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    trained = train(corpus, settings, 3, "cpu", tmp_path / "run", threads=1)
    write_model(trained.module, model_config(settings, corpus, ["CC-BY-4.0"]), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    images = torch.rand(3, 4, settings.size_px, settings.size_px)
    wanted = features(trained.module.student.backbone, config, images)

    weights = tmp_path / "model" / "model.safetensors"
    by_file = timm.create_model(
        config["architecture"], checkpoint_path=str(weights), **config["model_args"]
    )
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    for network in (by_file.eval(), by_folder.eval()):
        found = features(network, config, images)
        assert torch.equal(found["final"], wanted["final"])
        assert torch.equal(found["distilled"], wanted["distilled"])
        assert {name: one.shape[1] for name, one in found.items()} == config["geofm"]["features"]

    given = by_folder.pretrained_cfg  # as the card says, without geofm
    mean, std = (torch.tensor(given[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        found = by_folder((images - mean) / std)
    same = student in ("swin", "vit")  # the others normalise after the mean
    assert torch.equal(found, wanted["final"]) == same
    assert found.shape == wanted["final"].shape
    assert by_folder.num_classes == 0
    assert given["license"] == "CC-BY-4.0"
    assert tuple(given["input_size"]) == (4, settings.size_px, settings.size_px)


def test_timms_own_transform_is_the_preprocessing_of_8_bit_imagery(
    tmp_path: Path, one_core: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "store")
    bands = ["red", "green", "blue"]
    dataset = make_dataset(store, f"sqlite:///{tmp_path}/catalogue.db", bands=bands, samples=6)
    artifact = _run(tmp_path, dataset, epochs=1)
    folder = artifact.local("config.json").parent
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=network), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    unit = torch.from_numpy(to_unit(pixels.transpose(2, 0, 1), [1.0] * 3))
    model, config = load_model(artifact)
    with torch.no_grad():
        found = network(transform(Image.fromarray(pixels))[None])
    torch.testing.assert_close(found, features(model, config, unit[None])["final"])


def test_the_config_holds_what_a_user_needs(model: Artifact, dataset: Artifact) -> None:
    config = model.json("config.json")
    assert config["num_features"] == 192
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 0
    assert config["model_args"]["img_size"] == 32
    assert config["model_args"]["in_chans"] == 4
    stats = dataset.json("stats.json")
    assert config["pretrained_cfg"]["mean"] == stats["mean"]
    assert config["pretrained_cfg"]["std"] == stats["std"]
    assert config["geofm"] == {
        "bands": ["red", "green", "blue", "nir"],
        "unit": {"uint8": "count / 255", "uint16": "count * scale / 0.3"},
        "distill_stage": 3,
        "mask_patch_px": 8,
        "features": {"final": 192, "distilled": 192},
        "dataset": dataset.digest,
    }
    kept = load_file(model.local("objective.safetensors"))
    assert set(kept) == {
        "mask_token",
        "decoder.pixels.weight",
        "decoder.pixels.bias",
        "projector.weight",
        "projector.bias",
    }


def test_a_model_of_an_earlier_form_is_named(model: Artifact, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"timm": "swin_tiny_patch4_window7_224"}')
    with pytest.raises(OldModel, match="run its recipe again"):
        load_model(Artifact(str(tmp_path)))


def test_features_of_both_stages_at_any_size(model: Artifact) -> None:
    network, config = load_model(model)
    found = features(network, config, torch.rand(3, 4, 50, 50))
    assert found["final"].shape == (3, 192)
    assert found["distilled"].shape == (3, 192)
    assert torch.isfinite(found["final"]).all()
    assert not found["final"].requires_grad


def test_the_random_model_is_where_training_started(model: Artifact) -> None:
    trained, config = load_model(model)
    start = random_model(config, model.manifest.seed).state_dict()
    torch.manual_seed(model.manifest.seed)
    fresh = timm.create_model(config["architecture"], **config["model_args"]).state_dict()
    assert all(torch.equal(start[key], fresh[key]) for key in fresh)
    assert not any(torch.equal(value, start[key]) for key, value in trained.state_dict().items())


def test_the_card_names_data_teacher_terms_and_use(model: Artifact, dataset: Artifact) -> None:
    card = model.local("README.md").read_text()
    for piece in (
        dataset.digest,
        "random:test_vit",
        model.manifest.facts["teacher_weights_sha256"],
        "CC-BY-4.0",
        'timm.create_model("local-dir:.", pretrained=True)',
        "red, green, blue, nir",
        "| CC-BY-4.0 | test | 22 | Us |",
        "The teacher's weights are under terms that are not stated with them",
    ):
        assert piece in card


def test_the_cards_lines_load_the_model(model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    card = model.local("README.md")
    code = card.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(card.parent)
    unit = torch.rand(2, 4, 32, 32)
    told: dict[str, object] = {"unit": unit}
    exec(code, told)
    network, config = load_model(model)
    assert torch.equal(told["features"], features(network, config, unit)["final"])


def test_without_a_teacher_and_with_samples_that_were_never_drawn(
    dataset: Artifact, tmp_path: Path, one_core: pytest.MonkeyPatch
) -> None:
    artifact = _run(tmp_path, dataset, alpha=0, epochs=1)
    manifest = artifact.manifest
    assert manifest.dropped == {"never drawn": 2}
    assert manifest.counts["rows_out"] == 20
    assert manifest.facts["teacher"] == manifest.facts["teacher_weights_sha256"] == ""
    assert "projector.weight" not in load_file(artifact.local("objective.safetensors"))


@pytest.mark.parametrize("bands", [["pan"], ["red", "green", "blue"], ["nir", "red", "swir16"]])
def test_any_number_of_bands(
    bands: list[str], tmp_path: Path, one_core: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "store")
    dataset = make_dataset(store, f"sqlite:///{tmp_path}/catalogue.db", bands=bands, samples=6)
    artifact = _run(tmp_path, dataset, epochs=1)
    network, config = load_model(artifact)
    assert config["model_args"]["in_chans"] == len(bands)
    assert features(network, config, torch.rand(1, len(bands), 32, 32))["final"].shape == (1, 192)


def test_the_teacher_is_asked_once_where_the_recipe_says_so(
    dataset: Artifact, tmp_path: Path
) -> None:
    facts = _run(tmp_path, dataset, teacher_features="once").manifest.facts
    assert facts["teacher_features"] == "one pass over whole chips"
    assert facts["teacher_width"] == 64
    assert facts["teacher_weights_sha256"]


def test_processes_are_no_part_of_the_key(dataset: Artifact, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    job = make_job(STAGE, store, {"dataset": dataset}, tiny_settings(), 3)
    assert replace(job, how={"processes": 2, "parallel": "fsdp"}).key == job.key


@pytest.mark.parametrize(
    ("fields", "there", "absent"),
    [
        ({"alpha": 0}, "1.0 x masked L1 |", "cosine"),
        ({"mim_weight": 0, "alpha_end": 0.1}, "1.0 (at the end 0.1) x negative cosine", "L1"),
        ({"teacher_features": "once", "teacher_stage": 2}, "the teacher's 2", "the same crop"),
    ],
)
def test_the_card_says_what_was_minimised(
    dataset: Artifact, tmp_path: Path, fields: dict[str, object], there: str, absent: str
) -> None:
    card = _run(tmp_path, dataset, epochs=1, **fields).local("README.md").read_text()
    top = card.partition("## Use")[0]
    assert there in top
    assert absent not in top
