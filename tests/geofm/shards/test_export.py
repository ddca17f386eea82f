"""What others read of a dataset; each test skips where the package that reads is not installed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_catalog.errors import CheckError, UsageError
from data_catalog.storage.export import TargetExists
from flows.cli.export import export
from geofm.shards.croissant import semantic
from geofm.shards.export import NotADataset, export_croissant, export_huggingface
from geofm.shards.loader import SampleStream
from geofm.shards.reader import open_index
from tests.geofm.shards.conftest import make_inputs, some_chips

INTEROP = "pip install 'geofm[interop]'"


def needs(package: str):
    return pytest.importorskip(package, reason=f"needs {package}: {INTEROP}")


@pytest.fixture
def dataset(pack):
    chips = some_chips(40)
    for number, chip in enumerate(chips):
        chip.x = 500_000.0 + 10_000 * (number // 2)
    return pack(chips, holdout=0.3)


@pytest.fixture
def exported(dataset, tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    export_huggingface(dataset, folder, "small", "2026-11-24", "2026-11-24")
    return folder


def test_the_folder_holds_every_file_a_card_and_croissant(dataset, exported):
    for entry in dataset.manifest.files:
        if entry.path != "README.md":
            assert (exported / entry.path).read_bytes() == dataset.path(entry.path).read_bytes()
    head, card = (exported / "README.md").read_text().removeprefix("---\n").split("---\n\n", 1)
    about = yaml.safe_load(head)
    assert card == dataset.path("README.md").read_text()
    assert about["license"] == "cc-by-4.0"
    assert about["size_categories"] == ["n<1K"]
    assert [one["split"] for one in about["configs"][0]["data_files"]] == ["train", "holdout"]
    found = json.loads((exported / "croissant.json").read_text())
    listed = {one["@id"]: one.get("sha256") for one in found["distribution"]}
    for entry in dataset.manifest.files:
        if entry.path.endswith((".tar", ".parquet")):
            assert listed[entry.path] == entry.sha256
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert found["temporalCoverage"] == "2024-06-01/2024-06-01"
    assert found["spatialCoverage"]["geo"]["box"].startswith("45.000000 2.000000 45.010000")


def test_versions_are_semantic_ones():
    digest = "0123456789abcdef"
    found = [semantic(v, digest) for v in ("2026-11-04", "2026-11-04.2", "3", "")]
    assert found == ["2026.11.4", "2026.11.4+2", "3.0.0", "0.0.0+0123456789ab"]


def test_hard_links_share_the_stores_bytes_but_not_the_card(dataset, tmp_path: Path):
    export_huggingface(dataset, tmp_path / "links", "small", hard_links=True)
    tar = "shards/small-train-00000.tar"
    assert (tmp_path / "links" / tar).stat().st_ino == dataset.local(tar).stat().st_ino
    assert not dataset.path("README.md").read_text().startswith("---")


def test_what_is_damaged_or_no_dataset_or_in_the_way_is_refused(dataset, store, tmp_path: Path):
    with pytest.raises(TargetExists, match="--out"):
        export_huggingface(dataset, tmp_path, "small")
    chips = make_inputs(store, some_chips(2))["chips"]
    with pytest.raises(NotADataset, match="of kind chips"):
        export_croissant(chips, tmp_path / "c.json", "small")
    tar = dataset.local("shards/small-train-00000.tar")
    tar.write_bytes(tar.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckError, match=r"small-train-00000\.tar: content altered"):
        export_huggingface(dataset, tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


def test_the_command_names_what_it_wrote(dataset, store, catalogue, tmp_path: Path, capsys):
    catalogue.publish("corpus", dataset, "2026-11-24")
    where = {"store": store.url, "catalog": catalogue.url, "json_": True}
    export(dataset.digest, "croissant", str(tmp_path / "c.json"), **where)
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["name"] == "corpus"
    with pytest.raises(UsageError, match="choose hf or croissant or stac"):
        export(dataset.digest, "zip", "", **where)
    with pytest.raises(UsageError, match="can't be written"):
        export(dataset.digest, "croissant", str(tmp_path / "no" / "c.json"), **where)


def test_mlcroissant_validates_and_loads_the_tables(dataset, exported):
    mlc = needs("mlcroissant")
    found = mlc.Dataset(jsonld=str(exported / "croissant.json"))
    assert not found.metadata.ctx.issues.errors
    assert not found.metadata.ctx.issues.warnings
    samples = list(found.records("samples"))
    assert len(samples) == 40
    ids = {record["samples/chip_id"].decode() for record in samples}
    assert ids == set(dataset.table("index.parquet")["chip_id"])
    places = list(found.records("index"))
    sizes = {record["index/chip_id"].decode(): record["index/size"] for record in places}
    assert sizes == dict(dataset.table("index.parquet", ["key", "size"]).to_numpy())


def test_hugging_face_loads_both_splits_and_the_tables(dataset, exported, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = needs("datasets")
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(str(exported), cache_dir=cache)
    counts = dataset.manifest.counts
    assert {name: len(split) for name, split in loaded.items()} == {
        "train": counts["train"],
        "holdout": counts["holdout"],
    }
    streamed = datasets.load_dataset(str(exported), split="train", streaming=True)
    first = next(iter(streamed))
    row = dataset.table("index.parquet").iloc[0]
    assert first["__key__"].endswith(row.key)
    assert first["json"]["chip_id"] == row.key
    pixels = np.load(io.BytesIO(dataset.read_range(row.shard, row.offset, row["size"])))
    assert np.array_equal(np.asarray(first["npy"]).reshape(-1), pixels.reshape(-1))
    table = datasets.load_dataset(
        "parquet", data_files=f"{exported}/samples.parquet", split="train", cache_dir=cache
    )
    assert len(table) == 40


def test_duckdb_joins_index_and_samples(dataset, exported):
    duckdb = needs("duckdb")
    query = f"""
        select s.split, count(*), sum(i.size) from '{exported}/samples.parquet' s
        join '{exported}/index.parquet' i using (chip_id)
        where s.licence = 'CC-BY-4.0' and i.split = s.split group by 1 order by 1
    """
    index = dataset.table("index.parquet")
    expected = [
        (split, len(rows), int(rows["size"].sum())) for split, rows in index.groupby("split")
    ]
    assert duckdb.sql(query).fetchall() == expected


def test_torchgeo_stacks_and_transforms_the_samples(dataset):
    needs("torchgeo")
    import torch
    from torchgeo.datasets import stack_samples
    from torchgeo.transforms import AppendNDVI

    def as_torchgeo(sample):
        image = torch.from_numpy(sample.pixels.astype(np.float32))
        return {"image": image, "index": torch.tensor(sample.number)}

    stream = SampleStream(
        open_index(dataset, "all"),
        batch=8,
        transform=as_torchgeo,
        collate=lambda samples: stack_samples(list(samples)),
    )
    batches = list(stream.batches())
    assert [tuple(batch["image"].shape) for batch in batches] == [(8, 3, 32, 32)] * 5
    more = AppendNDVI(index_nir=2, index_red=0)(batches[0]["image"])
    assert more.shape == (8, 4, 32, 32)
