"""Answers read from an open connection: taken as they are meant, or asked for again."""

from __future__ import annotations

import time
from typing import BinaryIO

import pytest

from geofm.remote.assets import HttpAsset
from geofm.remote.http import _pool
from geofm.remote.reply import FAR_S, Reply
from geofm.remote.sent import send
from tests.geofm.remote.test_sent import DATA, asset, connect, sent_for
from tests.geofm.stac.small_world import World

__all__ = ["asset"]  # a fixture

START, END = 7, 3000
BODY = DATA[START:END]
HEAD = (
    f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {START}-{END - 1}/{len(DATA)}\r\n"
    'ETag: "1"\r\n'
).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def part_after(world: World, asset: HttpAsset, answer: bytes) -> int:
    """Read a range that was sent and is answered so the first time; how often it was asked for."""
    connect(asset, 1)

    def write(file: BinaryIO) -> None:
        del world.raw["/data.bin"]
        file.write(answer)

    world.raw["/data.bin"] = write
    before = len(world.asked)
    sent = asset.send(START, END)
    assert sent is not None
    assert asset.part(START, END, sent).data == BODY
    return len(world.asked) - before


def test_who_waits_for_an_answer_says_so(
    world: World, asset: HttpAsset, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("geofm.remote.reply.kept_waiting", lambda: told.append("waits"))
    connect(asset, 1)
    assert asset.part(START, END, asset.send(START, END)).data == BODY

    def write(file: BinaryIO) -> None:
        del world.raw["/data.bin"]
        file.write(HEAD + LENGTH)
        time.sleep(3 * FAR_S)
        file.write(b"\r\n" + BODY)

    before, told[:] = len(world.asked), []
    world.raw["/data.bin"] = write
    assert asset.part(START, END, asset.send(START, END)).data == BODY
    assert "waits" in told
    assert len(world.asked) == before + 1


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
def test_an_answer_is_read_however_its_end_is_told(
    world: World, asset: HttpAsset, answer: bytes
) -> None:
    assert part_after(world, asset, answer) == 1
    assert asset.part(0, 50).data == DATA[:50]


@pytest.mark.parametrize(
    "answer",
    [
        (HEAD + LENGTH + b"\r\n" + BODY) * 2,
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        HEAD + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
        HEAD + LENGTH + b"\r\n" + BODY + b"and more",
        HEAD + LENGTH + b"\r\n" + BODY[:-1],
        HEAD + CHUNKED[:-9],
        HEAD[:40],
        b"",
        b"\0" * 5000,
        HEAD + b"a: b\r\n" * 2**17,
    ],
    ids=[
        "twice",
        "interim",
        "upgrade",
        "two lengths",
        "too much",
        "too little",
        "few chunks",
        "head",
        "none",
        "noise",
        "long",
    ],
)
def test_any_other_answer_is_asked_for_again(world: World, asset: HttpAsset, answer: bytes) -> None:
    assert part_after(world, asset, answer) == 2
    assert asset.part(0, 50).data == DATA[:50]


def test_a_connection_is_used_again_only_after_a_whole_answer(
    world: World, asset: HttpAsset
) -> None:
    connect(asset, 1)
    connections = world.connections
    for most, alive in ((END - START, True), (10, False)):
        sent = sent_for(asset, START, END)
        reply = sent.response()
        assert isinstance(reply, Reply)
        assert (reply.status, reply.length_remaining) == (206, END - START)
        taken = b""
        while len(taken) < most and (piece := reply.read1(most - len(taken))):
            taken += piece
        assert taken == BODY[:most]
        assert reply.length_remaining == END - START - most
        reply.release_conn()
        assert asset.part(0, 50).data == DATA[:50]
        assert (world.connections == connections) == alive


def test_what_would_write_two_requests_is_not_sent(asset: HttpAsset) -> None:
    connect(asset, 1)
    pool = _pool(asset.href, asset.access)
    for target, headers in (("/a\r\nx: y", {}), ("/a", {"range": "b\r\nx: y"}), ("/é", {})):
        with pytest.raises(ValueError, match="no request"):
            send(pool, target, headers, 5.0)
    assert asset.part(0, 50).data == DATA[:50]
