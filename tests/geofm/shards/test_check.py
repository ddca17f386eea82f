from __future__ import annotations

import os

import numpy as np
import pytest

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError
from data_catalog.manifest import MANIFEST
from data_catalog.provenance.verify import verify_artifact
from flows.cli.audit import verify
from geofm.shards.check import verify_shards
from geofm.shards.index import INDEX
from tests.geofm.shards.conftest import some_chips

#: Bits that are flipped one after the other in each kind of file.
FLIPS = int(os.environ.get("GEOFM_FLIPS", "60"))


def _flip(dataset: Artifact, shard: str, byte: int, bit: int = 0) -> None:
    path = dataset.local(shard)
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_dataset_has_no_problems(pack):
    assert verify_shards(pack(some_chips())) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("npy header", "{key}.npy: tar header differs at byte {byte}"),
        ("npy checksum", "{key}.npy: tar header differs at byte {byte}"),
        ("npy magic", "{key}.npy: SHA-256"),
        ("npy last pixel", "{key}.npy: SHA-256"),
        ("npy padding", "{key}.npy: padding differs at byte {byte}"),
        ("json header", "{key}.json: tar header differs at byte {byte}"),
        ("json text", "{key}.json: SHA-256"),
        ("json padding", "{key}.json: padding differs at byte {byte}"),
    ],
)
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_found_and_located(pack, where, expected, bit):
    dataset = pack(some_chips())
    row = dataset.table("index.parquet").iloc[7]
    byte = {
        "npy header": row.offset - 512 + 3,
        "npy checksum": row.offset - 512 + 155,
        "npy magic": row.offset,
        "npy last pixel": row.offset + row["size"] - 1,
        "npy padding": row.offset + row["size"],
        "json header": row.json_offset - 200,
        "json text": row.json_offset + 10,
        "json padding": row.json_offset + row.json_size,
    }[where]
    _flip(dataset, row.shard, int(byte), bit)
    problems = verify_shards(dataset)
    assert len(problems) == 1
    assert problems[0].startswith(f"{row.shard}: sample {row.key}: ")
    assert expected.format(key=row.key, byte=byte) in problems[0]


def test_any_flipped_bit_is_found(pack):
    dataset = pack(some_chips(4), shard_mib=1)
    path = dataset.local("shards/small-train-00000.tar")
    whole = path.read_bytes()
    for byte in np.random.default_rng(0).choice(len(whole), 2 * FLIPS, replace=False):
        _flip(dataset, "shards/small-train-00000.tar", int(byte), int(byte) % 8)
        assert len(verify_shards(dataset)) == 1, byte
        path.write_bytes(whole)
    _flip(dataset, "shards/small-train-00000.tar", len(whole) - 1)
    assert "the end of the tar differs at byte" in verify_shards(dataset)[0]


def test_truncated_longer_missing_and_swapped(pack):
    dataset = pack(some_chips())
    index = dataset.table("index.parquet")
    row = index.iloc[3]
    path = dataset.local(row.shard)
    whole = path.read_bytes()

    path.write_bytes(whole[: int(row.offset) + 5])
    (problem,) = verify_shards(dataset)
    assert f"truncated at byte {row.offset + 5} of {len(whole)}: sample {row.key}" in problem

    path.write_bytes(whole[:-600])
    assert "the end of the tar is missing" in verify_shards(dataset)[0]

    path.write_bytes(whole + b"more")
    assert f"longer than written at byte {len(whole)}" in verify_shards(dataset)[0]

    other = dataset.local(sorted(set(index["shard"]) - {row.shard})[0])
    path.write_bytes(other.read_bytes())
    assert verify_shards(dataset)

    path.unlink()
    assert verify_shards(dataset) == [
        f"{row.shard}: missing; restore it from another copy, or pack again"
    ]


def test_a_damaged_index_is_a_problem_not_a_crash(pack):
    dataset = pack(some_chips(4))
    dataset.local("index.parquet").write_bytes(b"PAR1 no parquet PAR1")
    (problem,) = verify_shards(dataset)
    assert problem.startswith("index.parquet cannot be read")


