from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import s3fs

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError, UsageError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.chips import cut
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.remote.assets import remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access
from geofm.stac import static_catalog
from geofm.stac.search import STAGE
from geofm.stac.static_catalog import lies_within, resolve_href
from geofm.types import Json
from tests.geofm.stac.small_world import World, add_scene, texture

RED = {"red": texture(64, 64)}


def search(store: Store, catalogue: Catalogue, stac: object, **more: Any) -> Artifact:
    settings = SearchSettings.model_validate({"stac": str(stac), **more})
    return run_stage(STAGE, store, catalogue, {}, settings)


def verdicts(items: Artifact) -> dict[str, str]:
    frame = items.table("items.parquet", ["item_id", "status", "reason"])
    return {row.item_id: row.reason or row.status for row in frame.itertuples()}


def catalog(name: str, *links: tuple[str, str], kind: str = "Catalog") -> Json:
    entries = [{"rel": rel, "href": href} for rel, href in links]
    return {
        "type": kind,
        "id": name,
        "stac_version": "1.0.0",
        "description": name,
        "links": entries,
    }


@pytest.fixture
def tree(world: World, tmp_path: Path) -> Path:
    """A catalogue in a folder: a collection with two items, and an item without a collection."""
    root = tmp_path / "tree"
    for name in ("a", "b", "alone"):
        item = add_scene(world, name, RED)
        item["assets"]["red"]["href"] = "../assets/red%20.tif"
        folder = root / "s2" / name if name != "alone" else root / "alone"
        write(folder / "items" / f"{name}.json", item)
        (folder / "assets").mkdir()
        (folder / "assets" / "red%20.tif").write_bytes(world.files[f"/files/{name}/red.tif"])
    late = json.loads((root / "s2/b/items/b.json").read_text())
    late["properties"]["datetime"] = "2021-06-01T00:00:00Z"
    write(root / "s2/b/items/b.json", late)
    lone = json.loads((root / "alone/items/alone.json").read_text())
    del lone["collection"]
    write(root / "alone/items/alone.json", lone)
    collection = catalog(
        "sentinel-2-test", ("item", "./a/items/a.json"), ("item", "b/items/b.json"),
        ("root", "../catalog.json"), kind="Collection",
    )  # fmt: skip
    write(root / "s2" / "collection.json", {**collection, "license": "CC-BY-4.0"})
    links = [("child", "s2/collection.json"), ("item", "alone/items/alone.json"),
             ("self", "https://elsewhere.example/catalog.json")]  # fmt: skip
    write(root / "catalog.json", catalog("tree", *links))
    return root


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def serve_tree(world: World, tree: Path) -> str:
    for path in tree.rglob("*"):
        if path.is_file():
            address = f"/t/{path.relative_to(tree)}".replace("%20", "%2520")
            world.add(address, path.read_bytes().replace(b"%20", b"%2520"))
    return f"{world.url}/t/catalog.json"


def test_a_local_catalogue_is_read_and_cut(
    store: Store, catalogue: Catalogue, tree: Path, world: World
) -> None:
    items = search(store, catalogue, tree)
    frame = items.table("items.parquet").set_index("item_id")
    assert verdicts(items) == {"a": "ok", "b": "ok", "alone": "ok"}
    assert dict(frame.collection) == {
        "a": "sentinel-2-test", "b": "sentinel-2-test", "alone": "tree",
    }  # fmt: skip
    assert frame.licence["a"] == "CC-BY-4.0"
    assert json.loads(frame.item_json["a"])["assets"]["red"]["href"] == (
        "catalog:/s2/a/assets/red%20.tif"
    )
    assert str(tree) not in "".join(frame.item_json)
    before = len(world.asked)
    chips = run_stage(
        cut.STAGE, store, catalogue, {"items": items}, CutSettings(size_px=32, bands=["red"])
    )
    assert chips.manifest.counts["rows_out"] > 0
    assert len(world.asked) == before, "pixels come from the folder"


def test_the_same_catalogue_from_a_server_and_a_bucket(
    store: Store, catalogue: Catalogue, tree: Path, world: World, s3: str
) -> None:
    by_http = search(store, catalogue, serve_tree(world, tree))
    href = json.loads(by_http.table("items.parquet").item_json[0])["assets"]["red"]["href"]
    assert href == f"{world.url}/t/s2/a/assets/red%2520.tif"
    s3fs.S3FileSystem(skip_instance_cache=True).put(str(tree), f"{s3}/tree", recursive=True)
    by_s3 = search(store, catalogue, f"{s3}/tree/catalog.json")
    assert verdicts(by_s3) == verdicts(by_http) == {"a": "ok", "b": "ok", "alone": "ok"}
    href = json.loads(by_s3.table("items.parquet").item_json[0])["assets"]["red"]["href"]
    assert href == f"{s3}/tree/s2/a/assets/red%20.tif"
    inputs, settings = {"items": by_s3}, CutSettings(size_px=32, bands=["red"])
    assert run_stage(cut.STAGE, store, catalogue, inputs, settings).manifest.counts["rows_out"] > 0


