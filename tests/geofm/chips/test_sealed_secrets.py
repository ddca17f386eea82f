"""No secret of a listing is sealed, recorded or logged, and signing changes no identity."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest

from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.chips import cut
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.remote.quarantine import Quarantine
from geofm.stac.canonical_item import canonical_text, canonicalize
from tests.geofm.stac.small_world import World, add_scene, texture
from tests.geofm.stac.test_search import search, verdicts

RED = {"red": texture(32, 32)}
HUSH = "hUsh0123456789AbCd"


def sign(href: str, night: int, way: int) -> str:
    """An href as a server signs it on one night, in one of many ways."""
    value = f"{HUSH}{night}"
    query = [
        f"?X-Goog-Algorithm=x&X-Goog-Date={night}&X-Goog-Signature={value}",
        f"?Expires={night}&Signature={value}&Key-Pair-Id={value}",
        f"?AWSAccessKeyId={value}&Signature={value}&Expires={night}",
        f"?x-amz-signature={value}&X-AMZ-DATE={night}&x-Amz-Security-Token={value}",
        f"?sv=2020&sr=b&si=policy&sig={value}",
        f"?st={night}&se={night}&sp=r&sv=2020&sr=b&sig={value}",
        f"?api_key={value}", f"?access_token={value}&expires={night}", f"?token={value}",
    ][way]  # fmt: skip
    return href.replace("://", f"://me:{value}@") + query


def signed(item: dict[str, Any], night: int, way: int) -> dict[str, Any]:
    """An item with signatures of one night in all its corners."""
    item = copy.deepcopy(item)
    elsewhere = sign("https://data.example/x.tif", night, way)
    for asset in item["assets"].values():
        asset["href"] = sign(asset["href"], night, way)
        asset["alternate"] = {
            "s3": {"href": elsewhere, "alternate": {"https": {"href": elsewhere}}}
        }
    item["properties"]["preview"] = f"see [this]({elsewhere}) or {elsewhere}"
    item["properties"]["nested"] = [{"href": elsewhere, "api_key": f"{HUSH}{night}"}]
    item["links"] = [{"rel": "self", "href": elsewhere}]
    item["collection_assets"] = {"item_assets": {"a": {"href": elsewhere}}}
    return item


def assert_silent(store: Store, catalogue: Catalogue) -> None:
    """Neither a file of the store nor the catalogue holds the secret."""
    files = [path for path in store.local_root.rglob("*") if path.is_file()]
    assert files
    assert [str(path) for path in files if HUSH.encode() in path.read_bytes()] == []
    assert [row.error for row in catalogue.runs() if HUSH in str(row.error)] == []
    database = catalogue.url.removeprefix("sqlite:///")
    for name in (database, database + "-wal"):
        with open(name, "rb") as file:  # noqa: PTH123  a plain file beside the database
            assert HUSH.encode() not in file.read()


@pytest.mark.parametrize("way", range(9))
def test_an_item_is_the_same_on_every_night(way: int) -> None:
    item = {"type": "Feature", "id": "a", "collection": "c", "properties": {}, "links": [],
            "assets": {"red": {"href": "https://data.example/a%20b.tif"}}}  # fmt: skip
    nights = [canonicalize(signed(item, night, way)) for night in (1, 2)]
    assert nights[0].sha256 == nights[1].sha256
    assert HUSH not in nights[0].text
    assert json.loads(nights[0].text)["assets"]["red"]["href"] == "https://data.example/a%20b.tif"
    broken = [canonicalize({**signed(item, night, way), "bad": float("nan")}) for night in (1, 2)]
    assert broken[0].sha256 == broken[1].sha256


def test_parameters_that_choose_the_bytes_are_kept() -> None:
    hrefs = ["https://h/a?version=3&id=7", "https://h/a?sig=7", "https://h/a?x=%2F+%20"]
    item = {"assets": {str(n): {"href": href} for n, href in enumerate(hrefs)}}
    kept = json.loads(canonical_text(item))["assets"]
    assert [kept[str(n)]["href"] for n in range(3)] == hrefs


@pytest.mark.parametrize("way", [0, 3, 5])
def test_nothing_of_a_signature_is_sealed(
    store: Store, catalogue: Catalogue, world: World, caplog: pytest.LogCaptureFixture, way: int
) -> None:
    caplog.set_level(logging.DEBUG)
    good = add_scene(world, "good", RED)
    gone = add_scene(world, "gone", RED)
    gone["assets"]["red"]["href"] = sign("http://127.0.0.1:9/x.tif", 1, way)
    strange = add_scene(world, "strange", RED)
    strange["assets"]["red"]["href"] = sign("gopher://h/x.tif", 1, way)
    flat = add_scene(world, "flat", RED)
    flat["assets"]["red"]["href"] = 7
    world.collections[0]["item_assets"] = {"a": {"href": sign("https://h/x", 1, way)}}
    world.collections[0]["links"] = [{"rel": "x", "href": sign("https://h/x", 1, way)}]
    world.items.append({"id": sign("https://h/x", 1, way), "collection": "sentinel-2-test"})
    listed = list(world.items)
    digests = []
    for night in (1, 2):
        world.items[:] = [signed(one, night, way) if "assets" in one and one is not flat else one
                          for one in listed]  # fmt: skip
        items = search(store, catalogue, world.url)
        digests.append(items.digest)
    assert digests[0] == digests[1], "another signature is no other item"
    assert verdicts(items)["good"] == ("ok", "")
    settings = CutSettings(size_px=32, bands=["red"], retries=0, max_failed=0)
    with pytest.raises(RunError, match=r"max_failed"):
        run_stage(cut.STAGE, store, catalogue, {"items": items}, settings)
    settings.max_failed = 0.9
    chips = run_stage(cut.STAGE, store, catalogue, {"items": items}, settings)
    assert chips.manifest.counts["rows_out"] > 0
    assert good["id"] in set(chips.table("chips.parquet").item_id)
    assert_silent(store, catalogue)
    assert HUSH not in caplog.text


def test_a_static_catalogue_that_is_signed_seals_nothing(
    store: Store, catalogue: Catalogue, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    item = add_scene(world, "a", RED)
    digests = []
    for night in (1, 2):
        world.add("/a.json", json.dumps(signed(item, night, 5)).encode())
        sas = f"?sv=1&se={night}&sig={HUSH}{night}"
        links = [
            {"rel": "item", "href": f"a.json{sas}"},
            {"rel": "child", "href": f"none.json{sas}"},
            {"rel": "child", "href": f"https://u:{HUSH}@elsewhere.example/c.json"},
        ]
        root = {"type": "Catalog", "id": "t", "stac_version": "1.0.0", "links": links}
        world.add("/catalog.json", json.dumps(root).encode())
        digests.append(search(store, catalogue, world.url + "/catalog.json").digest)
    assert digests[0] == digests[1]
    assert_silent(store, catalogue)
    assert HUSH not in caplog.text


def test_errors_of_the_api_are_masked(
    store: Store, catalogue: Catalogue, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", HUSH)
    stac = SearchSettings(stac="http://127.0.0.1:9/v1?token=${TOKEN}").stac
    with pytest.raises(RunError) as found:
        search(store, catalogue, stac)
    error: BaseException | None = found.value
    while error is not None:  # a traceback shows the whole chain
        assert HUSH not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert_silent(store, catalogue)
    assert HUSH not in str(Quarantine("not_found", f"https://h/x?sig={HUSH}&se=1 is gone"))
