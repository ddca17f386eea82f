"""An exported model, as timm, Hugging Face and STAC readers see it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import shapely
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.errors import CheckError, UsageError
from data_catalog.provenance.costs import lineage_costs
from data_catalog.provenance.licences import card_licence
from data_catalog.run import run_stage
from data_catalog.storage.export import TargetExists
from data_catalog.store import Store, open_store
from flows.cli.export import export
from geofm.pretraining import features, load_model
from geofm.pretraining.export.hub import export_model
from geofm.pretraining.export.mlm import ALWAYS, covered_area, mlm_item, time_span
from geofm.pretraining.pretrain import STAGE
from tests.geofm.pretraining.conftest import make_dataset, tiny_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Catalogue]:
    """A store and a catalogue that hold a dataset and a model."""
    folder = tmp_path_factory.mktemp("place")
    store = open_store(folder / "store")
    return store, open_catalogue(f"sqlite:///{folder}/catalogue.db", store)


@pytest.fixture(scope="module")
def made(place: tuple[Store, Catalogue]) -> dict[str, Artifact]:
    store, catalogue = place
    dataset = make_dataset(store, catalogue.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        model = run_stage(
            STAGE, store, catalogue, {"dataset": dataset}, tiny_settings(epochs=1), 3, "cpu"
        )
    return {"dataset": dataset, "model": model}


@pytest.fixture(scope="module")
def folder(
    made: dict[str, Artifact], place: tuple[Store, Catalogue],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """The model's folder for Hugging Face."""
    target = tmp_path_factory.mktemp("hub") / "tiny-swin"
    costs = lineage_costs(place[1], [made["model"].digest])
    export_model(made["model"], made["dataset"], target, "tiny-swin", costs)
    return target


@pytest.fixture(scope="module")
def item(made: dict[str, Artifact]) -> dict[str, Any]:
    return mlm_item(made["model"], made["dataset"], "tiny-swin")


def test_timm_loads_the_folder_and_gives_the_models_features(
    made: dict[str, Artifact], folder: Path
) -> None:
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model, config = load_model(made["model"])
    images = torch.rand(2, 4, 32, 32)
    wanted = features(model, config, images)
    found = features(network, config, images)
    assert torch.equal(found["final"], wanted["final"])
    assert torch.equal(found["distilled"], wanted["distilled"])


def test_the_card_has_a_head_terms_cost_and_digest(made: dict[str, Artifact], folder: Path) -> None:
    model = made["model"]
    head, card = (folder / "README.md").read_text().removeprefix("---\n").split("---\n\n", 1)
    about = yaml.safe_load(head)
    assert about["library_name"] == "timm"
    assert about["license"] == "cc-by-4.0"
    assert about["datasets"] == ["tiny"]
    assert "knowledge-distillation" in about["tags"]
    read = ModelCard.load(folder / "README.md").data
    assert (read.library_name, read.pipeline_tag) == ("timm", "image-feature-extraction")
    assert card.startswith(model.local("README.md").read_text())
    more = card[len(model.local("README.md").read_text()) :]
    assert f"Model `{model.digest}`" in more
    assert "| pretrain |" in more
    assert "| pack |" in more
    assert "| all |" in more
    assert "Without a measurement of energy" in more
    sealed = model.json("config.json")
    written = json.loads((folder / "config.json").read_text())
    assert written["geofm"].pop("digest") == model.digest
    assert written == sealed
    manifest = (folder / "manifest.json").read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == model.digest


def test_what_is_measured_is_in_no_sealed_file(made: dict[str, Artifact]) -> None:
    model = made["model"]
    text = model.local("README.md").read_text() + model.local("manifest.json").read_text()
    for measured in ("kwh", "CO2e", "gpu_seconds", "images_per_second"):
        assert measured not in text


