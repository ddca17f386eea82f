"""The samples of a dataset: the kept chips, joined with their items and assets, in one order.

The order is by a hash of seed and chip id, the train split before the holdout. A chip's place
therefore depends on no other chip: when a refresh adds a few, or one has to be forgotten, the
shards without them stay as they are.

The rows are in a file of the job's scratch, sorted by way of buckets, so that memory holds one
bucket however many samples there are.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyproj
import shapely
from numpy.typing import NDArray
from shapely.geometry import mapping

from data_catalog.artifact import Artifact
from data_catalog.stage import Job
from data_catalog.tables import records
from geofm.formats.tar import BLOCK
from geofm.shards.index import release_memory
from geofm.shards.sorting import BLOCK_ROWS, BUCKET_ROWS, FILE, sort_rows
from geofm.shards.split import HOLDOUT, RIM, TRAIN
from geofm.types import Json

ASSET_COLUMNS = ["asset", "band", "href", "sha256", "sha256_from"]
#: Where a chip's pixels are; a sample's place is in the index instead.
CHIP_PLACE = ["part", "offset", "size"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Kept chips in dataset order.

    Attributes:
        file: Arrow IPC, a row per sample in batches of ``BLOCK_ROWS``: columns of the chips,
            scores, ``source``, ``split`` and ``place``; then those that belong to no split.
        hashes: place of each sample in the order, ascending within a split.
        npy_blocks: tar blocks of the ``.npy`` of all samples of each split.
        splits: first and last + 1 of the samples of each split that has any.
        left_out: kept chips that belong to no split: chip_id, cell, reason.
        assets: what was read, by (collection, item).
    """

    file: Path
    hashes: NDArray[np.uint64]
    npy_blocks: dict[str, int]
    splits: dict[str, tuple[int, int]]
    left_out: pa.Table
    assets: dict[tuple[str, str], list[Json]]

    def __len__(self) -> int:
        return len(self.hashes)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[pa.RecordBatch]:
        """Rows ``first`` to ``last`` - 1, some at a time."""
        end = len(self) if last is None else last
        with pa.OSFile(str(self.file)) as file, pa.ipc.open_file(file) as reader:
            for number in range(first // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
                start = number * BLOCK_ROWS
                begin = max(first - start, 0)
                yield reader.get_batch(number).slice(begin, end - start - begin)

    def records(
        self, first: int = 0, last: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[Json]:
        """Rows as dictionaries."""
        for batch in self.batches(first, last):
            yield from (batch.select(columns) if columns else batch).to_pylist()

    def distinct(self, column: str) -> set[str]:
        """The different texts of a column."""
        return {text for b in self.batches() for text in pc.unique(b[column]).to_pylist()}

    def documents(self, first: int, last: int) -> Iterator[tuple[Json, Json]]:
        """Rows as dictionaries, each with the JSON member of its sample."""
        for batch in self.batches(first, last):
            areas = _geojson(batch["geometry"])
            for row, area in zip(batch.to_pylist(), areas, strict=True):
                yield row, self._document(row, area)

    def _document(self, row: Json, area: Json) -> Json:
        """Where a sample came from, and how to read its pixels."""
        key = str(row["collection"]), str(row["item_id"])
        return {
            "chip_id": row["chip_id"],
            "item_id": row["item_id"],
            "collection": row["collection"],
            "assets": [a for a in self.assets.get(key, []) if a["band"] in row["bands"]],
            "cell": row["cell"],
            "window": {name: int(row[name]) for name in ("row", "col", "width", "height")},
            "crs": row["crs"],
            "transform": row["transform"],
            "geometry": area,
            "datetime": row["datetime"] or None,
            "bands": row["bands"],
            "dtype": row["dtype"],
            "scale": _finite(row["scale"]),
            "dn_offset": _finite(row["dn_offset"]),
            "licence": row["licence"],
            "source": row["source"],
            "pixel_sha256": row["pixel_sha256"],
        }

    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north in degrees."""
        boxes = [
            shapely.total_bounds(shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False)))
            for batch in self.batches()
        ]
        west, south, east, north = np.array(boxes).T
        return float(west.min()), float(south.min()), float(east.max()), float(north.max())


def write_samples(samples: Samples, path: Path) -> None:
    """Write ``samples.parquet``: GeoParquet 1.0 with a row per sample, in dataset order."""
    geometry = {
        "encoding": "WKB",
        "geometry_types": [],
        "crs": pyproj.CRS.from_epsg(4326).to_json_dict(),
        "bbox": list(samples.bounds()),
    }
    about = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    first = next(samples.batches())
    names = [name for name in first.schema.names if name not in (*CHIP_PLACE, "place")]
    schema = first.select(names).schema.with_metadata({"geo": json.dumps(about)})
    blocks = BUCKET_ROWS // BLOCK_ROWS
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        coming = (batch.select(names).cast(schema) for batch in samples.batches())
        while group := list(islice(coming, blocks)):
            writer.write_table(pa.Table.from_batches(group))
            release_memory()


def _finite(values: list[Any]) -> list[Any]:
    """NaN, which JSON lacks, as None."""
    return [None if isinstance(v, float) and math.isnan(v) else v for v in values]


def _geojson(wkb: pa.Array) -> list[Json]:
    """Footprints as GeoJSON; plain polygons, as most are, all at once."""
    areas = shapely.from_wkb(wkb.to_numpy(zero_copy_only=False))
    if (shapely.get_type_id(areas) != shapely.GeometryType.POLYGON).any():
        return [{"type": a.geom_type, "coordinates": _lists(mapping(a)["coordinates"])}
                for a in areas]  # fmt: skip
    _, corners, (rings, polygons) = shapely.to_ragged_array(areas, include_z=False)
    points = corners.tolist()
    closed = [points[a:b] for a, b in pairwise(rings.tolist())]
    return [{"type": "Polygon", "coordinates": closed[a:b]} for a, b in pairwise(polygons.tolist())]


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def load_samples(job: Job) -> Samples:
    """The samples of a dataset, in order; their rows are sorted once and stay in the scratch.

    Raises:
        NothingKept: when the decisions keep no chip, or none for training.
        MixedPixels: when kept chips differ in bands or dtype.
        RunError: when a kept chip or its item is not in the inputs.
    """
    path = job.scratch / FILE
    if not path.exists():
        with job.store.staging() as folder:
            sort_rows(job.inputs, job.seed, job.settings.holdout, folder)
            (folder / FILE).replace(path)
    return _open(path, path.stat().st_mtime_ns, job.inputs["chips"])


@lru_cache(maxsize=1)
def _open(path: Path, _: int, chips: Artifact) -> Samples:
    rim = []
    counts, npy_blocks = Counter[str](), Counter[str]()
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        hashes = np.empty(reader.num_record_batches * BLOCK_ROWS, np.uint64)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            belongs = pc.not_equal(batch["split"], RIM)
            rim.append(batch.select(["chip_id", "cell"]).filter(pc.invert(belongs)))
            batch = batch.filter(belongs)
            first = counts.total()
            hashes[first : first + len(batch)] = batch["place"].to_numpy()
            for split in (TRAIN, HOLDOUT):
                sizes = batch["size"].filter(pc.equal(batch["split"], split)).to_numpy()
                counts[split] += len(sizes)
                npy_blocks[split] += int((-(-sizes // BLOCK)).sum())
    release_memory()
    left_out = pa.Table.from_batches(rim)
    reason = pa.array(["holdout rim"] * len(left_out), pa.string())
    edge, end = counts[TRAIN], counts.total()
    return Samples(
        file=path,
        hashes=hashes[:end],
        npy_blocks=npy_blocks,
        splits={name: (a, b) for name, a, b in ((TRAIN, 0, edge), (HOLDOUT, edge, end)) if a < b},
        left_out=left_out.append_column("reason", reason),
        assets=_assets(chips),
    )


def _assets(chips: Artifact) -> dict[tuple[str, str], list[Json]]:
    """Assets that were read, by (collection, item), sorted by band and name."""
    table = chips.table("assets.parquet", ["collection", "item_id", "status", *ASSET_COLUMNS])
    table = table[table["status"] == "ok"].sort_values(["band", "asset"], kind="stable")
    found: dict[tuple[str, str], list[Json]] = {}
    for row in records(table):
        key = str(row["collection"]), str(row["item_id"])
        found.setdefault(key, []).append({name: str(row[name] or "") for name in ASSET_COLUMNS})
    return found
