"""Requests whose answers are read later: never another answer than one that is waited for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from geofm.raster.reader import begin
from geofm.remote.assets import BEGINNING, HttpAsset, Piece
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import BLOCK, RangeSource, coalesce
from geofm.remote.sent import Later, Sent
from geofm.remote.url_policy import Access, Signing
from tests.geofm.stac.small_world import World, serve

DATA = np.random.default_rng(1).bytes(20 * BLOCK + 77)


@pytest.fixture
def asset(world: World) -> HttpAsset:
    href = world.add("/data.bin", DATA)
    return HttpAsset(href, Access(stac=world.url, retries=2, timeout_s=5.0))


def connect(asset: HttpAsset, number: int) -> None:
    """Have so many connections open and idle."""
    together = Barrier(number)

    def ask(_: int) -> None:
        together.wait()
        asset.part(0, 10)

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(ask, range(number)))


def sent_for(asset: HttpAsset, start: int, end: int) -> Sent:
    """A request that is on its way."""
    found = asset.send(start, end)
    if found is None:
        connect(asset, 1)
        found = asset.send(start, end)
    assert found is not None
    return found


def test_a_request_goes_ahead_only_where_a_connection_is_open(asset: HttpAsset) -> None:
    assert asset.send(0, 100) is None
    sent = sent_for(asset, 5, 100)
    assert asset.part(5, 100, sent).data == DATA[5:100]


def test_answers_may_be_read_in_any_order(world: World, asset: HttpAsset) -> None:
    connect(asset, 4)
    opened, places = world.connections, []
    while (sent := asset.send(100 * len(places), 100 * len(places) + 50)) is not None:
        places.append((100 * len(places), sent))
    assert 1 <= len(places) <= opened
    for start, sent in reversed(places):
        assert asset.part(start, start + 50, sent).data == DATA[start : start + 50]
    again = [asset.send(0, 10) for _ in places]  # all of them have come back
    assert all(again)
    assert world.connections == opened


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_fault_is_asked_for_again(world: World, asset: HttpAsset, fault: int | str) -> None:
    connect(asset, 1)
    world.faults["/data.bin"] += [fault]
    sent = sent_for(asset, 7, 3000)
    assert asset.part(7, 3000, sent).data == DATA[7:3000]
    assert not world.faults["/data.bin"]
    assert world.asked.count("/data.bin") == 3  # the connection, the fault, and again


def test_a_connection_whose_time_is_over_costs_no_attempt(world: World, asset: HttpAsset) -> None:
    once = HttpAsset(asset.href, Access(stac=world.url, retries=0, timeout_s=5.0))
    connect(once, 1)
    world.raw["/data.bin"] = lambda file: world.raw.clear()  # hangs up, once
    assert once.part(3, 900, sent_for(once, 3, 900)).data == DATA[3:900]


def test_an_answer_that_never_comes_is_asked_for_again(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    world.raw["/data.bin"] = lambda file: world.raw.clear()  # hangs up, once
    assert asset.part(3, 900, sent_for(asset, 3, 900)).data == DATA[3:900]
    assert not world.raw


def test_redirects_of_what_was_sent_follow_the_policy(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    moved = HttpAsset(world.url + "/moved.bin", asset.access)
    world.redirects["/moved.bin"] = "/data.bin"
    assert moved.part(0, 99, sent_for(moved, 0, 99)).data == DATA[:99]
    with serve() as other:
        world.redirects["/moved.bin"] = other.add("/private.bin", DATA)
        with pytest.raises(Quarantine, match="host_refused"):
            moved.part(0, 99, sent_for(moved, 0, 99))
        assert other.asked == []


def test_what_is_refused_is_signed_and_then_sent_signed(world: World, asset: HttpAsset) -> None:
    world.add("/sign", json.dumps({"href": asset.href + "?token=1"}).encode())
    signing = Signing("{api}/sign?href={href}")
    one = HttpAsset(asset.href, asset.access, signing)
    connect(asset, 2)
    world.faults["/data.bin"] += [403]
    sent = one.send(0, 50)
    assert sent is not None
    assert sent.signed == ""
    assert one.part(0, 50, sent).data == DATA[:50]
    signed = one.send(0, 50)
    assert signed is not None
    assert signed.signed.endswith("?token=1")
    assert one.part(0, 50, signed).data == DATA[:50]
    other = HttpAsset(asset.href, asset.access, signing)
    assert other.send(0, 50) is None  # the host refuses what is not signed, so it is signed first


def test_what_nobody_reads_leaves_nothing_behind(world: World, asset: HttpAsset) -> None:
    sent = sent_for(asset, 0, len(DATA))
    assert sent.cancel()
    assert not sent.cancel()
    for start in (0, 500):  # a connection with the rest of that answer is never used again
        assert asset.part(start, start + 100).data == DATA[start : start + 100]


def test_a_rate_is_kept(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    slow = HttpAsset(asset.href, Access(stac=world.url, requests_per_s=1000.0))
    assert slow.send(0, 10) is None


def test_a_file_is_the_same_whoever_fetches_it(world: World, asset: HttpAsset) -> None:
    connect(asset, 3)
    ranges = coalesce((k * BLOCK + 5, k * BLOCK + 900) for k in range(0, 20, 4))
    source = RangeSource(asset, 2, "here")
    source.prefetch(ranges)
    begun = [segment.data for segment in source.segments]
    assert {isinstance(one, Later) for one in begun} == {True, False}  # few wait to be read
    for start, end in reversed(ranges):
        assert source.read(start, end - start) == DATA[start:end]


def test_an_opening_that_was_sent_can_be_left(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    call = begin(asset.href, asset.access, Signing(), whole=False)
    assert isinstance(call, Later)
    assert call.cancel()
    with pytest.raises(Quarantine, match="bad_scheme"):
        begin("file:///etc/passwd", asset.access, Signing(), whole=False).result()
    source = begin(asset.href, asset.access, Signing(), whole=False).result()
    assert isinstance(source, RangeSource)
    assert source.read(0, 10) == DATA[:10]


def test_a_small_file_is_asked_for_whole_at_once(world: World, asset: HttpAsset) -> None:
    connect(asset, 1)
    call = begin(asset.href, asset.access, Signing(), size=len(DATA))
    assert isinstance(call, Later)
    piece = call.result()
    assert isinstance(piece, Piece)
    assert piece.data == DATA
    assert world.asked.count("/data.bin") == 2  # the connection, and all of it
    # what its item says is one thing, what there is another
    few = Access(stac=world.url, retries=2, timeout_s=5.0, whole_max=len(DATA) - 1)
    source = begin(asset.href, few, Signing(), size=50).result()
    assert isinstance(source, RangeSource)
    assert source.size == len(DATA)
    for size in (0, 2 * BEGINNING):  # may take several requests: a thread's work
        assert not isinstance(begin(asset.href, asset.access, Signing(), size=size), Later)
