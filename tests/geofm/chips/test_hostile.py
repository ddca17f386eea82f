"""What strangers may write into items, headers and answers: a row with a reason, never a crash."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from affine import Affine
from rasterio.io import MemoryFile

from data_catalog.errors import RunError
from geofm.config.recipe import SearchSettings
from geofm.formats.npy import read_chip
from geofm.raster.grid import make_grid
from geofm.remote import assets, http, retry
from geofm.remote.assets import HttpAsset
from geofm.remote.quarantine import PASSING, Quarantine
from geofm.remote.url_policy import Access, Signing, is_public, locate
from geofm.stac import api_client
from geofm.stac.api_client import list_collections, open_api
from geofm.stac.canonical_item import canonicalize
from geofm.stac.item import check_geometry, is_number
from geofm.stac.validate_items import validate_items
from tests.geofm.chips.test_cut import Run, good, reasons, run
from tests.geofm.stac.small_world import World, add_scene, texture, tiff

__all__ = ["run"]  # a fixture
RED = texture(32, 32)
HUGE = 10**400


def spoiled(run: Run, name: str) -> dict[str, Any]:
    """An item listed with a good one beside it."""
    if not run.world.items:
        add_scene(run.world, "good", {"red": RED})
    return add_scene(run.world, name, {"red": RED})


def test_numbers_that_no_float_holds(run: Run) -> None:
    assert not is_number(HUGE)
    cloudy = spoiled(run, "cloudy")
    cloudy["properties"]["eo:cloud_cover"] = HUGE
    moved = spoiled(run, "moved")
    moved["assets"]["red"]["proj:transform"] = [HUGE, 0, 0, 0, -10, 0]
    far = spoiled(run, "far")
    far["geometry"]["coordinates"][0][0] = [HUGE, HUGE]
    endless = spoiled(run, "endless")
    endless["properties"]["eo:cloud_cover"] = 10**4000
    nan = spoiled(run, "nan")
    nan["properties"]["eo:cloud_cover"] = float("nan")
    frame = run.items().table("items.parquet").set_index("item_id")
    assert dict(frame.reason) == {
        "endless": "not_json",
        "nan": "not_json",
        "good": "", "cloudy": "wrong_types", "moved": "wrong_types", "far": "bad_geometry",
    }  # fmt: skip
    with pytest.raises(Quarantine, match="bad_geometry"):
        check_geometry({"type": "Polygon", "coordinates": [[[HUGE, 0], [1, 0], [1, 1]]]})


@pytest.mark.parametrize(
    "href",
    ["https://h/\x1b.tif", "https://h/a\nb.tif", "https://h/" + "x" * 70_000, "http://a..b/x",
     "https://xn--\u0378\u0379.\udc80/x", "http://[bad/x", "http://" + "a" * 64 + ".org/x",
     "http://h:99999/x", "s3://[bad", "s3://", "s3://bucket", "s3://bucket/a\x00b"],
)  # fmt: skip
@pytest.mark.parametrize("allow", [(), ("*", "s3://*")])
def test_addresses_that_nobody_can_ask(href: str, allow: tuple[str, ...]) -> None:
    with pytest.raises(Quarantine, match=r"^bad_(href|scheme)") as found:
        locate(href, Access("https://example.org", allow_hosts=allow))
    assert found.value.detail.isprintable()


def test_addresses_that_nobody_can_ask_are_rows(run: Run) -> None:
    hrefs = ["https://h/\x1b.tif", "https://h/" + "x" * 70_000, "http://a..b/x", "http://[bad/x"]
    for number, href in enumerate(hrefs):
        spoiled(run, f"i{number}")["assets"]["red"]["href"] = href
    locations = ["http://a..b/x", "http://[bad/x", "https://h/" + "x" * 9000]
    for number, location in enumerate(locations):
        spoiled(run, f"r{number}")
        run.world.files.pop(f"/files/r{number}/red.tif")
        run.world.redirects[f"/files/r{number}/red.tif"] = location
    chips = run.chips()
    assert set(reasons(chips).values()) == {"bad_href"}
    assert len(reasons(chips)) == 7


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(5e-324, 0.0), (1e-300, 0.0), (1e-30, -0.1), (1e-4, 1e308), (1e300, 0.0)],
)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_scales_that_no_sensor_has(run: Run, scale: float, offset: float, dtype: str) -> None:
    item = spoiled(run, "scaled")
    item["assets"]["red"]["raster:bands"] = [{"scale": scale, "offset": offset}]
    del item["assets"]["red"]["file:checksum"]
    run.world.add("/files/scaled/red.tif", tiff(RED.astype(dtype)))
    assert reasons(run.chips()) == {"scaled": "bad_scale"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gsd": 1e-300}, "bad_transform"),
        ({"gsd": 1e30}, "bad_transform"),
        ({"west": 1e200}, "bad_transform"),
        ({"west": 9e8, "north": 9e8}, "footprint_mismatch"),
        ({"crs": "IAU_2015:30100"}, "bad_crs"),
    ],
)
def test_headers_that_are_not_of_the_earth(run: Run, change: dict[str, Any], reason: str) -> None:
    item = spoiled(run, "bad")
    del item["assets"]["red"]["file:checksum"]
    del item["properties"]["proj:epsg"]
    run.world.add("/files/bad/red.tif", tiff(RED, **change))
    assert reasons(run.chips()) == {"bad": reason}


def empty_tiff(height: int, width: int, **more: Any) -> bytes:
    """A file of a few bytes that says it has many pixels."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=height, width=width, crs="EPSG:32631", dtype="uint16",
            transform=Affine(10, 0, 448_000, 0, -10, 5_411_200), SPARSE_OK=True, bigtiff="yes",
            **{"count": 1, "tiled": True, "blockxsize": 4096, "blockysize": 4096, **more},
        ):  # fmt: skip
            pass
        return bytes(memory.read())


