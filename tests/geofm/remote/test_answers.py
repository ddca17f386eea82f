"""Answers on reused connections: read as they are meant, or requested again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import BinaryIO

import numpy as np
import pytest

from geofm.raster.reader import prefetch
from geofm.remote.assets import HttpAsset, Piece
from geofm.remote.http import Request, open_response, send_request
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import BLOCK, RangeSource, coalesce
from geofm.remote.url_policy import Access, Signing
from tests.geofm.stac.small_world import World, serve

DATA = np.random.default_rng(1).bytes(20 * BLOCK + 77)
START, END = 7, 3000
BODY = DATA[START:END]
HEAD = (
    f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {START}-{END - 1}/{len(DATA)}\r\n"
    'ETag: "1"\r\n'
).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.fixture
def asset(world: World) -> HttpAsset:
    href = world.add("/data.bin", DATA)
    return HttpAsset(href, Access(stac=world.url, retries=2, timeout_s=5.0))


def connect(asset: HttpAsset, number: int) -> None:
    """Have so many connections open and idle."""
    together = Barrier(number)

    def read(_: int) -> None:
        together.wait()
        asset.part(0, 10)

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(read, range(number)))


def requests_for(world: World, asset: HttpAsset, answer: bytes) -> int:
    """Read a range whose first answer is this one; returns the number of requests."""
    connect(asset, 1)

    def write(file: BinaryIO) -> None:
        del world.raw["/data.bin"]
        file.write(answer)

    world.raw["/data.bin"] = write
    before = len(world.asked)
    assert asset.part(START, END).data == BODY
    return len(world.asked) - before


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + LENGTH + b"\r\n" + BODY,
        HEAD + CHUNKED,
        HEAD + b"\r\n" + BODY,
        b"HTTP/1.1 100 Continue\r\netag: x\r\n\r\n" + HEAD + LENGTH + b"\r\n" + BODY,
    ],
    ids=["length", "chunks", "until the end", "after an interim answer"],
)
def test_an_answer_is_read_however_its_end_is_stated(
    world: World, asset: HttpAsset, answer: bytes
) -> None:
    assert requests_for(world, asset, answer) == 1
    assert asset.part(0, 50).data == DATA[:50]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        HEAD + LENGTH + b"\r\n" + BODY[:-1],
        HEAD + CHUNKED[:-9],
        HEAD[:40],
        b"",
        b"\0" * 5000,
        HEAD + b"a: b\r\n" * 2**17,
    ],
    ids=["interim", "too little", "few chunks", "head", "none", "noise", "long"],
)
def test_a_damaged_answer_is_requested_again(world: World, asset: HttpAsset, answer: bytes) -> None:
    assert requests_for(world, asset, answer) == 2
    assert asset.part(0, 50).data == DATA[:50]


@pytest.mark.parametrize(
    "answer",
    [
        (HEAD + LENGTH + b"\r\n" + BODY) * 2,
        HEAD + LENGTH + b"\r\n" + BODY + b"and more",
    ],
    ids=["twice", "too much"],
)
def test_bytes_after_an_answer_are_never_taken_for_the_next_one(
    world: World, asset: HttpAsset, answer: bytes
) -> None:
    assert requests_for(world, asset, answer) == 1
    for start in (0, 500, 1000):
        assert asset.part(start, start + 50).data == DATA[start : start + 50]


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_fault_is_tried_again(world: World, asset: HttpAsset, fault: int | str) -> None:
    connect(asset, 1)
    world.faults["/data.bin"] += [fault]
    assert asset.part(START, END).data == BODY
    assert not world.faults["/data.bin"]
    assert world.asked.count("/data.bin") == 3  # the connection, the fault, and again


def test_a_connection_is_reused_only_after_a_whole_answer(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    connections = world.connections
    headers = {"range": f"bytes=0-{len(DATA) - 1}"}
    for limit, reused in ((len(DATA), True), (10, False)):
        with open_response(asset.href, headers, asset.access, "it") as answer:
            assert answer.read(limit) == DATA[:limit]
        assert asset.part(0, 50).data == DATA[:50]
        assert (world.connections == connections) == reused


def test_redirects_follow_the_policy(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    moved = HttpAsset(world.url + "/moved.bin", asset.access)
    world.redirects["/moved.bin"] = "/data.bin"
    assert moved.part(0, 99).data == DATA[:99]
    with serve() as other:
        world.redirects["/moved.bin"] = other.add("/private.bin", DATA)
        with pytest.raises(Quarantine, match="host_refused"):
            moved.part(0, 99)
        assert other.asked == []


def test_a_refused_address_is_signed_and_then_requested_signed(
    world: World, asset: HttpAsset
) -> None:
    world.add("/sign", json.dumps({"href": asset.href + "?token=1"}).encode())
    signing = Signing("{api}/sign?href={href}")
    signed = HttpAsset(asset.href, asset.access, signing)
    connect(asset, 2)
    world.faults["/data.bin"] += [403]
    world.asked.clear()
    assert signed.part(0, 50).data == DATA[:50]
    assert world.asked == ["/data.bin", "/sign", "/data.bin"]
    assert signed.part(0, 50).data == DATA[:50]
    other = HttpAsset(asset.href, asset.access, signing)
    assert other.part(0, 50).data == DATA[:50]  # the host refuses unsigned addresses: signed first
    assert world.asked[3:] == ["/data.bin", "/sign", "/data.bin"]


@pytest.mark.parametrize(
    ("url", "headers"),
    [("/a", {"range": "b\r\nx: y"}), ("/a", {"x\r\ny": "z"})],
)
def test_a_request_that_would_be_two_is_not_sent(
    world: World, asset: HttpAsset, url: str, headers: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"[Ii]nvalid header"):
        send_request(Request(world.url + url, headers), asset.access, "it")
    with pytest.raises(Quarantine, match="bad_href"):
        send_request(Request(world.url + "/a\r\nx: y"), asset.access, "it")
    assert url not in world.asked


def test_ranges_fetched_ahead_are_the_files_bytes(world: World, asset: HttpAsset) -> None:
    ranges = coalesce((k * BLOCK + 5, k * BLOCK + 900) for k in range(0, 20, 4))
    source = RangeSource(asset, 2, "here")
    source.prefetch(ranges)
    for start, end in reversed(ranges):
        assert source.read(start, end - start) == DATA[start:end]


def test_an_opening_in_the_background_raises_in_its_result(world: World, asset: HttpAsset) -> None:
    with pytest.raises(Quarantine, match="bad_scheme"):
        prefetch("file:///etc/passwd", asset.access, Signing(), whole=False).result()
    source = prefetch(asset.href, asset.access, Signing(), whole=False).result()
    assert isinstance(source, RangeSource)
    assert source.read(0, 10) == DATA[:10]
    piece = prefetch(asset.href, asset.access, Signing()).result()
    assert isinstance(piece, Piece)
    assert piece.data == DATA
    few = Access(stac=world.url, retries=2, timeout_s=5.0, whole_max=len(DATA) - 1)
    source = prefetch(asset.href, few, Signing()).result()
    assert isinstance(source, RangeSource)
    assert source.size == len(DATA)
    world.sent.clear()
    source = prefetch(asset.href, few, Signing(), stated_size=len(DATA)).result()
    assert isinstance(source, RangeSource)
    assert world.sent == [BLOCK], "the item states that the file is large: one small request"
