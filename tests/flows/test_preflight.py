"""A run that cannot end well does not begin: exit code 2, the field and the remedy, at once."""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_catalog.catalogue import Catalogue
from data_catalog.store import Store
from flows import preflight
from flows.preflight import CannotBegin, check_once, check_run
from flows.settings import Place
from geofm.config.recipe import Recipe
from geofm.config.recipe_book import load_recipe
from tests.flows.conftest import SMALL, Outcome
from tests.geofm.dedup.synthetic import Chip, make_chips, texture
from tests.geofm.evaluation.test_evaluate import make_task


@pytest.fixture
def place(store: Store, catalogue: Catalogue) -> Place:
    return Place(store, catalogue.at(store))


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """The demo with smaller networks and other changes."""

    def changed(*changes: str) -> Recipe:
        small = ["pretrain.teacher=random:test_vit", "pretrain.teacher_size_px=64"]
        return load_recipe("demo", [*small, "embed.encoder=random:test_vit", *changes])

    return changed


def weights_file(folder: Path, name: str = "test_vit") -> Path:
    file = folder / "weights.safetensors"
    save_file(timm.create_model(name).state_dict(), file)
    return file


def damaged(folder: Path) -> Path:
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:-5000])
    return file


def pickled(folder: Path) -> Path:
    torch.save({}, folder / "weights.bin")
    return folder / "weights.bin"


def not_finite(folder: Path) -> Path:
    file = weights_file(folder)
    state = load_file(file)
    state["blocks.0.mlp.fc1.weight"][:] = float("nan")
    save_file(state, file)
    return file


def renamed_folder(folder: Path) -> Path:
    (folder / "weights.safetensors").mkdir()
    return folder / "weights.safetensors"


def empty(folder: Path) -> Path:
    file = folder / "weights.safetensors"
    file.touch()
    return file


WEIGHTS = {
    "damaged": (damaged, "test_vit", "damaged"),
    "empty": (empty, "test_vit", "damaged"),
    "missing": (lambda folder: folder / "no.safetensors", "test_vit", "no file"),
    "other architecture": (weights_file, "test_vit2", "lacks"),
    "other shapes": (weights_file, "vit_tiny_patch16_224", "does not hold weights"),
    "folder": (renamed_folder, "test_vit", "is a folder"),
    "pickle": (pickled, "test_vit", "other formats can run code"),
    "not finite": (not_finite, "test_vit", "not finite"),
    "unknown network": (weights_file, "tset_vit", "test_vit"),
}


@pytest.mark.long
@pytest.mark.parametrize("field", ["embed.encoder", "pretrain.teacher", "pretrain.student"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_opened(
    recipe: Callable[..., Recipe], place: Place, tmp_path: Path, field: str, case: str
) -> None:
    make, network, words = WEIGHTS[case]
    changes = [f"{field}={network}@{make(tmp_path)}"]
    if field == "pretrain.student":
        changes += [
            "pretrain.student_init=pretrained", "pretrain.student_args={}",
            "cut.bands=red,green,blue",
        ]  # fmt: skip
    with pytest.raises(CannotBegin, match=words) as caught:
        check_run(recipe(*changes), place, data_only=False)
    assert caught.value.exit_code == 2
    assert field in str(caught.value)


def missing_task(folder: Path) -> str:
    return str(folder / "nowhere")


def task_of_text(folder: Path) -> str:
    for name in ("a", "b"):
        (folder / "task" / name).mkdir(parents=True)
        for number in range(3):
            (folder / "task" / name / f"{number}.png").write_text("not a picture")
    return str(folder / "task")


def task_with_a_bad_card(folder: Path) -> str:
    task = make_task(folder / "task", 3)
    (task / "task.json").write_text("{")
    return str(task)


def task_without_names_of_bands(folder: Path) -> str:
    import numpy as np
    import rasterio

    for name in ("a", "b"):
        (folder / "task" / name).mkdir(parents=True)
        for number in range(2):
            with rasterio.open(
                folder / "task" / name / f"{number}.tif", "w", driver="GTiff",
                width=8, height=8, count=5, dtype="uint16",
            ) as out:  # fmt: skip
                out.write(np.ones((5, 8, 8), np.uint16))
    return str(folder / "task")


def task_of_one_class(folder: Path) -> str:
    (folder / "task" / "only").mkdir(parents=True)
    return str(folder / "task")


def two_tasks_of_one_name(folder: Path) -> str:
    one, two = (make_task(folder / name / "cover", 3) for name in ("a", "b"))
    return f"{one},{two}"


TASKS = {
    "missing": (missing_task, "there is no folder"),
    "unreadable": (task_of_text, "can be read"),
    "card": (task_with_a_bad_card, "not a task card"),
    "bands": (task_without_names_of_bands, "bands"),
    "one class": (task_of_one_class, "1 class"),
    "twins": (two_tasks_of_one_name, "two tasks are called 'cover'"),
}


@pytest.mark.parametrize("case", TASKS)
def test_tasks_are_opened(
    recipe: Callable[..., Recipe], place: Place, tmp_path: Path, case: str
) -> None:
    make, words = TASKS[case]
    tasks = make(tmp_path)
    with pytest.raises(CannotBegin, match=words) as caught:
        check_run(recipe(f"evaluate.tasks={tasks}"), place, data_only=False)
    assert "evaluate.tasks" in str(caught.value)
    check_run(recipe(f"evaluate.tasks={tasks}"), place, data_only=True)


def picture_of_text(folder: Path) -> Path:
    (folder / "set").mkdir()
    (folder / "set" / "a.png").write_text("not a picture")
    return folder


def truncated_picture(folder: Path) -> Path:
    (folder / "set").mkdir()
    file = folder / "set" / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:-500])
    return folder


