"""The samples of a dataset: the kept chips, joined with their items and assets, in one order.

The order is by a hash of seed and chip id, the train split before the holdout. A chip's place
therefore depends on no other chip: when a refresh adds a few, or one has to be forgotten, the
shards without them stay as they are.

Rows stay in Arrow, a few hundred bytes each, and become JSON only where they are written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
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
from data_catalog.errors import RunError, UsageError
from data_catalog.tables import records
from geofm.imagery.identity import SUPERSEDED
from geofm.shards.index import GROUP_ROWS
from geofm.shards.split import HOLDOUT, RIM, TRAIN, split_cells

Json = dict[str, Any]

CHIP_COLUMNS = [
    "chip_id",
    "item_id",
    "collection",
    "cell",
    "row",
    "col",
    "width",
    "height",
    "crs",
    "transform",
    "geometry",
    "bands",
    "dtype",
    "scale",
    "dn_offset",
    "pixel_sha256",
    "valid_fraction",
    "cloud_fraction",
    "saturated_fraction",
    "part",
    "offset",
    "size",
    "datetime",
    "licence",
]
#: Columns of the decisions that go with a sample, where they are there.
SCORES = ("quality", "entropy", "gradient", "cluster")
ASSET_COLUMNS = ["asset", "band", "href", "sha256", "sha256_from"]
SCENE_COLUMNS = ["collection", "item_id", "source", "licence"]
#: Where a chip's pixels are; a sample's place is in the index instead.
CHIP_PLACE = ["part", "offset", "size"]
TEXT = pa.large_string()
#: Columns whose values repeat: a number per row and each text once, while in memory.
REPEATED = ["item_id", "collection", "crs", "dtype", "datetime", "licence", "part"]
#: Rows that become Python objects at a time.
BLOCK_ROWS = 4096


class NothingKept(UsageError):
    """A dataset needs at least one sample."""


class MixedPixels(UsageError):
    """Samples of one dataset must have the same bands and the same dtype."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Kept chips in dataset order.

    Attributes:
        rows: a row per sample: columns of the chips, scores, ``source`` and ``split``.
        hashes: place of each in the order, ascending within a split.
        left_out: kept chips that belong to no split: chip_id, cell, reason.
        assets: what was read, by (collection, item).
    """

    rows: pa.Table
    hashes: NDArray[np.uint64]
    left_out: pa.Table
    assets: dict[tuple[str, str], list[Json]]

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """First and last + 1 of the samples of each split that has any."""
        held = pc.sum(pc.equal(self.rows["split"], HOLDOUT)).as_py()
        edge = len(self) - held
        found = {TRAIN: (0, edge), HOLDOUT: (edge, len(self))}
        return {split: (a, b) for split, (a, b) in found.items() if a < b}

    def records(self, first: int, last: int) -> Iterator[Json]:
        """Rows as dictionaries."""
        for start in range(first, last, BLOCK_ROWS):
            yield from self.rows.slice(start, min(BLOCK_ROWS, last - start)).to_pylist()

    def document(self, row: Json) -> Json:
        """The JSON member of one sample: where it came from, and how to read its pixels."""
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
            "geometry": _geojson(row["geometry"]),
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
        blocks = [
            shapely.total_bounds(shapely.from_wkb(chunk.to_numpy(zero_copy_only=False)))
            for start in range(0, len(self), BLOCK_ROWS)
            for chunk in self.rows["geometry"].slice(start, BLOCK_ROWS).chunks
        ]
        west, south, east, north = np.array(blocks).T
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
    rows = samples.rows.drop_columns(CHIP_PLACE)
    plain = pa.schema(
        [
            (
                field.name,
                field.type.value_type if pa.types.is_dictionary(field.type) else field.type,
            )
            for field in rows.schema
        ],
        metadata={"geo": json.dumps(about)},
    )
    with pq.ParquetWriter(path, plain, compression="zstd") as writer:
        for first in range(0, len(rows), GROUP_ROWS):
            writer.write_table(rows.slice(first, GROUP_ROWS).cast(plain))


def _finite(values: list[Any]) -> list[Any]:
    """NaN, which JSON lacks, as None."""
    return [None if isinstance(v, float) and math.isnan(v) else v for v in values]


def _geojson(wkb: bytes) -> Json:
    found: Json = mapping(shapely.from_wkb(wkb))
    return {"type": found["type"], "coordinates": _lists(found["coordinates"])}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def place(seed: int, chip_id: str) -> int:
    """Where a chip stands in the dataset: 64 bits of a hash of seed and id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {chip_id}".encode()).digest()[:8], "big")


