"""The rows of a dataset's samples, joined and put in order by way of buckets on the disk.

Decisions and chips are read some rows at a time and dealt to buckets by their place in the order;
each bucket is then joined and sorted by itself. So memory holds a row group of the decisions or
one bucket (about 8,192 rows up to 4 million candidates), and 9 bytes of each kept chip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.database.item_states import STAND_INS
from data_catalog.errors import RunError, UsageError
from geofm.shards.index import release_memory
from geofm.shards.split import HOLDOUT, RIM, TRAIN, split_cells
from geofm.stac.supersede import SUPERSEDED

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
BLOCK_ROWS = 1024
#: Rows that are read or sorted at a time.
BUCKET_ROWS = 2**13
#: Files that rows are dealt to before they are sorted, at most.
BUCKETS = 512
#: A column of a Parquet file is read through a buffer of so many bytes.
BUFFER = 2**16


class NothingKept(UsageError):
    """A dataset needs at least one sample."""


class MixedPixels(UsageError):
    """Samples of one dataset must have the same bands and the same dtype."""


Places = NDArray[np.uint64]


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
    kept, buckets = _deal_kept(inputs["decisions"], seed, folder)
    release_memory()
    split = _splits(inputs["chips"], kept, holdout, seed)
    kinds: dict[str, set[str]] = {}
    sides: set[str] = set()
    times = np.zeros(len(kept), np.uint8)  # how often each was found
    with _dealer(folder, "chips", buckets) as deal:
        for batch in _chips(inputs["chips"], kept, seed, CHIP_COLUMNS):
            for kind, names in _kinds(batch).items():
                kinds.setdefault(kind, set()).update(names)
            side = [split.get(cell, TRAIN) for cell in batch["cell"].to_pylist()]
            sides.update(side)
            deal(batch.append_column("split", pa.array(side, pa.string())))
            places, again = np.unique(batch["place"].to_numpy(), return_counts=True)
            at = np.searchsorted(kept, places)
            times[at] = np.minimum(times[at] + again, 2)
    _require_same_pixels(kinds)
    _require_each_once(inputs["chips"], kept, times)
    if TRAIN not in sides:
        raise NothingKept(
            f"all {len(kept)} samples are held out: set pack.holdout lower than {holdout}"
        )
    scenes = _scenes(inputs["items"], inputs["chips"])
    numbers = sorted(int(path.name.removeprefix("kept-")) for path in folder.glob("kept-*"))
    ordered = (
        _sorted(_joined(folder, number, scenes, inputs), side)
        for side in (TRAIN, HOLDOUT, RIM)
        if side in sides
        for number in numbers
    )
    _write(ordered, folder / FILE)


def _deal_kept(decisions: Artifact, seed: int, folder: Path) -> tuple[Places, int]:
    """Deal ids and scores of the chips that are kept; their places sorted, and how many buckets."""
    file = pq.ParquetFile(decisions.local("decisions.parquet"), buffer_size=BUFFER)
    scores = [name for name in SCORES if name in file.schema_arrow.names]
    candidates = file.metadata.num_rows
    buckets = max(1, min(BUCKETS, -(-candidates // BUCKET_ROWS)))
    found = [np.empty(0, dtype=np.uint64)]
    with _dealer(folder, "kept", buckets) as deal:
        for batch in _read_rows(file, ["chip_id", "decision", *scores]):
            rows = batch.filter(pc.equal(batch["decision"], "keep")).drop_columns("decision")
            rows = _with_places(rows, seed)
            found.append(rows["place"].to_numpy())
            deal(rows)
    kept = np.concatenate(found)
    kept.sort()
    if not len(kept):
        raise NothingKept(
            f"none of the {candidates} candidate chips was kept: loosen the gates "
            "(curate.min_valid, curate.max_cloud, curate.max_saturated) or search for more scenes"
        )
    return kept, buckets


def _read_rows(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some rows at a time; a reader of many row groups would keep the texts of all of them."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(
            BUCKET_ROWS, row_groups=[group], columns=columns, use_threads=False
        )
        release_memory()


def _with_places(batch: pa.RecordBatch, seed: int) -> pa.RecordBatch:
    places = [place(seed, key) for key in batch["chip_id"].to_pylist()]
    return batch.append_column("place", pa.array(places, pa.uint64()))


def _chips(
    chips: Artifact, kept: Places, seed: int, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """Some rows at a time of the chips whose place is one of ``kept``, with ``place``."""
    file = pq.ParquetFile(chips.local("chips.parquet"), buffer_size=BUFFER)
    for rows in _read_rows(file, columns):
        batch = _with_places(rows.select(columns), seed)
        places = batch["place"].to_numpy()
        at = np.minimum(np.searchsorted(kept, places), len(kept) - 1)
        yield batch.filter(pa.array(kept[at] == places))


@contextmanager
def _dealer(folder: Path, name: str, buckets: int) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """A function that adds rows to the files ``NAME-000``, ... by their column ``place``."""
    edges = np.array([-(-(n << 64) // buckets) for n in range(1, buckets)], dtype=np.uint64)
    with ExitStack() as stack:
        writers: dict[int, Any] = {}

        def deal(batch: pa.RecordBatch) -> None:
            bucket = np.searchsorted(edges, batch["place"].to_numpy(), side="right")
            for number in np.unique(bucket).tolist():
                if number not in writers:
                    path = str(folder / f"{name}-{number:03d}")
                    writers[number] = stack.enter_context(pa.ipc.new_stream(path, batch.schema))
                writers[number].write_batch(batch.take(pa.array(np.flatnonzero(bucket == number))))

        yield deal


def _scenes(items: Artifact, chips: Artifact) -> pa.Table:
    """``key`` (collection and item), ``source`` and ``licence`` of the scenes that count."""
    frame = items.table("items.parquet", [*SCENE_COLUMNS, "status", "reason"])
    # an older version stands in where the newest could not be read: its chips count as well
    stand_in = frame["reason"].isin(SUPERSEDED)
    frame = frame.loc[(frame["status"] == "ok") | stand_in, SCENE_COLUMNS].astype(str)
    if any(entry.path == STAND_INS for entry in chips.manifest.files):
        unlisted = chips.table(STAND_INS, SCENE_COLUMNS).astype(str)
        names = ["collection", "item_id"]
        known = unlisted.set_index(names).index.isin(frame.set_index(names).index)
        frame = pd.concat([frame, unlisted[~known]], ignore_index=True)
    keys = frame["collection"] + "\n" + frame["item_id"]
    columns = {"key": keys, "source": frame["source"], "licence": frame["licence"]}
    if keys.duplicated().any():
        raise RunError(f"scenes are twice in items {items.digest[:12]}; run the search again")
    return pa.table({name: pa.array(texts, TEXT) for name, texts in columns.items()})


def _require_each_once(chips: Artifact, kept: Places, times: NDArray[np.uint8]) -> None:
    """Places identify chips: raises RunError unless each that is kept was found once.

    Args:
        chips: where they were looked for.
        kept: ascending.
        times: how often each was found; of equal ones the first has the number.
    """
    twice = np.flatnonzero(kept[1:] == kept[:-1])
    missing = np.count_nonzero(times == 0) - np.count_nonzero(times[twice + 1] == 0)
    if missing or len(twice) or times.max() > 1:
        raise RunError(
            f"of {len(kept)} kept chips {missing} are not in chips {chips.digest[:12]}, and some "
            f"may be there ({np.count_nonzero(times > 1)}) or in the decisions ({len(twice)}) "
            "twice; run the stages again from the cutting of chips"
        )


def _joined(
    folder: Path, bucket: int, scenes: pa.Table, inputs: Mapping[str, Artifact]
) -> pa.Table:
    """The kept chips of a bucket with scores, ``source`` and licence.

    Raises:
        RunError: when a chip's scene is not in the items.
    """
    rows, kept = (_read(folder / f"{name}-{bucket:03d}") for name in ("chips", "kept"))
    number = _found(rows["chip_id"], kept["chip_id"])
    for name in kept.column_names:
        if name not in ("chip_id", "place"):
            rows = rows.append_column(name, kept[name].take(number))
    scene = _found(_texts("\n", rows["collection"], rows["item_id"]), scenes["key"])
    if number.null_count or scene.null_count:
        raise RunError(
            f"kept chips are not in chips {inputs['chips'].digest[:12]} ({number.null_count}) or "
            f"have no scene in items {inputs['items'].digest[:12]} ({scene.null_count}); run the "
            "stages again from the search"
        )
    own = pc.fill_null(rows["licence"].cast(TEXT), "")
    licence = pc.if_else(pc.equal(own, ""), scenes["licence"].take(scene), own)
    rows = rows.set_column(rows.schema.get_field_index("licence"), "licence", licence)
    return rows.append_column("source", scenes["source"].take(scene))


def _found(texts: pa.ChunkedArray, among: pa.ChunkedArray) -> pa.Array:
    """Where each text is; null for one that is not there."""
    number = pc.index_in(texts.cast(TEXT), value_set=among.cast(TEXT))
    return number.combine_chunks() if isinstance(number, pa.ChunkedArray) else number


def _read(path: Path) -> pa.Table:
    with pa.ipc.open_stream(str(path)) as reader:
        return reader.read_all().combine_chunks()


def _sorted(rows: pa.Table, side: str) -> pa.Table:
    """The rows of one split by place and id."""
    rows = rows.filter(pc.equal(rows["split"], side))
    by = [("place", "ascending"), ("chip_id", "ascending")]
    return rows.take(pc.sort_indices(rows, sort_keys=by))


def _write(tables: Iterator[pa.Table], path: Path) -> None:
    """Write rows to an Arrow file in batches of one size."""
    waiting = next(tables)
    with pa.ipc.new_file(str(path), waiting.schema) as writer:
        for rows in tables:
            release_memory()
            whole = len(waiting) // BLOCK_ROWS * BLOCK_ROWS
            writer.write_table(waiting.slice(0, whole).combine_chunks(), BLOCK_ROWS)
            waiting = pa.concat_tables([waiting.slice(whole), rows])
        writer.write_table(waiting.combine_chunks(), BLOCK_ROWS)


def _texts(between: str, *columns: pa.Array) -> pa.Array:
    """Texts of several columns as one."""
    return pc.binary_join_element_wise(
        *(column.cast(TEXT) for column in columns), pa.scalar(between, TEXT)
    )


def _splits(chips: Artifact, kept: Places, share: float, seed: int) -> dict[str, str]:
    """The split of each cell; empty when all of them train."""
    if share == 0:
        return {}
    footprints: dict[str, bytes] = {}
    for batch in _chips(chips, kept, seed, ["chip_id", "cell", "geometry"]):
        for cell, area in zip(batch["cell"].to_pylist(), batch["geometry"], strict=True):
            if cell not in footprints:
                footprints[cell] = area.as_py()
    return split_cells(list(footprints), list(footprints.values()), share, seed)


def _kinds(batch: pa.RecordBatch) -> dict[str, set[str]]:
    """Collections by dtype and bands."""
    kinds = _texts(" ", batch["dtype"], pc.binary_join(batch["bands"], ","))
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
