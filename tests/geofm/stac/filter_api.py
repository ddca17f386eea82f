"""A STAC API on loopback that filters, counts and pages, and that a test can make fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from shapely.geometry import box, mapping, shape

from geofm.types import Json
from tests.geofm.stac.small_world import landing
from tests.servers import serving

FILTER = [
    "https://api.stacspec.org/v1.0.0/item-search#filter",
    "http://www.opengis.net/spec/cql2/1.0/conf/cql2-json",
]
QUERY = ["https://api.stacspec.org/v1.0.0/item-search#query"]


@dataclass
class Api:
    """The content of the API, and its faults.

    Attributes:
        counts: Pages state ``numberMatched``.
        conforms: Conformance classes besides item search.
        deepest: Items beyond this number are refused with status 400.
        tires: Queries that match more than this are answered with status 503.
        intersects: The API knows ``intersects``.
        down: Every answer to GET has status 404.
        skips: Number of searches whose first item is counted but left out.
        asked: Bodies of all searches.
    """

    url: str = ""
    items: list[Json] = field(default_factory=list)
    collections: list[Json] = field(default_factory=list)
    counts: bool = True
    conforms: list[str] = field(default_factory=lambda: FILTER)
    deepest: int = 10**9
    tires: int = 10**9
    intersects: bool = True
    down: bool = False
    skips: int = 0
    asked: list[Json] = field(default_factory=list)

    def matching(self, query: Json) -> list[Json]:
        """Return the matching items; items without a time or geometry match no query for it."""
        matched = [item for item in self.items if item["collection"] in query["collections"]]
        if "ids" in query:
            return [item for item in matched if item["id"] in query["ids"]]
        if "datetime" in query:
            first, _, last = query["datetime"].partition("/")
            last = last or first
            matched = [
                item for item in matched
                if (when := item["properties"].get("datetime"))
                and (first == ".." or time(when) >= time(first))
                and (last == ".." or time(when) <= time(last))
            ]  # fmt: skip
        area = box(*query["bbox"]) if "bbox" in query else None
        area = shape(query["intersects"]) if "intersects" in query else area
        if area is not None:
            matched = [
                item
                for item in matched
                if item["geometry"] and shape(item["geometry"]).intersects(area)
            ]
        tests = [
            (">=" if word == "gte" else "<", value)
            for word, value in query.get("query", {}).get("updated", {}).items()
        ]
        if "filter" in query:
            tests.append((query["filter"]["op"], query["filter"]["args"][1]))
        for op, value in tests:  # as texts, which is how some databases compare times
            updated = [str(item["properties"].get("updated", "")) for item in matched]
            matched = [
                item for item, when in zip(matched, updated, strict=True)
                if when and (when >= value if op == ">=" else when < value)
            ]  # fmt: skip
        return matched

    def answer(self, query: Json) -> tuple[int, Json]:
        """Answer a search with a status and a page."""
        self.asked.append(query)
        if "intersects" in query and not self.intersects:
            return 400, {"code": "BadRequest"}
        matched = self.matching(query)
        number = len(matched)
        if self.skips and matched:
            self.skips -= 1
            matched = matched[1:]
        start = int(query.get("token", 0))
        end = start + int(query["limit"])
        if len(matched) > self.tires:
            return 503, {}
        if end > self.deepest and end - int(query["limit"]) >= self.deepest:
            return 400, {"code": "result window is too large"}
        page: Json = {"type": "FeatureCollection", "features": matched[start:end], "links": []}
        if self.counts:
            page["numberMatched"] = number
        if end < len(matched):
            page["links"] = [
                {"rel": "next", "method": "POST", "href": f"{self.url}/search",
                 "body": {**query, "token": str(end)}}
            ]  # fmt: skip
        return 200, page


def time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@contextmanager
def serve_api() -> Iterator[Api]:
    """Serve an empty API until the block ends."""
    api = Api()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, content: Json) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/geo+json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if api.down:
                self.send(404, {})
                return
            page = landing(api.url)
            page["conformsTo"] += api.conforms
            collections = {"collections": api.collections, "links": []}
            self.send(200, collections if self.path == "/collections" else page)

        def do_POST(self) -> None:
            size = int(self.headers.get("content-length", 0))
            self.send(*api.answer(json.loads(self.rfile.read(size))))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serving(server) as api.url:
        yield api


def an_item(name: str, **properties: Any) -> Json:
    """Make an item of 1 × 1 degree; ``at`` is its south-west corner."""
    west, south = properties.pop("at", (2.0, 48.0))
    collection = properties.pop("collection", "c")
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection,
        "geometry": json.loads(json.dumps(mapping(box(west, south, west + 1, south + 1)))),
        "properties": {"datetime": "2020-01-01T00:00:00Z", **properties},
        "assets": {"red": {"href": "https://example.com/red.tif", "type": "image/tiff"}},
        "links": [],
    }  # fmt: skip