@lru_cache(maxsize=1)
def load_samples(
    items: Artifact, chips: Artifact, decisions: Artifact, seed: int, holdout: float = 0.0
) -> Samples:
    """The samples of a dataset, in order.

    Args:
        items: the scenes.
        chips: the candidates.
        decisions: which of them are kept.
        seed: of order and split.
        holdout: share of the ground cells that is held out.

    Raises:
        NothingKept: when the decisions keep no chip, or none for training.
        MixedPixels: when kept chips differ in bands or dtype.
        RunError: when a kept chip or its item is not in the inputs.
    """
    rows = _with_scenes(_kept_chips(chips, decisions), items, chips)
    _require_same_pixels(rows)
    rows = rows.append_column("split", _splits(rows, holdout, seed))
    keys = (key for chunk in rows["chip_id"].chunks for key in chunk.to_pylist())
    places = np.fromiter((place(seed, key) for key in keys), np.uint64, len(rows))
    order = rows.select(["split", "chip_id"]).append_column("place", pa.array(places))
    by = [("split", "descending"), ("place", "ascending"), ("chip_id", "ascending")]
    numbers = pc.sort_indices(order, sort_keys=by)  # train, rim, holdout
    rows, places = _sorted(rows, numbers), places[numbers.to_numpy()]
    rim = pc.equal(rows["split"], RIM)
    left_out = rows.filter(rim).select(["chip_id", "cell"])
    left_out = left_out.append_column("reason", pa.array(["holdout rim"] * len(left_out)))
    if len(left_out):
        stays = pc.invert(rim)
        rows, places = rows.filter(stays), places[stays.to_numpy(zero_copy_only=False)]
    if rows["split"][0].as_py() != TRAIN:
        raise NothingKept(
            f"all {len(rows)} samples are held out: set pack.holdout lower than {holdout}"
        )
    return Samples(rows, places, left_out, _assets(chips))


def _sorted(rows: pa.Table, numbers: pa.Array) -> pa.Table:
    """The rows in another order; a column at a time, so that they are in memory once."""
    columns = {}
    for name in rows.column_names:
        columns[name] = rows[name].take(numbers)
        rows = rows.drop_columns(name)
    return pa.table(columns)


def _kept_chips(chips: Artifact, decisions: Artifact) -> pa.Table:
    """Rows of the chips that the decisions keep, with their scores, in the chips' order."""
    path = decisions.local("decisions.parquet")
    scores = [name for name in SCORES if name in pq.read_schema(path).names]
    verdicts = pq.read_table(path, columns=["chip_id", "decision", *scores])
    kept = verdicts.filter(pc.equal(verdicts["decision"], "keep")).drop_columns("decision")
    if not len(kept):
        raise NothingKept(
            f"none of the {len(verdicts)} candidate chips was kept: loosen the gates "
            "(curate.min_valid, curate.max_cloud, curate.max_saturated) or search for more scenes"
        )
    wanted = kept["chip_id"].cast(TEXT).combine_chunks()
    file = pq.ParquetFile(chips.local("chips.parquet"), read_dictionary=REPEATED)
    found, numbers = [], []
    for batch in file.iter_batches(GROUP_ROWS, columns=CHIP_COLUMNS, use_threads=False):
        number = pc.index_in(batch["chip_id"].cast(TEXT), value_set=wanted)
        found.append(batch.filter(pc.is_valid(number)))
        numbers.append(pc.drop_null(number))
    table = pa.Table.from_batches(found).select(CHIP_COLUMNS).unify_dictionaries()
    number = pa.chunked_array(numbers)
    if len(table) != len(kept) or pc.count_distinct(number).as_py() != len(kept):
        missing = len(kept) - pc.count_distinct(number).as_py()
        raise RunError(
            f"{missing} kept chips are not in chips {chips.digest[:12]} or "
            f"{len(table) - len(kept) + missing} are there twice; run the stages again from the "
            "search"
        )
    for name in scores:
        table = table.append_column(name, kept[name].take(number))
    return table


