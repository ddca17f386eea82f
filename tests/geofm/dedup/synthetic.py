"""Small chips, items and embeddings artifacts, made through the store like real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from shapely.geometry import box

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.manifest import Manifest
from data_catalog.run import run_stage
from data_catalog.store import Store, list_files
from data_catalog.tables import write_table
from geofm.config.recipe import CurateSettings
from geofm.formats.npy import chip_bytes, pixel_sha256
from geofm.formats.tar import write_tar
from geofm.stages import get_stage

BANDS = ["red", "green", "blue"]


@dataclass
class Chip:
    """One synthetic chip."""

    pixels: NDArray[Any]
    item: str = "scene-a"
    collection: str = "c"
    scale: float = 1e-4
    bands: list[str] = field(default_factory=lambda: list(BANDS))
    valid: float = 1.0
    cloud: float = 0.0
    saturated: float = 0.0
    status: str = "ok"
    x: float = 500_000.0
    crs: str = "EPSG:32631"

    def chip_id(self, number: int) -> str:
        """24 hex digits, in no particular order."""
        return hashlib.sha256(f"chip {number}".encode()).hexdigest()[:24]


def texture(seed: int, size: int = 32, bands: int = 3, dtype: str = "uint16") -> NDArray[Any]:
    """A smooth random picture with a grain: [bands, size, size]."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(0.1, 0.9, (bands, 4, 4))
    picture = np.kron(coarse, np.ones((1, size // 4, size // 4)))
    picture = picture + draw.normal(0, 0.05, picture.shape)
    top = 255 if dtype == "uint8" else 3000
    return np.clip(picture * top, 1, top).astype(dtype)


def publish(
    store: Store, kind: str, stage: str, out: Path, facts: dict[str, Any], rows: int
) -> Artifact:
    manifest = Manifest(
        kind=kind,
        stage=stage,
        version="test",
        inputs={},
        settings={},
        seed=0,
        software={},
        counts={"rows_in": rows, "rows_out": rows},
        dropped={},
        facts=facts,
        deterministic=True,
        files=list_files(out),
    )
    return store.publish(out, manifest)


def make_chips(store: Store, chips: Sequence[Chip], per_part: int = 8) -> Artifact:
    """A chips artifact with ``per_part`` chips per tar."""
    with store.staging() as folder:
        out = folder / "artifact"
        (out / "parts").mkdir(parents=True)
        rows, assets = [], {}
        for first in range(0, len(chips), per_part):
            group = chips[first : first + per_part]
            name = f"parts/{first // per_part:04d}.tar"
            ids = [chip.chip_id(first + n) for n, chip in enumerate(group)]
            data = [(f"{i}.npy", chip_bytes(c.pixels)) for i, c in zip(ids, group, strict=True)]
            for chip_id, chip, member in zip(ids, group, write_tar(out / name, data), strict=True):
                rows.append(_chip_row(chip_id, chip, name, member.offset, member.size))
                for band in chip.bands:
                    assets[chip.item, band] = _asset_row(chip, band)
        frame = gpd.GeoDataFrame(rows, geometry="geometry", crs=4326)
        write_table(frame, out / "chips.parquet")
        write_table(pd.DataFrame(list(assets.values())), out / "assets.parquet")
        return publish(store, "chips", "cut", out, {}, len(rows))


def _chip_row(chip_id: str, chip: Chip, part: str, offset: int, size: int) -> dict[str, Any]:
    height, width = chip.pixels.shape[1:]
    west = 2.0 + (chip.x - 500_000) / 1e5
    return {
        "chip_id": chip_id,
        "item_id": chip.item,
        "item_sha256": item_sha256(chip.collection, chip.item),
        "collection": chip.collection,
        "cell": f"32631_{int(chip.x)}",
        "row": 0,
        "col": 0,
        "width": width,
        "height": height,
        "crs": chip.crs,
        "transform": [10.0, 0.0, chip.x, 0.0, -10.0, 5_000_000.0],
        "geometry": box(west, 45.0, west + 0.01, 45.01),
        "bands": chip.bands,
        "dtype": chip.pixels.dtype.name,
        "scale": [chip.scale] * len(chip.bands),
        "dn_offset": [0.0] * len(chip.bands),
        "pixel_sha256": pixel_sha256(chip.pixels),
        "valid_fraction": chip.valid,
        "cloud_fraction": chip.cloud,
        "saturated_fraction": chip.saturated,
        "part": part,
        "offset": offset,
        "size": size,
        "status": chip.status,
        "reason": "" if chip.status == "ok" else "nodata",
        "datetime": "2024-06-01T10:00:00Z",
        "licence": "CC-BY-4.0",
    }


def item_sha256(collection: str, item: str) -> str:
    """Stand in for the digest of an item's JSON."""
    return hashlib.sha256(f"{collection}/{item}".encode()).hexdigest()


def _asset_row(chip: Chip, band: str) -> dict[str, Any]:
    return {
        "item_id": chip.item,
        "collection": chip.collection,
        "asset": band,
        "band": band,
        "href": f"https://example.org/{chip.item}/{band}.tif",
        "sha256": hashlib.sha256(f"{chip.item}{band}".encode()).hexdigest(),
        "sha256_from": "computed",
        "status": "ok",
    }


def make_items(store: Store, chips: Sequence[Chip]) -> Artifact:
    """An items artifact with the scenes that the chips name."""
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        scenes = sorted({(chip.collection, chip.item) for chip in chips})
        rows = [
            {
                "collection": collection,
                "item_id": item,
                "item_sha256": item_sha256(collection, item),
                "item_json": "{}",
                "geometry": box(2, 45, 3, 46),
                # an older version that stands in for a newer one that could not be read
                "status": "dropped" if item.endswith("-old") else "ok",
                "reason": "reprocessed" if item.endswith("-old") else "",
                "source": "generic",
                "licence": "CC-BY-4.0",
            }
            for collection, item in scenes
        ]
        write_table(gpd.GeoDataFrame(rows, geometry="geometry", crs=4326), out / "items.parquet")
        return publish(store, "items", "search", out, {}, len(rows))


def make_embeddings(
    store: Store, chip_ids: Sequence[str], vectors: NDArray[np.floating[Any]]
) -> Artifact:
    """An embeddings artifact with given vectors."""
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        np.save(out / "embeddings.npy", vectors.astype(np.float16))
        write_table(pd.DataFrame({"chip_id": list(chip_ids)}), out / "ids.parquet")
        return publish(store, "embeddings", "embed", out, {}, len(chip_ids))


def curate_from(
    store: Store,
    catalogue: Catalogue,
    chips: Artifact,
    embeddings: Artifact,
    settings: CurateSettings,
    seed: int = 0,
) -> dict[str, Artifact]:
    """Everything from descriptors to decisions, by kind."""
    made = {"chips": chips, "embeddings": embeddings, "calibration": make_calibration(store)}
    for name in ("describe", "pool", "buckets", "pairs", "alike", "curate"):
        stage = get_stage(name)
        made[stage.kind] = run_stage(stage, store, catalogue, made, settings, seed)
    return made


def make_pool(store: Store, chip_ids: Sequence[str]) -> Artifact:
    """A pool artifact in which every chip is a candidate."""
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        table = pd.DataFrame({"chip_id": sorted(chip_ids), "rule": "", "quality": 1.0})
        table["monotone"] = False
        write_table(table, out / "pool.parquet")
        return publish(store, "pool", "pool", out, {}, len(chip_ids))


def make_calibration(store: Store, thresholds: dict[str, float] | None = None) -> Artifact:
    """A calibration artifact that says from which similarity chips of a collection are one."""
    found = {"c": 0.95} if thresholds is None else thresholds
    facts = {"thresholds": {name: {"threshold": value} for name, value in found.items()}}
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        return publish(store, "calibration", "calibrate", out, facts, 0)
