"""What is out of reach is never called damaged: a loader, a verification and a part say so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.provenance.verify import check_artifact, verify_artifact
from data_catalog.run import run_stage
from data_catalog.storage import reach
from data_catalog.store import Store, open_store
from geofm.config.recipe import PackSettings
from geofm.shards.check import verify_shards
from geofm.shards.loader import SampleStream
from geofm.shards.pack import STAGE
from geofm.shards.reader import DamagedShard, open_index
from tests.data_catalog.fault_proxy import FaultProxy, fault_proxy
from tests.geofm.shards.conftest import make_inputs, some_chips

#: Faults that say nothing about a file's content.
AWAY = ["403 AccessDenied", "403 ExpiredToken", "500 InternalError", "503 ServiceUnavailable",
        "reset"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a test."""
    monkeypatch.setattr(reach, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(reach, "FEW_PAUSES", (0.01, 0.02))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture(scope="session")
def packed(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A dataset on the object store."""
    store = open_store(f"{s3}/reach")
    folder = tmp_path_factory.mktemp("packed")
    catalogue = open_catalogue(f"sqlite:///{folder}/catalogue.db", store)
    settings = PackSettings(shard_mib=0.06, name="small")
    return run_stage(STAGE, store, catalogue, make_inputs(store, some_chips()), settings)


@pytest.fixture
def proxy(packed: Artifact, tmp_path: Path) -> Iterator[FaultProxy]:
    """The proxy before the store that has the dataset."""
    with fault_proxy(tmp_path / "cache") as found:
        yield found


def read_all(dataset: Artifact, **how: bool) -> tuple[int, list[str]]:
    stream = SampleStream(open_index(dataset), batch=4, **how)
    count = sum(len(batch) for batch in stream.batches())
    return count, stream.skipped


@pytest.mark.long
@pytest.mark.parametrize("fault", AWAY)
def test_a_store_that_is_away_damages_no_sample(
    proxy: FaultProxy, packed: Artifact, fault: str
) -> None:
    dataset = Artifact(packed.url)
    open_index(dataset)
    proxy.always(fault, ".tar")
    for how in ({"skip_damaged": True}, {}):
        with pytest.raises(reach.OutOfReach, match="AWS_") as caught:
            read_all(dataset, **how)
        assert caught.value.exit_code == 3
        assert "not known to be damaged" in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("fault", [*AWAY, "cut", "404 NoSuchKey"])
def test_what_passes_is_asked_for_again(proxy: FaultProxy, packed: Artifact, fault: str) -> None:
    proxy.always(fault, times=1)
    assert read_all(Artifact(packed.url), skip_damaged=True) == (24, [])
    proxy.always(fault, times=1)
    assert verify_artifact(Artifact(packed.url)) == []


@pytest.mark.parametrize("fault", AWAY)
def test_verify_says_what_it_could_not_read(
    proxy: FaultProxy, packed: Artifact, fault: str
) -> None:
    proxy.always(fault, ".tar")
    found = check_artifact(Artifact(packed.url))
    assert found.problems == []
    tars = [entry for entry in packed.manifest.files if entry.path.endswith(".tar")]
    assert len(found.unread) == len(tars)
    with pytest.raises(reach.OutOfReach):
        verify_artifact(Artifact(packed.url))
    proxy.always(fault)  # not even the manifest
    found = check_artifact(Artifact(packed.url))
    assert found.problems == []
    assert found.unread


def test_a_missing_shard_is_damage_after_it_was_asked_for_again(
    proxy: FaultProxy, packed: Artifact
) -> None:
    shard = next(e.path for e in packed.manifest.files if e.path.endswith(".tar"))
    dataset = Artifact(packed.url)
    open_index(dataset)
    proxy.always("404 NoSuchKey", shard)
    count, skipped = read_all(dataset, skip_damaged=True)
    assert count + len(skipped) == 24
    assert 0 < len(skipped) < 24
    with pytest.raises(DamagedShard):
        read_all(dataset)
    asked = [path for method, path in proxy.asked if method == "GET" and shard in path]
    assert len(asked) >= 3 * len(skipped)
    assert any(shard in text for text in verify_shards(Artifact(packed.url), packed.manifest))


@pytest.mark.parametrize("fault", ["403 AccessDenied", "500 InternalError"])
def test_a_stage_is_not_run_again_because_the_store_is_away(
    proxy: FaultProxy, packed: Artifact, fault: str
) -> None:
    store = Store.of(packed)
    proxy.always(fault)
    with pytest.raises(reach.OutOfReach):
        store.has(Artifact(packed.url))
    with pytest.raises(reach.OutOfReach):
        store.has_part("ab" * 32)
    with pytest.raises(reach.OutOfReach):
        _ = Artifact(packed.url).manifest


@pytest.mark.parametrize("fault", ["404 NoSuchKey", "500 InternalError", "cut"])
def test_a_part_is_not_thrown_away_for_a_passing_fault(
    proxy: FaultProxy, s3: str, fault: str
) -> None:
    store = open_store(f"{s3}/passing-{fault[:3]}")
    with store.staging() as out:
        (out / "rows").write_bytes(b"rows" * 1000)
        store.publish_part("ab12", out)
    proxy.always(fault, "ab12", times=1)
    place = store.fetch_part("ab12")
    assert place is not None
    assert (place / "rows").read_bytes() == b"rows" * 1000
    (place / "rows").write_bytes(b"flip" * 1000)  # a bit flipped in the cache
    place = store.fetch_part("ab12")
    assert place is not None
    assert (place / "rows").read_bytes() == b"rows" * 1000


@pytest.fixture
def locked_out() -> Iterator[Path]:
    """A folder that the user owns who runs the block; root becomes somebody for that time."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_a_file_that_may_not_be_read_is_not_damaged(locked_out: Path) -> None:
    store = open_store(locked_out / "store")
    catalogue = open_catalogue(f"sqlite:///{locked_out}/c.db", store)
    settings = PackSettings(shard_mib=0.06, name="small")
    dataset = run_stage(STAGE, store, catalogue, make_inputs(store, some_chips()), settings)
    tar = next(e.path for e in dataset.manifest.files if e.path.endswith(".tar"))
    dataset.local(tar).chmod(0)
    for how in ({"skip_damaged": True}, {}):
        with pytest.raises(reach.OutOfReach, match="permission"):
            read_all(dataset, **how)
    found = check_artifact(dataset)
    assert found.problems == []
    assert len(found.unread) == 1
    dataset.path("shards").chmod(0)
    assert check_artifact(Artifact(dataset.url)).problems == []
    with pytest.raises(reach.OutOfReach):
        verify_artifact(Artifact(dataset.url))
    dataset.path("shards").chmod(0o755)
    dataset.path("manifest.json").chmod(0)
    found = check_artifact(Artifact(dataset.url))
    assert (found.problems, len(found.unread)) == ([], 1)


NOTES = [b"{", b"\xff\xfe", b"[]", b'{"files": 3}', b'{"files": [3]}', b"null", b"[" * 100_000,
         b'{"files": [{"path": "../x", "sha256": "", "size": 0}]}']  # fmt: skip


@pytest.mark.parametrize("note", NOTES)
def test_a_part_with_a_damaged_note_is_made_again(store: Store, note: bytes) -> None:
    with store.staging() as out:
        (out / "rows").write_bytes(b"rows")
        store.publish_part("ab12", out)
    Path(store.part_folder("ab12").path, "part.json").write_bytes(note)
    assert store.fetch_part("ab12") is None
    assert not store.has_part("ab12")
