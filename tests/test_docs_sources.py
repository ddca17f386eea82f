"""The worked example of docs/sources.md, carried out: the check, a search and a cut."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from typer.testing import CliRunner

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import CheckError, UsageError
from data_catalog.run import run_stage
from data_catalog.sources import BandPlace, BaselineOffset, Cloud, Identity, Source
from data_catalog.store import Store
from flows.cli.main import app
from geofm.chips.recut import recut
from geofm.config.recipe import Recipe
from geofm.formats.npy import chip_from_bytes
from geofm.stages import DATA_STAGES, get_stage
from tests.geofm.stac.small_world import NORTH, WEST, World, polygon, serve, tiff

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sources.md"
API = "https://stac.example.org"


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def commands() -> list[list[str]]:
    """The page's `geofm sources` commands, as words."""
    lines = re.findall(r"^geofm (sources.*?)(?:  #.*)?$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [line.split() for line in lines]


@pytest.fixture
def world() -> Iterator[World]:
    with serve() as served:
        yield served


@pytest.fixture
def files(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in an empty folder, with the address of a server that is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smallsat.yaml").write_text(block("yaml").replace(API, world.url))
    (tmp_path / "item.json").write_text(block("json").replace(API, world.url))
    return tmp_path


def test_the_commands_of_the_page_do_what_it_says(files: Path) -> None:
    asked = commands()
    assert len(asked) == 4
    for words in asked:
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, [*asked[-1], "--json"], catch_exceptions=False)
    report = json.loads(shown.stdout)
    assert report["problems"] == []
    assert {b["name"]: (b["asset"], b["index"]) for b in report["bands"]} == {
        "blue": ("analytic", 1), "green": ("analytic", 2), "red": ("analytic", 3),
        "nir": ("analytic", 4),
    }  # fmt: skip
    assert {(b["scale"], b["offset"], b["nodata"]) for b in report["bands"]} == {(1e-4, -0.1, 0.0)}
    assert report["licence"] == "CC-BY-4.0"
    assert report["cloud"]["asset"] == "udm"
    identity = report["identity"]
    assert [identity[k] for k in ("acquisition", "tile", "version")] == [
        "strip-42",
        "tile-7",
        "2.0",
    ]


def test_what_is_missing_is_named_with_the_remedy(files: Path) -> None:
    item = json.loads((files / "item.json").read_text())
    del item["assets"]["udm"], item["properties"]["smallsat:strip"]
    item["assets"]["pixels"] = item["assets"].pop("analytic")
    (files / "item.json").write_text(json.dumps(item))
    shown = CliRunner().invoke(app, [*commands()[-1], "--json"])
    assert isinstance(shown.exception, CheckError)  # exit code 4
    assert "bands.red: " in str(shown.exception)
    assert "(the profile says asset 'analytic'); the item's assets are pixels" in str(
        shown.exception
    )
    assert "cloud.asset: the item has no asset 'udm'; it has pixels" in str(shown.exception)
    notes = json.loads(shown.stdout)["notes"]
    assert any("identity.acquisition: the item lacks smallsat:strip" in note for note in notes)


def test_a_bad_file_or_item_is_bad_usage(files: Path) -> None:
    (files / "smallsat.yaml").write_text(block("yaml").replace("CC-BY-4.0", "free"))
    shown = CliRunner().invoke(app, commands()[-2])
    assert isinstance(shown.exception, UsageError)  # exit code 2
    assert "smallsat.yaml: licence: 'free' is neither" in str(shown.exception)
    (files / "smallsat.yaml").write_text(block("yaml").replace("smallsat-sr", "other"))
    for text, words in {
        block("json"): "'smallsat-sr' is covered by no profile of the file: smallsat",
        "[]": "it must be a JSON object",
        "{": "can't be read as JSON",
    }.items():
        (files / "item.json").write_text(text)
        shown = CliRunner().invoke(app, commands()[-1])
        assert isinstance(shown.exception, UsageError)
        assert words in str(shown.exception)
    assert isinstance(CliRunner().invoke(app, ["sources", "--item", "x"]).exception, UsageError)
    assert isinstance(CliRunner().invoke(app, ["sources", "nothing"]).exception, UsageError)


def four_bands(pixels: NDArray[np.uint16]) -> bytes:
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=64, width=64, count=4, crs="EPSG:32631", dtype="uint16",
            transform=Affine(10, 0, WEST, 0, -10, NORTH), tiled=True, blockxsize=32, blockysize=32,
        ) as file:  # fmt: skip
            file.write(pixels)
        return bytes(memory.read())


