"""Where a request really goes: to the host that was checked, by a proxy or directly, by TLS."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from geofm.remote import http as connections
from geofm.remote import url_policy as hosts
from geofm.remote.assets import remote
from geofm.remote.http import address
from geofm.remote.quarantine import Quarantine
from geofm.remote.reply import FAR_S
from geofm.remote.url_policy import Access
from tests.geofm.stac.small_world import World


@pytest.fixture(autouse=True)
def _fresh() -> None:
    connections.proxy_for.cache_clear()
    connections.pools.cache_clear()


def test_an_address_is_taken_apart_once() -> None:
    assert address("http://good.example\\@evil.example/x?a=%2F") == (
        "http", "evil.example", 80, "/x?a=%2F",
    )  # fmt: skip
    assert address("https://H.example:8443//other/x") == ("https", "h.example", 8443, "//other/x")
    assert address("http://[::1]:81/é b") == ("http", "::1", 81, "/%C3%A9%20b")


def test_other_hosts_go_by_the_proxy_and_loopback_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", world.url.replace("http://", "http://me:secret@"))
    world.add("http://data.example:80/a", b"data")
    access = Access(stac="http://data.example", retries=0)
    assert remote("http://data.example/a", access).part(0, 2).data == b"da"
    assert world.asked == ["http://data.example:80/a"]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    href = world.add("/b", b"data")
    assert remote(href, Access(stac=world.url, retries=0)).part(0, 2).data == b"da"


def test_tls_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key,
         "-out", certificate, "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(206)
            self.send_header("content-range", "bytes 0-3/4")
            self.send_header("content-length", "4")
            self.end_headers()
            self.wfile.write(b"da")
            time.sleep(2 * FAR_S)
            self.wfile.write(b"ta")

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{server.server_address[1]}"
    access = Access(stac=url, retries=0)
    try:
        with pytest.raises(Quarantine, match=r"unreachable.*SSL"):
            remote(f"{url}/a", access).part(0, 4)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        connections.pools.cache_clear()
        asset = remote(f"{url}/a", access)
        assert [asset.part(0, 4).data for _ in range(2)] == [b"data"] * 2
        sent = asset.send(0, 4)
        assert sent is not None
        assert asset.part(0, 4, sent).data == b"data"
        assert len(asked) == 3  # a pause amid an answer is no fault
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_a_name_that_turns_private_after_its_check_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = world.url.rpartition(":")[2]
    world.add("/a", b"data")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(hosts, "addresses", lambda host: ["93.184.216.34"])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **named: resolve("127.0.0.1", *more, **named)
    )
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    href = f"http://rebound.example:{port}/a"
    with pytest.raises(Quarantine, match="host_refused") as found:
        remote(href, Access(stac="http://other.example", retries=2)).part(0, 2)
    assert not found.value.passing
    assert world.asked == []
    allowed = Access(stac="http://other.example", allow_hosts=("rebound.example",))
    assert remote(href, allowed).part(0, 2).data == b"da"
