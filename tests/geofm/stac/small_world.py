"""A small STAC API with generated scenes on loopback, whose answers a test can spoil."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.io import MemoryFile

from geofm.types import Json
from tests.servers import serving

#: Left and upper edge of the scenes (EPSG:32631), on the grid of 32-pixel cells of 10 m.
WEST, NORTH = 448_000.0, 5_411_200.0


@dataclass
class World:
    """The content of the server, and its faults.

    Attributes:
        url: Address of the server.
        files: Bytes by path.
        redirects: Location by path.
        raw: Functions by path that write a whole answer, with its status line.
        headers: Extra headers by path.
        spliced: JSON text that replaces a string, for text that ``json`` can't write.
        connections: Number of connections so far.
        lists_all: Every search finds every item.
        faults: Statuses (or ``cut``) that a path answers first, in order.
        items: The items.
        collections: The collections.
        asked: Paths of all requests.
        sent: Number of bytes of each answer with a file.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Callable[[BinaryIO], None]] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    spliced: dict[str, str] = field(default_factory=dict)
    connections: int = 0
    lists_all: bool = False
    faults: dict[str, list[int | str]] = field(default_factory=lambda: defaultdict(list))
    items: list[Json] = field(default_factory=list)
    collections: list[Json] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    def add(self, path: str, data: bytes) -> str:
        """Serve a file; returns its address."""
        self.files[path] = data
        return f"{self.url}{path}"


@contextmanager
def serve() -> Iterator[World]:
    """Serve an empty world until the block ends."""
    world = World()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits for an acknowledgement

        def setup(self) -> None:
            super().setup()
            world.connections += 1

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", cut: bool = False, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            world.asked.append(path)
            fault = world.faults[path].pop(0) if world.faults[path] else 0
            if isinstance(fault, int) and fault:
                self.answer(fault, **world.headers.get(path, {}))
            elif path in world.raw:
                self.close_connection = True
                with suppress(OSError):
                    world.raw[path](self.wfile)
            elif path in world.redirects:
                self.answer(302, location=world.redirects[path])
            elif path in world.files:
                self.file(world.files[path], fault == "cut")
            elif path == "/":
                self.json(landing(world.url))
            elif path == "/collections":
                self.json({"collections": world.collections, "links": []})
            else:
                self.answer(404)

        def do_POST(self) -> None:
            size = int(self.headers.get("content-length", 0))
            query = json.loads(self.rfile.read(size))
            world.asked.append(self.path)
            fault = world.faults[self.path].pop(0) if world.faults[self.path] else 0
            if isinstance(fault, int) and fault:
                self.answer(fault)
                return
            matched = [
                item
                for item in world.items
                if world.lists_all or item.get("collection") in query["collections"]
            ]
            start = int(query.get("token", 0))
            end = start + int(query["limit"])
            links = []
            if end < len(matched):
                body = {**query, "token": str(end)}
                links = [{"rel": "next", "method": "POST", "href": world.url + "/search",
                          "body": body}]  # fmt: skip
            page = {"type": "FeatureCollection", "features": matched[start:end], "links": links}
            self.json(page, fault == "cut")

        def json(self, content: Json, cut: bool = False) -> None:
            text = json.dumps(content)
            for word, instead in world.spliced.items():
                text = text.replace(json.dumps(word), instead)
            self.answer(200, text.encode(), cut, content_type="application/geo+json")

        def file(self, data: bytes, cut: bool) -> None:
            span, status = self.headers.get("range"), 200
            more = {"etag": '"1"', **world.headers.get(self.path, {})}
            body = data
            if span:
                first, _, last = span.removeprefix("bytes=").partition("-")
                body = data[int(first) : int(last) + 1]
                end = int(first) + len(body) - 1
                status = 206
                more = {"content_range": f"bytes {first}-{end}/{len(data)}", **more}
            world.sent.append(len(body))
            self.answer(status, body, cut, **more)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # the reader may hang up
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    with serving(server) as world.url:
        yield world


