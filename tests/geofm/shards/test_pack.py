from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import webdataset as wds

from data_catalog import store as stores
from data_catalog.errors import UsageError
from data_catalog.provenance.verify import verify_artifact
from data_catalog.run import make_job, plan_parts, run_stage, seal, work_parts
from data_catalog.store import Store, open_store
from geofm.config.recipe import PackSettings
from geofm.formats.npy import pixel_sha256
from geofm.raster.radiometry import to_unit
from geofm.shards.pack import STAGE, DamagedChip, shard_count, shard_ranges
from tests.geofm.dedup.synthetic import Chip, texture
from tests.geofm.shards.conftest import make_inputs, some_chips

SETTINGS = PackSettings(shard_mib=0.06, name="small")


def shards(dataset) -> list[str]:
    return [f.path for f in dataset.manifest.files if f.path.endswith(".tar")]


def test_every_kept_chip_is_a_sample_with_its_provenance(pack):
    chips = some_chips()
    dataset = pack(chips, drop=[2, 5])
    index = dataset.table("index.parquet")
    kept = {chip.chip_id(n): chip for n, chip in enumerate(chips) if n not in (2, 5)}
    assert set(index["key"]) == set(kept)
    assert len(shards(dataset)) > 2
    assert shards(dataset)[0] == "shards/small-train-00000.tar"
    for row in index.itertuples():
        chip = kept[row.key]
        pixels = np.load(io.BytesIO(dataset.read_range(row.shard, row.offset, row.size)))
        assert (pixels == chip.pixels).all()
        about = json.loads(dataset.read_range(row.shard, row.json_offset, row.json_size))
        assert about["pixel_sha256"] == pixel_sha256(chip.pixels)
        assert about["item_id"] == chip.item
        assert [a["href"] for a in about["assets"]] == [
            f"https://example.org/{chip.item}/{band}.tif" for band in ("blue", "green", "red")
        ]
        assert all(len(a["sha256"]) == 64 for a in about["assets"])
        assert about["window"] == {"row": 0, "col": 0, "width": 32, "height": 32}
        assert about["geometry"]["type"] == "Polygon"
        assert (about["licence"], about["source"]) == ("CC-BY-4.0", "generic")
    assert dataset.manifest.facts["sources"][0]["rows"] == 22
    assert dataset.manifest.counts["rows_in"] == 22


def test_chips_of_a_stand_in_scene_are_packed(pack):
    chips = some_chips()
    chips = [replace(chips[0], item=f"{chips[0].item}-old"), *chips[1:]]
    dataset = pack(chips, drop=[])
    assert dataset.manifest.counts["rows_out"] == len(chips)
    items = dataset.table("samples.parquet")["item_id"]
    assert (items == chips[0].item).sum() == 1


def test_order_is_the_hash_of_seed_and_id(pack):
    chips = some_chips()
    one, two = pack(chips, seed=0), pack(chips, seed=1)
    for dataset, seed in ((one, 0), (two, 1)):
        keys = dataset.table("index.parquet")["key"].tolist()
        digests = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in keys]
        assert digests == sorted(digests)
        assert dataset.table("samples.parquet")["chip_id"].tolist() == keys
    assert one.digest != two.digest


def test_webdataset_and_tar_read_the_shards(pack, tmp_path: Path):
    chips = some_chips()
    by_id = {chip.chip_id(n): chip for n, chip in enumerate(chips)}
    dataset = pack(chips)
    urls = [str(dataset.local(name)) for name in shards(dataset)]
    seen = {}
    for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode():
        seen[sample["__key__"]] = sample
    assert seen.keys() == by_id.keys()
    for key, sample in seen.items():
        assert (sample["npy"] == by_id[key].pixels).all()
        assert sample["json"]["chip_id"] == key
    subprocess.run(["tar", "-xf", urls[0], "-C", str(tmp_path)], check=True)
    with tarfile.open(urls[0]) as tar:
        names = tar.getnames()
    assert sorted(p.name for p in tmp_path.glob("*.npy")) == sorted(
        n for n in names if n.endswith(".npy")
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_for_any_workers_and_after_a_kill(tmp_path: Path, workers):
    digests = set()
    for run in ("plain", "mapped"):
        store = open_store(tmp_path / run)
        job = make_job(STAGE, store, make_inputs(store, some_chips()), SETTINGS, seed=7)
        parts = plan_parts(STAGE, job)
        if run == "mapped":
            work_parts(STAGE, job, parts[1:2])
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda p: work_parts(STAGE, job, [p]), parts[::-1]))  # noqa: B023
        else:
            work_parts(STAGE, job, parts)
        digests.add(seal(STAGE, job, parts)[0].digest)
    assert len(digests) == 1


def test_forgetting_one_chip_touches_one_shard(store):
    chips = some_chips(60)
    before = make_job(STAGE, store, make_inputs(store, chips), SETTINGS)
    after = make_job(STAGE, store, make_inputs(store, chips, drop=[17]), SETTINGS)
    old, new = plan_parts(STAGE, before), plan_parts(STAGE, after)
    assert len(old) == len(new) > 5
    assert len({p.key for p in new} - {p.key for p in old}) == 1


