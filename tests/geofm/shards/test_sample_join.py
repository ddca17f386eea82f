from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.store import Store, StoreFull, open_store
from geofm.shards import sample_join
from geofm.shards.sample_join import BATCH_ROWS, FILE, write_sample_rows
from tests.geofm.shards.conftest import make_inputs, some_chips


def rewrite(artifact: Artifact, name: str, change) -> None:
    """Change the rows of a table in place."""
    path = artifact.local(name)
    table = pq.read_table(path)
    frame = change(table.to_pandas())
    pq.write_table(pa.Table.from_pandas(frame, table.schema, preserve_index=False), path)


def last_again(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame, frame.tail(1)])


def first_changed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(chip_id=["0" * 24, *frame["chip_id"][1:]])


@pytest.mark.parametrize(
    ("artifact", "change", "message"),
    [
        ("chips", last_again, r"of 12 kept chips 0 are not .*there \(1\) or .*decisions \(0\)"),
        ("decisions", last_again, r"of 13 kept chips 0 are not .*there \(0\) or .*decisions \(1\)"),
        ("decisions", first_changed, r"of 12 kept chips 1 are not in chips"),
    ],
)
def test_decisions_that_do_not_fit_the_chips_are_refused(
    store: Store, tmp_path: Path, artifact, change, message
):
    inputs = make_inputs(store, some_chips(12))
    rewrite(inputs[artifact], f"{artifact}.parquet", change)
    with pytest.raises(RunError, match=message):
        write_sample_rows(inputs, 0, 0.0, tmp_path)


def test_rows_are_in_batches_of_one_size_and_in_order(tmp_path: Path):
    folder = tmp_path / "with [brackets] * and ?"
    chips = [
        replace(chip, x=500_000.0 + 320 * (n % 50))
        for n, chip in enumerate(some_chips(2 * BATCH_ROWS + 5))
    ]
    inputs = make_inputs(open_store(folder / "store"), chips)
    write_sample_rows(inputs, 3, 0.2, folder)
    with pa.ipc.open_file(str(folder / FILE)) as file:
        sizes = [file.get_batch(n).num_rows for n in range(file.num_record_batches)]
        rows = file.read_all().to_pylist()
    assert sizes == [BATCH_ROWS, BATCH_ROWS, 5]
    splits = ["train", "holdout", "rim"]
    assert len({row["split"] for row in rows}) > 1
    for row in rows:
        digest = hashlib.sha256(f"3 {row['chip_id']}".encode()).digest()
        assert row["order_hash"] == int.from_bytes(digest[:8], "big")
    keys = [(splits.index(row["split"]), row["order_hash"], row["chip_id"]) for row in rows]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (duckdb.OutOfMemoryException("Out of Memory Error: failed to offload"), errno.ENOSPC),
        (duckdb.IOException('IO Error: Could not write file "x": No space left'), errno.ENOSPC),
        (duckdb.IOException("IO Error: Disk quota exceeded"), errno.EDQUOT),
        (duckdb.IOException("IO Error: File too large"), errno.EFBIG),
        (OSError("IO Error: File too large"), errno.EFBIG),
        (duckdb.IOException("IO Error: Input/output error"), errno.EIO),
        (OSError(errno.EACCES, "Permission denied"), errno.EACCES),
    ],
)
def test_errors_of_the_join_have_the_number_of_their_cause(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error, code
):
    def fail(*_: object):
        raise error
        yield

    monkeypatch.setattr(sample_join, "_join", fail)
    with pytest.raises(OSError) as caught:
        write_sample_rows(make_inputs(store, some_chips(2)), 0, 0.0, tmp_path)
    assert caught.value.errno == code


def test_no_room_to_spill_is_a_full_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    connect = duckdb.connect

    def small(**options):
        database = connect(**options)
        database.execute("SET max_temp_directory_size = '1KiB'")
        return database

    inputs = make_inputs(store, some_chips(20))
    monkeypatch.setattr(duckdb, "connect", small)
    monkeypatch.setattr(sample_join, "MEMORY_MIB", 1)
    with pytest.raises(StoreFull, match="free some space"), store.staging() as folder:
        write_sample_rows(inputs, 0, 0.0, folder)


#: Joins the tables of a store and prints the rise of peak memory, MiB.
JOIN = """
import sys
from pathlib import Path
import duckdb
from data_catalog.store import Store
from geofm.shards import sample_join

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

store, folder = Store(sys.argv[1]), Path(sys.argv[2])
inputs = {kind: store.locate(digest) for kind, digest in zip(sys.argv[3::2], sys.argv[4::2])}
duckdb.connect().close()
before = peak_mib()
sample_join.MEMORY_MIB = 256
sample_join.write_sample_rows(inputs, 0, 0.0, folder)
print(peak_mib() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path):
    store = open_store(tmp_path / "store")
    inputs = make_inputs(store, some_chips(100))
    copies = 8_000  # of about 600 bytes each
    for name in ("chips", "decisions"):
        path = inputs[name].local(f"{name}.parquet")
        rows = pq.read_table(path)
        database = duckdb.connect(config={"threads": 1, "memory_limit": "300MiB"})
        database.register("rows", rows)
        database.sql(
            f"""
            COPY (
                SELECT * REPLACE (substr(sha256(chip_id || copy), 1, 24) AS chip_id)
                FROM range({copies}) AS copies (copy), rows
            ) TO '{path}.new' (FORMAT parquet, ROW_GROUP_SIZE 65536)
            """
        )
        path.with_name(f"{path.name}.new").replace(path)
    arguments = [text for kind, a in inputs.items() for text in (kind, a.digest)]
    done = subprocess.run(
        [sys.executable, "-c", JOIN, store.url, tmp_path, *arguments],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    with pa.OSFile(str(tmp_path / FILE)) as file, pa.ipc.open_file(file) as rows:
        sizes = [rows.get_batch(n).num_rows for n in range(rows.num_record_batches)]
    assert sum(sizes) == 100 * copies
    assert (tmp_path / FILE).stat().st_size > 430 * 2**20
    assert float(done.stdout) < 380
