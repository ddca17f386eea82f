"""The samples of a dataset: kept chips with their scenes and assets, in one order.

The order is given by a hash of seed and chip id, the train split before the holdout. The position
of a chip thus depends on no other chip: if a refresh adds a few chips, or one has to be removed,
the shards without them stay as they are.

The rows are in a file of the job's scratch and are read in batches, so memory does not grow with
their number.
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
from geofm.shards.sample_join import BATCH_ROWS, FILE, write_sample_rows
from geofm.shards.split import HOLDOUT, RIM, TRAIN
from geofm.types import Json

ASSET_COLUMNS = ["asset", "band", "href", "sha256", "sha256_from"]
#: Columns of the rows that are not in ``samples.parquet``: the bytes of the chip that was packed
#: (the index has those of the sample), and the hash.
SCRATCH_COLUMNS = ("part", "offset", "size", "order_hash")
#: Rows of a row group of ``samples.parquet``.
GROUP_ROWS = 2**13


@dataclass(frozen=True, eq=False)
class Samples:
    """Kept chips in dataset order.

    Attributes:
        file: Rows of ``write_sample_rows``: the samples, then chips that belong to no split.
        hashes: Order hash of each sample, ascending within a split.
        npy_blocks: Tar blocks of all ``.npy`` members of each split.
        splits: First and last + 1 of the samples of each split that has any.
        left_out: Kept chips that belong to no split: chip_id, cell, reason.
        assets: Assets that were read, by (collection, item).
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
        """Yield rows ``first`` to ``last`` - 1 in batches."""
        end = len(self) if last is None else last
        with pa.OSFile(str(self.file)) as file, pa.ipc.open_file(file) as reader:
            for number in range(first // BATCH_ROWS, -(-end // BATCH_ROWS)):
                start = number * BATCH_ROWS
                begin = max(first - start, 0)
                yield reader.get_batch(number).slice(begin, end - start - begin)

    def records(
        self, first: int = 0, last: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[Json]:
        """Yield rows as dictionaries."""
        for batch in self.batches(first, last):
            yield from (batch.select(columns) if columns else batch).to_pylist()

    def distinct(self, column: str) -> set[str]:
        """Return the distinct values of a text column."""
        return {text for b in self.batches() for text in pc.unique(b[column]).to_pylist()}

    def documents(self, first: int, last: int) -> Iterator[tuple[Json, Json]]:
        """Yield each row as a dictionary, with the JSON member of its sample."""
        for batch in self.batches(first, last):
            areas = _geojson(batch["geometry"])
            for row, area in zip(batch.to_pylist(), areas, strict=True):
                yield row, self._document(row, area)

    def _document(self, row: Json, area: Json) -> Json:
        """Make the JSON member of a sample: its origin, and how to read its pixels."""
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
        """Return west, south, east and north of all samples, degrees."""
        boxes = [
            shapely.total_bounds(shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False)))
            for batch in self.batches()
        ]
        west, south, east, north = np.array(boxes).T
        return float(west.min()), float(south.min()), float(east.max()), float(north.max())


def load_samples(job: Job) -> Samples:
    """Return the samples of a dataset; their rows are made once and stay in the job's scratch.

    Raises:
        NothingKept: The decisions keep no chip, or none for training.
        MixedPixels: Kept chips differ in bands or dtype.
        RunError: A kept chip or its scene is not in the inputs.
    """
    path = job.scratch / FILE
    if not path.exists():
        with job.store.staging() as folder:
            write_sample_rows(job.inputs, job.seed, job.settings.holdout, folder)
            (folder / FILE).replace(path)
    return _open(path, path.stat().st_mtime_ns, job.inputs["chips"])


@lru_cache(maxsize=1)
def _open(path: Path, _mtime_ns: int, chips: Artifact) -> Samples:
    """Read what is kept in memory: hashes, counts and assets."""
    rim = []
    counts, npy_blocks = Counter[str](), Counter[str]()
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        hashes = np.empty(reader.num_record_batches * BATCH_ROWS, np.uint64)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            belongs = pc.not_equal(batch["split"], RIM)
            rim.append(batch.select(["chip_id", "cell"]).filter(pc.invert(belongs)))
            batch = batch.filter(belongs)
            first = counts.total()
            hashes[first : first + len(batch)] = batch["order_hash"].to_numpy()
            for split in (TRAIN, HOLDOUT):
                sizes = batch["size"].filter(pc.equal(batch["split"], split)).to_numpy()
                counts[split] += len(sizes)
                npy_blocks[split] += int((-(-sizes // BLOCK)).sum())
    release_memory()
    left_out = pa.Table.from_batches(rim)
    reason = pa.array(["holdout rim"] * len(left_out), pa.string())
    train, total = counts[TRAIN], counts.total()
    ranges = ((TRAIN, 0, train), (HOLDOUT, train, total))
    return Samples(
        file=path,
        hashes=hashes[:total],
        npy_blocks=npy_blocks,
        splits={name: (first, last) for name, first, last in ranges if first < last},
        left_out=left_out.append_column("reason", reason),
        assets=_read_assets(chips),
    )


def _read_assets(chips: Artifact) -> dict[tuple[str, str], list[Json]]:
    """Return the assets that were read, by (collection, item), sorted by band and name."""
    table = chips.table("assets.parquet", ["collection", "item_id", "status", *ASSET_COLUMNS])
    table = table[table["status"] == "ok"].sort_values(["band", "asset"], kind="stable")
    assets: dict[tuple[str, str], list[Json]] = {}
    for row in records(table):
        key = str(row["collection"]), str(row["item_id"])
        assets.setdefault(key, []).append({name: str(row[name] or "") for name in ASSET_COLUMNS})
    return assets


def write_samples(samples: Samples, path: Path) -> None:
    """Write ``samples.parquet``: GeoParquet 1.0 with a row per sample, in dataset order."""
    geometry = {
        "encoding": "WKB",
        "geometry_types": [],
        "crs": pyproj.CRS.from_epsg(4326).to_json_dict(),
        "bbox": list(samples.bounds()),
    }
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    first = next(samples.batches())
    names = [name for name in first.schema.names if name not in SCRATCH_COLUMNS]
    schema = first.select(names).schema.with_metadata({"geo": json.dumps(geo)})
    batches = (batch.select(names).cast(schema) for batch in samples.batches())
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(batches, GROUP_ROWS // BATCH_ROWS)):
            writer.write_table(pa.Table.from_batches(group))
            release_memory()


def _finite(values: list[Any]) -> list[Any]:
    """Replace NaN, which JSON lacks, by None."""
    return [None if isinstance(v, float) and math.isnan(v) else v for v in values]


def _geojson(wkb: pa.Array) -> list[Json]:
    """Convert footprints to GeoJSON; polygons, which most of them are, all at once."""
    areas = shapely.from_wkb(wkb.to_numpy(zero_copy_only=False))
    if (shapely.get_type_id(areas) != shapely.GeometryType.POLYGON).any():
        return [
            {"type": area.geom_type, "coordinates": _lists(mapping(area)["coordinates"])}
            for area in areas
        ]
    _, corners, (rings, polygons) = shapely.to_ragged_array(areas, include_z=False)
    points = corners.tolist()
    closed = [points[a:b] for a, b in pairwise(rings.tolist())]
    return [{"type": "Polygon", "coordinates": closed[a:b]} for a, b in pairwise(polygons.tolist())]


def _lists(value: Any) -> Any:
    """Replace tuples by lists, at any depth."""
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