def test_statistics_are_those_of_the_pixels(pack):
    chips = some_chips(10)
    chips[4].pixels[:, :, :8] = 0  # nodata
    chips[4].valid = 0.75
    chips[5].pixels[0, 0, 0] = 0  # dark, in a chip that is wholly valid
    stats = pack(chips).json("stats.json")
    units = [to_unit(chip.pixels, [1e-4] * 3).astype(np.float64).reshape(3, -1) for chip in chips]
    units[4] = units[4][:, units[4].any(axis=0)]
    pixels = np.concatenate(units, axis=1)
    np.testing.assert_allclose(stats["mean"], pixels.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], pixels.std(axis=1), rtol=1e-6)
    assert stats["count"] == pixels.shape[1] == 10 * 1024 - 256
    assert (stats["bands"], stats["dtype"]) == (["red", "green", "blue"], "uint16")


def test_statistics_of_8_bit_chips(pack):
    chips = some_chips(6, dtype="uint8")
    stats = pack(chips).json("stats.json")
    pixels = np.concatenate([chip.pixels.reshape(3, -1) for chip in chips], axis=1) / 255
    np.testing.assert_allclose(stats["mean"], pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(stats["std"], pixels.std(axis=1), rtol=1e-9)


def test_card_and_samples(pack):
    dataset = pack(some_chips(9))
    card = dataset.path("README.md").read_text()
    for part in ("9 image chips of 32 × 32", "CC-BY-4.0", "10 m", "2024-06-01", "webdataset"):
        assert part in card
    samples = gpd.read_parquet(dataset.local("samples.parquet"))
    assert samples.crs.to_epsg() == 4326
    assert {"chip_id", "licence", "source", "geometry", "quality"} <= set(samples.columns)


def test_mixed_pixels_are_refused_with_a_remedy(pack):
    mixed = [Chip(texture(0)), Chip(texture(1, dtype="uint8"), collection="naip")]
    with pytest.raises(UsageError, match=r"uint16 .*search\.collections.*cut\.bands") as error:
        pack(mixed)
    assert "uint8 red,green,blue (naip)" in str(error.value)
    bands = [Chip(texture(0)), Chip(texture(1, bands=1), bands=["red"])]
    with pytest.raises(UsageError, match="one list of bands"):
        pack(bands)


def test_nothing_kept_is_refused_with_a_remedy(pack):
    with pytest.raises(UsageError, match=r"none of the 2 .*curate\.min_valid"):
        pack(some_chips(2), drop=[0, 1])


def test_damaged_pixels_are_not_packed(store, catalogue):
    inputs = make_inputs(store, some_chips(4))
    part = inputs["chips"].local("parts/0000.tar")
    data = bytearray(part.read_bytes())
    data[512 + 200] ^= 1
    part.write_bytes(data)
    with pytest.raises(DamagedChip, match="other pixels than when it was cut"):
        run_stage(STAGE, store, catalogue, inputs, SETTINGS)


def test_shards_come_in_steps():
    assert [shard_count(total, 10) for total in (0, 10, 11, 30, 31, 60, 61, 120, 121)] == [
        1, 1, 2, 3, 4, 6, 8, 12, 16,
    ]  # fmt: skip
    hashes = np.array([0, 2**62, 2**63, 2**64 - 1], dtype=np.uint64)
    assert shard_ranges(hashes, 1) == [(0, 4)]
    assert shard_ranges(hashes, 2) == [(0, 2), (2, 4)]
    assert shard_ranges(hashes, 3) == [(0, 2), (2, 3), (3, 4)]


def test_an_object_store_copies_shards_by_itself(s3, catalogue, monkeypatch):
    """Bytes of a shard go up once, as a part; a version copies it, and one it shares as well."""
    store = open_store(f"{s3}/versions")
    chips = some_chips(60)
    copy, copies = Store._copy_in_store, []
    upload, uploads = stores.upload_file, []

    def copied(self, *arguments):
        done = copy(self, *arguments)
        copies.append(done)
        return done

    def uploaded(source, target):
        uploads.append(target.path)
        upload(source, target)

    datasets = []
    for drop in ([], [17]):
        inputs = make_inputs(store, chips, drop=drop)
        copies.clear()
        uploads.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_copy_in_store", copied)
            patch.setattr(stores, "upload_file", uploaded)
            datasets.append(run_stage(STAGE, store, catalogue, inputs, SETTINGS))
        tars = [path for path in uploads if path.endswith(".tar")]
        assert copies.count(True) >= len(shards(datasets[-1])) > 5
        assert len(tars) == (1 if drop else len(shards(datasets[-1])))
        assert all("/parts/" in path for path in tars)
        assert verify_artifact(datasets[-1]) == []
    assert datasets[0].digest != datasets[1].digest
