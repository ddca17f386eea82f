"""Requests of the search: what is retried, and what a failure says."""

from __future__ import annotations

import gzip
import logging
import socket
import ssl
from typing import Any, BinaryIO

import pytest
from pystac_client.exceptions import APIError
from urllib3.exceptions import ConnectTimeoutError, ProxyError, SSLError

from geofm.remote import retry
from geofm.remote.url_policy import Access
from geofm.stac import api_client
from geofm.stac.api_client import MAX_ERROR_BYTES, RETRIES, StacRequests, status_of
from tests.geofm.stac.small_world import World


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses, recorded instead of slept."""
    recorded: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", recorded.append)
    return recorded


def failure_of(io: StacRequests, path: str = "/a") -> APIError:
    with pytest.raises(APIError) as caught:
        io.request(io.access.base + path)
    return caught.value


@pytest.mark.parametrize(
    ("more", "body"),
    [
        (b"", b"busy: \xe9\xff"),
        (b"", b"busy" + b"x" * (2 * MAX_ERROR_BYTES)),
        (b"Content-Encoding: gzip\r\n", b"no gzip"),
        (b"Content-Encoding: gzip\r\n", gzip.compress(b"busy")[:-9]),
        (b"Content-Length: 99\r\n", b"cut"),
    ],
    ids=["no UTF-8", "long", "no gzip", "cut gzip", "cut"],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_status_counts_whatever_the_body_is(
    world: World, pauses: list[float], status: int, more: bytes, body: bytes
) -> None:
    head = f"HTTP/1.1 {status} No\r\nRetry-After: 3\r\n".encode()
    world.raw["/a"] = lambda out: (out.write(head + more + b"\r\n" + body), None)[1]
    failure = failure_of(StacRequests(Access(world.url)))
    assert status_of(failure) == status
    assert len(world.asked) == RETRIES + 1
    assert len(pauses) == RETRIES
    assert min(pauses) >= 3
    assert len(str(failure)) < 600
    assert str(failure).startswith(("busy", f"HTTP {status}"))


def test_a_passing_failure_with_a_strange_body_is_overcome(
    world: World, pauses: list[float]
) -> None:
    def busy(out: BinaryIO) -> None:
        del world.raw["/a"]
        out.write(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n\xff\xfe")

    world.add("/a", b"{}")
    world.raw["/a"] = busy
    assert StacRequests(Access(world.url)).request(world.url + "/a") == "{}"


def test_what_a_server_does_not_know_is_not_asked_again(world: World, pauses: list[float]) -> None:
    world.faults["/a"] += [501, 400]
    io = StacRequests(Access(world.url))
    assert [status_of(failure_of(io)) for _ in range(2)] == [501, 400]
    assert (len(world.asked), pauses) == (2, [])


def test_a_port_without_a_server_is_tried_three_times(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    io = StacRequests(Access(url))
    assert "refused" in str(failure_of(io))
    assert (io.count, len(pauses)) == (3, 2)
    assert caplog.text.count("search: requesting again in ") == 2


@pytest.mark.parametrize(
    ("error", "requests"),
    [
        (ConnectTimeoutError("dropped"), 3),
        (ProxyError("no proxy", ConnectTimeoutError("dropped")), 3),
        (SSLError(ssl.SSLCertVerificationError("self-signed")), 1),
        (ProxyError("no tunnel", SSLError(ssl.SSLCertVerificationError("self-signed"))), 1),
        (SSLError(ssl.SSLEOFError("lost")), RETRIES + 1),
    ],
    ids=["timeout", "proxy", "certificate", "certificate by proxy", "lost"],
)
def test_attempts_depend_on_the_failure(
    world: World,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    requests: int,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(api_client, "send_request", fail)
    io = StacRequests(Access(world.url))
    assert status_of(failure_of(io)) is None
    assert (io.count, len(pauses)) == (requests, requests - 1)
