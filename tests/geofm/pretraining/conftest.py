"""A small dataset artifact and settings of a student that trains in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import BaseModel
from shapely.geometry import box

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.hashing import canonical
from data_catalog.run import run_stage
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.store import Store, open_store
from data_catalog.tables import write_table
from geofm.config.recipe import PretrainSettings
from geofm.formats.npy import chip_bytes
from geofm.formats.tar import write_tar
from geofm.pretraining.data import Corpus, open_corpus
from geofm.raster.radiometry import to_unit

SCALE = 0.0001
BANDS = ["red", "green", "blue", "nir"]
#: Arguments of a Swin of four stages: 32 px, grids of 16, 8, 4 and 2 tokens.
SWIN: dict[str, Any] = {
    "embed_dim": 24,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 2,
    "patch_size": 2,
    "img_size": 32,
    "in_chans": 4,
    "num_classes": 0,
}


class FakePackSettings(BaseModel):
    """Settings of the fake stage ``pack``."""

    samples: int = 22
    bands: list[str] = BANDS
    edge: int = 40


def picture(number: int, bands: int, edge: int) -> np.ndarray:
    """Make the chip with this number, uint16, shape (bands, edge, edge)."""
    rng = np.random.default_rng(number)
    smooth = np.kron(rng.random((bands, edge // 8, edge // 8)), np.ones((8, 8)))
    return (smooth * 3000 + rng.random((bands, edge, edge)) * 200).astype(np.uint16)


def _seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    fake: FakePackSettings = job.settings
    (folder / "shards").mkdir()
    index, rows, units = [], [], []
    for shard in range(2):
        numbers = range(shard, fake.samples, 2)
        pictures = {f"{n:024x}": picture(n, len(fake.bands), fake.edge) for n in numbers}
        name = f"shards/tiny-{shard:05d}.tar"
        members = [(f"{key}.npy", chip_bytes(pixels)) for key, pixels in pictures.items()]
        for member in write_tar(folder / name, members):
            key = member.name.removesuffix(".npy")
            place = {"offset": member.offset, "size": member.size, "sha256": member.sha256}
            index.append({"key": key, "chip_id": key, "shard": name, **place})
        for key, pixels in pictures.items():
            scale = [SCALE] * len(fake.bands)
            place = int(key, 16) / 10
            rows.append(
                {
                    "chip_id": key, "scale": scale, "datetime": f"2024-06-{shard + 1:02}T10:30:00Z",
                    "geometry": box(5 + place, 45, 5.05 + place, 45.05),
                }
            )  # fmt: skip
            units.append(to_unit(pixels, scale))
    write_table(pd.DataFrame(index), folder / "index.parquet")
    write_table(gpd.GeoDataFrame(rows, crs="EPSG:4326"), folder / "samples.parquet")
    stack = np.stack(units)
    stats = {
        "bands": fake.bands,
        "mean": [float(m) for m in stack.mean(axis=(0, 2, 3))],
        "std": [float(s) for s in stack.std(axis=(0, 2, 3))],
    }
    (folder / "stats.json").write_bytes(canonical(stats))
    source = {"source": "test", "licence": "CC-BY-4.0", "rows": fake.samples, "attribution": "Us"}
    return Sealed(
        counts={"rows_in": fake.samples, "rows_out": fake.samples},
        facts={"name": "tiny", "sources": [source]},
    )


FAKE_PACK = Stage("pack", "test", "dataset", (), ("numpy",), no_parts, no_work, _seal)


def make_dataset(store: Store, catalogue_url: str, **fields: Any) -> Artifact:
    """Make a dataset artifact of procedural chips, through the catalogue like any other."""
    return run_stage(
        FAKE_PACK, store, open_catalogue(catalogue_url, store), {}, FakePackSettings(**fields)
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """22 chips of 40 px with 4 bands in 2 shards."""
    folder = tmp_path_factory.mktemp("dataset")
    return make_dataset(open_store(folder / "store"), f"sqlite:///{folder}/catalogue.db")


@pytest.fixture(scope="session")
def corpus(dataset: Artifact) -> Corpus:
    """The opened dataset."""
    return open_corpus(dataset)


@pytest.fixture
def tiny() -> PretrainSettings:
    """A Swin of 32 px and four stages (grids 16, 8, 4, 2), masked by 8 px patches."""
    return tiny_settings()


def tiny_settings(**fields: Any) -> PretrainSettings:
    """Settings of a student small enough for tests; ``fields`` override them."""
    decided = ("img_size", "in_chans", "num_classes")
    base: dict[str, Any] = {
        "student": "swin_tiny_patch4_window7_224",
        "student_args": {k: v for k, v in SWIN.items() if k not in decided},
        "teacher": "random:test_vit",
        "teacher_size_px": 32,
        "size_px": 32,
        "mask_patch_px": 8,
        "epochs": 2,
        "warmup_epochs": 0.5,
        "batch": 4,
        "base_lr": 0.02,
        "checkpoint_steps": 3,
    }
    return PretrainSettings.model_validate({**base, **fields})


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Run small networks on one core, and restore the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def child_of(code: str, dataset: Artifact, folder: Path) -> subprocess.Popen[str]:
    """Start a process with one thread that runs ``code`` on a dataset in a folder."""
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", code, dataset.url, str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
