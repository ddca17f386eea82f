"""Faults that pass: how long they are waited for, and when a host is left alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, BinaryIO

import pytest

from geofm.remote import assets as remote_module
from geofm.remote import retry
from geofm.remote.assets import HttpAsset, expiry, remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.retry import (
    FIRST_PAUSE,
    MAX_FAILURES,
    MAX_PAUSE,
    Fault,
    Host,
    host_record,
    read_with_retries,
    retry_after,
)
from geofm.remote.url_policy import Access, Signing
from tests.geofm.stac.small_world import World

SIGN = Signing("{api}/sign?href={href}")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses, taken down instead of slept."""
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    return pauses


def reader(world: World, **change: object) -> Access:
    return Access(**{"stac": world.url, "retries": 1, "timeout_s": 5.0, **change})  # type: ignore[arg-type]


def test_pauses_grow_and_are_spread_over_their_whole_range(slept: list[float]) -> None:
    def fail() -> None:
        raise Fault("no")

    for _ in range(200):
        with pytest.raises(Quarantine, match=r"unreachable.*6 attempts"):
            read_with_retries(fail, 5, "it")
    for number in range(5):
        most = FIRST_PAUSE * 2**number
        pauses = slept[number::5]
        assert 0 <= min(pauses) < 0.1 * most
        assert 0.9 * most < max(pauses) <= most


def test_retry_after_is_obeyed_within_bounds(slept: list[float]) -> None:
    def date(seconds: float) -> str:
        return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)

    assert retry_after("7") == 7
    assert 17 < retry_after(date(20)) <= 20
    assert retry_after("86400") == retry_after(date(1e6)) == MAX_PAUSE
    for nonsense in ("", "-5", "soon", "1e9", "١", date(-9), "9" * 400, "Mon, 99 Foo"):
        assert retry_after(nonsense) == 0
    tries = iter([Fault("429", 7.0), Fault("503", 1e9)])

    def fail() -> int:
        for fault in tries:
            raise fault
        return 1

    assert read_with_retries(fail, 5, "it") == 1
    assert 7 <= slept[0] <= 7 + FIRST_PAUSE
    assert slept[1] == MAX_PAUSE


def test_the_server_says_when_to_come_back(world: World, slept: list[float]) -> None:
    href = world.add("/a", b"data")
    world.headers["/a"] = {"retry_after": "3"}
    world.faults["/a"] += [429]
    piece = remote(href, reader(world)).whole(10)
    assert piece is not None
    assert piece.data == b"data"
    assert 3 <= slept[0] <= 3 + FIRST_PAUSE


def test_requests_to_one_host_are_spaced(
    world: World, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry.time, "monotonic", lambda: 100.0)
    href = world.add("/a", b"data")
    asset = remote(href, reader(world, requests_per_s=4))
    for _ in range(4):
        asset.part(0, 2)
    assert slept == [0.0, 0.25, 0.5, 0.75]
    Host().take_turn(None)
    assert len(slept) == 4, "no limit, no turn"


def test_threads_share_a_hosts_rate(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.time, "monotonic", lambda: 100.0)
    host = Host()

    def ask() -> None:
        for _ in range(5):
            host.take_turn(100)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == pytest.approx([number / 100 for number in range(20)])


def test_a_dead_host_is_left_alone_and_tried_again(world: World, slept: list[float]) -> None:
    href = world.add("/a", b"data")
    world.faults["/a"] += [503] * 2 * MAX_FAILURES
    asset = remote(href, reader(world))
    for _ in range(MAX_FAILURES):
        with pytest.raises(Quarantine, match="2 attempts"):
            asset.part(0, 2)
    asked = len(world.asked)
    for _ in range(20):
        with pytest.raises(Quarantine, match="has not answered") as found:
            asset.part(0, 2)
        assert (found.value.reason, found.value.passing) == ("unreachable", True)
    assert len(world.asked) == asked
    host = host_record(world.url.removeprefix("http://"))
    host.rests_until = 0.0  # its rest is over
    assert asset.part(0, 2).data == b"da"
    assert not host.rests()


def test_some_lost_requests_do_not_make_a_dead_host(world: World, slept: list[float]) -> None:
    href = world.add("/a", b"data")
    asset = remote(href, reader(world))
    for _ in range(MAX_FAILURES):
        world.faults["/a"] += [503] * 2
        with pytest.raises(Quarantine, match="unreachable"):
            asset.part(0, 2)
        assert asset.part(0, 2).data == b"da"


