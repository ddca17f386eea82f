"""The built-in source profiles: bands, scales, and access to assets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import s3fs

from data_catalog.sources import Source, source_for
from geofm.remote import assets as remote
from geofm.remote.url_policy import Access, Signing, s3_options, signing_of
from geofm.stac.bands import find_band
from geofm.stac.profile_check import check_profile
from tests.geofm.stac.small_world import polygon

EARTH = "https://earth-search.aws.element84.com/v1"
PC = "https://planetarycomputer.microsoft.com/api/stac/v1"
AWS = (
    "AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL",
    "AWS_REGION", "AWS_DEFAULT_REGION",
)  # fmt: skip


def item(assets: dict[str, Any], **properties: Any) -> dict[str, Any]:
    whole = {key: {"href": f"s3://bucket/{key}.tif", **asset} for key, asset in assets.items()}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "one", "collection": "any", "links": [],
        "geometry": polygon(448_000, 5_411_200, 1000, 1000), "assets": whole,
        "properties": {"datetime": "2020-01-01T00:00:00Z", **properties},
    }  # fmt: skip


@pytest.mark.parametrize("api", [EARTH, PC])
def test_naip_bands_go_by_index_where_the_item_is_silent(api: str) -> None:
    naip = source_for(api, "naip")
    silent = item({"image": {}})
    indices = {
        name: find_band(silent, name, naip).index for name in ("red", "green", "blue", "nir")
    }
    assert indices == {"red": 1, "green": 2, "blue": 3, "nir": 4}
    swapped = [{"name": n, "common_name": n} for n in ("nir", "red", "green", "blue")]
    stated = item({"image": {"eo:bands": swapped}})
    assert [find_band(stated, name, naip).index for name in ("nir", "red")] == [1, 2]


@pytest.mark.parametrize(
    ("stated", "scale", "offset"),
    [
        ({}, 2.75e-5, -0.2),
        ({"scale": 2.75e-5, "offset": -0.2}, 2.75e-5, -0.2),
        ({"scale": 0.0001}, 0.0001, 0.0),
    ],
)
def test_landsat_is_scaled_as_stated_else_as_usgs_says(
    stated: dict[str, float], scale: float, offset: float
) -> None:
    landsat = source_for(EARTH, "landsat-c2-l2")
    band = find_band(item({"nir08": {"raster:bands": [stated]}}), "nir", landsat)
    assert (band.scale or band.usual_scale, band.offset, band.nodata) == (scale, offset, 0)


def test_every_band_of_the_lists_is_found_in_items_like_the_providers(shared: Path) -> None:
    folder = shared / "data" / "landsat_c2" / "stac_examples" / "examples" / "landsat-c2-l2"
    for api in (EARTH, PC):
        source = source_for(api, "landsat-c2-l2")
        for path in sorted(folder.glob("L[CT]0[89]*/*.json")):
            content = json.loads(path.read_text())
            for asset in content["assets"].values():
                asset["href"] = "s3://usgs-landsat/" + asset["href"].rpartition("/")[2]
            report = check_profile(content, source)
            assert report["problems"] == []
            assert {b["name"] for b in report["bands"]} >= set(source.bands)
            own = [b for b in report["bands"] if b["name"] in source.bands]
            assert {(b["scale"], b["offset"], b["nodata"]) for b in own} == {(2.75e-5, -0.2, 0)}
            lwir = next(b for b in report["bands"] if b["name"] == "lwir11")
            assert (lwir["scale"], lwir["offset"]) == (0.00341802, 149.0)
            assert report["cloud"]["asset"] == "qa_pixel"


def test_what_can_not_be_used_is_said_and_not_raised() -> None:
    source = source_for("http://any", "any")
    for bad in (7, None, [], {}, {"id": "../x"}, item({}), item({"a": {"href": "file:///etc"}})):
        report = check_profile(bad, source)
        assert report["problems"], bad
        json.dumps(report)
    nothing = check_profile(item({"a": {"type": "image/tiff"}}), source)
    assert "name their assets" in nothing["problems"][0]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_wins_over_the_profile(clean: pytest.MonkeyPatch) -> None:
    paid = signing_of(source_for(EARTH, "naip"))
    own = Signing(endpoint="http://minio:9000", region="here")
    assert s3_options(Signing()) == (False, False, "", "")
    assert s3_options(paid) == (False, True, "", "us-west-2")
    assert s3_options(own) == (False, False, "http://minio:9000", "here")
    clean.setenv("AWS_REQUEST_PAYER", "requester")
    assert s3_options(own)[1]
    clean.setenv("AWS_REQUEST_PAYER", "")
    assert not s3_options(paid)[1]
    clean.setenv("AWS_REGION", "eu-central-1")
    clean.setenv("AWS_ENDPOINT_URL", "http://gateway:1")
    assert s3_options(own) == (False, False, "http://gateway:1", "eu-central-1")
    clean.setenv("AWS_NO_SIGN_REQUEST", "YES")
    clean.delenv("AWS_REQUEST_PAYER")
    assert s3_options(paid)[:2] == (True, False)  # nobody can pay without a name


def test_a_profiles_endpoint_is_where_its_assets_are_read(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3}/profile/red.tif", b"pixels")
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    signing = Signing("", False, True, endpoint, "us-east-1", credentials_for=("bucket/profile",))
    asset = remote.remote(f"{s3}/profile/red.tif", Access("http://any", retries=0), signing)
    piece = asset.whole(100)
    assert piece is not None
    assert piece.data == b"pixels"
    assert asset.part(2, 4).data == b"xe"


def test_requester_pays_reaches_every_request(clean: pytest.MonkeyPatch) -> None:
    signing = signing_of(Source(name="x", title="x", provider="x", licence="MIT",
                                requester_pays=True, endpoint="http://127.0.0.1:9",
                                region="us-west-2"))  # fmt: skip
    asset = remote.remote("s3://bucket/red.tif", Access("http://any"), signing)
    assert isinstance(asset, remote.S3Asset)
    files = remote.s3_files(*s3_options(asset.signing), 0)
    assert files.req_kw == {"RequestPayer": "requester"}
    assert files.endpoint_url == "http://127.0.0.1:9"
    assert files.client_kwargs == {"region_name": "us-west-2"}
