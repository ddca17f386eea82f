"""The STAC API as its clients use it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import httpx
import numpy as np
import pystac_client
import pytest
import rasterio
from rasterio.windows import Window

from data_catalog.errors import RunError
from geofm.planet.catalog.server import ServedWorld, serve_world


@pytest.fixture(scope="module")
def client(served: ServedWorld) -> pystac_client.Client:
    return pystac_client.Client.open(served.url)


def test_paging_finds_every_item_once(client: pystac_client.Client, small_world: Path) -> None:
    ids = {path.stem for path in small_world.glob("items/*/*.json")}
    assert len(ids) == 8
    for method in ("GET", "POST"):
        searched = [item.id for item in client.search(limit=3, method=method).items()]
        assert sorted(searched) == sorted(ids)
    assert {c.id for c in client.get_collections()} == {"planet-s2", "planet-hr"}
    listed = [item.id for c in client.get_collections() for item in c.get_items()]
    assert sorted(listed) == sorted(ids)


def test_serving_closes_no_log_handler_of_the_process(small_world: Path) -> None:
    closed = []

    class Watched(logging.NullHandler):
        def close(self) -> None:
            closed.append("the planet's server")
            super().close()

    handler = Watched()
    with serve_world(small_world):
        pass
    assert closed == []
    handler.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_filters(client: pystac_client.Client, method: str) -> None:
    def ids(**query: object) -> set[str]:
        return {i.id for i in client.search(method=method, limit=2, **query).items()}  # type: ignore[arg-type]

    assert ids(collections=["planet-hr"]) == {"HR_A02_20230618"}
    assert ids(ids=["S2A_31TXE_20240428_0_L2A", "none"]) == {"S2A_31TXE_20240428_0_L2A"}
    in_2021 = ids(datetime="2021-01-01/2021-12-31")
    assert in_2021 == {"S2A_31TXD_20210603_0_L2A", "S2A_31TXD_20210603_1_L2A"}
    lake = ids(bbox=[6.0, 45.1, 6.4, 45.3])
    assert lake == {"S2A_31TXG_20231016_0_L2A", "S2A_32TXA_20231016_0_L2A"}
    assert ids(bbox=[0, 0, 1, 1]) == set()
    corner = {"type": "Point", "coordinates": [6.1, 45.21]}
    assert ids(intersects=corner) <= lake
    assert ids(datetime="2025-01-01/..") == set()


def test_sorting(client: pystac_client.Client) -> None:
    up = [i.datetime for i in client.search(sortby=["+properties.datetime"], limit=3).items()]
    down = [i.datetime for i in client.search(sortby=["-properties.datetime"], limit=3).items()]
    assert up == sorted(up, key=str) and down == up[::-1]


def test_items_are_valid_and_their_links_lead_back(client: pystac_client.Client) -> None:
    item = next(client.search(ids=["S2A_31TXD_20240428_0_L2A"]).items())
    assert item.properties["license"] == "CC0-1.0"
    again = httpx.get(item.get_self_href() or "").json()
    assert again["id"] == item.id
    assert again["assets"]["red"]["href"] == item.assets["red"].href
    assert item.get_collection() is not None


@pytest.mark.parametrize(
    "query",
    [{"bbox": "1,2,3"}, {"datetime": "yesterday"}, {"limit": "none"}, {"token": "x"},
     {"bbox": "0,0,1,1", "intersects": '{"type": "Point", "coordinates": [0, 0]}'},
     {"intersects": "{"}],
)  # fmt: skip
def test_bad_queries_are_told(served: ServedWorld, query: dict[str, str]) -> None:
    answer = httpx.get(served.url + "/search", params=query)
    assert answer.status_code == 400
    assert answer.json()["description"]


def test_what_is_not_there(served: ServedWorld) -> None:
    for path in ("/collections/none", "/collections/planet-s2/items/none", "/assets/none.tif",
                 "/assets/../truth.json", "/assets/%2e%2e/truth.json"):  # fmt: skip
        assert httpx.get(served.url + path).status_code == 404


def test_byte_ranges(served: ServedWorld, small_world: Path, client: pystac_client.Client) -> None:
    asset = next(client.search(ids=["S2A_31TXE_20240428_0_L2A"]).items()).assets["nir"]
    data = (small_world / asset.href.removeprefix(served.url + "/")).read_bytes()
    whole = httpx.get(asset.href)
    assert whole.content == data
    assert whole.headers["etag"].strip('"') == asset.extra_fields["file:checksum"][4:]
    head = httpx.head(asset.href)
    assert int(head.headers["content-length"]) == len(data) and not head.content
    part = httpx.get(asset.href, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, data[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(data)}"
    last = httpx.get(asset.href, headers={"Range": "bytes=-50"})
    assert (last.status_code, last.content) == (206, data[-50:])
    beyond = httpx.get(asset.href, headers={"Range": f"bytes={len(data)}-"})
    assert beyond.status_code == 416
    same = httpx.get(asset.href, headers={"If-None-Match": whole.headers["etag"]})
    assert same.status_code == 304


def test_a_window_over_http_equals_the_local_one(
    served: ServedWorld, small_world: Path, client: pystac_client.Client
) -> None:
    href = next(client.search(ids=["S2A_31TXD_20240428_0_L2A"]).items()).assets["red"].href
    window = Window(40, 90, 128, 128)
    quiet = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR")
    with quiet, rasterio.open(f"/vsicurl/{href}") as remote:
        far = remote.read(1, window=window)
    with rasterio.open(small_world / href.removeprefix(served.url + "/")) as local:
        assert np.array_equal(far, local.read(1, window=window))
    assert far.std() > 0


def test_serving_nothing_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no planet.*python -m geofm\.planet"):
        serve_world(tmp_path)


def test_a_taken_port_is_told(served: ServedWorld, small_world: Path) -> None:
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(RunError, match="give another"):
        serve_world(small_world, port)


def test_answers_are_the_documented_shapes(served: ServedWorld) -> None:
    landing = httpx.get(served.url + "/").json()
    assert {link["rel"] for link in landing["links"]} >= {"self", "root", "data", "search"}
    conformance = httpx.get(served.url + "/conformance").json()["conformsTo"]
    assert "https://api.stacspec.org/v1.0.0/item-search" in conformance
    page = httpx.post(served.url + "/search", content=json.dumps({"limit": 2})).json()
    assert (page["numberReturned"], page["numberMatched"]) == (2, 8)