def test_wrong_answers_do_not_make_a_dead_host(world: World, slept: list[float]) -> None:
    world.add("/a", b"data")
    head = b"HTTP/1.1 206 P\r\ncontent-range: bytes 5-9/100\r\ncontent-length: 4\r\n\r\ndata"
    world.raw["/lies"] = lambda out: (out.write(head), None)[1]
    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(Quarantine, match="2 attempts"):
            remote(world.url + "/lies", reader(world)).part(0, 4)
    assert remote(world.url + "/a", reader(world)).part(0, 2).data == b"da"


def test_what_is_not_there_says_nothing_about_its_host(world: World) -> None:
    for _ in range(MAX_FAILURES + 1):
        with pytest.raises(Quarantine, match="not_found"):
            remote(world.url + "/nothing", reader(world)).part(0, 2)
    assert not host_record(world.url.removeprefix("http://")).rests()


def test_when_a_signature_expires() -> None:
    assert expiry("https://h/a?se=1700000000.5&sig=x") == 1_700_000_000.5
    assert expiry("https://h/a?se=2023-11-14T22:13:20Z&sig=x") == 1_700_000_000
    assert expiry("https://h/a?Expires=1700000000&Signature=x") == 1_700_000_000
    amazon = "https://h/a?X-Amz-Date=20231114T221320Z&X-Amz-Expires=60&X-Amz-Signature=x"
    assert expiry(amazon) == 1_700_000_060
    assert expiry("https://h/a", "2023-11-14T22:13:20Z") == 1_700_000_000
    for nothing in ("https://h/a", "https://h/a?se=nan", "https://h/a?se=" + "9" * 400,
                    "https://h/a?se=x", "https://h/a?X-Amz-Date=x&X-Amz-Expires=1"):  # fmt: skip
        assert expiry(nothing) == float("inf")
    assert expiry("https://h/a", {"not": "a text"}) == float("inf")


def sign(world: World, href: str, lives_s: float) -> None:
    """Let the world's signing service sign ``href`` from now on."""
    signed = f"{href}?se={time.time() + lives_s}&sig=x"
    world.add("/sign", json.dumps({"href": signed}).encode())


def test_a_signature_is_renewed_before_it_is_refused(world: World) -> None:
    href = world.add("/a", b"data")
    world.faults["/a"] += [403]
    asset = HttpAsset(href, reader(world), SIGN)
    sign(world, href, 2.0)
    asset.part(0, 2)
    asset.part(0, 2)
    assert world.asked == ["/a", "/sign", "/a", "/a"]
    asset._expires = time.time() + 0.5
    sign(world, href, 60.0)
    asset.part(0, 2)
    asset.part(0, 2)
    assert world.asked[4:] == ["/sign", "/a", "/a"]


def test_threads_share_a_signature(world: World) -> None:
    href = world.add("/a", b"data")
    asset = HttpAsset(href, reader(world), Signing(SIGN.url, always=True))
    sign(world, href, 60.0)
    with ThreadPoolExecutor(8) as pool:
        assert len({piece.data for piece in pool.map(lambda n: asset.part(0, 2), range(40))}) == 1
    assert world.asked.count("/sign") == 1
    assert world.asked.count("/a") == 40


def test_a_wrong_clock_does_not_sign_for_ever(world: World) -> None:
    href = world.add("/a", b"data")
    asset = HttpAsset(href, reader(world), Signing(SIGN.url, always=True))
    sign(world, href, -3600.0)
    for _ in range(3):
        asset.part(0, 2)
    assert world.asked == ["/sign", "/a", "/a", "/a"]


def test_a_host_that_wants_signatures_is_remembered(world: World) -> None:
    one, two = world.add("/one", b"data"), world.add("/two", b"data")
    world.faults["/one"] += [403]
    sign(world, one, 60.0)
    HttpAsset(one, reader(world), SIGN).part(0, 2)
    sign(world, two, 60.0)
    HttpAsset(two, reader(world), SIGN).part(0, 2)
    assert world.asked[-2:] == ["/sign", "/two"]
    del world.files["/sign"]  # who can't sign any more is asked plainly
    assert HttpAsset(two, reader(world), SIGN).part(0, 2).data == b"da"