def test_a_folder_in_the_way_or_a_damaged_file_is_refused(
    made: dict[str, Artifact], tmp_path: Path
) -> None:
    with pytest.raises(TargetExists, match="--out"):
        export_model(made["model"], made["dataset"], tmp_path, "tiny", [])
    weights = made["model"].local("model.safetensors")
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckError, match=r"model\.safetensors: content altered"):
            export_model(made["model"], made["dataset"], tmp_path / "out", "tiny", [])
    finally:
        weights.write_bytes(whole)
    assert not list(tmp_path.iterdir())


def test_linked_weights_are_the_stores_own_but_card_and_config_are_not(
    made: dict[str, Artifact], tmp_path: Path
) -> None:
    model = made["model"]
    export_model(model, made["dataset"], tmp_path / "out", "tiny", [], hard_links=True)
    linked = (tmp_path / "out" / "model.safetensors").stat().st_ino
    assert linked == model.local("model.safetensors").stat().st_ino
    assert "digest" not in model.json("config.json")["geofm"]
    assert not model.local("README.md").read_text().startswith("---")


def test_the_item_says_what_goes_in_what_comes_out_and_where_it_is_from(
    made: dict[str, Artifact], item: dict[str, Any]
) -> None:
    model, about = made["model"], item["properties"]
    config = model.json("config.json")
    assert item["id"] == f"tiny-swin-{model.digest[:12]}"
    taken = about["mlm:input"][0]
    assert taken["bands"] == ["red", "green", "blue", "nir"]
    assert taken["input"]["shape"] == [-1, 4, 32, 32]
    assert [s["mean"] for s in taken["value_scaling"]] == config["pretrained_cfg"]["mean"]
    assert [s["stddev"] for s in taken["value_scaling"]] == config["pretrained_cfg"]["std"]
    assert "count * scale / 0.3" in taken["pre_processing_function"]["expression"]
    assert {o["name"]: o["result"]["shape"] for o in about["mlm:output"]} == {
        "final": [-1, 192],
        "distilled": [-1, 192],
    }
    assert about["mlm:architecture"] == "swin_tiny_patch4_window7_224"
    assert about["mlm:framework"] == "pytorch"
    assert about["mlm:total_parameters"] == model.manifest.facts["parameters"]
    assert about["mlm:hyperparameters"]["alpha"] == 1
    assert about["license"] == "CC-BY-4.0"
    weights = item["assets"]["weights"]
    body = Path(model.local("model.safetensors"))
    assert weights["file:checksum"] == "1220" + hashlib.sha256(body.read_bytes()).hexdigest()
    assert weights["file:size"] == body.stat().st_size
    assert weights["href"] == body.as_uri()
    assert [link["href"] for link in item["links"] if link["rel"] == "derived_from"] == [
        f"urn:sha256:{made['dataset'].digest}"
    ]
    assert about["datetime"] is None
    assert about["start_datetime"] == "2024-06-01T10:30:00Z"
    assert about["end_datetime"] == "2024-06-02T10:30:00Z"
    area = shapely.geometry.shape(item["geometry"])
    assert area.geom_type == "MultiPolygon"
    assert len(area.geoms) == 22
    assert area.area == pytest.approx(22 * 0.05**2)
    assert item["bbox"] == pytest.approx([5, 45, 7.15, 45.05])


def test_the_item_in_the_folder_names_the_files_beside_it(folder: Path) -> None:
    assets = json.loads((folder / "item.json").read_text())["assets"]
    assert set(assets) == {"weights", "config", "card", "manifest"}
    for asset in assets.values():
        body = (folder / asset["href"]).read_bytes()
        assert asset["file:checksum"] == "1220" + hashlib.sha256(body).hexdigest()
        assert asset["file:size"] == len(body)