def test_many_pixels_are_refused_though_the_item_states_them(run: Run) -> None:
    item = spoiled(run, "vast")
    del item["assets"]["red"]["file:checksum"]
    item["assets"]["red"]["proj:shape"] = [200_000, 200_000]
    run.world.add("/files/vast/red.tif", empty_tiff(200_000, 200_000))
    thick = spoiled(run, "thick")
    del thick["assets"]["red"]["file:checksum"]
    thick["assets"]["red"]["proj:shape"] = [4096, 4096]
    run.world.add("/files/thick/red.tif", empty_tiff(4096, 4096, count=9))
    assert reasons(run.chips()) == {"vast": "too_many_pixels", "thick": "too_many_pixels"}


def test_cells_are_counted() -> None:
    to = (10.0, 0.0, 0.0, 0.0, -10.0, 0.0)
    assert make_grid("EPSG:32631", to, (10_980, 10_980), 16, None).cell_count == 686**2
    for shape, gsd_m in (((40_000, 40_000), None), ((100, 100), 1e-300), ((9000, 9000), 0.05)):
        with pytest.raises(Quarantine, match="too_many_cells"):
            make_grid("EPSG:32631", to, shape, 16, gsd_m)


def test_floats_beyond_all_counts_are_saturated(run: Run) -> None:
    item = spoiled(run, "float")
    del item["assets"]["red"]["file:checksum"]
    item["assets"]["red"]["raster:bands"] = [{"scale": 1e3}]
    bright = np.full((32, 32), 1e307)
    bright[0] = -1e307
    run.world.add("/files/float/red.tif", tiff(bright, nodata=None))
    chips = run.chips()
    frame = good(chips)
    got = read_chip(chips, frame[frame.item_id == "float"].iloc[0])[0]
    assert (got[0] == 1).all()
    assert (got[1:] == 65_535).all()


def test_messages_are_printable() -> None:
    problem = Quarantine("bad_id", "a\x1b[31mb\nc\udc80")
    assert problem.detail == "a\\x1b[31mb\\nc\\udc80"
    assert str(problem).isprintable()