def serve_item(world: World, item: dict, name: str, release: str, pixels: NDArray) -> None:
    """List the page's item under another name, with files that are there."""
    clouds = np.zeros((64, 64), np.uint8)
    clouds[:32, :32] = 2  # bit 1
    item = json.loads(json.dumps(item))
    item["id"] = name
    item["geometry"] = polygon(WEST, NORTH, 640, 640)
    item["properties"] |= {"smallsat:release": release, "proj:epsg": 32631}
    item["assets"]["analytic"]["href"] = world.add(f"/files/{name}.tif", four_bands(pixels))
    item["assets"]["udm"]["href"] = world.add(f"/files/{name}-udm.tif", tiff(clouds, nodata=None))
    world.items.append(item)


def test_a_search_and_a_cut_by_the_pages_profile(
    world: World, files: Path, store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOFM_SOURCES", str(files / "smallsat.yaml"))
    item = json.loads((files / "item.json").read_text())
    world.collections.append({"type": "Collection", "id": "smallsat-sr", "license": "other"})
    reflectance = np.random.default_rng(0).integers(1, 4000, (4, 64, 64)).astype(np.uint16)
    serve_item(world, item, "v1", "1.0", reflectance)
    serve_item(world, item, "v2", "2.0", reflectance + np.uint16(1000))
    recipe = Recipe.model_validate(
        {"search": {"stac": world.url}, "cut": {"size_px": 32, "bands": ["red", "nir", "blue"]}}
    )
    made: dict[str, Artifact] = {}
    for name in DATA_STAGES[: DATA_STAGES.index("cut") + 1]:
        stage = get_stage(name)
        made[stage.kind] = run_stage(stage, store, catalogue, made, getattr(recipe, name))
    items = made["items"].table("items.parquet").set_index("item_id")
    assert set(items["source"]) == {"smallsat"}
    assert set(items["licence"]) == {"CC-BY-4.0"}
    assert tuple(items.loc["v1", ["reason", "superseded_by"]]) == ("reprocessed", "v2")
    chips = made["chips"].table("chips.parquet")
    assert set(chips["item_id"]) == {"v2"}
    assert len(chips) == 4
    for _, chip in chips.iterrows():
        data = made["chips"].read_range(chip["part"], int(chip["offset"]), int(chip["size"]))
        row, col = int(chip["row"]), int(chip["col"])
        assert np.array_equal(
            chip_from_bytes(data), reflectance[[2, 3, 0], row : row + 32, col : col + 32]
        )
        assert chip["cloud_fraction"] == float((row, col) == (0, 0))
        assert list(chip["scale"]) == [1e-4] * 3
        assert list(chip["dn_offset"]) == [-1000] * 3
    # cut again by the profile of then, whatever has become of it
    (files / "smallsat.yaml").write_text("gone: true")
    monkeypatch.setenv("GEOFM_SOURCES", str(files))
    again = recut(made["chips"], made["items"], sorted(chips["chip_id"]))
    assert all(one.got == one.expected and not one.problem for one in again)
    facts = made["items"].manifest.facts
    assert list(facts["profiles"]) == ["smallsat"]
    assert facts["profiles"]["smallsat"]["cloud"]["cloud"] == [1]
    assert facts["sources"][0]["attribution"] == "Imagery by Example Space."


def test_every_field_of_a_profile_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for model in (Source, Cloud, Identity, BandPlace, BaselineOffset):
        for field in model.model_fields:
            assert re.search(rf"`{field}`|[{{ ]{field}:", text), field
