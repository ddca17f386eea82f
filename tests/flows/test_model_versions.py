"""Models have names and versions like datasets: published if new, compared, refused where taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import UsageError
from data_catalog.provenance.model_diff import ModelDifference, compare_models
from data_catalog.run import run_stage
from data_catalog.store import Store
from flows.versions import NameTaken, difference_between, print_difference, publish
from geofm.config.recipe_book import BadRecipe, load_recipe
from geofm.pretraining import pretrain
from tests.geofm.pretraining.conftest import make_dataset, tiny_settings


@pytest.fixture
def train(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Artifact]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dataset = make_dataset(store, catalogue.url, samples=9)

    def run(**fields: Any) -> Artifact:
        settings = tiny_settings(**{"epochs": 1, "warmup_epochs": 0, **fields})
        return run_stage(pretrain.STAGE, store, catalogue, {"dataset": dataset}, settings, 3, "cpu")

    return run


def test_a_model_is_published_when_it_is_new(
    catalogue: Catalogue, train: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    first = train()
    published = publish(catalogue, "small", first)
    assert (published.new, published.row.predecessor) == (True, None)
    assert not publish(catalogue, "small", train(name="other-name")).new  # a name is no content
    second = train(alpha=0.5)
    published = publish(catalogue, "small", second)
    assert published.new
    assert catalogue.resolve("small").digest == second.digest
    found = difference_between(catalogue, "small", "")
    assert isinstance(found, ModelDifference)
    assert found == compare_models(catalogue, first, second)
    assert found.settings == {"alpha": (1.0, 0.5)}
    assert (found.inputs, found.weights, found.dataset) == ({}, {}, None)
    assert published.headline().endswith("settings: alpha")
    assert json.dumps(published.to_json())
    print_difference(found)
    assert "alpha" in capsys.readouterr().out


def test_other_weights_are_named_in_the_difference(
    catalogue: Catalogue, train: Callable[..., Artifact]
) -> None:
    first = train()
    publish(catalogue, "small", first)
    second = train(teacher="small")
    found = compare_models(catalogue, first, second)
    assert found.inputs == {"teacher": (None, first.digest)}
    assert found.weights["teacher"][1] == second.manifest.facts["weights"]["teacher"]["sha256"]
    assert "weights: teacher" in found.headline()


def test_a_dataset_and_a_model_do_not_share_a_name(
    store: Store, catalogue: Catalogue, train: Callable[..., Artifact]
) -> None:
    model = train()
    dataset = catalogue.get(model.manifest.inputs["dataset"])
    publish(catalogue, "small", model)
    with pytest.raises(NameTaken, match=r"pack\.name.*is the name of a model"):
        publish(catalogue, "small", dataset)
    publish(catalogue, "tiny", dataset)
    with pytest.raises(NameTaken, match=r"pretrain\.name.*is the name of a dataset"):
        publish(catalogue, "tiny", model)
    assert issubclass(NameTaken, UsageError)


def test_the_name_of_a_model_follows_the_recipe() -> None:
    assert load_recipe("demo").model_name == "demo-model"
    assert load_recipe("demo", ["pretrain.name=mine"]).model_name == "mine"
    for name in ("A", "../x", "a@b", "-a"):
        with pytest.raises(BadRecipe, match=r"pretrain\.name"):
            load_recipe("demo", [f"pretrain.name={name}"])
