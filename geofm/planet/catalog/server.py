"""The server of a built world on loopback: a STAC API, and the files with byte ranges."""

from __future__ import annotations

import copy
import json
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from data_catalog.errors import RunError
from geofm.planet.catalog.item_search import BadQuery, ItemSearch, parse_search, search_items
from geofm.planet.world import world_items
from geofm.types import Json

GEOJSON = "application/geo+json"
CONFORMS = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/collections",
    "https://api.stacspec.org/v1.0.0/ogcapi-features",
    "https://api.stacspec.org/v1.0.0/item-search",
    "https://api.stacspec.org/v1.0.0/item-search#sort",
    "http://www.opengis.net/spec/ogcapi-features-1/1.0/conf/core",
    "http://www.opengis.net/spec/ogcapi-features-1/1.0/conf/geojson",
]
_MEDIA = {".tif": "image/tiff; application=geotiff; profile=cloud-optimized", ".png": "image/png"}


def link(rel: str, href: str, kind: str = "application/json", **more: Any) -> Json:
    """Make a STAC link."""
    return {"rel": rel, "href": href, "type": kind, **more}


@dataclass(frozen=True)
class Archive:
    """A world to serve: its folder, collections and items, and the checksum of each file."""

    root: Path
    collections: dict[str, Json]
    items: tuple[Json, ...]
    digests: dict[str, str]


def open_archive(root: Path) -> Archive:
    """Read a built world.

    Raises:
        RunError: The folder holds no world.
    """
    if not (root / "truth.json").is_file():
        raise RunError(f"{root} holds no planet; build one with `python -m geofm.planet --out`")
    paths = sorted((root / "collections").glob("*.json"))
    collections = {path.stem: json.loads(path.read_bytes()) for path in paths}
    items = tuple(world_items(root))
    digests = {
        asset["href"]: asset["file:checksum"] for i in items for asset in i["assets"].values()
    }
    return Archive(root, collections, items, digests)


def make_app(archive: Archive) -> FastAPI:
    """Make the API; addresses in its answers start with the address of the request."""
    app = FastAPI(title="geofm planet", docs_url=None, redoc_url=None)

    @app.exception_handler(BadQuery)
    async def bad_query(_: Request, error: BadQuery) -> JSONResponse:
        return JSONResponse({"code": "BadRequest", "description": str(error)}, status_code=400)

    @app.get("/")
    async def landing(request: Request) -> Json:
        base = _base(request)
        return {
            "type": "Catalog", "stac_version": "1.0.0", "id": "geofm-planet",
            "title": "A procedural Earth", "conformsTo": CONFORMS,
            "description": "Generated imagery for demonstrations and tests of geofm.",
            "links": [
                link("self", base + "/"), link("root", base + "/"),
                link("conformance", base + "/conformance"), link("data", base + "/collections"),
                link("search", base + "/search", GEOJSON, method="GET"),
                link("search", base + "/search", GEOJSON, method="POST"),
                link("service-desc", base + "/openapi.json",
                     "application/vnd.oai.openapi+json;version=3.0"),
                *(link("child", f"{base}/collections/{name}") for name in archive.collections),
            ],
        }  # fmt: skip

    @app.get("/conformance")
    async def conformance() -> Json:
        return {"conformsTo": CONFORMS}

    @app.get("/collections")
    async def collections(request: Request) -> Json:
        base = _base(request)
        described = [_collection(c, base) for c in archive.collections.values()]
        links = [link("self", base + "/collections"), link("root", base + "/")]
        return {"collections": described, "links": links}

    @app.get("/collections/{name}")
    async def collection(name: str, request: Request) -> Json:
        return _collection(_find_collection(archive, name), _base(request))

    @app.get("/collections/{name}/items")
    async def items(name: str, request: Request) -> JSONResponse:
        _find_collection(archive, name)
        parameters = {**request.query_params, "collections": name}
        return _page(archive, parameters, request, f"/collections/{quote(name)}/items")

    @app.get("/collections/{name}/items/{item}")
    async def item(name: str, item: str, request: Request) -> JSONResponse:
        for entry in archive.items:
            if entry["collection"] == name and entry["id"] == item:
                return JSONResponse(_item(entry, _base(request)), media_type=GEOJSON)
        raise HTTPException(404, f"no item {item!a:.80} in {name!a:.80}")

    @app.get("/search")
    async def search_by_get(request: Request) -> JSONResponse:
        parameters: Json = dict(request.query_params)
        if parameters.get("intersects"):
            parameters["intersects"] = _parse_json(parameters["intersects"])
        return _page(archive, parameters, request, "/search")

    @app.post("/search")
    async def search_by_post(request: Request) -> JSONResponse:
        parameters = _parse_json(await request.body())
        if not isinstance(parameters, dict):
            raise BadQuery("the body is no JSON object")
        return _page(archive, parameters, request, "/search")

    @app.api_route("/assets/{path:path}", methods=["GET", "HEAD"])
    async def asset(path: str, request: Request) -> Response:
        digest = archive.digests.get(f"assets/{path}")
        if digest is None:  # only files that an item names are served
            raise HTTPException(404, "no such asset")
        etag = f'"{digest[4:]}"'
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        file = archive.root / "assets" / path
        return FileResponse(file, media_type=_MEDIA[file.suffix], headers={"etag": etag})

    return app