def landing(url: str) -> Json:
    """Return the landing page of the API."""
    core = [f"https://api.stacspec.org/v1.0.0/{p}" for p in ("core", "collections", "item-search")]
    links = [{"rel": "root", "href": url + "/"}, {"rel": "self", "href": url + "/"},
             {"rel": "data", "href": url + "/collections"},
             {"rel": "search", "href": url + "/search", "method": "POST",
              "type": "application/geo+json"}]  # fmt: skip
    return {"type": "Catalog", "id": "small", "stac_version": "1.0.0", "description": "tests",
            "conformsTo": core, "links": links}  # fmt: skip


def tiff(
    pixels: NDArray[Any],
    west: float = WEST,
    north: float = NORTH,
    gsd: float = 10.0,
    crs: str | None = "EPSG:32631",
    nodata: float | None = 0,
) -> bytes:
    """Encode a band as a tiled GeoTIFF."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=pixels.shape[0], width=pixels.shape[1], count=1, crs=crs,
            dtype=pixels.dtype, transform=Affine(gsd, 0, west, 0, -gsd, north), nodata=nodata,
            tiled=True, blockxsize=32, blockysize=32, compress="deflate",
        ) as file:  # fmt: skip
            file.write(pixels, 1)
        return bytes(memory.read())


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.uint16]:
    """Draw random counts that are never nodata."""
    return np.random.default_rng(seed).integers(1, 4000, (height, width)).astype(np.uint16)


def polygon(west: float, north: float, width_m: float, height_m: float, epsg: int = 32631) -> Json:
    """Transform a box in UTM into a GeoJSON polygon in degrees."""
    transform = Transformer.from_crs(epsg, 4326, always_xy=True).transform
    corners = [(west, north - height_m), (west + width_m, north - height_m),
               (west + width_m, north), (west, north)]  # fmt: skip
    ring = [list(transform(*corner)) for corner in [*corners, corners[0]]]
    return {"type": "Polygon", "coordinates": [ring]}


def add_scene(
    world: World,
    name: str,
    bands: dict[str, NDArray[Any]],
    *,
    collection: str = "sentinel-2-test",
    west: float = WEST,
    north: float = NORTH,
    epsg: int = 32631,
    offset: float = 0.0,
    gsd: dict[str, float] | None = None,
    told: bool = True,
    **properties: Any,
) -> Json:
    """Serve a scene and list its item; returns the item, which a test may then change.

    With ``told`` the item states the grid of its pixels, so that planning reads no header.
    """
    assets = {}
    first = next(iter(bands.values()))
    for key, pixels in bands.items():
        edge = (gsd or {}).get(key, 10.0)
        data = tiff(pixels, west, north, edge, f"EPSG:{epsg}")
        assets[key] = {
            "href": world.add(f"/files/{name}/{key}.tif", data),
            "type": "image/tiff; application=geotiff",
            "roles": ["data"],
            "eo:bands": [{"name": key, "common_name": key}],
            "raster:bands": [{"nodata": 0, "scale": 0.0001, "offset": offset}],
            "proj:shape": list(pixels.shape),
            **({"proj:transform": [edge, 0.0, west, 0.0, -edge, north]} if told else {}),
            "file:checksum": "1220" + hashlib.sha256(data).hexdigest(),
        }
    edge = (gsd or {}).get(next(iter(bands)), 10.0)
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection,
        "geometry": polygon(west, north, first.shape[1] * edge, first.shape[0] * edge, epsg),
        "properties": {"datetime": "2020-01-01T00:00:00Z", "proj:epsg": epsg, **properties},
        "assets": assets, "links": [{"rel": "self", "href": "volatile"}],
    }  # fmt: skip
    world.items.append(item)
    if collection not in [c["id"] for c in world.collections]:
        world.collections.append({"type": "Collection", "id": collection, "license": "CC-BY-4.0"})
    return item


def identity(tile: str, version: str, made: str, strip: str = "A") -> Json:
    """Return the Sentinel-2 properties that identify an acquisition."""
    return {
        "s2:datatake_id": f"GS2A_20200101T000000_000001_N{version}",
        "s2:processing_baseline": version,
        "s2:generation_time": made,
        "s2:datastrip_id": f"DS_{strip}_{made}",
        "s2:sequence": "0",
        "s2:product_uri": f"S2A_{tile}_{version}_{made}.SAFE",
        "grid:code": f"MGRS-{tile}",
    }
