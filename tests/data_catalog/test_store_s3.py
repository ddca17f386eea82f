"""A store on a real S3 gateway behaves as a local one."""

from __future__ import annotations

from pathlib import Path

from data_catalog.catalogue import Catalogue
from data_catalog.run import run_stage
from data_catalog.store import Store, open_store
from data_catalog.verify import verify_artifact, verify_chain
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
