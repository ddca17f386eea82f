"""The writer on a disk that fills up, and killed at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.provenance.verify import verify_artifact
from data_catalog.run import make_job, plan_parts, run_stage, seal, work_parts
from data_catalog.store import Store, StoreFull, open_store
from geofm.config.recipe import PackSettings
from geofm.shards.pack import STAGE
from geofm.shards.reader import open_index
from tests.geofm.shards.conftest import make_inputs, some_chips

SETTINGS = PackSettings(shard_mib=0.06, name="small")
CHIPS = 60

#: Packs into a store that stands in a small disk of its own; argument: folder to mount it on.
ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from data_catalog.run import make_job, plan_parts, seal, work_parts
from data_catalog.store import Store, StoreFull, open_store
from data_catalog.provenance.verify import verify_artifact
from geofm.shards.pack import STAGE
from tests.geofm.shards.conftest import make_inputs, some_chips
from tests.geofm.shards.test_faults import CHIPS, SETTINGS
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
inputs = make_inputs(open_store(disk.parent / "inputs"), some_chips(CHIPS))
store = open_store(disk / "store")
job = make_job(STAGE, store, inputs, SETTINGS)
parts = plan_parts(STAGE, job)
filler = disk / "filler"
filler.write_bytes(bytes(700_000))
for number, part in enumerate(parts):
    try:
        work_parts(STAGE, job, [part])
    except StoreFull as error:
        print("full after", number, "of", len(parts), "parts:", error)
        break
assert [store.has_part(p.key) for p in parts] == [n < number for n in range(len(parts))]
assert not list((disk / "store" / "staging").iterdir())
filler.unlink()
work_parts(STAGE, job, parts)
artifact, _ = seal(STAGE, job, parts)
assert verify_artifact(artifact) == []
print("digest", artifact.digest)
"""


def clean_digest(folder: Path, chips: int = CHIPS) -> str:
    store = open_store(folder / "clean")
    inputs = make_inputs(store, some_chips(chips))
    catalogue = open_catalogue(f"sqlite:///{folder}/clean.db", store)
    return run_stage(STAGE, store, catalogue, inputs, SETTINGS).digest


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    apart = ["unshare", "--mount", "--map-root-user"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*apart, "mount", "-t", "tmpfs", "none", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs unshare and the right to mount a tmpfs in a user namespace")
    done = subprocess.run(
        [*apart, sys.executable, "-c", ON_A_SMALL_DISK, disk],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, digest = done.stdout.splitlines()[-2:]
    assert "No space left on device" in told
    assert "run again" in told
    assert "--store" in told
    assert 0 < int(told.split()[2]) < int(told.split()[4])
    assert digest == f"digest {clean_digest(tmp_path)}"


@pytest.mark.parametrize("limit", [3_000, 40_000])
def test_a_limit_on_file_sizes_is_said_and_leaves_nothing(tmp_path: Path, limit):
    """EFBIG, as a quota would: in the small files of the seal or in the tars."""
    inputs = make_inputs(open_store(tmp_path / "inputs"), some_chips(CHIPS))
    store = open_store(tmp_path / "store")
    job = make_job(STAGE, store, inputs, SETTINGS)
    parts = plan_parts(STAGE, job)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work_parts(STAGE, job, parts)
        except StoreFull:
            code = 42
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert not list((tmp_path / "store" / "staging").iterdir())
    work_parts(STAGE, job, parts)
    assert seal(STAGE, job, parts)[0].digest == clean_digest(tmp_path)


def test_a_full_disk_while_sealing_publishes_nothing(store: Store, monkeypatch):
    job = make_job(STAGE, store, make_inputs(store, some_chips(12)), SETTINGS)
    parts = plan_parts(STAGE, job)
    work_parts(STAGE, job, parts)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "index.parquet")

    with monkeypatch.context() as patch:
        patch.setattr("geofm.shards.pack.write_samples", full)
        with pytest.raises(StoreFull, match=r"index\.parquet was written"):
            seal(STAGE, job, parts)
    assert not list((store.local_root / "artifacts" / "dataset").glob("*"))
    assert verify_artifact(seal(STAGE, job, parts)[0]) == []


def pack_and_exit(job) -> None:
    """The writer's process."""
    code = 1
    try:
        parts = plan_parts(STAGE, job)
        work_parts(STAGE, job, parts)
        seal(STAGE, job, parts)
        code = 0
    finally:
        os._exit(code)


def test_a_writer_killed_again_and_again_ends_with_the_same_dataset(tmp_path: Path):
    kills = int(os.environ.get("GEOFM_KILLS", "8"))
    expected = clean_digest(tmp_path)
    rng = np.random.default_rng(0)
    inputs = make_inputs(open_store(tmp_path / "inputs"), some_chips(CHIPS))
    killed = stores = 0
    while killed < kills:
        store = open_store(tmp_path / f"store-{stores}")
        stores += 1
        job = make_job(STAGE, store, inputs, SETTINGS)
        while True:
            child = os.fork()
            if child == 0:
                pack_and_exit(job)
            time.sleep(rng.uniform(0, 0.25))
            if killed < kills:
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
            store.sweep()
        found = list((store.local_root / "artifacts" / "dataset").iterdir())
        assert [folder.name for folder in found] == [expected]
        dataset = Artifact(str(found[0]))
        assert verify_artifact(dataset) == []
        keys = open_index(dataset).keys.to_pylist()
        assert len(keys) == len(set(keys)) == CHIPS
        # one that was killed before it took its lock leaves an empty folder for a while
        assert not list((store.local_root / "staging").glob("*/files/*"))
    assert killed == kills
