"""``geofm verify --recut``: damage is reported, and damaged inputs are not cut again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.errors import CheckError
from data_catalog.provenance.verify import sealed_ancestor
from data_catalog.run import run_stage
from data_catalog.storage.reach import OutOfReach
from data_catalog.store import Store, open_store
from data_catalog.tables import write_table
from flows.cli.audit import verify
from geofm.config.recipe import PackSettings
from geofm.shards import pack
from tests.data_catalog.provenance.test_chain import Chain, alter, chain
from tests.geofm.chips.test_cut import Run, good
from tests.geofm.dedup.synthetic import publish
from tests.geofm.stac.small_world import World, add_scene, serve, texture

__all__ = ["chain"]


class Cut(NamedTuple):
    """A dataset of a few chips that were really cut, and what it was made from."""

    dataset: Artifact
    chips: Artifact
    items: Artifact
    world: World

    def verify(self, deep: bool = False) -> None:
        """Verify the dataset and cut five samples again; print JSON."""
        place = Store.of(self.dataset)
        verify(
            self.dataset.digest, deep=deep, recut=5, seed=1, store=place.url,
            catalog=f"sqlite:///{place.root.parent}/c.db", json_=True,
        )  # fmt: skip


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[Cut]:
    with serve() as world:
        add_scene(world, "a", {"red": texture(70, 100)})
        store = open_store(tmp_path / "store")
        catalogue = open_catalogue(f"sqlite:///{tmp_path}/c.db", store)
        run = Run(store, catalogue, world)
        items, chips = run.items(), run.chips()
        rows = good(chips)[["chip_id"]].assign(
            decision="keep", quality=1.0, entropy=5.0, gradient=0.1, cluster="c"
        )
        with store.staging() as folder:
            out = folder / "artifact"
            out.mkdir()
            write_table(rows, out / "decisions.parquet")
            decisions = publish(store, "decisions", "curate", out, {}, len(rows))
        inputs = {"items": items, "chips": chips, "decisions": decisions}
        settings = PackSettings(shard_mib=0.06, name="small")
        catalogue.record(decisions, "decisions")
        dataset = run_stage(pack.STAGE, store, catalogue, inputs, settings, 0)
        yield Cut(dataset, chips, items, world)


def _write(name: str, data: bytes) -> Callable[[Artifact], object]:
    return lambda artifact: Path(artifact.root.path, name).write_bytes(data)


def _remove(name: str) -> Callable[[Artifact], object]:
    return lambda artifact: Path(artifact.root.path, name).unlink()


def _remove_all(artifact: Artifact) -> None:
    shutil.rmtree(artifact.root.path)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("of", "damage", "named"),
    [
        ("dataset", _write("index.parquet", b"PAR1 nothing PAR1"), "index.parquet"),
        ("dataset", _remove("index.parquet"), "index.parquet"),
        ("chips", _write("chips.parquet", b"PAR1 nothing PAR1"), "chips.parquet"),
        ("chips", _remove("chips.parquet"), "chips.parquet"),
        ("chips", _write("manifest.json", b"{"), "manifest.json"),
        ("chips", _remove_all, "its input chips"),
        ("items", _write("items.parquet", b""), "items.parquet"),
        ("items", _remove_all, "its input items"),
    ],
)
def test_damage_is_listed_and_nothing_is_cut_again(
    cut: Cut, capsys: pytest.CaptureFixture[str],
    of: str, damage: Callable[[Artifact], object], named: str, deep: bool,
) -> None:  # fmt: skip
    damage(getattr(cut, of))
    with pytest.raises(CheckError) as caught:
        cut.verify(deep)
    assert named in str(caught.value)
    assert "no sample was cut again" in str(caught.value)
    said = json.loads(capsys.readouterr().out)
    assert [text for text in said["problems"] if named in text]
    assert said["recut"] == 0


def test_an_index_out_of_reach_is_unread(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OutOfReach("index.parquet could not be read")

    monkeypatch.setattr(Artifact, "table", away)
    with pytest.raises(OutOfReach, match="no sample was cut again"):
        cut.verify()


def test_whole_samples_are_cut_again(cut: Cut, capsys: pytest.CaptureFixture[str]) -> None:
    cut.verify()
    said = json.loads(capsys.readouterr().out)
    assert said["recut"] == said["recut_identical"] == 5


def test_the_ancestor_is_that_of_the_manifests(chain: Chain) -> None:
    alter(chain, "update edge set parent = :dataset where child = :chips")
    alter(chain, "update artifact set kind = 'items' where digest = :dataset")
    for artifact in (chain.dataset, chain.chips, chain.items):
        assert sealed_ancestor(artifact, "items").digest == chain.items.digest
    chain.items.path("manifest.json").write_bytes(b"{")
    with pytest.raises(CheckError, match=r"manifest\.json"):
        sealed_ancestor(chain.dataset, "model")
    shutil.rmtree(chain.items.root.path)
    with pytest.raises(CheckError, match="its input items"):
        sealed_ancestor(chain.dataset, "model")
