"""A store on a real S3 gateway behaves as a local one, also when uploads die or compete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import s3fs

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.manifest import Manifest
from data_catalog.provenance.verify import verify_artifact, verify_chain
from data_catalog.run import run_stage
from data_catalog.store import Store, list_files, open_store
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings, computed


def test_same_digests_and_reuse_on_s3(
    s3: str, store: Store, catalogue: Catalogue, tmp_path: Path
) -> None:
    remote = open_store(f"{s3}/corpus")
    items = run_stage(NUMBERS, remote, catalogue, {}, Settings())
    squares = run_stage(SQUARES, remote, catalogue, {"items": items}, Settings())
    assert squares.url.startswith("s3://")
    assert remote.has(squares)
    assert squares.local("003.txt").read_text() == "9"
    assert squares.read_range("005.txt", 1, 1) == b"5"
    assert verify_chain(catalogue, squares) == []

    local_items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=6, lose=0))
    assert local_items.digest == items.digest

    more = run_stage(NUMBERS, remote, catalogue, {}, Settings(count=8))
    run_stage(SQUARES, remote, catalogue, {"items": more}, Settings())
    assert computed(remote.local_root) == list(range(8))  # six of the parts were found on S3

    squares.path("003.txt").write_bytes(b"8")
    found = verify_artifact(squares)
    assert any("003.txt" in problem for problem in found), found


#: Publishes an artifact of many files; the place of each is told by its number.
PUBLISH = """
import sys
from tests.data_catalog.test_store_s3 import many_files
from data_catalog.store import open_store
store = open_store(sys.argv[1])
print("go", flush=True)
sys.stdin.readline()
if len(sys.argv) > 2:  # the power fails before the upload of this file
    import os, signal
    from data_catalog import store as stores
    upload = stores.upload_file
    def fail(source, target):
        if target.name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        upload(source, target)
    stores.upload_file = fail
many_files(store)
"""
FILES = 40


def many_files(store: Store) -> Artifact:
    """Publish a folder of many files; any process gives the same ones."""
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        for number in range(FILES):
            (out / f"{number:03d}.bin").write_bytes(bytes([number]) * 300_000)
        manifest = Manifest(
            kind="chips", stage="cut", version="1", inputs={}, settings={}, seed=0, software={},
            counts={}, dropped={}, facts={}, deterministic=True, files=list_files(out),
        )  # fmt: skip
        return store.publish(out, manifest)


def publisher(url: str, cache: Path, *dies_at: str) -> subprocess.Popen[str]:
    """A process of another machine (a cache of its own) that waits for a word to publish."""
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISH, url, *dies_at], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env={**os.environ, "GEOFM_CACHE": str(cache)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    return process


def say_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_an_upload_that_died_half_way_is_no_artifact_and_is_done_again(
    s3: str, tmp_path: Path
) -> None:
    store = open_store(f"{s3}/half")
    process = publisher(store.url, tmp_path / "other", "020.bin")
    say_go(process)
    assert process.wait(60) == -signal.SIGKILL
    process.communicate()
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    there = files.glob(f"{s3.removeprefix('s3://')}/half/artifacts/chips/*/003.bin")
    digest = there[0].split("/")[-2]
    artifact = store.artifact("chips", digest)
    assert not store.has(artifact)
    left = files.ls(there[0].rpartition("/")[0], refresh=True)
    assert len(left) == 20
    again = many_files(store)
    assert again.digest == digest
    assert store.has(again)
    assert verify_artifact(again) == []


def test_two_writers_of_one_artifact_leave_it_whole(s3: str, tmp_path: Path) -> None:
    store = open_store(f"{s3}/both")
    writers = [publisher(store.url, tmp_path / name) for name in ("one", "two")]
    for process in writers:
        say_go(process)
    assert [process.wait(60) for process in writers] == [0, 0]
    for process in writers:
        process.communicate()
    artifact = many_files(store)
    assert verify_artifact(artifact) == []
    assert len(artifact.manifest.files) == FILES


def test_a_part_is_what_its_note_says_whatever_else_lies_there(s3: str) -> None:
    store = open_store(f"{s3}/parts")
    folder = store.part_folder("ab12")
    (folder / "left.bin").write_bytes(b"by an upload that died")
    with store.staging() as out:
        (out / "rows").write_bytes(b"rows")
        store.publish_part("ab12", out)
    with ThreadPoolExecutor(8) as pool:  # all fetch it at once into one cache
        places = set(pool.map(store.fetch_part, ["ab12"] * 8))
    place = places.pop()
    assert not places
    assert place is not None
    assert sorted(path.name for path in place.iterdir()) == ["part.json", "rows"]
    assert [path.name for path in place.parent.iterdir() if path.name.startswith(".")] == []


def test_a_part_that_lost_a_file_is_thrown_away(s3: str) -> None:
    store = open_store(f"{s3}/lost")
    with store.staging() as out:
        (out / "rows").write_bytes(b"rows")
        store.publish_part("cd34", out)
    rows = store.part_folder("cd34") / "rows"
    rows.fs.rm_file(rows.path)
    assert store.fetch_part("cd34") is None
    assert not store.has_part("cd34")