def _with_scenes(rows: pa.Table, items: Artifact, chips: Artifact) -> pa.Table:
    """The rows with ``source`` of their items, and the items' licence where they have none."""
    scenes = items.table("items.parquet", [*SCENE_COLUMNS, "status", "reason"])
    # an older version stands in where the newest could not be read: its chips count as well
    stand_in = scenes["reason"].isin(SUPERSEDED)
    scenes = scenes.loc[(scenes["status"] == "ok") | stand_in, SCENE_COLUMNS]
    keys = pa.array(scenes["collection"].astype(str) + "\n" + scenes["item_id"].astype(str), TEXT)
    number = pc.index_in(_joined("\n", rows["collection"], rows["item_id"]), value_set=keys)
    if number.null_count or pc.count_distinct(keys).as_py() != len(keys):
        raise RunError(
            f"{number.null_count} kept chips have no item in items {items.digest[:12]} (or items "
            f"are there twice), but in chips {chips.digest[:12]}; run the stages again from the "
            "search"
        )
    source, licence = (
        pa.array(scenes[name].astype(str), TEXT).take(number) for name in ("source", "licence")
    )
    unsaid = pc.equal(pc.fill_null(_text(rows["licence"]), ""), "")
    at = rows.schema.get_field_index("licence")
    rows = rows.set_column(at, "licence", pc.if_else(unsaid, licence, _text(rows["licence"])))
    return rows.append_column("source", source.dictionary_encode())


def _value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, also where it keeps each of them once."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of texts as such, however it is kept."""
    return column.cast(_value_type(column.type)).cast(TEXT)


def _joined(between: str, *columns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of several columns as one."""
    return pc.binary_join_element_wise(
        *(_text(column) for column in columns), pa.scalar(between, TEXT)
    )


def _splits(rows: pa.Table, share: float, seed: int) -> pa.Array:
    """The split of each row, by its cell."""
    if share == 0:
        return pa.array([TRAIN]).take(pa.array(np.zeros(len(rows), dtype=np.int64)))
    cells = _text(rows["cell"]).combine_chunks().dictionary_encode()
    _, first = np.unique(cells.indices.to_numpy(), return_index=True)  # 0, 1, 2, ... in order
    footprints = rows["geometry"].take(pa.array(first)).to_pylist()
    names = cells.dictionary.to_pylist()
    split = split_cells(names, footprints, share, seed)
    return pa.array([split[name] for name in names]).take(cells.indices)


def _require_same_pixels(rows: pa.Table) -> None:
    kinds = _joined(" ", rows["dtype"], pc.binary_join(rows["bands"], ","))
    if pc.count_distinct(kinds).as_py() > 1:
        names: dict[str, set[str]] = {}
        for kind, name in zip(kinds.to_pylist(), rows["collection"].to_pylist(), strict=True):
            names.setdefault(kind, set()).add(name)
        found = "; ".join(f"{kind} ({', '.join(sorted(names[kind]))})" for kind in sorted(names))
        raise MixedPixels(
            f"one dataset needs one dtype and one list of bands, but the kept chips have {found}; "
            "choose collections that agree with search.collections, or bands they all have with "
            "cut.bands"
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
