"""The rows of a dataset's samples: kept chips joined with scores and scenes, in dataset order.

DuckDB joins and sorts the tables. Its memory is limited (``MEMORY_MIB``); what does not fit is kept
in the job's scratch, so a dataset may have any number of samples.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_catalog.artifact import Artifact
from data_catalog.database.item_states import STAND_INS, SUPERSEDED_REASONS
from data_catalog.errors import RunError, UsageError
from geofm.chips.schema import CHIP_COLUMNS
from geofm.shards.split import HOLDOUT, RIM, TRAIN, split_cells

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

#: Columns of the chips that a sample does not have: it takes ``source`` from its scene, and the
#: others say why a chip is not usable or serve to choose chips.
_NOT_IN_SAMPLES = {
    "item_sha256", "source", "gsd_m", "shadow_fraction", "constant", "status", "reason", "detail",
    "witness",
}  # fmt: skip
SAMPLE_COLUMNS = [name for name in CHIP_COLUMNS if name not in _NOT_IN_SAMPLES]
#: Columns of the decisions that go with a sample, if the decisions have them.
SCORE_COLUMNS = ("quality", "entropy", "gradient", "cluster")
#: Columns of the items that a sample's scene is described by.
SCENE_COLUMNS = ["collection", "item_id", "source", "licence"]
#: Name of the file in the job's scratch.
FILE = "sample-rows.arrow"
#: Rows of a batch of the file.
BATCH_ROWS = 1024
#: Texts of DuckDB's errors about a full disk, and their numbers. It is out of memory only if
#: spilled rows have no room; by default they take at most 90 % of the disk's free space.
NO_ROOM = {
    "Out of Memory Error": errno.ENOSPC,
    "No space left": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
}
#: Memory that DuckDB may use, MiB. A million rows need between 128 and 256, four million no more.
MEMORY_MIB = 512


class NothingKept(UsageError):
    """A dataset needs at least one sample."""


class MixedPixels(UsageError):
    """Samples of one dataset must have the same bands and the same dtype."""


def write_sample_rows(
    inputs: Mapping[str, Artifact], seed: int, holdout: float, folder: Path
) -> None:
    """Write ``sample-rows.arrow``: a row per kept chip, ordered by split, hash and chip id.

    The columns are ``SAMPLE_COLUMNS``, ``order_hash`` (the first 64 bits of the SHA-256 of seed
    and chip id), ``split``, the scores and ``source``.

    Args:
        inputs: Artifacts ``items``, ``chips`` and ``decisions``.
        seed: Seed of order and split.
        holdout: Share of the ground cells that is held out, 0 to 1.
        folder: Folder for the file and for what does not fit into memory.

    Raises:
        NothingKept: The decisions keep no chip, or none for training.
        MixedPixels: Kept chips differ in bands or dtype.
        RunError: A kept chip is not exactly once in the chips, or its scene is not in the items.
        OSError: The folder's disk is full (``ENOSPC``, ``EDQUOT``, ``EFBIG``), or it fails.
    """
    import duckdb

    chips, decisions = (inputs[name].local(f"{name}.parquet") for name in ("chips", "decisions"))
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{MEMORY_MIB}MiB",
        "threads": 1,
        "temp_directory": str(folder / "spill"),
        "preserve_insertion_order": False,
        "enable_geoparquet_conversion": False,
        "autoinstall_known_extensions": False,
    }
    try:
        with duckdb.connect(config=settings) as database:
            database.execute("SET enable_progress_bar = false")  # it would be on stdout
            database.read_parquet(_literal(chips), file_row_number=True).create_view("chips")
            scores = _load_kept(database, decisions)
            _require_once(database, inputs["chips"])
            _require_same_pixels(database)
            _load_splits(database, holdout, seed)
            database.register("scenes", _scenes(inputs["items"], inputs["chips"]))
            rows = _join(database, scores, seed)
            schema = _schema(chips, decisions, scores)
            _write(rows, schema, inputs, holdout, folder / FILE)
    except (duckdb.IOException, duckdb.OutOfMemoryException, OSError) as error:
        code = next((NO_ROOM[text] for text in NO_ROOM if text in str(error)), None)
        # while rows are fetched, DuckDB's errors are OSErrors without a number
        if isinstance(error, OSError) and (error.errno is not None or code is None):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(code or errno.EIO, reason, str(folder)) from error


def _load_kept(database: DuckDBPyConnection, decisions: Path) -> list[str]:
    """Make the table ``kept`` (chip ids and scores of kept chips); return the scores' names."""
    file = pq.ParquetFile(decisions)
    scores = [name for name in SCORE_COLUMNS if name in file.schema_arrow.names]
    rows = database.read_parquet(_literal(decisions)).filter("decision = 'keep'")
    rows.select(", ".join(("chip_id", *scores))).create("kept")
    if not _one_row(database, "SELECT count(*) FROM kept")[0]:
        raise NothingKept(
            f"none of the {file.metadata.num_rows} candidate chips was kept: loosen the gates "
            "(curate.min_valid, curate.max_cloud, curate.max_saturated) or search for more scenes"
        )
    return scores


