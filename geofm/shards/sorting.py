"""The rows of a dataset's samples, joined and put in order by way of buckets on the disk.

The kept chips are read some at a time, joined with their items, and dealt to buckets by their
place in the order; each bucket is then sorted by itself. So memory holds one bucket (about 65,536
rows), and 24 bytes and the scores of each kept chip, however many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError, UsageError
from geofm.imagery.identity import SUPERSEDED
from geofm.shards.index import GROUP_ROWS
from geofm.shards.split import HOLDOUT, RIM, TRAIN, split_cells

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
SCENE_COLUMNS = ["collection", "item_id", "source", "licence"]
TEXT = pa.large_string()
FILE = "samples.arrow"
#: Rows of a batch of the file: so many become Python objects at a time.
BLOCK_ROWS = 4096
#: Files that rows are dealt to before they are sorted, at most.
BUCKETS = 512
#: Splits in the order of the file.
RANK = {TRAIN: 0, HOLDOUT: 1, RIM: 2}


class NothingKept(UsageError):
    """A dataset needs at least one sample."""


class MixedPixels(UsageError):
    """Samples of one dataset must have the same bands and the same dtype."""


def place(seed: int, chip_id: str) -> int:
    """Where a chip stands in the dataset: 64 bits of a hash of seed and id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {chip_id}".encode()).digest()[:8], "big")


