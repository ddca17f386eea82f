"""Where a request really goes: to the host that was checked, by a proxy or directly, by TLS."""

from __future__ import annotations

import http.server
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pytest
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.remote import http as connections
from geofm.remote import url_policy
from geofm.remote.assets import remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access, check_redirect, parse_http_url
from tests.geofm.stac.small_world import World


@pytest.fixture(autouse=True)
def _fresh() -> None:
    connections.proxy_for.cache_clear()
    connections.pools.cache_clear()


def test_an_address_is_taken_apart_once() -> None:
    address = parse_http_url
    assert address("https://H.example:8443//other/x") == ("https", "h.example", 8443, "//other/x")
    assert address("http://[::1]:81/é b") == ("http", "::1", 81, "/%C3%A9%20b")
    assert address("http://u:p%40@h.example/x?a=%2F#f") == ("http", "h.example", 80, "/x?a=%2F")
    assert address("http://münchen.example") == ("http", "xn--mnchen-3ya.example", 80, "/")


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example\\@evil.example/x?a=%2F",
        "http://good.example @evil.example/",
        "http://good.example@evil.example@third.example/",
        "http://exa%6dple.com/",
        "http://good.example%2F@evil.example:80%40/",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://h.example:0/",
        "http://h.example:65536/",
        "http://h.example:٣/",
        "http://a..example/",
        "http://" + "x" * 64 + ".example/",
        "http://a。example/",
        "http://./",
        "http://é_.example/",
    ],
)
def test_an_address_that_parsers_read_differently_is_refused(url: str) -> None:
    with pytest.raises(Quarantine, match="bad_href"):
        parse_http_url(url)


PIECES = st.sampled_from(
    ["good.example", "evil.example", "127.0.0.1", "0x7f.1", "2130706433", "[::1]", "[fe80::1%25e]",
     "[::ffff:127.0.0.1]", "user:pw@", "@", "a%40b@", "\\", "%2e", "%6d", "é", "ß", "。", "．", "①",
     "xn--", "-", "_", ".", "..", "/", "//", "/../", "?a=b", "#f", ":80", ":0", ":65536", ":", "::",
     " ", "%", "%zz", "A", "%2F", "%2f", "x" * 70, "٣"]
)  # fmt: skip
POOLS = urllib3.PoolManager()
SCHEMES = st.sampled_from(["http://", "https://", "HTTP://", "http:/", "//", "ftp://", ""])


@settings(max_examples=250, deadline=None)
@given(SCHEMES, st.lists(PIECES, min_size=1, max_size=6).map("".join))
def test_what_is_checked_is_what_is_connected_to(scheme: str, rest: str) -> None:
    """An accepted address is canonical: read again, by urllib3 or the library, it is the same."""
    try:
        found = parse_http_url(scheme + rest)
    except Quarantine as problem:
        assert problem.reason in ("bad_href", "bad_scheme")
        return
    host = f"[{found.host}]" if ":" in found.host else found.host
    assert re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", found.host)
    assert 0 < found.port < 65536
    assert re.fullmatch(r"/[!-~]*", found.target)
    again = f"{found.scheme}://{host}:{found.port}{found.target}"
    assert parse_http_url(again)[:3] == found[:3]
    assert (urlsplit(again).hostname, urlsplit(again).port) == (found.host, found.port)
    pool = POOLS.connection_from_host(found.host, found.port, found.scheme)
    assert (pool.host.strip("[]"), pool.port) == (found.host, found.port)
    assert urlsplit(scheme + rest).hostname in (found.host, None) or not rest.isascii()


def test_a_redirect_from_https_to_http_is_followed_by_https() -> None:
    access = Access(stac="https://h.example", allow_hosts=("h.example",))
    url = "https://h.example:8443/a"
    assert check_redirect(url, "http://h.example/b?c=%2f#d", access).startswith(
        "https://h.example:8443/b?c=%2"
    )
    with pytest.raises(Quarantine, match="host_refused"):
        check_redirect(url, "http://other.example/b", access)


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
            time.sleep(0.06)
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
        assert len(asked) == 2  # a pause amid an answer is no fault
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
    monkeypatch.setattr(url_policy, "addresses", lambda host: ["93.184.216.34"])
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


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_private_address_gets_not_a_byte(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    resolve = socket.getaddrinfo
    monkeypatch.setattr(url_policy, "addresses", lambda host: ["93.184.216.34"])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **named: resolve("127.0.0.1", *more, **named)
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        href = f"{scheme}://rebound.example:{server.getsockname()[1]}/a"
        with pytest.raises(Quarantine, match="host_refused"):
            remote(href, Access(stac="http://other.example", retries=0)).part(0, 2)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(5)
            assert connection.recv(100) == b""  # neither a request nor a TLS hello


@pytest.mark.parametrize("public_only", [True, False])
def test_tls_is_set_as_python_sets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public_only: bool
) -> None:
    create = ssl.create_default_context

    def strict() -> ssl.SSLContext:
        """Return the default context of Python 3.13."""
        context = create()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = connections._ssl_context(public_only)
    assert context.verify_flags == strict().verify_flags
    assert context.keylog_filename == str(tmp_path / "keys")
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert isinstance(context, connections._PublicSslContext) == public_only


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nContent-Range: bytes 0-3/4\r\n",
         "http_error"),
        (b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-3/4\r\nContent-Length: 4\r\n"
         b"Content-Length: 5\r\n", "unreachable"),
        # the server ends each connection after its answer, and says so
        ("HTTP/1.1 302 F\r\nLocation: /é\r\nConnection: close\r\n".encode(), "not_found"),
        (b"HTTP/1.1 302 F\r\nLocation: /\xff\r\nConnection: close\r\n", "not_found"),
    ],
    ids=["another protocol", "two lengths", "redirect in UTF-8", "redirect in Latin-1"],
)  # fmt: skip
def test_an_answer_with_a_strange_head_gives_no_pixels(
    world: World, head: bytes, reason: str
) -> None:
    def write(out: BinaryIO) -> None:
        out.write(head + b"\r\ndata!")

    world.raw["/a"] = write
    asset = remote(world.url + "/a", Access(stac=world.url, retries=1, timeout_s=2.0))
    began = time.monotonic()
    for read in (partial(asset.part, 0, 4), partial(asset.whole, 4)):
        with pytest.raises(Quarantine, match=reason):
            read()
    assert time.monotonic() - began < 5
    assert all(path.isascii() for path in world.asked)


@pytest.mark.parametrize("path", ["/é", "/\u212b", "/a?\xff", "/\udc80"])
def test_a_target_is_sent_in_ascii(world: World, path: str) -> None:
    asset = remote(world.url + path, Access(stac=world.url, retries=0, timeout_s=2.0))
    with pytest.raises(Quarantine, match="not_found"):
        asset.part(0, 4)
    assert len(world.asked) == 1
    assert world.asked[0].isascii()
