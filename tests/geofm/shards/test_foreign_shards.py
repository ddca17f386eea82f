"""A dataset that somebody else made: an index that leads elsewhere, pixels that were replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError
from data_catalog.provenance.verify import verify_artifact
from data_catalog.store import Store, list_files
from geofm.chips.recut import Recut
from geofm.shards.check import check_index, packed_pixels
from geofm.shards.index import INDEX, index_tar, sort_shards, write_index
from geofm.shards.loader import SampleStream
from geofm.shards.reader import DamagedShard, ShardFiles, open_index
from tests.geofm.shards.conftest import some_chips


def reseal(dataset: Artifact, change: Callable[[Path], None]) -> Artifact:
    """A copy of a dataset with something changed, sealed again as a stranger would."""
    store = Store.of(dataset)
    with store.staging() as folder:
        out = folder / "artifact"
        shutil.copytree(dataset.root.path, out)
        (out / "manifest.json").unlink()
        change(out)
        manifest = dataset.manifest.model_copy(update={"files": list_files(out)})
        found = store.publish(out, manifest)
    assert verify_artifact(found) == []
    return found


def rewrite(row: int, **values: Any) -> Callable[[Path], None]:
    """Change values of one row of the index."""

    def change(folder: Path) -> None:
        index = pd.read_parquet(folder / INDEX)
        for name, value in values.items():
            index.loc[row, name] = value
        index.to_parquet(folder / INDEX)

    return change


@pytest.mark.parametrize(
    "values",
    [
        {"shard": "../../../../../../etc/passwd"},
        {"shard": "/etc/passwd"},
        {"shard": "shards/other.tar"},
        {"shard": "index.parquet/../shards/small-train-00000.tar"},
        {"shard": "shards\\small-train-00000.tar"},
        {"shard": ""},
        {"offset": -1},
        {"offset": 2**62},
        {"offset": 2**63 - 1},
        {"size": 0},
        {"size": -5},
        {"size": 2**62},
        {"size": 2**63 - 1},
    ],
)
def test_an_index_that_leads_outside_is_refused(pack, values: dict[str, Any]) -> None:
    forged = reseal(pack(some_chips()), rewrite(3, **values))
    with pytest.raises(DamagedShard, match=r"index.parquet of dataset .* is damaged"):
        open_index(forged)
    assert check_index(forged)


@pytest.mark.parametrize("values", [{"json_offset": -1}, {"json_size": 2**62}])
def test_the_place_of_the_json_is_checked_as_well(pack, values: dict[str, Any]) -> None:
    assert check_index(reseal(pack(some_chips()), rewrite(3, **values)))


def _drop(column: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = pd.read_parquet(folder / INDEX)
        index.drop(columns=column).to_parquet(folder / INDEX)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _drop("shard"), _drop("offset"), _drop("key"), _drop("sha256"),
        rewrite(2, shard=None), rewrite(2, key=None), rewrite(2, sha256="zz"),
        lambda folder: (folder / INDEX).write_bytes(b"PAR1"),
        lambda folder: pd.DataFrame({"key": [1], "shard": [2], "offset": ["a"], "size": [[]],
                                     "sha256": [3]}).to_parquet(folder / INDEX),
    ],
)  # fmt: skip
def test_an_index_of_another_shape_is_one_clear_error(pack, change) -> None:
    forged = reseal(pack(some_chips()), change)
    assert check_index(forged)
    with pytest.raises(CheckError):
        open_index(forged, digests=True)


def test_a_whole_index_has_no_problem(pack) -> None:
    assert check_index(pack(some_chips())) == []


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_a_shard_that_is_no_file_is_not_opened(pack, tmp_path: Path, what: str) -> None:
    dataset = pack(some_chips())
    index = open_index(dataset)
    path = Path(index.files[0])
    (tmp_path / "outside.tar").write_bytes(path.read_bytes())
    path.unlink()
    if what == "link":
        path.symlink_to(tmp_path / "outside.tar")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(CheckError):
        open_index(dataset)
    with ShardFiles(index) as files, pytest.raises(DamagedShard):  # replaced since it was opened
        files.read(0)
    stream = SampleStream(index, batch=4, skip_damaged=True)
    list(stream.batches())
    assert stream.skipped


def test_a_sample_that_was_blackened_and_sealed_again_is_found(pack) -> None:
    dataset = pack(some_chips())
    whole = open_index(dataset, "all")
    key, size = str(whole.keys[4]), int(whole.sizes[4])
    before = packed_pixels(dataset, whole.keys.to_pylist())

    def blacken(folder: Path) -> None:
        shard = folder / Path(whole.files[int(whole.shards[4])]).relative_to(dataset.root.path)
        data = bytearray(shard.read_bytes())
        start = int(whole.offsets[4])
        data[start + 128 : start + size] = bytes(size - 128)
        shard.write_bytes(data)
        names = sort_shards(f"shards/{path.name}" for path in (folder / "shards").iterdir())
        write_index((index_tar(folder / name, name) for name in names), folder / INDEX)

    forged = reseal(dataset, blacken)
    assert check_index(forged) == []
    after = packed_pixels(forged, whole.keys.to_pylist())
    assert [name for name in after if after[name] != before[name]] == [key]
    cut = Recut(key, before[key], before[key], "", packed=after[key])
    assert not cut.is_same
    assert cut.differences() == [f"sample {key}: its shard has other pixels than its chip"]
    assert Recut(key, before[key], before[key], "", packed=before[key]).is_same
