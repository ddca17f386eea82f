"""The forecast of a run: unchanged stages, new parts, and what the stages after them compute."""

from __future__ import annotations

from typing import Any

import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.config.recipe import Recipe
from geofm.forecasting.figures import RunForecast, StageForecast
from geofm.forecasting.run import forecast_run
from geofm.stages import get_stage
from tests.geofm.pretraining.conftest import tiny_settings
from tests.geofm.stac.small_world import NORTH, World, add_scene, texture


class Run:
    """A store whose search and cut are carried out, and whose other stages are forecast."""

    def __init__(self, store: Store, catalogue: Catalogue, world: World) -> None:
        self.store, self.catalogue, self.world = store, catalogue, world

    def recipe(self, **sections: dict[str, Any]) -> Recipe:
        usual: dict[str, dict[str, Any]] = {
            "search": {"stac": self.world.url},
            "cut": {"size_px": 32, "bands": ["red"]},
            "embed": {"encoder": "random:test_vit", "size_px": 32},
            "pretrain": {**tiny_settings().model_dump(), "epochs": 3},
        }
        return Recipe.model_validate({k: usual.get(k, {}) | sections.get(k, {})
                                      for k in usual.keys() | sections.keys()})  # fmt: skip

    def items(self) -> dict[str, Artifact]:
        search = get_stage("search")
        found = run_stage(search, self.store, self.catalogue, {}, self.recipe().search)
        return {"items": found}

    def cut(self) -> dict[str, Artifact]:
        items, cut = self.items(), get_stage("cut")
        chips = run_stage(cut, self.store, self.catalogue, items, self.recipe().cut)
        return {**items, "chips": chips}

    def forecast(self, *stages: str, **sections: dict[str, Any]) -> RunForecast:
        recipe, given = self.recipe(**sections), self.items()
        return forecast_run(recipe, self.store, self.catalogue, stages, given)


@pytest.fixture
def run(store: Store, catalogue: Catalogue, world: World) -> Run:
    add_scene(world, "a", {"red": texture(96, 96)})
    return Run(store, catalogue, world)


def stage_of(forecast: RunForecast, name: str) -> StageForecast:
    found = forecast.of(name)
    assert found is not None
    return found


def test_a_first_run_computes_everything_by_built_in_rates(run: Run) -> None:
    asked = len(run.world.asked)
    found = run.forecast("cut", "embed", "describe", "curate", "pack", curate={"budget": 4})
    assert not [path for path in run.world.asked[asked:] if path.startswith("/files")]
    assert {entry.source for entry in found.stages} == {"default"}
    rows = {entry.stage: entry.rows for entry in found.stages}
    assert rows == {"cut": 9, "embed": 9, "describe": 9, "curate": 9, "pack": 4}
    size = len(run.world.files["/files/a/red.tif"])
    assert 0.5 * size < stage_of(found, "cut").fetch_bytes < 2 * size
    assert all(entry.seconds > 0 and entry.disk_bytes > 0 for entry in found.stages)
    assert found.problems == ()


def test_a_stage_that_was_done_is_unchanged_and_costs_nothing(run: Run) -> None:
    run.cut()
    found = run.forecast("cut", "describe")
    assert stage_of(found, "cut") == StageForecast("cut", 9, source="unchanged")
    assert stage_of(found, "describe").rows == 9, "no run has described these chips"
    assert stage_of(found, "describe").source == "default"


def test_only_parts_that_are_new_count(run: Run) -> None:
    given = run.cut()
    run_stage(get_stage("describe"), run.store, run.catalogue, given, run.recipe().curate)
    add_scene(run.world, "b", {"red": texture(64, 96)}, north=NORTH - 6400)
    found = run.forecast("cut", "describe", "curate")
    cut, describe = stage_of(found, "cut"), stage_of(found, "describe")
    assert (cut.rows, describe.rows) == (6, 6)
    assert stage_of(found, "curate").rows == 15
    assert cut.source == describe.source == "records (1 run)"
    size = len(run.world.files["/files/b/red.tif"])
    assert 0.5 * size < cut.fetch_bytes < 2 * size


def test_with_other_settings_every_chip_is_computed_again(run: Run) -> None:
    run.cut()
    found = run.forecast("cut", "describe", cut={"size_px": 16})
    assert stage_of(found, "cut").rows == 36
    assert stage_of(found, "cut").source == "records (1 run, other settings)"


def test_training_without_a_record_is_probed(run: Run) -> None:
    found = run.forecast("cut", "curate", "pack", "pretrain")
    training = stage_of(found, "pretrain")
    assert training.source.startswith("probe (")
    assert training.rows == 3 * 8, "three epochs of two batches of four"
    assert training.seconds > 0
    assert training.disk_bytes > 0


def test_features_that_are_cached_once_are_probed_too(run: Run) -> None:
    changes = {**tiny_settings().model_dump(), "teacher_features": "once"}
    found = run.forecast("cut", "curate", "pack", "pretrain", pretrain=changes)
    assert stage_of(found, "pretrain").source.startswith("probe (")


def test_a_batch_larger_than_the_dataset_is_reported(run: Run) -> None:
    found = run.forecast("cut", "curate", "pack", "pretrain", curate={"budget": 2})
    assert "pretrain.batch is 4, and about 2 samples" in found.warnings[0]


def test_a_gpu_that_is_not_there_is_a_problem_with_its_remedy(run: Run) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = run.forecast("cut", "embed", compute={"device": "cuda"})
    assert "set compute.device to auto or cpu" in found.problems[0]
    assert stage_of(found, "embed").gpu_seconds == 0


def test_weights_that_do_not_exist_are_a_problem(run: Run) -> None:
    found = run.forecast("cut", "embed", embed={"encoder": "no-such-network"})
    assert "no-such-network" in found.problems[0]
    assert stage_of(found, "embed").rows == 9
