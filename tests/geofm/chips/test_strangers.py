"""What a stranger's catalogue can reach: hosts, the user's credentials, files of this machine."""

from __future__ import annotations

import json
import socket
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError, UsageError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.config.credentials import credentials_of
from geofm.config.recipe import SearchSettings
from geofm.remote import http, url_policy
from geofm.remote.assets import HttpAsset, remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access, Signing, check_redirect
from geofm.stac.search import STAGE
from tests.geofm.remote.seen import Seen, watch
from tests.geofm.stac.small_world import World, add_scene, landing, serve, texture

RED = {"red": texture(32, 32)}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    http.proxy_for.cache_clear()
    http.pools.cache_clear()
    yield
    http.proxy_for.cache_clear()
    http.pools.cache_clear()


@pytest.fixture
def seen() -> Iterator[Seen]:
    with watch() as found:
        yield found


def search(store: Store, catalogue: Catalogue, stac: str, **more: Any) -> Any:
    settings = SearchSettings.model_validate({"stac": stac, **more})
    return run_stage(STAGE, store, catalogue, {}, settings)


def text(content: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"content-type": "application/json"}, json.dumps(content).encode()


# Redirects and links -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/collections", "/search"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_stac_client_follows_no_redirect_to_a_private_host(
    store: Store, catalogue: Catalogue, seen: Seen, path: str, status: int
) -> None:
    with serve() as private:
        add_scene(private, "a", RED)
        seen.answers = {
            "/": text(landing(seen.url)),
            "/collections": text({"collections": [{"type": "Collection", "id": "c"}]}),
        }
        seen.answers[path] = (status, {"location": private.url + path}, b"")
        with pytest.raises(RunError, match=r"is not allowed .*search\.allow_hosts"):
            search(store, catalogue, seen.url)
        assert private.asked == []
        port = private.url.rpartition(":")[2]
        if path == "/":  # where the user allows it, it is followed
            with pytest.raises(RunError, match="no item matches"):
                search(store, catalogue, seen.url, allow_hosts=[f"127.0.0.1:{port}"])
            assert "/search" in private.asked


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "/etc/passwd\n", "ftp://h/x", "http://169.254.169.254/",
                 "http://u:p@127.0.0.1:9/", "http://[fd00:ec2::254]/", "gopher://h"],
)  # fmt: skip
def test_the_stac_client_follows_no_strange_redirect(
    store: Store, catalogue: Catalogue, seen: Seen, location: str
) -> None:
    seen.answers["/"] = (302, {"location": location.strip()}, b"")
    with pytest.raises(RunError):
        search(store, catalogue, seen.url)
    assert set(seen.paths) <= {"/", "/etc/passwd"}


def test_a_redirect_loop_of_the_stac_client_ends(
    store: Store, catalogue: Catalogue, seen: Seen
) -> None:
    seen.answers = {"/": (302, {"location": "/b"}, b""), "/b": (302, {"location": "/"}, b"")}
    with pytest.raises(RunError, match="redirects more than 5 times"):
        search(store, catalogue, seen.url)
    assert len(seen.requests) == 6


@pytest.mark.parametrize("href", ["http://127.0.0.1:9/search", "file:///etc/hostname",
                                  "/etc/hostname", "http://169.254.169.254/search"])  # fmt: skip
def test_a_search_link_is_checked(
    store: Store, catalogue: Catalogue, seen: Seen, href: str
) -> None:
    root = landing(seen.url)
    root["links"][-1]["href"] = href
    seen.answers = {
        "/": text(root),
        "/collections": text({"collections": [{"type": "Collection", "id": "c"}]}),
    }
    with pytest.raises(RunError):
        search(store, catalogue, seen.url)
    assert set(seen.paths) <= {"/", "/collections", "/etc/hostname"}


def test_a_next_page_is_asked_with_no_other_method(
    store: Store, catalogue: Catalogue, seen: Seen
) -> None:
    page = {"collections": [{"type": "Collection", "id": "c"}],
            "links": [{"rel": "next", "href": seen.url + "/x", "method": "DELETE"}]}  # fmt: skip
    seen.answers = {"/": text(landing(seen.url)), "/collections": text(page)}
    with pytest.raises(RunError, match="method 'DELETE'"):
        search(store, catalogue, seen.url)
    assert "/x" not in seen.paths


@pytest.mark.parametrize("name", ["catalog.json", "items.parquet"])
def test_a_static_catalogue_follows_no_redirect_to_a_private_host(
    store: Store, catalogue: Catalogue, seen: Seen, name: str
) -> None:
    with serve() as private:
        address = private.add(f"/{name}", b'{"type": "Catalog", "id": "x", "links": []}')
        seen.answers[f"/{name}"] = (302, {"location": address}, b"")
        with pytest.raises(RunError, match=r"is not allowed|host_refused|private network"):
            search(store, catalogue, f"{seen.url}/{name}")
        assert private.asked == []


