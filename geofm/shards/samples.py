"""The samples of a dataset: the kept chips, joined with their items and assets, in one order.

The order is by a hash of seed and chip id. A chip's place therefore depends on no other chip:
when a refresh adds a few, or one has to be forgotten, the shards without them stay as they are.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from shapely.geometry import mapping

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError, UsageError
from data_catalog.tables import records
from geofm.imagery.identity import SUPERSEDED

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
SCORES = ["quality", "entropy", "gradient", "cluster"]
ASSET_COLUMNS = ["asset", "band", "href", "sha256", "sha256_from"]


class NothingKept(UsageError):
    """A dataset needs at least one sample."""


class MixedPixels(UsageError):
    """Samples of one dataset must have the same bands and the same dtype."""


@dataclass(frozen=True)
class Samples:
    """Kept chips in dataset order (``rows``), their hashes, and assets by (collection, item).

    ``table`` is ``rows`` as dictionaries.
    """

    rows: gpd.GeoDataFrame
    table: list[Json]
    hashes: NDArray[np.uint64]
    assets: dict[tuple[str, str], list[Json]]

    def document(self, number: int) -> Json:
        """The JSON member of one sample: where it came from, and how to read its pixels."""
        row = self.table[number]
        key = str(row["collection"]), str(row["item_id"])
        return {
            "chip_id": row["chip_id"],
            "item_id": row["item_id"],
            "collection": row["collection"],
            "assets": [a for a in self.assets.get(key, []) if a["band"] in plain(row["bands"])],
            "cell": plain(row["cell"]),
            "window": {name: int(row[name]) for name in ("row", "col", "width", "height")},
            "crs": row["crs"],
            "transform": plain(row["transform"]),
            "geometry": _geojson(row["geometry"]),
            "datetime": row["datetime"] or None,
            "bands": plain(row["bands"]),
            "dtype": row["dtype"],
            "scale": plain(row["scale"]),
            "dn_offset": plain(row["dn_offset"]),
            "licence": row["licence"],
            "source": row["source"],
            "pixel_sha256": row["pixel_sha256"],
        }


def plain(value: Any) -> Any:
    """Arrays and NumPy scalars as JSON values; NaN, which JSON lacks, as None."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(element) for element in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _geojson(geometry: Any) -> Json:
    found: Json = mapping(geometry)
    return {"type": found["type"], "coordinates": _lists(found["coordinates"])}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


SCENE_COLUMNS = ["collection", "item_id", "source", "licence"]


def place(seed: int, chip_id: str) -> int:
    """Where a chip stands in the dataset: 64 bits of a hash of seed and id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {chip_id}".encode()).digest()[:8], "big")


@lru_cache(maxsize=2)
def load_samples(items: Artifact, chips: Artifact, decisions: Artifact, seed: int) -> Samples:
    """The samples of a dataset, in order.

    Raises:
        NothingKept: when the decisions keep no chip.
        MixedPixels: when kept chips differ in bands or dtype.
        RunError: when a kept chip or its item is not in the inputs.
    """
    verdicts = decisions.table("decisions.parquet", ["chip_id", "decision", *SCORES])
    kept = verdicts[verdicts["decision"] == "keep"].drop(columns="decision")
    if not len(kept):
        raise NothingKept(
            f"none of the {len(verdicts)} candidate chips was kept: loosen the gates "
            "(curate.min_valid, curate.max_cloud, curate.max_saturated) or search for more scenes"
        )
    table = chips.table("chips.parquet", CHIP_COLUMNS)
    scenes = items.table("items.parquet", [*SCENE_COLUMNS, "status", "reason"])
    # an older version stands in where the newest could not be read: its chips count as well
    stand_in = scenes["reason"].isin(SUPERSEDED)
    scenes = scenes.loc[(scenes["status"] == "ok") | stand_in, SCENE_COLUMNS]
    rows = table.merge(kept, on="chip_id", validate="one_to_one").merge(
        scenes.rename(columns={"licence": "item_licence"}),
        on=["collection", "item_id"],
        validate="many_to_one",
    )
    if len(rows) != len(kept):
        raise RunError(
            f"{len(kept) - len(rows)} kept chips are not in chips {chips.digest[:12]} or their "
            f"items not in {items.digest[:12]}; run the stages again from the search"
        )
    rows["licence"] = rows["licence"].where(rows["licence"].fillna("") != "", rows["item_licence"])
    _require_same_pixels(rows)
    rows["place"] = np.array([place(seed, str(i)) for i in rows["chip_id"]], dtype=np.uint64)
    rows = rows.sort_values(["place", "chip_id"], ignore_index=True)
    hashes = rows["place"].to_numpy(dtype=np.uint64)
    frame = gpd.GeoDataFrame(
        rows.drop(columns=["place", "item_licence"]), geometry="geometry", crs=4326
    )
    return Samples(frame, records(frame), hashes, _assets(chips))


def _require_same_pixels(rows: pd.DataFrame) -> None:
    bands = [",".join(map(str, names)) for names in rows["bands"]]
    kinds = pd.Series(rows["dtype"].astype(str).to_numpy() + " " + np.array(bands, dtype=object))
    if kinds.nunique() > 1:
        by_kind = rows.groupby(kinds.to_numpy())["collection"].unique()
        found = "; ".join(f"{kind} ({', '.join(sorted(names))})" for kind, names in by_kind.items())
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