def _parse_json(text: str | bytes) -> Any:
    """Parse JSON of a request."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadQuery("the query is no JSON") from error


def _base(request: Request) -> str:
    """Return the address of the API as the client sees it."""
    return str(request.base_url).rstrip("/")


def _find_collection(archive: Archive, name: str) -> Json:
    """Return a collection, or answer with HTTP 404."""
    if name not in archive.collections:
        raise HTTPException(404, f"no collection {name!a:.80}")
    return archive.collections[name]


def _collection(collection: Json, base: str) -> Json:
    """Return a collection with its links."""
    address = f"{base}/collections/{collection['id']}"
    links = [
        link("self", address), link("root", base + "/"), link("parent", base + "/"),
        link("items", address + "/items", GEOJSON),
        link("license", "https://creativecommons.org/publicdomain/zero/1.0/", "text/html"),
    ]  # fmt: skip
    return {**collection, "links": links}


def _item(item: Json, base: str) -> Json:
    """Return an item with its links and absolute addresses."""
    served = copy.deepcopy(item)
    for asset in served["assets"].values():
        asset["href"] = f"{base}/{asset['href']}"
    collection = f"{base}/collections/{item['collection']}"
    served["links"] = [
        link("self", f"{collection}/items/{quote(item['id'])}", GEOJSON),
        link("root", base + "/"),
        link("parent", collection),
        link("collection", collection),
    ]
    return served


def _page(archive: Archive, parameters: Json, request: Request, path: str) -> JSONResponse:
    """Answer a search with a page of items."""
    query = parse_search(parameters)
    matched = search_items(archive.items, query)
    page = matched[query.offset : query.offset + query.limit]
    base = _base(request)
    links = [link("self", str(request.url), GEOJSON), link("root", base + "/")]
    if query.offset + len(page) < len(matched):
        links.append(_next_link(parameters, query, request, base + path))
    body = {
        "type": "FeatureCollection", "features": [_item(item, base) for item in page],
        "links": links, "numberMatched": len(matched), "numberReturned": len(page),
    }  # fmt: skip
    return JSONResponse(body, media_type=GEOJSON)


def _next_link(parameters: Json, query: ItemSearch, request: Request, address: str) -> Json:
    """Make the link to the next page."""
    token = f"next:{query.offset + query.limit}"
    if request.method == "POST":
        return link("next", address, GEOJSON, method="POST", body={**parameters, "token": token})
    kept = {name: value for name, value in request.query_params.items() if name != "token"}
    return link("next", f"{address}?{urlencode({**kept, 'token': token})}", GEOJSON, method="GET")


class ServedWorld:
    """A running server; ``url`` has no slash at its end. Close it, or use it in ``with``."""

    def __init__(self, root: Path, port: int) -> None:
        app = make_app(open_archive(root))
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            self._socket.close()
            raise RunError(f"port {port} can't be used ({error.strerror}); give another") from error
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        # uvicorn's own logging configuration would close all handlers of the process. Prefect's
        # handler sends its lines from another thread, and closing it can wait for ever.
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True,
            name="geofm-planet",
        )  # fmt: skip
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RunError("the planet's server did not start; its log says why")
            self._thread.join(0.01)

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving; open connections are ended."""
        self._server.should_exit = True
        self._thread.join(2)
        self._server.force_exit = True
        self._thread.join(8)
        self._socket.close()

    def __enter__(self) -> ServedWorld:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve_world(root: Path, port: int = 0) -> ServedWorld:
    """Serve a built world on 127.0.0.1, in a thread of this process.

    Args:
        root: Folder of the world, as returned by ``build_world``.
        port: Port; 0 chooses a free port.

    Raises:
        RunError: The folder holds no world, or the port is taken.
    """
    return ServedWorld(root, port)