def test_a_child_that_redirects_away_is_a_row(
    store: Store, catalogue: Catalogue, world: World
) -> None:
    with serve() as private:
        private.add("/child.json", b'{"type": "Catalog", "id": "x", "links": []}')
        world.redirects["/child.json"] = private.url + "/child.json"
        item = add_scene(world, "a", RED)
        world.add("/item.json", json.dumps(item).encode())
        root = {"type": "Catalog", "id": "t", "stac_version": "1.0.0", "description": "t",
                "links": [{"rel": "child", "href": "child.json"},
                          {"rel": "item", "href": "item.json"}]}  # fmt: skip
        world.add("/catalog.json", json.dumps(root).encode())
        items = search(store, catalogue, world.url + "/catalog.json").table("items.parquet")
        assert sorted(items.reason) == ["", "broken_link"]
        assert private.asked == []


def test_a_signing_service_that_redirects_is_checked(world: World) -> None:
    href = world.add("/red.tif", b"data")
    with serve() as private:
        private.add("/sign", json.dumps({"href": href + "?sig=1"}).encode())
        world.redirects["/sign"] = private.url + "/sign"
        world.faults["/red.tif"] += [403]
        signing = Signing(world.url + "/sign?href={href}")
        with pytest.raises(Quarantine, match="forbidden"):
            HttpAsset(href, Access(world.url, retries=0), signing).whole(100)
        assert private.asked == []


def test_https_is_not_left() -> None:
    access = Access("https://api.example/v1", allow_hosts=("*",))
    to = "https://api.example/v1"
    assert check_redirect(to, "http://api.example/v2?a=1", access) == "https://api.example/v2?a=1"
    for target in ("http://other.example/", "http://api.example:8080/"):
        with pytest.raises(Quarantine, match="leaves https"):
            check_redirect(to, target, access)
    assert check_redirect("http://a.example", "https://b.example/", access) == "https://b.example/"


def test_a_name_that_turns_private_after_its_check_is_refused_to_the_stac_client(
    store: Store, catalogue: Catalogue, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = seen.url.rpartition(":")[2]
    monkeypatch.setattr(url_policy, "addresses", lambda host: ["93.184.216.34"])
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **named: resolve("127.0.0.1", *more, **named)
    )
    seen.answers["/"] = (302, {"location": f"http://rebound.example:{port}/inner"}, b"")
    with pytest.raises(RunError, match="private address"):
        search(store, catalogue, seen.url)
    assert seen.paths == ["/"]


# The user's credentials --------------------------------------------------------------------------