def test_pystac_reads_the_item_and_its_extension(item: dict[str, Any]) -> None:
    read = pystac.Item.from_dict(item)
    assert pystac.Item.from_dict(read.to_dict()).id == item["id"]
    mlm = pytest.importorskip("pystac.extensions.mlm", reason="needs pystac >= 1.12")
    model = mlm.MLMExtension.ext(read)
    assert model.input[0].input.shape == [-1, 4, 32, 32]
    assert [one.name for one in model.output] == ["final", "distilled"]


def test_stac_model_validates_the_item(item: dict[str, Any]) -> None:
    reason = "needs stac-model: pip install 'geofm[interop]'"
    schema = pytest.importorskip("stac_model.schema", reason=reason)
    found = schema.MLModelProperties(**item["properties"])
    assert found.name == "tiny-swin"
    assert found.input[0].input.data_type == "float32"
    broken = {**item["properties"], "mlm:input": [{"name": "no shape", "bands": []}]}
    with pytest.raises(ValueError, match="input"):
        schema.MLModelProperties(**broken)


def test_a_model_of_no_known_time_is_bound_to_none(place: tuple[Store, Catalogue]) -> None:
    dataset = make_dataset(place[0], place[1].url, samples=4)
    samples = dataset.table("samples.parquet").assign(datetime=None)
    assert (time_span(samples)["start_datetime"], time_span(samples)["end_datetime"]) == ALWAYS


def test_many_footprints_are_covered_by_few_corners() -> None:
    rng = np.random.default_rng(0)
    west, south = rng.uniform(5, 6, 3000), rng.uniform(45, 46, 3000)
    tiles = shapely.box(west, south, west + 0.002, south + 0.002)
    area = covered_area(tiles)
    assert shapely.get_num_coordinates(area) <= 1000
    assert shapely.covers(area, tiles).all()
    assert area.area < 1.6
    assert all(part.exterior.is_ccw for part in shapely.get_parts(area))
    edge = covered_area(
        np.array([shapely.box(179.995 - i * 0.05, 0, 180, 0.001) for i in range(2000)])
    )
    assert edge.bounds[2] <= 180


def test_the_hubs_own_names_of_licences() -> None:
    assert card_licence(["CC-BY-SA-4.0"]) == {"license": "cc-by-sa-4.0"}
    assert card_licence(["PDDL-1.0"]) == {"license": "pddl"}
    assert card_licence(["CC-BY-SA-3.0-IGO"]) == {
        "license": "other", "license_name": "CC-BY-SA-3.0-IGO",
    }  # fmt: skip
    assert card_licence(["CC-BY-4.0", "MIT"])["license_name"] == "CC-BY-4.0 AND MIT"
    assert card_licence([]) == {"license": "unknown"}


def test_the_command_picks_by_kind(
    made: dict[str, Artifact], place: tuple[Store, Catalogue], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store, catalogue = place
    monkeypatch.chdir(tmp_path)
    model = made["model"].digest
    where: dict[str, Any] = {"store": store.url, "catalog": catalogue.url, "json_": True}
    export(model, "hf", "", **where)
    written = json.loads(capsys.readouterr().out)
    assert written["path"] == str(tmp_path / "tiny-swin_tiny_patch4_window7_224-hf")
    assert (Path(written["path"]) / "model.safetensors").exists()
    export(model, "stac", "", **where)
    path = Path(json.loads(capsys.readouterr().out)["path"])
    assert path.name == "tiny-swin_tiny_patch4_window7_224.stac.json"
    assert json.loads(path.read_text())["assets"]["weights"]["href"].startswith("file://")
    with pytest.raises(UsageError, match=r"no --format croissant: choose hf or stac"):
        export(model, "croissant", "", **where)
    with pytest.raises(UsageError, match=r"of kind dataset.*choose hf or croissant"):
        export(made["dataset"].digest, "stac", "", **where)
    catalogue.publish("encoder", made["model"], "2026-11-24")
    export("encoder", "stac", "", **where)
    assert Path(json.loads(capsys.readouterr().out)["path"]).name == "encoder.stac.json"