def footprints_of_text(folder: Path) -> Path:
    (folder / "set.geojson").write_text("{")
    return folder


def footprints(folder: Path, *geometries: object) -> Path:
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    content = {"type": "FeatureCollection", "features": features}
    (folder / "set.geojson").write_text(json.dumps(content))
    return folder


def without_geometry(folder: Path) -> Path:
    return footprints(folder, {"type": "Point", "coordinates": [1, 2]}, None)


def in_metres(folder: Path) -> Path:
    return footprints(folder, {"type": "Point", "coordinates": [500000, 4649776]})


def yaml_of_bytes(folder: Path) -> Path:
    (folder / "sets.yaml").write_bytes(b"\xff\xfe\x00sets")
    return folder / "sets.yaml"


SETS = {
    "missing": (lambda folder: folder / "nowhere", "there is no registry"),
    "empty": (lambda folder: folder, "no evaluation set"),
    "no picture": (picture_of_text, "cannot be read as an image"),
    "truncated picture": (truncated_picture, "cannot be read as an image"),
    "no footprints": (footprints_of_text, "no footprints"),
    "no geometry": (without_geometry, "have no geometry"),
    "metres": (in_metres, "not in degrees"),
    "no text": (yaml_of_bytes, "cannot be read"),
}


@pytest.mark.parametrize("case", SETS)
def test_evaluation_sets_are_opened(
    recipe: Callable[..., Recipe], place: Place, tmp_path: Path, case: str
) -> None:
    make, words = SETS[case]
    (tmp_path / "sets").mkdir()
    registry = make(tmp_path / "sets")
    changed = recipe(f"curate.evaluation_sets={registry}")
    for data_only in (True, False):
        with pytest.raises(CannotBegin, match=words):
            check_run(changed, place, data_only)


