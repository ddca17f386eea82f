"""A fast server of byte ranges on loopback, with a small STAC API, that counts the bytes it sends.

The server needs little CPU time, so measurements show the reader. ``FOLDER/collection.json`` and
``FOLDER/items.json`` (a list; hrefs relative to ``/assets/``) make the API; files are in
``FOLDER/assets``. An asset in ``FOLDER/patches.json`` is a file with a few changed bytes, so that a
file on disk can serve many places. ``/__stats`` returns requests and bytes of bodies, ``/__reset``
clears them.

    python benchmarks/range_server.py FOLDER --port 0      (the first printed line is the address)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Json = dict[str, Any]
RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d*)", re.IGNORECASE)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class World:
    """A folder, and counts of what was sent from it."""

    def __init__(self, folder: Path, most_items: int | None = None) -> None:
        self.folder = folder.resolve()
        self.url = ""
        self.counts: dict[str, Counter[str]] = {"requests": Counter(), "bytes": Counter()}
        self.items: list[Json] = []
        self.collection: Json = {}
        self.patches: dict[str, Json] = {}
        if (folder / "patches.json").exists():
            self.patches = json.loads((folder / "patches.json").read_bytes())
        if (folder / "items.json").exists():
            self.items = json.loads((folder / "items.json").read_bytes())[:most_items]
            self.collection = json.loads((folder / "collection.json").read_bytes())

    @lru_cache(maxsize=4096)  # noqa: B019 (one world a process)
    def file(self, name: str) -> tuple[int, int, int, bytes] | None:
        """Return descriptor and size of an asset, and the changed bytes with their position."""
        patch = self.patches.get(name, {"file": name, "at": 0, "hex": ""})
        place = (self.folder / "assets" / patch["file"]).resolve()
        if not place.is_relative_to(self.folder / "assets") or not place.is_file():
            return None
        handle = self.handle(place)
        return handle, os.fstat(handle).st_size, patch["at"], bytes.fromhex(patch["hex"])

    @lru_cache(maxsize=512)  # noqa: B019
    def handle(self, place: Path) -> int:
        """Return the descriptor of a file, opened once."""
        return os.open(place, os.O_RDONLY)

    def read(self, name: str, first: int, end: int) -> bytes:
        """Read bytes of an asset."""
        found = self.file(name)
        assert found is not None
        handle, _, at, new = found
        data = os.pread(handle, end - first, first)
        if new and first < at + len(new) and end > at:
            low, high = max(first, at), min(end, at + len(new))
            data = data[: low - first] + new[low - at : high - at] + data[high - first :]
        return data

    def api(self, path: str, body: bytes) -> Json | None:
        """Answer a request to the STAC API."""
        if path == "/":
            core = [f"https://api.stacspec.org/v1.0.0/{p}"
                    for p in ("core", "collections", "item-search", "ogcapi-features")]  # fmt: skip
            links = [{"rel": "root", "href": self.url}, {"rel": "self", "href": self.url},
                     {"rel": "data", "href": self.url + "collections"},
                     {"rel": "search", "href": self.url + "search", "method": "POST",
                      "type": "application/geo+json"}]  # fmt: skip
            return {"type": "Catalog", "id": "bench", "stac_version": "1.0.0", "links": links,
                    "description": "generated", "conformsTo": core}  # fmt: skip
        if path == "/collections":
            return {"collections": [self.collection], "links": []}
        if path == f"/collections/{self.collection.get('id')}":
            return self.collection
        if path == "/search":
            return self.search(json.loads(body or b"{}"))
        return None

    def search(self, query: Json) -> Json:
        """Return a page of the items that match ``bbox`` and ``datetime``."""
        found = self.items
        if box := query.get("bbox"):
            w, s, e, n = box
            found = [i for i in found if i["bbox"][0] <= e and i["bbox"][2] >= w
                     and i["bbox"][1] <= n and i["bbox"][3] >= s]  # fmt: skip
        if query.get("datetime"):
            first, _, last = query["datetime"].partition("/")
            first, last = first.strip("."), (last or first).strip(".")
            found = [i for i in found if first <= i["properties"]["datetime"]
                     and (not last or i["properties"]["datetime"] <= last)]  # fmt: skip
        start = int(query.get("token", 0))
        end = start + int(query.get("limit", 10))
        links = [{"rel": "next", "href": self.url + "search", "method": "POST",
                  "body": {**query, "token": str(end)}}] if end < len(found) else []  # fmt: skip
        page = [
            {**item, "assets": {k: {**a, "href": f"{self.url}assets/{a['href']}"}
                                for k, a in item["assets"].items()}}
            for item in found[start:end]
        ]  # fmt: skip
        return {"type": "FeatureCollection", "features": page, "links": links,
                "numberMatched": len(found)}  # fmt: skip


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request after the other."""

    def __init__(self, world: World) -> None:
        self.world, self.waiting = world, b""

    def connection_made(self, transport: Any) -> None:
        """Send small answers at once."""
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self.waiting += data
        while (end := self.waiting.find(b"\r\n\r\n")) >= 0:
            head = self.waiting[:end]
            told = LENGTH.search(head)
            size = end + 4 + (int(told[1]) if told else 0)
            if len(self.waiting) < size:
                return
            body, self.waiting = self.waiting[end + 4 : size], self.waiting[size:]
            for block in self.answer(head, body):
                self.transport.write(block)

    def answer(self, head: bytes, body: bytes) -> Iterator[bytes]:
        """Return the bytes of an answer."""
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        path = unquote(target.partition("?")[0])
        name = path.removeprefix("/assets/")
        if name != path and (found := self.world.file(name)):
            size = found[1]
            status, more, first, last = "200 OK", "", 0, size - 1
            if options := RANGE.search(head):
                first, last = int(options[1]), min(int(options[2] or size), size - 1)
                status, more = (
                    "206 Partial Content",
                    (f"content-range: bytes {first}-{last}/{size}\r\n"),
                )
            if first > last:
                yield from self.send("416 Range Not Satisfiable", b"", "api")
                return
            data = b"" if method == "HEAD" else self.world.read(name, first, last + 1)
            self.count("assets", len(data))
            yield (f'HTTP/1.1 {status}\r\ncontent-length: {last - first + 1}\r\n{more}'
                   f'etag: "{size}"\r\naccept-ranges: bytes\r\n'
                   "content-type: image/tiff\r\n\r\n").encode()  # fmt: skip
            yield data
            return
        if path == "/__stats":
            yield from self.send("200 OK", json.dumps(self.world.counts).encode(), "")
        elif path == "/__reset":
            for group in self.world.counts.values():
                group.clear()
            yield from self.send("200 OK", b"{}", "")
        elif (found_json := self.world.api(path, body)) is not None:
            yield from self.send("200 OK", json.dumps(found_json).encode(), "api")
        else:
            yield from self.send("404 Not Found", b"", "api")

    def send(self, status: str, data: bytes, group: str) -> Iterator[bytes]:
        """Send a JSON answer."""
        if group:
            self.count(group, len(data))
        yield (f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n"
               "content-type: application/json\r\n\r\n").encode()  # fmt: skip
        yield data

    def count(self, group: str, size: int) -> None:
        """Add to the totals."""
        for name in (group, "total"):
            self.world.counts["requests"][name] += 1
            self.world.counts["bytes"][name] += size


async def serve(world: World, port: int) -> None:
    """Serve until ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(Connection, world), "127.0.0.1", port)
    world.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    print(world.url, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--items", type=int, help="serve only the first so many")
    options = parser.parse_args()
    asyncio.run(serve(World(options.folder, options.items), options.port))
