"""Peers of ``benchmarks/cut.py``: each reads the same windows, in a process of its own.

    PYTHON benchmarks/cut_peers.py READER JOB.json

PYTHON's environment: rasterio, numpy; odc-stac and pystac; rio-tiler; urllib3 and imagecodecs for
the bare range readers. The last printed line is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak_rss_mib

Json = dict[str, Any]
#: GDAL options for COGs from the documentation of rio-tiler and odc-stac.
GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".tif",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "GDAL_CACHEMAX": "200",
    "VSI_CACHE": "TRUE",
    "VSI_CACHE_SIZE": "5000000",
    "GDAL_HTTP_PROXY": "",
    "NO_PROXY": "127.0.0.1",
}
#: Largest gap between blocks in a request, and largest request, in bytes.
GAP, LONGEST = 64, 4 * 2**20
#: Bytes that are read from the beginning of a file.
HEADER = 16 * 2**10


def main() -> None:
    """Read the windows; print seconds, chips and memory."""
    reader, file = sys.argv[1:]
    job = json.loads(Path(file).read_bytes())
    os.environ.update(GDAL)
    warm(job)
    READERS[reader](elsewhere(job))()
    run = READERS[reader](job)
    counts = urllib.request.Request(job["reset"], method="POST")  # noqa: S310
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(counts).read()
    began = time.perf_counter()
    chips = run()
    seconds = time.perf_counter() - began
    peak = peak_rss_mib()
    print(json.dumps({"seconds": seconds, "chips": chips, "peak_rss_mib": peak}))


def warm(job: Json) -> None:
    """Read a local file of a scene, so that GDAL and PROJ load their data."""
    import rasterio

    for item in list(job["items"].values())[:1]:
        with rasterio.open(item["files"]["red"]) as file:
            file.read(1, window=((0, 256), (0, 256)))
            str(file.crs)


def elsewhere(job: Json) -> Json:
    """Return the job with other addresses of the same files, which no cache knows."""
    files = {name: item["files"] for name, item in job["items"].items()}
    other: Json = json.loads(json.dumps(job).replace(".tif", ".tif?before"))
    for name, item in other["items"].items():
        item["files"] = files[name]
    return other


def on_threads(job: Json, each: Callable[[Any], int], things: Iterable[Any]) -> int:
    """Read chips with the job's number of threads."""
    with ThreadPoolExecutor(job["threads"]) as pool:
        return sum(pool.map(each, things))


def odc_stac(job: Json) -> Callable[[], int]:
    """Call ``odc.stac.load`` once per chip."""
    import pystac
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.stac import configure_rio, load

    configure_rio(cloud_defaults=True)
    items = {name: pystac.Item.from_dict(item["stac"]) for name, item in job["items"].items()}
    size, bands = job["size"], job["bands"]

    def chip(window: Json) -> int:
        place = GeoBox((size, size), Affine(*window["transform"]), window["crs"])
        found = load([items[window["item"]]], bands=bands, geobox=place)
        pixels = np.stack([found[band].values[0] for band in bands])
        assert pixels.shape == (len(bands), size, size)
        return 1

    return lambda: on_threads(job, chip, job["windows"])


def rio_tiler(job: Json) -> Callable[[], int]:
    """Call ``Reader.part`` once per chip and band."""
    from rio_tiler.io import Reader

    size = job["size"]

    def chip(window: Json) -> int:
        a, _, west, _, e, north = window["transform"]
        box = (west, north + e * size, west + a * size, north)
        read = []
        for href in job["items"][window["item"]]["hrefs"].values():
            with Reader(href) as file:
                part = file.part(box, bounds_crs=window["crs"], dst_crs=window["crs"],
                                 height=size, width=size)  # fmt: skip
                read.append(part.data[0])
        assert np.stack(read).shape[1:] == (size, size)
        return 1

    return lambda: on_threads(job, chip, job["windows"])


def rasterio_loop(job: Json, local: bool = False) -> Callable[[], int]:
    """Open each scene once and read its windows in order."""
    import rasterio
    from rasterio.windows import Window

    size = job["size"]
    by_item = defaultdict(list)
    for window in job["windows"]:
        by_item[window["item"]].append(window)

    def scene(name: str) -> int:
        hrefs = job["items"][name]["files" if local else "hrefs"].values()
        files = [rasterio.open(href if local else f"/vsicurl/{href}") for href in hrefs]
        for window in by_item[name]:
            place = Window(window["col"], window["row"], size, size)
            pixels = np.stack([file.read(1, window=place) for file in files])
            assert pixels.shape[1:] == (size, size)
        for file in files:
            file.close()
        return len(by_item[name])

    return lambda: on_threads(job, scene, by_item)


