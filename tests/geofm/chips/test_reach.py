"""Which buckets are read with credentials, and which hosts are public."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.chips import cut
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.remote import http
from geofm.remote.assets import S3Asset, remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import (
    Access,
    Signing,
    catalogue_access,
    check_host,
    credentials_allowed,
    is_public,
)
from tests.geofm.chips.test_strangers import _direct, search
from tests.geofm.remote.seen import Seen, watch
from tests.geofm.stac.small_world import World, add_scene, texture

__all__ = ["_direct"]  # a fixture
RED = {"red": texture(32, 32)}


@pytest.fixture
def seen() -> Iterator[Seen]:
    with watch() as found:
        yield found


# Buckets -----------------------------------------------------------------------------------------


@pytest.fixture
def aws(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A gateway that shows whether requests are signed, and a user with credentials."""
    for name in ("AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUSH")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", seen.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return seen


@pytest.mark.parametrize(
    ("access", "signing", "signed"),
    [
        ({}, {}, False),
        ({}, {"requester_pays": True}, False),
        ({}, {"credentials_for": ("other",), "requester_pays": True}, False),
        ({}, {"credentials_for": ("mine",)}, True),
        ({}, {"credentials_for": ("mi*",)}, True),
        ({"credentials_for": ("mine",)}, {}, True),
        ({"credentials_for": ("s3://mine/a",)}, {}, True),
        ({"credentials_for": ("mine/a/",)}, {}, True),
        ({"credentials_for": ("mine/b", "min", "mine/a/b")}, {}, False),
        ({"stac": "s3://mine/a/catalog.json"}, {}, True),
        ({"stac": "s3://mine/c/catalog.json"}, {}, False),
    ],
)
def test_credentials_are_used_for_named_buckets_only(
    aws: Seen, access: dict[str, Any], signing: dict[str, Any], signed: bool
) -> None:
    may = Access(**{"stac": "http://h.example", "retries": 0, **access})
    with pytest.raises(Quarantine, match="forbidden") as found:
        S3Asset("s3://mine/a/x.tif", may, Signing(**signing)).whole(10)
    assert ("search.credentials_for" in found.value.detail) is not signed
    assert aws.requests
    for _, path, headers in aws.requests:
        assert path.startswith("/mine/a/x.tif")
        assert ("authorization" in headers) is signed
        assert "x-amz-request-payer" not in headers
        assert "AKIAHUSH" not in path


def test_a_prefix_is_whole_steps_of_a_key() -> None:
    may = Access("http://h", credentials_for=("mine/a",))
    assert credentials_allowed("s3://mine/a/x", may, Signing())
    for href in ("s3://mine/ab/x", "s3://mine/a/../secret", "s3://mine/x/a", "s3://mine2/a/x",
                 "https://mine.s3.amazonaws.com/a/x", "s3://mine"):  # fmt: skip
        assert not credentials_allowed(href, may, Signing())


def test_https_addresses_of_buckets_are_never_signed(aws: Seen) -> None:
    access = Access(aws.url, retries=0, credentials_for=("mine",))
    with pytest.raises(Quarantine, match="forbidden"):
        remote(aws.url + "/mine/a/x.tif", access).part(0, 4)
    assert "authorization" not in aws.requests[0][2]


def test_a_bucket_that_an_item_names_is_not_read_with_credentials(
    store: Store, catalogue: Catalogue, world: World, aws: Seen
) -> None:
    for collection in ("sentinel-2-test", "landsat-c2-l2", "naip"):
        item = add_scene(world, f"in-{collection}", RED, collection=collection)
        item["assets"]["red"]["href"] = "s3://private/x.tif"
    items = search(store, catalogue, world.url)
    with pytest.raises(RunError, match="forbidden 3"):
        run_stage(cut.STAGE, store, catalogue, {"items": items},
                  CutSettings(size_px=32, bands=["red"], retries=0))  # fmt: skip
    assert aws.requests
    assert not any("authorization" in headers for _, _, headers in aws.requests)


@pytest.mark.parametrize("text", ["", "a b", "https://h/x", "/x", "s3://"])
def test_buckets_are_written_as_buckets(text: str) -> None:
    with pytest.raises(ValueError, match="usgs-landsat"):
        SearchSettings(credentials_for=[text])


# Proxies and special addresses -------------------------------------------------------------------


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "all_proxy"])
@pytest.mark.parametrize("host", ["metadata.google.internal", "intranet.corp.invalid"])
def test_names_that_only_a_proxy_resolves_are_refused(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, name: str, upper: bool, host: str
) -> None:
    monkeypatch.setenv(name.upper() if upper else name, seen.url)
    http.proxy_for.cache_clear()

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for scheme in ("http", "https"):
        with pytest.raises(Quarantine, match=r"host_refused.*search\.allow_hosts") as found:
            check_host(f"{scheme}://{host}/x", Access("https://api.example"))
        assert not found.value.passing
        check_host(f"{scheme}://{host}/x", Access("https://api.example", allow_hosts=(host,)))


def test_an_unknown_name_without_a_proxy_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(Quarantine, match="unreachable") as found:
        check_host("http://nothing.invalid/x", Access("https://api.example"))
    assert found.value.passing


@pytest.mark.parametrize(
    "address",
    ["168.63.129.16", "192.0.0.1", "192.0.0.9", "192.0.0.192", "192.88.99.1", "100.64.0.1",
     "100.127.255.255", "169.254.0.1", "169.254.169.254", "0.0.0.0", "0.1.2.3", "255.255.255.255",
     "224.0.0.1", "239.1.1.1", "240.0.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1",
     "198.18.0.1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "127.0.0.1",
     "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fc00::1", "::", "::1", "::ffff:169.254.169.254",
     "::ffff:168.63.129.16", "::ffff:192.0.0.192", "64:ff9b::a83f:8110", "64:ff9b::a9fe:a9fe",
     "64:ff9b:1::1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:808:808::1", "2001::1",
     "2001:db8::1", "3fff::1", "ff02::1", "ff0e::1", "100::1", "2001:20::1", "fec0::1"],
)  # fmt: skip
def test_no_public_host_has_a_special_address(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "100.63.0.1", "100.128.0.1", "172.32.0.1",
                                     "192.0.1.1", "168.63.129.17", "2606:4700:4700::1111",
                                     "::ffff:8.8.8.8", "64:ff9b::808:808"])  # fmt: skip
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


def test_the_catalogue_s_own_server_needs_no_allow_list() -> None:
    settings = SearchSettings(stac="http://127.0.0.1:7/v1", allow_hosts=["data.example"])
    access = catalogue_access(settings)
    check_host("http://127.0.0.1:7/v1/collections", access)
    check_host("https://data.example/x", access)
    with pytest.raises(Quarantine, match="host_refused"):
        check_host("http://127.0.0.1:8/", access)
    bucket = SearchSettings(stac="s3://b/c.json", allow_hosts=["x"])
    assert catalogue_access(bucket).allow_hosts == ("s3://b", "x")
