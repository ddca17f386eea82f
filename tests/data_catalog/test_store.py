"""The store: atomic publishing, damage found, unwritable places refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_catalog.catalogue import Catalogue
from data_catalog.hashing import canonical, digest_of
from data_catalog.provenance.verify import verify_artifact, verify_chain
from data_catalog.run import run_stage
from data_catalog.store import Store, StoreNotWritable, open_store
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings


def chain(store: Store, catalogue: Catalogue):
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    return items, run_stage(SQUARES, store, catalogue, {"items": items}, Settings())


def test_verify_names_what_was_touched(store: Store, catalogue: Catalogue) -> None:
    items, squares = chain(store, catalogue)
    assert verify_chain(catalogue, squares) == []
    target = Path(squares.path("003.txt").path)
    target.chmod(0o644)
    target.write_bytes(b"8")  # was 9: same size, one bit
    assert [p for p in verify_artifact(squares) if "003.txt" in p and "altered" in p]
    target.unlink()
    assert verify_artifact(squares) == [f"{squares.path('003.txt')}: missing"]
    squares.path("extra.bin").write_bytes(b"x")
    assert any("extra.bin: not in the manifest" in p for p in verify_artifact(squares))
    manifest = items.path("manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"seed":0', b'"seed":1'))
    fresh = catalogue.get(items.digest)
    assert any("manifest.json: altered" in p for p in verify_artifact(fresh))
    manifest.write_bytes(b"{")
    assert any("missing or damaged" in p for p in verify_artifact(catalogue.get(items.digest)))


@pytest.mark.parametrize("place", ["file/below", "/proc/geofm"])
def test_an_unwritable_store_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreNotWritable, match=r"cannot be written.*--store or GEOFM_STORE"):
        open_store(place if place.startswith("/") else tmp_path / place)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(), json_values))
def test_canonical_ignores_the_order_of_keys(value: dict) -> None:
    backwards = dict(reversed(list(value.items())))
    assert canonical(value) == canonical(backwards)
    assert len(digest_of(value)) == 64


def test_canonical_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"value": float("nan")})