def told(catalogue, store, dataset: Artifact) -> str:
    """What ``geofm verify`` says; empty when all is well."""
    try:
        verify(dataset.digest, store=store.url, catalog=catalogue.url)
    except CheckError as error:
        return str(error)
    return ""


def test_any_bit_of_the_index_is_found_and_located(pack, store, catalogue):
    dataset = pack(some_chips(), holdout=0.3)
    assert told(catalogue, store, dataset) == ""
    path = dataset.local(INDEX)
    whole = path.read_bytes()
    columns = set()
    for byte in np.random.default_rng(0).choice(len(whole), min(FLIPS, len(whole)), replace=False):
        _flip(dataset, INDEX, int(byte), int(byte) % 8)
        found = told(catalogue, store, dataset)
        assert f"{INDEX}: differs at byte {byte} (" in found
        assert "sample " not in found  # the shards are not blamed
        columns.add(found.split(f"byte {byte} (")[1].split(")")[0])
        path.write_bytes(whole)
    assert "column sha256 of samples 0 to 23" in columns
    path.unlink()
    assert "can be made again from the shards, which are whole" in told(catalogue, store, dataset)


def test_any_bit_of_the_manifest_is_found_and_located(pack, store, catalogue):
    dataset = pack(some_chips(6))
    path = dataset.local(MANIFEST)
    whole = path.read_bytes()
    for byte in np.random.default_rng(1).choice(len(whole), min(FLIPS, len(whole)), replace=False):
        _flip(dataset, MANIFEST, int(byte), int(byte) % 8)
        found = told(catalogue, store, Artifact(dataset.url))
        assert found.startswith(f"1 problems in {dataset.digest}:"), found
        assert f"byte {byte} differs from the catalogue's copy" in found
        alone = verify_artifact(Artifact(dataset.url))  # a folder that nobody recorded
        assert any(MANIFEST in problem for problem in alone)
        path.write_bytes(whole)


def test_a_bit_of_a_tar_is_told_once_with_its_sample(pack, store, catalogue):
    dataset = pack(some_chips())
    row = dataset.table(INDEX).iloc[11]
    _flip(dataset, row.shard, int(row.offset) + 200)
    found = told(catalogue, store, dataset)
    assert found.count("sample ") == 1
    assert f"{row.shard}: sample {row.key}: {row.key}.npy: SHA-256 of bytes" in found


def test_two_members_that_changed_places_are_both_named(pack, store, catalogue):
    dataset = pack(some_chips())
    index = dataset.table(INDEX)
    one, two = index[index["shard"] == index["shard"][0]].iloc[:2].itertuples()
    path = dataset.local(one.shard)
    data = bytearray(path.read_bytes())
    size = one.size
    assert size == two.size
    data[one.offset : one.offset + size], data[two.offset : two.offset + size] = (
        data[two.offset : two.offset + size], data[one.offset : one.offset + size],
    )  # fmt: skip
    path.write_bytes(data)
    found = told(catalogue, store, dataset)
    for row in (one, two):
        assert f"sample {row.key}: {row.key}.npy: SHA-256" in found


def test_a_damaged_index_beside_a_damaged_tar(pack, store, catalogue):
    dataset = pack(some_chips())
    row = dataset.table(INDEX).iloc[11]
    _flip(dataset, row.shard, int(row.offset) - 500)
    _flip(dataset, INDEX, 100)
    found = told(catalogue, store, dataset)
    assert f"{row.shard}: the tar header" in found or f"{row.shard}: no tar header" in found
    assert f"{INDEX}: damaged as well" in found


def test_a_damaged_table_names_the_rows_that_cannot_be_read(pack):
    dataset = pack(some_chips())
    whole = dataset.path("samples.parquet").read_bytes()
    named = 0
    for byte in range(6, len(whole) - 6, len(whole) // 40):
        _flip(dataset, "samples.parquet", byte, 5)
        (problem,) = verify_artifact(dataset)
        assert "samples.parquet: content altered" in problem
        named += "of rows 0 to 23 cannot be read" in problem or "footer cannot be read" in problem
        assert "read" in problem.rpartition(";")[2]
        dataset.path("samples.parquet").write_bytes(whole)
    assert named > 10