def local_gdal(job: Json) -> Callable[[], int]:
    """Read files on the local disk: the cost of decoding alone."""
    return rasterio_loop(job, local=True)


def bare(job: Json, decode: str = "", keep: bool = False) -> Callable[[], int]:
    """Read only the compressed blocks that the windows touch, with neighbours in one request.

    Args:
        job: The job.
        decode: Nothing, ``zlib`` (standard library, predictor by numpy) or ``libdeflate``.
        keep: Whether to request the beginning of each file too, which a reader needs to locate
            blocks, to hash the blocks' pixels (SHA-256), and to write them to a file.
    """
    import urllib3

    if decode == "libdeflate":
        import imagecodecs

        def unpack(data: bytes, block: Json) -> Any:
            size = block["edge"] ** 2 * np.dtype(block["dtype"]).itemsize
            plain = imagecodecs.zlib_decode(data, out=size)
            pixels = np.frombuffer(plain, block["dtype"]).reshape(block["edge"], block["edge"])
            return imagecodecs.delta_decode(pixels, axis=1)
    else:

        def unpack(data: bytes, block: Json) -> Any:
            pixels = np.frombuffer(zlib.decompress(data), block["dtype"])
            pixels = pixels.reshape(block["edge"], block["edge"])
            return np.add.accumulate(pixels, axis=1, dtype=pixels.dtype)

    class Prompt(urllib3.connection.HTTPConnection):
        """Acknowledges at once, as geofm does; a server with Nagle's algorithm waits for that."""

        def getresponse(self) -> Any:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            return super().getresponse()

    urllib3.HTTPConnectionPool.ConnectionCls = Prompt
    connections = urllib3.PoolManager(maxsize=16)
    kept = threading.local()

    def write(pixels: Any) -> None:
        file = getattr(kept, "file", None)
        if file is None:
            file = kept.file = tempfile.TemporaryFile(dir=job["scratch"], buffering=0)  # noqa: SIM115
        hashlib.sha256(pixels).digest()
        file.write(pixels)

    def fetch(span: Json) -> int:
        told = {"range": f"bytes={span['first']}-{span['end'] - 1}", "accept-encoding": "identity"}
        answer = connections.request("GET", span["href"], headers=told, preload_content=False)
        data = answer.read(decode_content=False)
        answer.release_conn()
        assert len(data) == span["end"] - span["first"] or not span["blocks"]
        if decode:
            for block in span["blocks"]:
                start = block["offset"] - span["first"]
                pixels = unpack(data[start : start + block["size"]], block)
                if keep:
                    write(pixels)
        return 0

    spans = coalesce(job["blocks"])
    if keep:
        files = sorted({span["href"] for span in spans})
        spans = [*({"href": f, "first": 0, "end": HEADER, "blocks": []} for f in files), *spans]
    return lambda: on_threads(job, fetch, spans) + len(job["windows"])


def coalesce(blocks: list[Json]) -> list[Json]:
    """Merge neighbouring blocks into requests."""
    spans: list[Json] = []
    for block in sorted(blocks, key=lambda b: (b["href"], b["offset"])):
        end = block["offset"] + block["size"]
        last = spans[-1] if spans else None
        if (last and last["href"] == block["href"] and block["offset"] - last["end"] <= GAP
                and end - last["first"] <= LONGEST):  # fmt: skip
            last["end"] = end
            last["blocks"].append(block)
        else:
            spans.append({"href": block["href"], "first": block["offset"], "end": end,
                          "blocks": [block]})  # fmt: skip
    return spans


READERS: dict[str, Callable[[Json], Callable[[], int]]] = {
    "odc-stac": odc_stac,
    "rio-tiler": rio_tiler,
    "rasterio": rasterio_loop,
    "local GDAL": local_gdal,
    "bare fetch": bare,
    "bare fetch + zlib": lambda job: bare(job, "zlib"),
    "bare fetch + zlib, headers, kept": lambda job: bare(job, "zlib", keep=True),
    "bare fetch + libdeflate": lambda job: bare(job, "libdeflate"),
}

if __name__ == "__main__":
    main()
