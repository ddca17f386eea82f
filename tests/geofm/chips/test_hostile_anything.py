"""Whatever a catalogue sends, item JSON or bytes: the run ends, in the store, on allowed hosts.

Each example is a whole search and cut of a few spoiled items beside a good one.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_catalog.catalogue import open_catalogue
from data_catalog.store import open_store
from geofm.remote import retry
from geofm.types import Json
from tests.geofm.chips.test_cut import Run
from tests.geofm.raster.crafted import craft, tile, usual, vast_jpeg2000
from tests.geofm.stac.small_world import World, add_scene, serve, texture, tiff

RED = texture(32, 32)
MANY = "GEOFM_EXAMPLES" in os.environ
FEW = settings(
    max_examples=int(os.environ.get("GEOFM_EXAMPLES", "10")),
    deadline=None,
    derandomize=not MANY,
    # making a failure small takes minutes of whole runs
    phases=[Phase.explicit, Phase.generate, *([Phase.reuse, Phase.shrink] if MANY else [])],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

numbers = st.one_of(
    st.integers(-5, 5), st.floats(), st.integers(-(2**70), 2**70), st.just(10**400), st.booleans()
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from([
        "../../x", "/etc/passwd", "file:///etc/passwd", "http://10.0.0.1/x.tif", "http://[bad/x",
        "http://localhost:1/x", "http://169.254.169.254/", "s3://", "/vsicurl/http://127.0.0.1/x",
        "GTIFF_DIR:1:/etc/passwd", "<VRTDataset/>", "EPSG:0", "EPSG:4326", "EPSG:99999999",
        "9999-99-99T99:99:99Z", "red", "\u202e", "\ud800", "x" * 5000, "1220", "POINT",
    ]),
)  # fmt: skip
anything = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
#: Which place of an item is changed (by number), and into what; or that it is taken away.
changes = st.lists(
    st.tuples(st.integers(0, 10_000), st.one_of(anything, st.just("drop"))), min_size=1, max_size=3
)
items = st.one_of(changes, changes, changes, anything.map(lambda value: {"whole": value}))


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: Files that Python opens for writing, while a list is here.
_written: list[list[str]] = []


def _audit(event: str, details: tuple[Any, ...]) -> None:
    if not _written:
        return
    if event == "open" and isinstance(details[0], int):
        return  # a descriptor: the event of its path came before
    if event == "os.mkdir" or (event == "open" and details[2] & WRITING):
        _written[-1].append(str(details[0]))


sys.addaudithook(_audit)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            places(inner, found)
    return found


def spoil(item: Json, how: Any) -> Any:
    """An item with some places changed, or something else altogether."""
    if isinstance(how, dict):
        return how["whole"]
    for number, value in how:
        spots = places(item, [])
        if not spots:
            break
        container, key = spots[number % len(spots)]
        if value == "drop":
            del container[key]
        else:
            container[key] = copy.deepcopy(value)
    return item


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A raster with bytes changed, left out or put in, or no raster at all."""
    if draw(st.integers(0, 5)) == 0:
        head = draw(st.sampled_from([b"", b"II*\0", b"II+\0", b"MM\0*", b"\xff\x4f\xff\x51"]))
        return head + draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from([
        tiff(RED), craft(usual(), tile()), craft(usual(96, 9), tile(), big=True), vast_jpeg2000(),
    ])))  # fmt: skip
    header = min(len(data), 400)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, header - 1) | st.integers(0, len(data) - 1))
        new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([
            b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80",
        ]))  # fmt: skip
        data[at : at + (0 if draw(st.integers(0, 9)) == 0 else len(new))] = new
    if draw(st.integers(0, 4)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, Run, Path, set[Any]]]:
    """A world, an empty store, and every address that a connection is made to or a name asked."""
    retry._host_record.cache_clear()
    asked: set[Any] = set()
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connecting(self: socket.socket, where: Any) -> None:
        asked.add(where[:2])
        connect(self, where)

    def resolving(host: Any, *more: Any, **named: Any) -> Any:
        if host not in ("127.0.0.1", "localhost"):  # no name server is asked in a test
            raise socket.gaierror(f"nobody knows {host!r}")
        return resolve(host, *more, **named)

    with serve() as world, tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket, "getaddrinfo", resolving)
        world.lists_all, place = True, Path(folder)
        patch.chdir(place)  # a relative path ends where it is noticed
        store = open_store(place / "store")
        run = Run(store, open_catalogue(f"sqlite:///{place}/c.db", store), world)
        add_scene(world, "good", {"red": RED}, collection="good")
        _written.append([])
        try:
            yield world, run, place, asked
        finally:
            _written.clear()


def check(run: Run, world: World, folder: Path, asked: set[Any]) -> None:
    """Search and cut; then the laws of hostile input."""
    chips = run.chips(max_failed=1.0, timeout_s=3, retries=0)
    frame = chips.table("chips.parquet")
    assert (frame[frame.item_id == "good"].status == "ok").all()
    assert "good" in set(frame.item_id)
    for artifact in (run.items(), chips):
        counts, dropped = artifact.manifest.counts, artifact.manifest.dropped
        assert counts["rows_in"] == counts["rows_out"] + sum(dropped.values())
    assert asked == {("127.0.0.1", int(world.url.rpartition(":")[2]))}
    outside = [path for path in _written[-1] if not path.startswith((str(folder), "/dev/null"))]
    assert _written[-1], "the watch works"
    assert not outside
    assert {path.name.partition(".db")[0] for path in folder.iterdir()} == {"store", "c"}


@pytest.mark.long
@FEW
@given(spoiled=st.lists(items, min_size=8, max_size=8))
def test_any_json(spoiled: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch, watched(patch) as (world, run, folder, asked):
        for number, how in enumerate(spoiled):
            add_scene(world, f"bad-{number}", {"red": RED, "scl": RED.astype("uint8")})
            world.items[-1] = spoil(world.items[-1], how)
        check(run, world, folder, asked)


@pytest.mark.long
@FEW
@given(spoiled=st.lists(files(), min_size=8, max_size=8), whole=st.booleans())
def test_any_bytes(spoiled: list[bytes], whole: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, watched(patch) as (world, run, folder, asked):
        for number, data in enumerate(spoiled):
            day = {"datetime": f"2020-01-01T00:00:{number:02d}Z"}
            item = add_scene(world, f"bad-{number}", {"red": RED}, **day)
            for name in ("file:checksum", "proj:shape"):
                item["assets"]["red"].pop(name)
            world.files[f"/files/bad-{number}/red.tif"] = data
        run_settings = {} if whole else {"whole_max_mib": 0}
        chips = run.chips
        run.chips = lambda **more: chips(**more, **run_settings)  # type: ignore[method-assign]
        check(run, world, folder, asked)
