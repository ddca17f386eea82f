"""Chips, items and decisions in any number for ``benchmarks/shards.py``, in a real store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from shapely.geometry import box

from data_catalog.artifact import Artifact
from data_catalog.manifest import Manifest
from data_catalog.store import Store, list_files
from data_catalog.tables import write_table
from geofm.formats.npy import chip_bytes, pixel_sha256
from geofm.formats.tar import write_tar

#: Different images; more would only take time to generate.
PICTURES = 64
ROWS = 2**16


def make_world(
    store: Store, samples: int, shape: tuple[int, int, int], dtype: str, per_scene: int
) -> dict[str, Artifact]:
    """Make the inputs of ``pack``: chips stored by scene, scenes along a line from west to east."""
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    pictures = [rng.integers(1, top, shape, dtype=dtype) for _ in range(PICTURES)]
    coded = [(chip_bytes(picture), pixel_sha256(picture)) for picture in pictures]
    with store.staging() as folder:
        out = folder / "artifact"
        (out / "parts").mkdir(parents=True)
        _write_chips(out, samples, shape, dtype, per_scene, coded)
        chips = _publish(store, "chips", "cut", out, samples)
    scenes = [f"scene-{n:06d}" for n in range(-(-samples // per_scene))]
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        frame = {"collection": "c", "item_id": scenes, "status": "ok", "reason": "",
                 "source": "generic", "licence": "CC-BY-4.0"}  # fmt: skip
        areas = [box(0, 0, 1, 1)] * len(scenes)
        write_table(gpd.GeoDataFrame(frame, geometry=areas, crs=4326), out / "items.parquet")
        items = _publish(store, "items", "search", out, len(scenes))
    ids = [chip_id(number) for number in range(samples)]
    return {"items": items, "chips": chips, "decisions": decide(store, ids, set())}


def decide(store: Store, ids: list[str], drop: set[str]) -> Artifact:
    """Make decisions that keep all but some chips."""
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        kept = ["drop" if one in drop else "keep" for one in ids]
        table = pa.table({"chip_id": ids, "decision": kept, "quality": np.ones(len(ids))})
        pq.write_table(table, out / "decisions.parquet")
        return _publish(store, "decisions", "curate", out, len(ids))


def chip_id(number: int) -> str:
    """Return an id of 24 hex digits."""
    return hashlib.sha256(f"chip {number}".encode()).hexdigest()[:24]


def _write_chips(
    out: Path, samples: int, shape: tuple[int, int, int], dtype: str, per_scene: int,
    coded: list[tuple[bytes, str]],
) -> None:  # fmt: skip
    bands = [f"b{n:02d}" for n in range(shape[0])]
    writer: pq.ParquetWriter | None = None
    waiting: list[dict[str, Any]] = []
    for scene, first in enumerate(range(0, samples, per_scene)):
        numbers = range(first, min(first + per_scene, samples))
        part = f"parts/{scene:06d}.tar"

        def members(numbers: range = numbers) -> Iterator[tuple[str, bytes]]:
            for n in numbers:
                yield f"{chip_id(n)}.npy", coded[n % len(coded)][0]

        for n, member in zip(numbers, write_tar(out / part, members(), digests=False), strict=True):
            waiting.append(
                {"chip_id": member.name[:24], "item_id": f"scene-{scene:06d}", "n": n,
                 "pixel_sha256": coded[n % len(coded)][1], "part": part, "offset": member.offset,
                 "size": member.size, "x": scene, "y": n - first}
            )  # fmt: skip
        if len(waiting) >= ROWS or numbers.stop == samples:
            table = _chip_table(pd.DataFrame(waiting), shape, dtype, bands)
            writer = writer or pq.ParquetWriter(out / "chips.parquet", table.schema)
            writer.write_table(table)
            waiting = []
    assert writer is not None
    writer.close()
    scenes = [f"scene-{n:06d}" for n in range(-(-samples // per_scene))]
    assets = [
        {"item_id": scene, "collection": "c", "asset": band, "band": band,
         "href": f"https://example.org/{scene}/{band}.tif", "sha256": "0" * 64,
         "sha256_from": "computed", "status": "ok"}
        for scene in scenes for band in bands
    ]  # fmt: skip
    write_table(pd.DataFrame(assets), out / "assets.parquet")


def _chip_table(
    rows: pd.DataFrame, shape: tuple[int, int, int], dtype: str, bands: list[str]
) -> pa.Table:
    count, x, y = len(rows), rows["x"].to_numpy(), rows["y"].to_numpy()
    west, south = x % 3600 * 0.1 - 180, y * 0.001
    areas = shapely.to_wkb(shapely.box(west, south, west + 0.001, south + 0.001))
    lattice = f"EPSG:32631/{shape[1]}x10m"
    same = {
        "collection": "c", "row": 0, "col": 0, "height": shape[1], "width": shape[2],
        "crs": "EPSG:32631", "dtype": dtype, "valid_fraction": 1.0, "cloud_fraction": 0.0,
        "saturated_fraction": 0.0, "datetime": "2024-06-01T10:00:00Z", "licence": "CC-BY-4.0",
        "status": "ok",
    }  # fmt: skip
    columns = {name: pa.repeat(value, count) for name, value in same.items()}
    for name in ("chip_id", "item_id", "pixel_sha256", "part", "offset", "size"):
        columns[name] = pa.array(rows[name].to_numpy())
    columns["cell"] = pa.array([f"{lattice}/{a}/{b}" for a, b in zip(x, y, strict=True)])
    columns["geometry"] = pa.array(areas)
    columns["transform"] = pa.array([[10.0, 0.0, 5e5, 0.0, -10.0, 5e6]] * count)
    columns["bands"] = pa.array([bands] * count)
    columns["scale"] = pa.array([[1e-4] * len(bands)] * count)
    columns["dn_offset"] = pa.array([[0] * len(bands)] * count)
    return pa.table(columns)


def _publish(store: Store, kind: str, stage: str, out: Path, rows: int) -> Artifact:
    manifest = Manifest(
        kind=kind, stage=stage, version="benchmark", inputs={}, settings={}, seed=0, software={},
        counts={"rows_in": rows, "rows_out": rows}, dropped={}, facts={}, deterministic=True,
        files=list_files(out),
    )  # fmt: skip
    return store.publish(out, manifest)
