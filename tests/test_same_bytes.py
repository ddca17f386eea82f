"""The comparison of two stores sees every changed byte."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "same_bytes.py"


@pytest.fixture(scope="module")
def same_bytes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_bytes", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one artifact each of three stages."""
    for stage in ("cut", "embed", "curate"):
        folder = tmp_path / "store" / "artifacts" / stage / "0"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"stage": stage, "seed": 0}))
        if stage == "cut":
            chips = pd.DataFrame({"chip_id": ["b", "a"], "pixel_sha256": ["2", "1"]})
            chips.to_parquet(folder / "chips.parquet")
            (folder / "parts").mkdir()
            with tarfile.open(folder / "parts" / "0.tar", "w") as tar:
                member = tarfile.TarInfo("a.npy")
                member.size = 3
                tar.addfile(member, BytesIO(b"abc"))
        elif stage == "embed":
            np.save(folder / "embeddings.npy", np.ones((2, 3), np.float16))
        else:
            decisions = pd.DataFrame({"chip_id": ["a", "b"], "decision": ["keep", "drop"]})
            decisions.to_parquet(folder / "decisions.parquet")
    return tmp_path / "store"


def test_a_copy_is_equal(
    same_bytes: ModuleType, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = store.with_name("copy")
    shutil.copytree(store, copy)
    assert same_bytes.compare(store, copy) == 0
    assert "4 of 4 equal" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["pixels", "member", "vector", "decision", "absent", "empty"])
def test_a_change_is_seen(same_bytes: ModuleType, store: Path, changed: str) -> None:
    copy = store.with_name("copy")
    shutil.copytree(store, copy)
    artifacts = copy / "artifacts"
    if changed == "pixels":
        chips = pd.DataFrame({"chip_id": ["a", "b"], "pixel_sha256": ["1", "3"]})
        chips.to_parquet(artifacts / "cut" / "0" / "chips.parquet")
    elif changed == "member":
        path = artifacts / "cut" / "0" / "parts" / "0.tar"
        path.write_bytes(path.read_bytes().replace(b"abc", b"abd"))
    elif changed == "vector":
        np.save(artifacts / "embed" / "0" / "embeddings.npy", np.zeros((2, 3), np.float16))
    elif changed == "decision":
        decisions = pd.DataFrame({"chip_id": ["a", "b"], "decision": ["keep", "keep"]})
        decisions.to_parquet(artifacts / "curate" / "0" / "decisions.parquet")
    elif changed == "absent":
        shutil.rmtree(artifacts / "embed")
    else:
        shutil.rmtree(artifacts)
    assert same_bytes.compare(store, copy) == 1