def test_neither_netrc_nor_cookies_nor_headers_reach_a_server(
    store: Store, catalogue: Catalogue, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password hush\ndefault login me password hush\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    with serve() as other:
        cookie = {"set-cookie": "session=hush; Path=/"}
        page = {"collections": [{"type": "Collection", "id": "c"}],
                "links": [{"rel": "next", "href": "/more",
                           "headers": {"X-Own": "hush"}}]}  # fmt: skip
        more = {"location": other.url + "/collections"}
        root = text(landing(seen.url))
        seen.answers = {
            "/": (root[0], {**root[1], **cookie}, root[2]),
            "/collections": text(page),
            "/more": (302, more, b""),
        }
        got: list[Any] = []
        other.raw["/collections"] = lambda _: got.append(1)
        port = other.url.rpartition(":")[2]
        with pytest.raises(RunError):
            search(store, catalogue, seen.url, allow_hosts=[f"127.0.0.1:{port}"])
        assert got
    for _, path, headers in seen.requests:
        assert "authorization" not in headers
        assert "cookie" not in headers
        assert headers.get("x-own") == ("hush" if path == "/more" else None)


def test_a_link_s_headers_are_not_sent_to_another_server(seen: Seen, world: World) -> None:
    from geofm.remote.http import Request, send_request

    world.redirects["/a"] = seen.url + "/b"
    seen.answers["/b"] = (200, {}, b"x")
    headers = {"authorization": "Bearer hush", "x-api-key": "hush", "range": "bytes=0-1"}
    access = Access(world.url, allow_hosts=("127.0.0.1",))
    response, url = send_request(Request(world.url + "/a", headers), access, "a")
    assert (response.status, url) == (200, seen.url + "/b")
    ((_, _, sent),) = seen.requests
    assert "hush" not in json.dumps(sent)
    assert sent["range"] == "bytes=0-1"


def test_a_reference_is_sent_to_the_catalogue_alone(
    store: Store, catalogue: Catalogue, seen: Seen, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAC_USER", "me")
    monkeypatch.setenv("STAC_PASSWORD", "hu/sh")
    monkeypatch.setenv("STAC_TOKEN", "a+b/c=")
    item = add_scene(world, "a", RED)
    root = text(landing(seen.url + "/v1"))
    seen.answers = {
        "/v1": root,
        "/v1/": root,
        "/v1/collections": text({"collections": world.collections}),
        "/v1/search": text({"type": "FeatureCollection", "features": [item], "links": []}),
        "/a.tif": (302, {"location": world.add("/b.tif", b"data")}, b""),
    }
    address = seen.url.replace("://", "://${STAC_USER}:${STAC_PASSWORD}@")
    stac = address + "/v1?token=${STAC_TOKEN}&v=2"
    made = search(store, catalogue, stac)
    assert len(seen.requests) > 2
    for _, path, headers in seen.requests:
        assert path.endswith("token=a%2Bb%2Fc%3D")
        assert headers["authorization"] == "Basic bWU6aHUvc2g="
    assert made.manifest.settings["stac"] == stac
    for file in store.local_root.rglob("*"):
        assert not file.is_file() or not any(
            secret in file.read_bytes() for secret in (b"hu/sh", b"a+b/c=", b"a%2Bb%2Fc")
        )
    # an asset on the catalogue's own server: with credentials; where it redirects to: without
    access = Access(stac, allow_hosts=("127.0.0.1",), retries=0)
    assert remote(seen.url + "/a.tif", access).part(0, 4).data == b"data"
    assert seen.requests[-1][2]["authorization"]
    monkeypatch.delenv("STAC_TOKEN")
    with pytest.raises(UsageError, match=r"\$\{STAC_TOKEN\}, which is not set"):
        search(store, catalogue, stac)


@pytest.mark.parametrize(
    ("user", "sent"),
    [
        ("me%40org:${PW}", "me@org:50%25/x"),
        ("${PW}:a%2Fb", "50%25/x:a/b"),
        ("${PW}", "50%25/x"),
        ("a%24%7BPW%7D:${PW}%21", "a${PW}:50%25/x!"),
    ],
)
def test_user_info_is_decoded_and_values_of_references_are_not(
    user: str, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW", "50%25/x")
    header = credentials_of(f"https://{user}@api.example/v1").headers["authorization"]
    assert b64decode(header.removeprefix("Basic ")).decode() == sent


def test_a_whole_query_can_be_a_reference(
    store: Store, catalogue: Catalogue, seen: Seen, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAS", "?sv=1&se=2&sig=a%2Bb")
    item = add_scene(world, "a", RED)
    seen.answers["/c/item.json"] = text(item)
    root = {"type": "Catalog", "id": "t", "links": [{"rel": "item", "href": "item.json"}]}
    seen.answers["/c/catalog.json"] = text(root)
    made = search(store, catalogue, seen.url + "/c/catalog.json?${SAS}")
    assert set(seen.paths) == {
        "/c/catalog.json?sv=1&se=2&sig=a%2Bb", "/c/item.json?sv=1&se=2&sig=a%2Bb",
    }  # fmt: skip
    assert list(made.table("items.parquet").status) == ["ok"]


@pytest.mark.parametrize(
    "stac",
    ["https://me:hush@api.example/v1", "HTTPS://hush@api.example/v1", "s3://me:hush@b/c.json",
     "https://api.example/v1?token=hush", "https://api.example/v1?api_key=hush&v=1",
     "https://api.example/v1?X-Amz-Signature=hush", "https://api.example/v1?sv=1&se=2&sig=hush",
     "https://api.example/v1?ToKeN=hush", "https://api.example/v1?%74oken=hush",
     "https://api.example/v1#access_token=hush", "https://me:hu/sh@api.example/v1",
     "https://me:x${P}hush@api.example/v1"],
)  # fmt: skip
def test_an_address_with_a_secret_is_refused_with_the_remedy(stac: str) -> None:
    with pytest.raises(UsageError, match=r"search\.stac holds a secret.*\$\{STAC_TOKEN\}") as found:
        SearchSettings(stac=stac)
    assert "hush" not in str(found.value)
    assert found.value.exit_code == 2


@pytest.mark.parametrize(
    "stac", ["https://${HOST}/v1", "https://h/${PATH}", "s3://b/${KEY}", "/data/${X}/catalog.json"]
)
def test_references_stand_where_they_are_resolved(stac: str) -> None:
    with pytest.raises(UsageError, match="user info or in the query"):
        SearchSettings(stac=stac)
