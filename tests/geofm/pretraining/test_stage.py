from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.run import run_stage
from data_catalog.store import open_store
from data_catalog.verify import verify_artifact
from geofm.pretraining import features, load_model, random_model
from geofm.pretraining.stage import STAGE
from tests.geofm.pretraining.conftest import make_dataset, tiny_settings


def _run(folder: Path, dataset: Artifact, seed: int = 3, **fields: object) -> Artifact:
    catalogue = open_catalogue(f"sqlite:///{folder}/catalogue.db")
    settings, store = tiny_settings(**fields), open_store(folder / "store")
    return run_stage(STAGE, store, catalogue, {"dataset": dataset}, settings, seed, "cpu")


@pytest.fixture(scope="module")
def one_core() -> pytest.MonkeyPatch:
    """The stage asks the environment for its threads."""
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
    assert not manifest.deterministic  # other thread counts give other last bits
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


def test_timm_loads_the_weights_strictly_from_the_config_alone(model: Artifact) -> None:
    config = model.json("config.json")
    network = timm.create_model(config["timm"], **config["args"])
    network.load_state_dict(load_file(model.local("model.safetensors")), strict=True)
    assert network.patch_embed.proj.in_channels == 4
    kept = load_file(model.local("objective.safetensors"))
    assert set(kept) == {
        "mask_token",
        "decoder.pixels.weight",
        "decoder.pixels.bias",
        "projector.weight",
        "projector.bias",
    }
    images = torch.rand(2, 4, 32, 32)
    mean, std = (torch.tensor(config[key]).reshape(1, 4, 1, 1) for key in ("mean", "std"))
    loaded, config = load_model(model)
    with torch.no_grad():
        pooled = network.eval()((images - mean) / std)
    torch.testing.assert_close(features(loaded, config, images)["final"], pooled)


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
    fresh = timm.create_model(config["timm"], **config["args"]).state_dict()
    assert all(torch.equal(start[key], fresh[key]) for key in fresh)
    assert not any(torch.equal(value, start[key]) for key, value in trained.state_dict().items())


def test_the_card_names_data_teacher_terms_and_use(model: Artifact, dataset: Artifact) -> None:
    card = model.local("README.md").read_text()
    for piece in (
        dataset.digest,
        "random:test_vit",
        model.manifest.facts["teacher_weights_sha256"],
        "CC-BY-4.0",
        "timm.create_model",
        "red, green, blue, nir",
    ):
        assert piece in card


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
    assert config["args"]["in_chans"] == len(bands)
    assert features(network, config, torch.rand(1, len(bands), 32, 32))["final"].shape == (1, 192)
