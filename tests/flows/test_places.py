"""Every question is answered by the store that was opened: a copy, a moved or a read-only one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database.address import sqlite_address
from data_catalog.run import run_stage
from data_catalog.store import open_store
from flows.cli.main import main
from geofm.config.recipe import PackSettings
from geofm.shards.pack import STAGE
from tests.geofm.shards.conftest import make_inputs, some_chips


class Made(NamedTuple):
    """A store with one published dataset, and the key of one of its samples."""

    root: Path
    dataset: Artifact
    catalogue: Catalogue

    @property
    def samples(self) -> list[str]:
        """Keys of the samples, in order."""
        return [str(key) for key in self.dataset.table("index.parquet", ["key"])["key"]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A store made here, which the tests then copy, move or lock."""
    root = tmp_path / "store"
    store = open_store(root)
    catalogue = open_catalogue(sqlite_address(root / "catalogue.db"), store)
    inputs = make_inputs(store, some_chips(), (1, 2))
    for artifact in inputs.values():
        catalogue.record(artifact, artifact.digest)
    settings = PackSettings(shard_mib=0.06, name="small")
    dataset = run_stage(STAGE, store, catalogue, inputs, settings)
    catalogue.publish("small", dataset, "2026-11-30")
    return Made(root, dataset, catalogue)


class Answer(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Ask]:
    """Run ``geofm ARGS`` in this process, in an empty folder."""
    for name in ("GEOFM_STORE", "GEOFM_CATALOG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*args: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["geofm", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    yield run
    assert [*(tmp_path / "here").iterdir()] == []


def questions(made: Made) -> list[tuple[str, ...]]:
    """Commands that read, as an auditor types them."""
    kept, digest = made.samples[0], made.dataset.digest[:12]
    return [
        ("list", "--json"), ("show", "small", "--json"), ("path", "small"), ("trace", "small"),
        ("trace", f"small/{kept}"), ("why", kept, "--in", "small", "--json"),
        ("verify", "small"), ("verify", digest, "--deep"), ("licences", "small"),
    ]  # fmt: skip


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_a_copied_store_is_verified_itself(made: Made, ask: Ask, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "copy")
    row = made.dataset.table("index.parquet").iloc[5]
    inside = made.dataset.root.path.removeprefix(str(made.root)).lstrip("/")
    flip(tmp_path / "copy" / inside / row.shard, row.offset + 200)
    found = ask("verify", "small", "--store", tmp_path / "copy")
    assert found.code == 4
    assert f"copy/{inside}/{row.shard}" in found.err
    assert f"sample {row.key}" in found.err
    whole = ask("verify", "small", "--store", made.root)
    assert whole.code == 0, whole.err


def test_a_moved_store_answers_everything(made: Made, ask: Ask, tmp_path: Path) -> None:
    moved = tmp_path / "another name"
    asked = questions(made)
    made.root.rename(moved)
    for question in asked:
        found = ask(*question, "--store", moved)
        assert found.code == 0, (question, found.err)
        assert str(made.root) not in found.out
    assert ask("path", "small", "--store", f"{moved}/").out.startswith(str(moved))
    target = tmp_path / "out.json"
    found = ask("export", "small", "--format", "croissant", "--out", target, "--store", moved)
    assert found.code == 0, found.err
    assert json.loads(target.read_text())["name"] == "small"


@pytest.mark.parametrize("log", [True, False])
def test_a_read_only_mount_answers_everything(
    made: Made, ask: Ask, tmp_path: Path, log: bool
) -> None:
    asked = questions(made)
    if not log:
        made.catalogue.engine.dispose()
    assert (made.root / "catalogue.db-wal").exists() == log
    mount = tmp_path / "mount"
    mount.mkdir()
    bound = ["mount", "--bind", made.root, mount]
    if os.geteuid() or subprocess.run(bound, check=False, capture_output=True).returncode:
        pytest.skip("only a user who may mount can try a read-only mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mount], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (mount / "x").write_text("x")
        for question in asked:
            found = ask(*question, "--store", mount)
            assert found.code == 0, (question, found.err)
        seen = json.loads(
            ask("why", made.samples[0], "--in", "small", "--json", "--store", mount).out
        )
        assert not seen["picture"].startswith(str(mount))
        assert Path(seen["picture"]).read_bytes().startswith(b"\x89PNG")
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.parametrize(
    "command",
    ["list", "show x", "path x", "trace x", "licences x", "verify x", "diff x y", "why x --in y",
     "export x"],
)  # fmt: skip
def test_a_mistyped_store_is_named_and_not_made(ask: Ask, tmp_path: Path, command: str) -> None:
    place = tmp_path / "mistyped"
    found = ask(*command.split(), "--store", place)
    assert found.code == 2
    assert str(place) in found.err
    assert not place.exists()


def test_an_artifact_of_another_store_is_reported_as_such(
    made: Made, ask: Ask, tmp_path: Path
) -> None:
    other = open_store(tmp_path / "other")
    catalog = sqlite_address(made.root / "catalogue.db")
    listed = json.loads(ask("list", "--json", "--store", other.url, "--catalog", catalog).out)
    assert {row["in_store"] for row in listed["artifacts"]} == {False}
    found = ask("show", "small", "--store", other.url, "--catalog", catalog)
    assert found.code == 2
    assert "not in this store" in found.err
    assert other.url in found.err