def sort_rows(inputs: Mapping[str, Artifact], seed: int, holdout: float, folder: Path) -> None:
    """Write ``samples.arrow``: the kept chips with their scenes, by split, place and id.

    Args:
        inputs: items, chips and decisions.
        seed: of order and split.
        holdout: share of the ground cells that is held out.
        folder: gets the file; also holds the buckets meanwhile.
    """
    kept = _kept(inputs["decisions"])
    split = _splits(inputs["chips"], kept, holdout, seed)
    count = min(BUCKETS, -(-len(kept) // GROUP_ROWS))
    kinds: dict[str, set[str]] = {}
    with ExitStack() as stack:
        buckets: dict[tuple[int, int], Any] = {}
        for batch in _rows(inputs, kept):
            for kind, names in _kinds(batch).items():
                kinds.setdefault(kind, set()).update(names)
            dealt = _deal(batch, split, seed, count)
            for key, rows in dealt.items():
                if key not in buckets:
                    name = str(folder / f"bucket-{key[0]}-{key[1]:03d}")
                    buckets[key] = stack.enter_context(pa.ipc.new_stream(name, rows.schema))
                buckets[key].write_batch(rows)
    _require_same_pixels(kinds)
    if not any(rank == RANK[TRAIN] for rank, _ in buckets):
        raise NothingKept(
            f"all {len(kept)} samples are held out: set pack.holdout lower than {holdout}"
        )
    _join(folder, [f"bucket-{rank}-{bucket:03d}" for rank, bucket in sorted(buckets)])


def _kept(decisions: Artifact) -> pa.Table:
    """Ids of the chips that are kept, with their scores."""
    path = decisions.local("decisions.parquet")
    scores = [name for name in SCORES if name in pq.read_schema(path).names]
    verdicts = pq.read_table(path, columns=["chip_id", "decision", *scores])
    kept = verdicts.filter(pc.equal(verdicts["decision"], "keep")).drop_columns("decision")
    if not len(kept):
        raise NothingKept(
            f"none of the {len(verdicts)} candidate chips was kept: loosen the gates "
            "(curate.min_valid, curate.max_cloud, curate.max_saturated) or search for more scenes"
        )
    return kept


def _chips(chips: Artifact, kept: pa.Table, columns: list[str]) -> Iterator[Any]:
    """Batches of the kept chips, each with the numbers of its rows in ``kept``."""
    wanted = kept["chip_id"].cast(TEXT).combine_chunks()
    file = pq.ParquetFile(chips.local("chips.parquet"))
    rows = max(2 * BLOCK_ROWS, len(kept) // 64)  # each batch hashes all of ``wanted`` anew
    for batch in file.iter_batches(rows, columns=columns, use_threads=False):
        number = pc.index_in(batch["chip_id"].cast(TEXT), value_set=wanted)
        yield batch.filter(pc.is_valid(number)).select(columns), pc.drop_null(number)


def _rows(inputs: Mapping[str, Artifact], kept: pa.Table) -> Iterator[pa.RecordBatch]:
    """The kept chips with scores, ``source`` and licence, in the chips' order."""
    items, chips = inputs["items"], inputs["chips"]
    scenes = items.table("items.parquet", [*SCENE_COLUMNS, "status", "reason"])
    # an older version stands in where the newest could not be read: its chips count as well
    stand_in = scenes["reason"].isin(SUPERSEDED)
    scenes = scenes.loc[(scenes["status"] == "ok") | stand_in, SCENE_COLUMNS]
    keys = pa.array(scenes["collection"].astype(str) + "\n" + scenes["item_id"].astype(str), TEXT)
    source, terms = (pa.array(scenes[name].astype(str), TEXT) for name in ("source", "licence"))
    scores = [name for name in kept.column_names if name != "chip_id"]
    seen = np.zeros(len(kept), dtype=np.int64)
    lost = 0
    for batch, number in _chips(chips, kept, CHIP_COLUMNS):
        np.add.at(seen, number.to_numpy(), 1)
        rows = batch
        for name in scores:
            rows = rows.append_column(name, _flat(kept[name].take(number)))
        scene = pc.index_in(_joined("\n", rows["collection"], rows["item_id"]), value_set=keys)
        lost += scene.null_count
        unsaid = pc.equal(pc.fill_null(rows["licence"].cast(TEXT), ""), "")
        licence = pc.if_else(unsaid, terms.take(scene), rows["licence"].cast(TEXT))
        at = rows.schema.get_field_index("licence")
        rows = rows.set_column(at, "licence", licence)
        yield rows.append_column("source", source.take(scene))
    if (seen != 1).any() or lost or pc.count_distinct(keys).as_py() != len(keys):
        raise RunError(
            f"of {len(kept)} kept chips {int((seen == 0).sum())} are not in chips "
            f"{chips.digest[:12]}, {int((seen > 1).sum())} are there twice, and {lost} have no "
            f"item in items {items.digest[:12]} (or items are there twice); run the stages again "
            "from the search"
        )


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _deal(
    batch: pa.RecordBatch, split: Mapping[str, str], seed: int, count: int
) -> dict[tuple[int, int], pa.RecordBatch]:
    """The rows by rank of the split and bucket, with ``split`` and ``place``."""
    places = [place(seed, key) for key in batch["chip_id"].to_pylist()]
    sides = [split.get(cell, TRAIN) for cell in batch["cell"].to_pylist()] if split else (
        [TRAIN] * len(batch)
    )  # fmt: skip
    batch = batch.append_column("split", pa.array(sides, pa.string()))
    batch = batch.append_column("place", pa.array(places, pa.uint64()))
    rows: dict[tuple[int, int], list[int]] = {}
    for number, (side, where) in enumerate(zip(sides, places, strict=True)):
        rows.setdefault((RANK[side], where * count >> 64), []).append(number)
    return {key: batch.take(pa.array(numbers)) for key, numbers in rows.items()}


def _join(folder: Path, buckets: list[str]) -> None:
    """Sort each bucket and write them one after the other, in batches of one size."""
    by = [("place", "ascending"), ("chip_id", "ascending")]
    writer, waiting = None, None
    with ExitStack() as stack:
        for name in buckets:
            with pa.ipc.open_stream(str(folder / name)) as reader:
                rows = reader.read_all()
            (folder / name).unlink()
            rows = rows.take(pc.sort_indices(rows, sort_keys=by))
            if writer is None:
                writer = stack.enter_context(pa.ipc.new_file(str(folder / FILE), rows.schema))
            waiting = rows if waiting is None else pa.concat_tables([waiting, rows])
            whole = len(waiting) // BLOCK_ROWS * BLOCK_ROWS
            if whole:
                writer.write_table(waiting.slice(0, whole).combine_chunks(), BLOCK_ROWS)
                waiting = waiting.slice(whole)
        if writer is not None and waiting is not None and len(waiting):
            writer.write_table(waiting.combine_chunks(), BLOCK_ROWS)


def _joined(between: str, *columns: pa.Array) -> pa.Array:
    """Texts of several columns as one."""
    return pc.binary_join_element_wise(
        *(column.cast(TEXT) for column in columns), pa.scalar(between, TEXT)
    )


def _splits(chips: Artifact, kept: pa.Table, share: float, seed: int) -> dict[str, str]:
    """The split of each cell; empty when all of them train."""
    if share == 0:
        return {}
    footprints: dict[str, bytes] = {}
    for batch, _ in _chips(chips, kept, ["chip_id", "cell", "geometry"]):
        for cell, area in zip(batch["cell"].to_pylist(), batch["geometry"], strict=True):
            if cell not in footprints:
                footprints[cell] = area.as_py()
    return split_cells(list(footprints), list(footprints.values()), share, seed)


def _kinds(batch: pa.RecordBatch) -> dict[str, set[str]]:
    """Collections by dtype and bands."""
    kinds = _joined(" ", batch["dtype"], pc.binary_join(batch["bands"], ","))
    found: dict[str, set[str]] = {}
    pairs = pa.table({"kind": kinds, "collection": batch["collection"]})
    for row in pairs.group_by(["kind", "collection"]).aggregate([]).to_pylist():
        found.setdefault(row["kind"], set()).add(row["collection"])
    return found


def _require_same_pixels(kinds: Mapping[str, set[str]]) -> None:
    if len(kinds) > 1:
        found = "; ".join(f"{kind} ({', '.join(sorted(kinds[kind]))})" for kind in sorted(kinds))
        raise MixedPixels(
            f"one dataset needs one dtype and one list of bands, but the kept chips have {found}; "
            "choose collections that agree with search.collections, or bands they all have with "
            "cut.bands"
        )