def test_the_query_is_applied_by_us(store: Store, catalogue: Catalogue, tree: Path) -> None:
    assert set(verdicts(search(store, catalogue, tree, datetime="2021"))) == {"b"}
    wanted = search(store, catalogue, tree, collections=["sentinel-2-test", "nothing"])
    assert set(verdicts(wanted)) == {"a", "b"}
    assert set(verdicts(search(store, catalogue, tree, places=["2.3/48.85/20"]))) == {
        "a", "b", "alone",
    }  # fmt: skip
    with pytest.raises(RunError, match=r"search\.bbox 10,20,11,21"):
        search(store, catalogue, tree, bbox=(10, 20, 11, 21))
    with pytest.raises(UsageError, match=r"search\.max_items = 2"):
        search(store, catalogue, tree, max_items=2)


def test_links_that_lead_nowhere_are_rows(
    store: Store, catalogue: Catalogue, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((tree / "catalog.json").read_text())
    outside = tree.parent / "outside.json"
    write(outside, {"type": "Feature", "id": "outside"})
    (tree / "linked.json").symlink_to(outside)
    (tree / "broken.json").write_text("{")
    (tree / "list.json").write_text("[1]")
    hrefs = ["gone.json", "broken.json", "list.json", "../outside.json", "linked.json",
             "/etc/passwd", "file:///etc/passwd", "https://elsewhere.example/x.json", "http://[",
             "s2"]  # fmt: skip
    content["links"] += [{"rel": "item", "href": href} for href in hrefs]
    content["links"] += [7, {"rel": "child"}, {"rel": "item", "href": 8}]
    content["links"].append({"rel": "child", "href": "catalog.json"})  # itself
    write(tree / "catalog.json", content)
    items = search(store, catalogue, tree)
    frame = items.table("items.parquet")
    broken = frame[frame.reason == "broken_link"]
    assert items.manifest.counts == {"rows_in": 16, "rows_out": 3}
    assert len(broken) == 13
    assert (broken.status == "quarantined").all()
    assert "gone.json" in " ".join(broken.detail)
    assert "gone.json" in caplog.text
    assert str(tree) not in " ".join(broken.detail)


def test_a_fault_that_passes_is_no_broken_link(
    store: Store, catalogue: Catalogue, tree: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geofm.remote.assets.time.sleep", lambda seconds: None)
    url = serve_tree(world, tree)
    world.faults["/t/s2/a/items/a.json"] += [503, "cut", 429]
    assert verdicts(search(store, catalogue, url))["a"] == "ok"
    world.faults["/t/s2/a/items/a.json"] += [503] * 20
    with pytest.raises(RunError, match=r"a\.json of the catalogue cannot be read.*run again"):
        search(store, catalogue, url)


def test_links_stay_on_the_catalogues_own_server(
    store: Store, catalogue: Catalogue, tree: Path, world: World
) -> None:
    content = json.loads((tree / "catalog.json").read_text())
    content["links"].append({"rel": "item", "href": "http://127.0.0.2:9/item.json"})
    write(tree / "catalog.json", content)
    items = search(store, catalogue, serve_tree(world, tree))
    detail = items.table("items.parquet").set_index("reason").detail["broken_link"]
    assert "not of this catalogue's own server" in detail


def test_depth_and_circles_end(
    store: Store, catalogue: Catalogue, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(static_catalog.MAX_DEPTH + 3):
        write(tree / f"c{number}.json", catalog(f"c{number}", ("child", f"c{number + 1}.json")))
    content = json.loads((tree / "catalog.json").read_text())
    content["links"].append({"rel": "child", "href": "c0.json"})
    write(tree / "catalog.json", content)
    frame = search(store, catalogue, tree).table("items.parquet")
    assert ["links below the root" in text for text in frame[frame.item_id == ""].detail] == [True]
    monkeypatch.setattr(static_catalog, "MAX_DOCUMENTS", 5)
    with pytest.raises(RunError, match="more than 5 files"):
        search(store, catalogue, tree)


def test_assets_are_read_below_the_folder_and_nowhere_else(
    store: Store, catalogue: Catalogue, tree: Path, world: World
) -> None:
    path = tree / "s2/a/items/a.json"
    item = json.loads(path.read_text())
    (tree.parent / "secret.tif").write_bytes(world.files["/files/a/red.tif"])
    (tree / "s2/a/assets/link.tif").symlink_to(tree.parent / "secret.tif")
    hrefs = {"up": "../../../../secret.tif", "file": f"file://{tree.parent}/secret.tif",
             "etc": "/etc/passwd", "vsi": "/vsizip//etc/passwd"}  # fmt: skip
    for name, href in hrefs.items():
        bad = {**item, "id": name, "assets": {"red": {**item["assets"]["red"], "href": href}}}
        write(tree / f"s2/{name}.json", bad)
    late = {"link": "assets/link.tif", "raw": "catalog:/../secret.tif", "none": "assets/no.tif",
            "folder": "assets/."}  # fmt: skip
    for name, href in late.items():
        bad = {**item, "id": name, "assets": {"red": {**item["assets"]["red"], "href": href}}}
        write(tree / f"s2/a/{name}.json", bad)
    content = json.loads((tree / "s2/collection.json").read_text())
    content["links"] += [{"rel": "item", "href": f"{name}.json"} for name in hrefs]
    content["links"] += [{"rel": "item", "href": f"a/{name}.json"} for name in late]
    write(tree / "s2/collection.json", content)
    items = search(store, catalogue, tree)
    reasons = verdicts(items)
    assert {reasons[name] for name in hrefs} == {"bad_scheme"}
    settings = CutSettings(size_px=32, bands=["red"], max_failed=0.9)
    chips = run_stage(cut.STAGE, store, catalogue, {"items": items}, settings)
    frame = chips.table("chips.parquet", ["item_id", "status", "reason"])
    bad = frame[frame.status == "quarantined"]
    assert dict(zip(bad.item_id, bad.reason, strict=True)) == {
        "link": "bad_href", "raw": "bad_href", "none": "not_found", "folder": "not_found",
    }  # fmt: skip


def test_catalog_addresses_mean_nothing_elsewhere(
    store: Store, catalogue: Catalogue, world: World
) -> None:
    add_scene(world, "a", RED)["assets"]["red"]["href"] = "catalog:/etc/passwd"
    add_scene(world, "b", RED)
    assert verdicts(search(store, catalogue, world.url))["a"] == "bad_scheme"
    with pytest.raises(Quarantine, match="bad_scheme"):
        remote("catalog:/etc/passwd", Access(world.url))


def test_the_collection_alone_and_a_saved_search(
    store: Store, catalogue: Catalogue, tree: Path, world: World
) -> None:
    assert verdicts(search(store, catalogue, tree / "s2/collection.json")) == {"a": "ok", "b": "ok"}
    saved = {"type": "FeatureCollection", "features": [*world.items, 7]}
    write(tree / "saved.json", saved)
    assert list(verdicts(search(store, catalogue, tree / "saved.json")).values()).count("ok") == 0
    hrefs = [item["assets"]["red"] for item in world.items]
    for number, asset in enumerate(hrefs):
        asset["href"] = f"https://example.com/{number}.tif"
    write(tree / "saved.json", saved)
    assert sorted(verdicts(search(store, catalogue, tree / "saved.json")).values()) == [
        "ok", "ok", "ok", "wrong_types",
    ]  # fmt: skip


def test_addresses_that_hold_no_catalogue(
    store: Store, catalogue: Catalogue, tmp_path: Path, world: World
) -> None:
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(UsageError, match=r"neither catalog\.json nor collection\.json"):
        search(store, catalogue, tmp_path)
    with pytest.raises(RunError, match=r"no JSON; check search\.stac"):
        search(store, catalogue, tmp_path / "text.json")
    with pytest.raises(RunError, match=r"cannot be read.*check search\.stac"):
        search(store, catalogue, tmp_path / "gone.json")
    for address in ("earth-search", "ftp://x/catalog.json", "file:", "gs://b/catalog.json"):
        with pytest.raises(ValueError, match="STAC API"):
            SearchSettings(stac=address)


@pytest.mark.parametrize(
    ("base", "href", "address"),
    [
        ("/d/c/x.json", "../a.tif", "/d/a.tif"),
        ("/d/c/x.json", "file:///d/a%20b.tif", "/d/a b.tif"),
        ("s3://b/c/x.json", "../../../a.tif", "s3://b/a.tif"),
        ("s3://b/c/x.json", "https://h/a.tif", "https://h/a.tif"),
        ("https://h/c/x.json", "/a.tif", "https://h/a.tif"),
        ("https://h/c/x.json", "file:///a.tif", "file:///a.tif"),
    ],
)
def test_relative_addresses(base: str, href: str, address: str) -> None:
    assert resolve_href(base, href) == address


def test_what_belongs_to_a_catalogue() -> None:
    assert lies_within("s3://b/c.json", "s3://b/d/e.json")
    assert not lies_within("s3://b/c.json", "s3://bb/e.json")
    assert lies_within("https://h/c.json", "http://h/e.json")
    assert not lies_within("https://h/c.json", "/etc/passwd")
    assert not lies_within("/d/c.json", "/dd/e.json")
