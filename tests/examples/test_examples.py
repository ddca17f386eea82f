"""The scripts of examples/ run as their first lines say, offline and on small data."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_catalog.catalogue import open_catalogue
from data_catalog.provenance.costs import lineage_costs
from data_catalog.run import run_stage
from data_catalog.store import open_store
from geofm.pretraining.export.hub import export_model
from geofm.pretraining.pretrain import STAGE
from tests.geofm.pretraining.conftest import make_dataset, tiny_settings
from tests.geofm.stac.small_world import add_scene, serve, texture

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_LINES = 60


def main_of(name: str) -> Callable[[Sequence[str]], None]:
    """Load an example and return its main function."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[Sequence[str]], None] = module.main
    return main


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_explains_itself(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert f"python examples/{path.name}" in text
    with pytest.raises(SystemExit) as stop:
        main_of(path.stem)(["--help"])
    assert stop.value.code == 0
    first_line = text.splitlines()[0].strip('"')
    assert first_line in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """A static catalogue in a folder: three scenes of two chips each; the second is a copy."""
    folder, links = tmp_path / "scenes", []
    folder.mkdir()
    with serve() as world:
        for number, name in enumerate(("first", "copy", "other")):
            pixels = texture(256, 256, seed=number // 2)
            bands = {"red": pixels, "green": pixels, "blue": pixels}
            item = add_scene(world, name, bands, datetime=f"2024-06-0{number + 1}T10:30:00Z")
            for key, asset in item["assets"].items():
                asset["href"] = f"{name}-{key}.tif"
                (folder / asset["href"]).write_bytes(world.files[f"/files/{name}/{key}.tif"])
            (folder / f"{name}.json").write_text(json.dumps(item))
            links.append({"rel": "item", "href": f"{name}.json"})
    catalog = {"type": "Catalog", "id": "scenes", "stac_version": "1.0.0",
               "description": "three scenes", "links": links}  # fmt: skip
    (folder / "catalog.json").write_text(json.dumps(catalog))
    return folder / "catalog.json"


@pytest.mark.slow
def test_a_folder_of_items_is_curated(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--store", str(tmp_path / "store"), "--budget", "1"]
    main_of("curate_items")([str(catalog), *options])
    lines = capsys.readouterr().out.splitlines()
    decided = {line.split()[0]: line for line in lines if re.search(r"(keep|drop): ", line)}
    dropped = [line for line in decided.values() if "drop: " in line]
    assert len(decided) == 6
    assert any("identical" in line for line in dropped)
    assert {decided[line.split()[-1]].split()[1] for line in dropped} == {"keep:"}


def test_shards_stream_into_a_plain_torch_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    dataset = make_dataset(open_store(folder), f"sqlite:///{folder}/catalogue.db")
    command = [dataset.digest, "--store", str(folder), "--epochs", "3"]
    main_of("stream_shards")(command)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"epoch {n}: 2 batches" for n in range(3)]
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert losses[2] < losses[0]


@pytest.mark.slow
def test_an_exported_student_is_loaded_into_timm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = open_store(tmp_path / "store")
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/catalogue.db", store)
    dataset = make_dataset(store, catalogue.url)
    settings = tiny_settings(epochs=1)
    model = run_stage(STAGE, store, catalogue, {"dataset": dataset}, settings, 0, "cpu")
    folder = tmp_path / "student"
    export_model(model, dataset, folder, "student", lineage_costs(catalogue, [model.digest]))
    np.save(tmp_path / "chip.npy", np.full((4, 40, 40), 1000, dtype=np.uint16))
    main_of("load_student")([str(folder), str(tmp_path / "chip.npy")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "swin_tiny_patch4_window7_224: bands red, green, blue, nir"
    assert lines[1].startswith("chip.npy: 192 features, first [")
    main_of("load_student")([str(folder)])
    assert capsys.readouterr().out.splitlines()[1].startswith("random: 192 features")