def _require_once(database: DuckDBPyConnection, chips: Artifact) -> None:
    """Raise RunError unless each kept chip is once in the decisions and once in the chips."""
    kept, ids, missing, twice = _one_row(
        database,
        """
        SELECT (SELECT count(*) FROM kept), count(*), count(*) FILTER (times = 0),
               count(*) FILTER (times > 1)
        FROM (
            SELECT count(chips.chip_id) AS times
            FROM (SELECT DISTINCT chip_id FROM kept) AS ids LEFT JOIN chips USING (chip_id)
            GROUP BY ids.chip_id
        )
        """,
    )
    if missing or twice or ids < kept:
        raise RunError(
            f"of {kept} kept chips {missing} are not in chips {chips.digest[:12]}, and some may be "
            f"there ({twice}) or in the decisions ({kept - ids}) twice; run the stages again from "
            "the cutting of chips"
        )


def _require_same_pixels(database: DuckDBPyConnection) -> None:
    """Raise MixedPixels unless the kept chips have one dtype and one list of bands."""
    rows = database.sql(
        """
        SELECT dtype || ' ' || array_to_string(bands, ',') AS kind,
               string_agg(DISTINCT collection, ', ' ORDER BY collection) AS collections
        FROM chips SEMI JOIN kept USING (chip_id) GROUP BY kind ORDER BY kind
        """
    ).fetchall()
    if len(rows) > 1:
        kinds = "; ".join(f"{kind} ({collections})" for kind, collections in rows)
        raise MixedPixels(
            f"one dataset needs one dtype and one list of bands, but the kept chips have {kinds}; "
            "choose collections that agree with search.collections, or bands they all have with "
            "cut.bands"
        )


def _load_splits(database: DuckDBPyConnection, holdout: float, seed: int) -> None:
    """Make the table ``splits``: the split of each cell that does not train."""
    splits: dict[str, str] = {}
    if holdout > 0:
        cells, footprints = zip(
            *database.sql(
                """
                SELECT cell, arg_min(geometry, file_row_number)
                FROM chips SEMI JOIN kept USING (chip_id) GROUP BY cell
                """
            ).fetchall(),
            strict=True,
        )
        splits = split_cells(cells, footprints, holdout, seed)
    table = {cell: split for cell, split in splits.items() if split != TRAIN}
    columns = {"cell": list(table), "split": list(table.values())}
    database.register(
        "splits", pa.table(columns, schema=pa.schema({"cell": pa.string(), "split": pa.string()}))
    )


