"""The list of ``docs/hostile.md``: each item is served, searched and cut, and ends as it says."""

from __future__ import annotations

import json
import re
import resource
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from geofm.types import Json
from tests.geofm.chips.test_cut import Run, run
from tests.geofm.raster.crafted import (
    ASCII,
    DOUBLE,
    LONG,
    LONG8,
    SHORT,
    craft,
    tile,
    usual,
    vast_jpeg2000,
)
from tests.geofm.stac.small_world import NORTH, WEST, World, add_scene, texture

__all__ = ["run"]  # a fixture
PAGE = Path(__file__).parents[3] / "docs" / "hostile.md"
RED = texture(32, 32)
#: What an item that does no harm ends as.
GOOD = "ok"


class Case:
    """One hostile item to be: a good one, its address, and the world that serves it."""

    def __init__(self, world: World, name: str, number: int) -> None:
        day = f"2020-01-01T{number // 60:02d}:{number % 60:02d}:00Z"
        self.world, self.path = world, f"/files/{name}/red.tif"
        self.item = add_scene(world, name, {"red": RED}, datetime=day)
        self.asset: Json = self.item["assets"]["red"]
        self.properties: Json = self.item["properties"]

    def serve(self, data: bytes) -> None:
        """Another file than the item describes."""
        self.asset.pop("file:checksum")
        self.asset.pop("proj:shape")
        self.world.files[self.path] = data

    def redirect(self, *hops: str) -> None:
        """The asset's address leads elsewhere."""
        data = self.world.files.pop(self.path)
        self.world.files["/real" + self.path] = data
        for here, there in zip((self.path, *hops), hops, strict=False):
            self.world.redirects[here] = there

    def answer(self, head: str, body: bytes = b"", endless: bool = False) -> None:
        """Bytes of an answer as they go over the line."""

        def write(out: BinaryIO) -> None:
            out.write(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
            while endless:
                out.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")

        self.world.raw[self.path] = write


def changed(**tags: Any) -> bytes:
    """A crafted TIFF with some tags (``t256``) changed."""
    return craft({**usual(), **{int(name[1:]): value for name, value in tags.items()}}, tile())


def turned(*affine: float) -> bytes:
    """A TIFF whose corner is the usual one, with other axes."""
    tags = {n: v for n, v in usual().items() if n not in (33550, 33922)}
    a, b, d, e = affine
    matrix = (a, b, 0, WEST, d, e, 0, NORTH, 0, 0, 0, 0, 0, 0, 0, 1)
    return craft({**tags, 34264: (DOUBLE, matrix)}, tile())


def deep(case: Case, levels: int) -> None:
    """Lists in lists."""
    case.properties["note"] = f"{levels} levels"
    case.world.spliced[f"{levels} levels"] = "[" * levels + "]" * levels


def bomb() -> str:
    rings = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    item = '<GDALMetadata><Item name="x">&e9;</Item></GDALMetadata>'
    return f'<!DOCTYPE x [<!ENTITY e0 "boom">{rings}]>{item}'


def many_tiles(case: Case) -> None:
    edge = 32 * 40
    case.serve(craft(usual(edge, 40 * 40), tile()))


CASES: dict[str, Callable[[Case], None]] = {
    "redirect-private": lambda c: c.redirect("http://10.0.0.1/red.tif"),
    "redirect-metadata": lambda c: c.redirect("http://169.254.169.254/latest/meta-data"),
    "redirect-file": lambda c: c.redirect("file:///etc/passwd"),
    "redirect-loop": lambda c: c.redirect("/b" + c.path, c.path),
    "href-userinfo": lambda c: c.asset.update(href="http://data.example\\@127.0.0.1:9/red.tif"),
    "signed-elsewhere": lambda c: (
        c.world.faults[c.path].extend([403] * 99),
        c.world.add("/sign", json.dumps({"href": "http://evil.example/red.tif"}).encode()),
    ),
    "tiff-tile-count": lambda c: c.serve(changed(t324=(LONG, (8,) * 90_000))),
    "tiff-tiny-tiles": lambda c: c.serve(changed(t256=(LONG, (40_000,)), t257=(LONG, (40_000,)))),
    "tiff-ifd-loop": lambda c: c.serve(craft(usual(), tile(), following=8)),
    "tiff-one-tile-for-all": many_tiles,
    "tiff-offset-beyond": lambda c: c.serve(
        craft({**usual(), 324: (LONG, (2**32 - 9,)), 325: (LONG, (2000,))}, tile(), place=False)
    ),
    "tiff-zip-bomb": lambda c: c.serve(craft(usual(), zlib.compress(b"\1" * 300_000_000))),
    "tiff-vast": lambda c: c.serve(
        craft({**usual(), 256: (LONG8, (2**31 - 1,)), 257: (LONG8, (2**31 - 1,))}, tile(), big=True)
    ),
    "tiff-many-bands": lambda c: c.serve(changed(t277=(SHORT, (65_535,)))),
    "tiff-xml-bomb": lambda c: c.serve(changed(t42112=(ASCII, bomb()))),
    "tiff-sidecars": lambda c: c.serve(
        changed(t42112=(ASCII, '<GDALMetadata><Item name="OVERVIEW_FILE" domain="OVERVIEWS">'
                        "/vsicurl/http://10.0.0.1/x.ovr</Item></GDALMetadata>"))
    ),
    "tiff-south-up": lambda c: c.serve(turned(10, 0, 0, 10)),
    "tiff-rotated": lambda c: c.serve(turned(7, 7, 7, -7)),
    "tiff-nan-pixels": lambda c: c.serve(changed(t33550=(DOUBLE, (float("nan"), 10.0, 0.0)))),
    "jp2-vast": lambda c: c.serve(vast_jpeg2000()),
    "scale-infinite": lambda c: c.asset.update({"raster:bands": [{"scale": float("inf")}]}),
    "item-10-mb": lambda c: c.properties.update(note="x" * 10_000_000),
    "item-deep": lambda c: deep(c, 900),
    "item-very-deep": lambda c: deep(c, 100_000),
    "asset-key-path": lambda c: c.item.update(
        assets={"../../red": c.asset, "__proto__": dict(c.asset, **{"eo:bands": []})}
    ),
    "bands-10000": lambda c: c.asset["eo:bands"].extend({"name": f"b{n}"} for n in range(9999)),
    "id-bidi": lambda c: c.item.update(id="scene\u202efit.exe"),
    "datetime-year-10000": lambda c: c.properties.update(datetime="10000-01-01T00:00:00Z"),
    "geometry-over-the-pole": lambda c: c.item["geometry"].update(
        coordinates=[[[-170, 80], [170, 89.9], [-10, 90], [10, 70], [-170, 80]]]
    ),
    "encoding-lies": lambda c: c.world.headers.update({c.path: {"content_encoding": "gzip"}}),
    "length-lies": lambda c: c.answer("HTTP/1.1 206 P\nContent-Range: bytes 0-99/100\n"
                                      "Content-Length: 100\n", b"II*\0"),
    "range-lies": lambda c: c.answer("HTTP/1.1 206 P\nContent-Range: bytes 7-10/99999\n"
                                     "Content-Length: 4\n", b"II*\0"),
    "size-lies": lambda c: c.answer(f"HTTP/1.1 206 P\nContent-Range: bytes 0-3/{10**15}\n"
                                    "Content-Length: 4\n", b"II*\0"),
    "endless": lambda c: c.answer("HTTP/1.1 206 P\nContent-Range: bytes 0-65535/99999999\n"
                                  "Transfer-Encoding: chunked\n", endless=True),
    "headers-flood": lambda c: c.answer("HTTP/1.1 206 P\n" + "X: y\n" * 100_000),
    "no-http": lambda c: c.answer("\x15\x03\x01\x00\x02\x02\x28"),
}  # fmt: skip


def listed() -> dict[str, set[str]]:
    """Name and outcomes of each row of the page's table."""
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (`[^|]*`) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", ends)) for name, ends in rows}


def test_the_page_lists_what_is_tested() -> None:
    assert set(listed()) == set(CASES)
    assert len(CASES) >= 20


@pytest.mark.long
@pytest.mark.parametrize("whole_max_mib", [64, 0])
def test_each_ends_as_the_page_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_max_mib: float
) -> None:
    asked: set[Any] = set()
    connect = socket.socket.connect
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, where: (asked.add(where), connect(self, where))[1]
    )
    add_scene(run.world, "good", {"red": RED}, collection="other")
    for number, (name, spoil) in enumerate(CASES.items()):
        spoil(Case(run.world, name, number))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chips = run.chips(max_failed=1.0, timeout_s=3, retries=0, whole_max_mib=whole_max_mib)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    items = run.items().table("items.parquet")
    ends: dict[str, set[str]] = {}
    for table in (items[items.status != "ok"], chips.table("chips.parquet")):
        for row in table.itertuples():
            ends.setdefault(row.item_id, set()).add(row.reason or GOOD)
    assert ends.pop("good") == {GOOD}
    names = {item["id"]: name for item, name in zip(run.world.items[1:], CASES, strict=True)}
    told = {names.get(item_id, item_id): reasons for item_id, reasons in ends.items()}
    expected = listed()
    wrong = {n: (told.get(n), expected[n]) for n in CASES
             if not told.get(n) or not told[n] <= expected[n]}  # fmt: skip
    assert not wrong

    world = ("127.0.0.1", int(run.world.url.rpartition(":")[2]))
    assert asked == {world}, "no other host is ever asked"
    assert not [path for path in run.world.asked if re.search(r"\.(ovr|aux|xml|msk|tfw)", path)]
    assert {p.name.partition(".db")[0] for p in tmp_path.iterdir()} == {"store", "catalogue"}
    assert grown < 1024 * 600, "MiB more at the peak"