def test_what_a_passing_fault_says_is_not_kept() -> None:
    one = Quarantine("unreachable", "http://127.0.0.1:4711: refused", passing=True)
    assert one.kept == PASSING
    assert Quarantine("not_found", "x").kept == "x"


def test_unfreezable_items_are_told_apart_by_what_lasts() -> None:
    def item(port: int, sign: str) -> dict[str, Any]:
        return {
            "id": "a", "collection": "c", "properties": {"x": float("nan")},
            "links": [{"href": f"http://h:{port}/"}],
            "assets": {"red": {"href": f"https://h/x?se=1&sig={sign}"},
                       "near": {"href": f"http://127.0.0.1:{port}/x"}},
        }  # fmt: skip

    def digest(listed: dict[str, Any], url: str) -> str:
        row = validate_items([canonicalize(listed, url)], SearchSettings(), {"c": {}}, "planet")[0]
        assert row["reason"] == "not_json"
        return str(row["item_sha256"])

    first = digest(item(1, "a"), "http://127.0.0.1:1")
    turned = dict(reversed(item(2, "b").items()))
    assert digest(turned, "http://127.0.0.1:2") == first
    other = {**item(1, "a"), "extra": 1}
    assert digest(other, "http://127.0.0.1:1") != first


def test_collections_without_a_plain_name_are_skipped(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.collections += [{"id": "good"}, {"id": "../\x1b[31m"}, {"id": 7}]
    assert list(list_collections(open_api(world.url).io, world.url)) == ["good"]
    assert "../\\x1b[31m" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("there", "said"),
    [("/collections", "was read before"), ("http://127.0.0.2:9/collections", "another server")],
)
def test_pages_that_lead_elsewhere(world: World, there: str, said: str) -> None:
    href = there if there.startswith("http") else world.url + there
    page = {"collections": [{"id": "a"}], "links": [{"rel": "next", "href": href}]}
    world.add("/collections", json.dumps(page).encode())
    with pytest.raises(RunError, match=said):
        list_collections(open_api(world.url).io, world.url)


def test_endless_pages_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "MAX_PAGES", 3)
    pages = [{"collections": [{"id": f"c{n}"}]} for n in range(9)]
    io = open_api(world.url).io
    monkeypatch.setattr(io, "get_pages", lambda url: iter(pages))
    with pytest.raises(RunError, match="more than 3 pages"):
        list_collections(io, world.url)


def test_a_server_cannot_make_us_wait_for_hours(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    world.headers["/collections"] = {"retry_after": "21000"}
    world.faults["/collections"] += [503]
    world.collections += [{"id": "good"}]
    assert list(list_collections(open_api(world.url).io, world.url)) == ["good"]
    assert pauses == [retry.MAX_PAUSE]


def test_an_endless_signing_answer_is_not_read_to_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    href = world.add("/red.tif", b"x")
    world.add("/sign", b" " * 50_000_000)
    world.faults["/red.tif"] += [403]
    taken = []
    whole = http.Answer.read

    def watch(answer: http.Answer, most: int) -> bytes:
        data = whole(answer, most)
        taken.append((len(data), answer.response.tell()))
        return data

    monkeypatch.setattr(http.Answer, "read", watch)
    began = time.monotonic()
    with pytest.raises(Quarantine, match="forbidden"):
        HttpAsset(href, Access(world.url), Signing("{api}/sign?href={href}")).whole(10)
    assert time.monotonic() - began < 5
    assert (assets.MAX_SIGNED, assets.MAX_SIGNED) in taken
    assert max(size for _, size in taken) < 1_000_000


@pytest.mark.parametrize(
    "address",
    ["64:ff9b::7f00:1", "fec0::1", "::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "ff02::1"],
)
def test_addresses_that_only_look_public(address: str) -> None:
    assert not is_public(address)
    assert is_public("2606:4700:4700::1111")
    assert is_public("64:ff9b::808:808")