def _scenes(items: Artifact, chips: Artifact) -> pa.Table:
    """Return ``collection``, ``item_id``, ``source`` and ``licence`` of the usable scenes.

    Raises:
        RunError: A scene is listed twice.
    """
    frame = items.table("items.parquet", [*SCENE_COLUMNS, "status", "reason"])
    # if the newest version of a scene could not be read, chips of an older version are used
    superseded = frame["reason"].isin(SUPERSEDED_REASONS)
    frame = frame.loc[(frame["status"] == "ok") | superseded, SCENE_COLUMNS].astype(str)
    key = ["collection", "item_id"]
    if any(entry.path == STAND_INS for entry in chips.manifest.files):
        unlisted = chips.table(STAND_INS, SCENE_COLUMNS).astype(str)
        known = unlisted.set_index(key).index.isin(frame.set_index(key).index)
        frame = pd.concat([frame, unlisted[~known]], ignore_index=True)
    if frame.duplicated(key).any():
        raise RunError(f"scenes are twice in items {items.digest[:12]}; run the search again")
    return pa.table({name: pa.array(frame[name], pa.string()) for name in SCENE_COLUMNS})


def _join(database: DuckDBPyConnection, scores: list[str], seed: int) -> Iterator[pa.RecordBatch]:
    """Yield the joined rows in dataset order; a chip of an unknown scene has no ``source``."""
    columns = [
        "coalesce(nullif(chips.licence, ''), scenes.licence) AS licence"
        if name == "licence"
        else f'chips."{name}"'
        for name in SAMPLE_COLUMNS
    ]
    split = f"coalesce(splits.split, '{TRAIN}')"
    return iter(
        database.sql(
            f"""
            SELECT {", ".join(columns)},
                   ('0x' || substr(sha256('{int(seed)} ' || chips.chip_id), 1, 16))::UBIGINT
                       AS order_hash,
                   {split} AS split,
                   {"".join(f"kept.{name}, " for name in scores)}
                   scenes.source
            FROM chips
            JOIN kept USING (chip_id)
            LEFT JOIN splits USING (cell)
            LEFT JOIN scenes
                ON scenes.collection = chips.collection AND scenes.item_id = chips.item_id
            ORDER BY list_position({[TRAIN, HOLDOUT, RIM]}, {split}), order_hash, chips.chip_id
            """  # noqa: S608  the names are this module's own
        ).to_arrow_reader(BATCH_ROWS)
    )


def _schema(chips: Path, decisions: Path, scores: list[str]) -> pa.Schema:
    """Return the columns of the file with the types of the tables that they are from."""
    chip, decision = pq.read_schema(chips), pq.read_schema(decisions)
    fields = [
        pa.field("licence", pa.large_string()) if name == "licence" else chip.field(name)
        for name in SAMPLE_COLUMNS
    ]
    fields += [pa.field("order_hash", pa.uint64()), pa.field("split", pa.string())]
    fields += [decision.field(name) for name in scores]
    return pa.schema([*fields, pa.field("source", pa.large_string())])


def _write(
    rows: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    inputs: Mapping[str, Artifact],
    holdout: float,
    path: Path,
) -> None:
    """Write rows in batches of ``BATCH_ROWS``.

    Raises:
        NothingKept: No row is for training.
        RunError: The scenes of some rows are not in the items.
    """
    written = unknown = 0
    waiting = schema.empty_table()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in rows:
            if not written and not len(waiting) and batch["split"][0].as_py() != TRAIN:
                raise NothingKept(
                    f"all samples are held out: set pack.holdout lower than {holdout}"
                )
            unknown += batch["source"].null_count
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch]).cast(schema)])
            whole = len(waiting) // BATCH_ROWS * BATCH_ROWS
            if whole:
                writer.write_table(waiting.slice(0, whole).combine_chunks(), BATCH_ROWS)
                waiting, written = waiting.slice(whole).combine_chunks(), written + whole
        writer.write_table(waiting.combine_chunks(), BATCH_ROWS)
    if unknown:
        raise RunError(
            f"{unknown} kept chips have no scene in items {inputs['items'].digest[:12]}; run the "
            "stages again from the search"
        )


def _one_row(database: DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """Return the only row of a query."""
    [row] = database.sql(query).fetchall()
    return tuple(row)


def _literal(path: Path) -> str:
    """Return a path in which DuckDB sees no wildcard."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(path))