@pytest.mark.parametrize(
    "other", ["http://127.0.0.1:9/a?sig=x", "http://evil.example\\@127.0.0.1/a", "file:///a", "/a"]
)
def test_a_signature_for_another_place_is_refused(world: World, other: str) -> None:
    href = world.add("/a", b"data")
    world.add("/sign", json.dumps({"href": other}).encode())
    world.faults["/a"] += [403]
    with pytest.raises(Quarantine, match=r"forbidden|bad_"):
        HttpAsset(href, reader(world), SIGN).part(0, 2)


def test_connections_are_used_again(world: World) -> None:
    href = world.add("/a", b"data" * 1000)
    world.faults["/a"] += [429, 403]
    sign(world, href, 60.0)
    asset = HttpAsset(href, reader(world), SIGN)
    for _ in range(5):
        asset.part(0, 2000)
        assert asset.whole(10_000) is not None
    assert world.connections == 1
    assert asset.whole(10) is None, "more than is wanted: this connection is closed"
    asset.part(0, 2000)
    assert world.connections <= 2


def test_a_file_is_read_whole_without_more_than_is_wanted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "BEGINNING", 1000)
    data = bytes(range(256)) * 20
    asset = remote(world.add("/a", data), reader(world))
    piece = asset.whole(len(data))
    assert piece is not None
    assert (piece.data, piece.total, piece.etag) == (data, len(data), '"1"')
    assert world.sent == [1000, len(data) - 1000]
    assert asset.whole(len(data) - 1) is None
    assert asset.whole(999) is None
    assert asset.whole(0) is None
    assert world.sent[2:] == [1000, 999]
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    world.raw["/a"] = lambda out: (out.write(head + data), None)[1]
    plain = asset.whole(len(data))
    assert plain is not None, "a server without ranges"
    assert plain.data == data
    assert asset.whole(len(data) - 1) is None


def test_a_file_that_changes_between_two_ranges_is_asked_for_again(
    world: World, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "BEGINNING", 1000)
    asset = remote(world.add("/a", b"a" * 3000), reader(world))
    once, tags = HttpAsset._range, iter(['"other"', '"1"'])
    monkeypatch.setattr(
        HttpAsset, "_range", lambda self, a, b: replace(once(self, a, b), etag=next(tags))
    )
    piece = asset.whole(3000)
    assert piece is not None
    assert piece.data == b"a" * 3000
    assert world.asked == ["/a"] * 4


def test_dripping_answers_are_given_up(world: World) -> None:
    def drip(out: BinaryIO) -> None:
        out.write(
            b"HTTP/1.1 206 P\r\ncontent-length: 4000\r\ncontent-range: bytes 0-3999/4000\r\n\r\n"
        )
        for _ in range(4000):
            out.write(b"x")
            time.sleep(0.05)

    world.raw["/a"] = drip
    with pytest.raises(Quarantine, match=r"unreachable.*only \d+ bytes"):
        remote(world.url + "/a", reader(world, retries=0, timeout_s=0.3)).part(0, 4000)


def endless_continue(out: BinaryIO) -> None:
    while True:
        out.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def dripping_headers(out: BinaryIO) -> None:
    out.write(b"HTTP/1.1 206 P\r\n")
    while True:
        out.write(b"X")
        time.sleep(0.05)


@pytest.mark.parametrize("never", [endless_continue, dripping_headers])
def test_answers_that_never_begin_are_cut_off(
    world: World, never: Callable[[BinaryIO], None]
) -> None:
    world.raw["/a"] = never
    with pytest.raises(Quarantine, match=r"unreachable.*ReadTimeout") as found:
        remote(world.url + "/a", reader(world, retries=0, timeout_s=0.3)).part(0, 4)
    assert found.value.passing
    world.add("/b", b"data")
    assert remote(world.url + "/b", reader(world, timeout_s=0.3)).part(0, 2).data == b"da"


@pytest.mark.parametrize("head", [b"HTTP/1.1 206 P\r\nETag: x\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n"])
def test_headers_cut_short_are_a_passing_fault(world: World, head: bytes) -> None:
    world.raw["/a"] = lambda out: (out.write(head), None)[1]
    asset = remote(world.url + "/a", reader(world, retries=0))
    with pytest.raises(Quarantine, match="unreachable"):
        asset.part(0, 4) if b"206" in head else asset.whole(100)


def test_records_belong_to_hosts() -> None:
    assert host_record("a:80") is host_record("a:80")
    assert host_record("a:80") is not host_record("a:81")
    one: Any = host_record("s3://bucket")
    assert one.failures == 0