FIELDS = {
    "device": (["compute.device=cuda"], "compute.device"),
    "budget": (["cut.max_chips=100", "curate.budget=200"], "cut.max_chips"),
    "batch": (["cut.max_chips=10"], "pretrain.batch"),
    "batch of budget": (["curate.budget=8"], "pretrain.batch"),
    "one name": (["pack.name=demo-model"], "pretrain.name"),
    "a network's name": (["pretrain.name=resnet18"], "pretrain.name"),
    "statistics": (["pretrain.statistics=imagenet"], "pretrain.statistics"),
    "pieces": (["pretrain.microbatch=5"], "pretrain.microbatch"),
    "size": (["pretrain.size_px=104", "pretrain.mask_patch_px=8"], "pretrain.size_px"),
    "patch": (["pretrain.mask_patch_px=24"], "pretrain.mask_patch_px"),
    "no teacher": (["pretrain.teacher="], "pretrain.teacher"),
    "no tasks": (["evaluate.tasks="], "evaluate.tasks"),
    "encoder's size": (["embed.size_px=50"], "embed.size_px"),
    "width": (["embed.encoder=random:mobilenetv3_small_050"], "embed.encoder"),
    "model": (["embed.encoder=smal-model"], "geofm list"),
    "arguments": (["pretrain.student_args={depht: 3}"], "pretrain.student_args"),
    "file of a random student": (["pretrain.student=test_vit@a.safetensors"], "student_init"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_do_not_fit_together(
    recipe: Callable[..., Recipe], place: Place, case: str
) -> None:
    if case == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    changes, words = FIELDS[case]
    with pytest.raises(CannotBegin, match=words.replace(".", r"\.")):
        check_run(recipe(*changes), place, data_only=False)


def test_trackers_and_runners_that_are_not_installed(
    recipe: Callable[..., Recipe], place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tracker in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, tracker, None)
        with pytest.raises(CannotBegin, match=rf"{tracker}.*pip install 'geofm\[track\]'"):
            check_run(recipe(f"compute.trackers={tracker}"), place, data_only=False)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(CannotBegin, match="WANDB_API_KEY"):
        check_run(recipe("compute.trackers=wandb"), place, data_only=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    preflight._check_trackers(recipe("compute.trackers=wandb"))
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(CannotBegin, match=r"geofm\[dask\]"):
        check_run(recipe("compute.runner=dask"), place, data_only=True)
    installed = types.ModuleType("prefect_dask")
    installed.__spec__ = ModuleSpec("prefect_dask", None)
    monkeypatch.setitem(sys.modules, "prefect_dask", installed)
    monkeypatch.setenv("GEOFM_DASK", "tcp://127.0.0.1:9")
    with pytest.raises(CannotBegin, match="GEOFM_DASK"):
        check_run(recipe("compute.runner=dask"), place, data_only=True)


def test_all_problems_are_told_at_once(
    recipe: Callable[..., Recipe], place: Place, tmp_path: Path
) -> None:
    changed = recipe(
        f"evaluate.tasks={tmp_path}/a", f"curate.evaluation_sets={tmp_path}/b", "curate.budget=3"
    )
    with pytest.raises(CannotBegin) as caught:
        check_run(changed, place, data_only=False)
    for field in ("evaluate.tasks", "registry of evaluation sets", "pretrain.batch"):
        assert field in str(caught.value)


def test_a_name_of_another_kind_is_taken(recipe: Callable[..., Recipe], place: Place) -> None:
    chips = make_chips(place.store, [Chip(texture(0))])
    place.catalogue.record(chips, "key")
    place.catalogue.publish("taken", chips, "2026-11-30")
    for field in ("pack.name", "pretrain.name"):
        with pytest.raises(CannotBegin, match=rf"{field}.*is the name of a chips"):
            check_run(recipe(f"{field}=taken"), place, data_only=False)


def test_what_fits_passes_once_for_command_and_flow(
    recipe: Callable[..., Recipe], place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    real = preflight.check_run
    monkeypatch.setattr(preflight, "check_run", lambda *a: (calls.append(a), real(*a)))
    task = make_task(tmp_path / "task", 2)
    good = recipe(f"evaluate.tasks=planet,{task}", "pretrain.epochs=1", "pretrain.warmup_epochs=9")
    check_once(good, place, False, keep=True)
    check_once(good, place, False)
    assert len(calls) == 1
    check_once(good, place, False)
    assert len(calls) == 2


COMMANDS = {
    "task": (["evaluate.tasks=nowhere"], "there is no folder"),
    "weights": (["pretrain.teacher=test_vit@damaged.safetensors"], "damaged"),
    "evaluation set": (["curate.evaluation_sets=sets"], "cannot be read as an image"),
    "tracker": (["compute.trackers=wandb"], "geofm[track]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_ends_at_once_and_fetches_nothing(
    geofm_process: Callable[..., Outcome], tmp_path: Path, case: str
) -> None:
    changes, words = COMMANDS[case]
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 999)
    (tmp_path / "sets" / "one").mkdir(parents=True)
    (tmp_path / "sets" / "one" / "a.jpg").write_text("nothing")
    (tmp_path / "wandb.py").write_text("raise ImportError\n")
    more = [part for change in changes for part in ("--set", change)]
    started = time.monotonic()
    done = geofm_process("run", "demo", *SMALL, *more, "--store", "store")
    seconds = time.monotonic() - started
    assert (done.code, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "store").glob("artifacts/*/*"))
    assert seconds < 60  # 15 on a quiet machine
