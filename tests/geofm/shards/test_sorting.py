from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.store import Store, open_store
from geofm.shards import sorting
from geofm.shards.sorting import FILE, sort_rows
from tests.geofm.shards.conftest import make_inputs, some_chips


def rewrite(artifact: Artifact, name: str, change) -> None:
    """Change the rows of a table in place."""
    path = artifact.local(name)
    table = pq.read_table(path)
    frame = change(table.to_pandas())
    pq.write_table(pa.Table.from_pandas(frame, table.schema, preserve_index=False), path)


def last_again(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame, frame.tail(1)])


def one_changed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(chip_id=["0" * 24, *frame["chip_id"][1:]])


@pytest.mark.parametrize(
    ("artifact", "change", "message"),
    [
        ("chips", last_again, r"of 12 kept chips 0 are not .*there \(1\) or .*decisions \(0\)"),
        ("decisions", last_again, r"of 13 kept chips 0 are not .*there \(0\) or .*decisions \(1\)"),
        ("decisions", one_changed, r"of 12 kept chips 1 are not in chips"),
    ],
)
def test_decisions_that_do_not_fit_the_chips_are_refused(
    store: Store, tmp_path: Path, artifact, change, message
):
    inputs = make_inputs(store, some_chips(12))
    rewrite(inputs[artifact], f"{artifact}.parquet", change)
    with pytest.raises(RunError, match=message):
        sort_rows(inputs, 0, 0.0, tmp_path)


def arrow_peak(inputs: dict[str, Artifact], folder: Path) -> int:
    """Most bytes that Arrow held while rows were sorted."""
    before = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counting)
    try:
        folder.mkdir()
        sort_rows(inputs, 0, 0.0, folder)
    finally:
        pa.set_memory_pool(before)
    return int(counting.max_memory())


def test_memory_for_rows_does_not_grow_with_their_number(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sorting, "BUCKET_ROWS", 32)
    monkeypatch.setattr(sorting, "BLOCK_ROWS", 8)
    peaks = {}
    for count in (100, 800):
        inputs = make_inputs(open_store(tmp_path / str(count)), some_chips(count))
        for name in ("chips", "decisions"):  # row groups of one size, as of large tables
            path = inputs[name].local(f"{name}.parquet")
            pq.write_table(pq.read_table(path), path, row_group_size=50)
        peaks[count] = arrow_peak(inputs, tmp_path / f"sorted-{count}")
        with pa.ipc.open_file(str(tmp_path / f"sorted-{count}" / FILE)) as rows:
            assert rows.read_all().num_rows == count
    assert peaks[800] < 1.5 * peaks[100]
