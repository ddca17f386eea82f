"""A refresh of pixel duplicates takes over verdicts, and ends as a run from scratch does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.run import run_stage
from data_catalog.store import open_store
from geofm.config.recipe import CurateSettings
from geofm.dedup import alike, partition
from geofm.dedup.perceptual_hash import orient
from geofm.stages import get_stage
from tests.geofm.dedup.synthetic import Chip, make_calibration, make_chips, make_embeddings
from tests.geofm.dedup.test_signature import ground

WIDTH = 24


@dataclass
class Named(Chip):
    """A chip whose id does not depend on its place in the pool."""

    name: str = ""

    def chip_id(self, number: int) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:24]


def world() -> list[Named]:
    """Views of 30 places; copies, turned copies and overlapping views of some; flat and water."""
    pictures = {n: np.clip(ground(n) * 12, 1, 4000) for n in range(30)}
    chips = [_chip(f"place {n}", pictures[n]) for n in pictures]
    chips += [_chip(f"copy {n}", pictures[n] * 1.04) for n in range(6)]
    chips += [_chip(f"turned {n}", pictures[n], turn=5) for n in range(4, 10)]
    chips += [_chip(f"shifted {n}", pictures[n], left=38) for n in range(8, 14)]
    draw = np.random.default_rng(0)
    seas = [400 + draw.normal(0, 6, (128, 128)) for _ in range(4)]
    chips += [_chip(f"sea {n}", sea) for n, sea in enumerate(seas)]
    chips += [_chip(f"the same sea {n}", sea * 1.02) for n, sea in enumerate(seas[:2])]
    return [
        *chips,
        _chip("flat", np.full((128, 128), 500.0)),
        _chip("flat too", np.full((128, 128), 501.0)),
    ]


def _chip(name: str, picture: np.ndarray, left: int = 32, turn: int = 0) -> Named:
    view = orient(picture[32:96, left : left + 64], turn)
    bands = np.rint(view[None] * np.array([1.0, 0.9, 0.8])[:, None, None])
    return Named(bands.astype(np.uint16), name=name)


class Place:
    """A store with its catalogue."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder / "store")
        self.catalogue = open_catalogue(f"sqlite:///{folder}/c.db", self.store)

    def run(self, chips: list[Named]) -> Artifact:
        """Run the stages up to ``alike``."""
        made = {
            "chips": make_chips(self.store, chips),
            "embeddings": make_embeddings(
                self.store, [c.chip_id(0) for c in chips], vectors(chips)
            ),
            "calibration": make_calibration(self.store),
        }
        for name in ("describe", "pool", "buckets", "alike"):
            stage = get_stage(name)
            made[stage.kind] = run_stage(
                stage, self.store, self.catalogue, made, CurateSettings(min_valid=0.0)
            )
        return made["alike"]


def vectors(chips: list[Named]) -> np.ndarray:
    """Embeddings that depend on a chip's name alone, in a few groups."""
    found = []
    for chip in chips:
        draw = np.random.default_rng(int(chip.chip_id(0)[:8], 16))
        centre = np.random.default_rng(int(chip.chip_id(0)[:8], 16) % 5).normal(size=WIDTH)
        found.append(centre + draw.normal(0, 0.4, WIDTH))
    return np.array(found)


def pairs_of(artifact: Artifact) -> pd.DataFrame:
    return artifact.table("alike.parquet")


def compared_by(artifact: Artifact) -> set[frozenset[str]]:
    ids = artifact.table("candidates.parquet")["chip_id"].to_numpy()
    with np.load(artifact.local("compared.npz")) as data:
        return {frozenset(pair) for pair in zip(ids[data["left"]], ids[data["right"]], strict=True)}


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Numbers of pairs whose thumbnails were compared."""
    seen: list[int] = []
    compare = alike.compare_thumbnails

    def count(*given, **named):
        seen.append(len(given[2]))
        return compare(*given, **named)

    monkeypatch.setattr(alike, "compare_thumbnails", count)
    return seen


@pytest.mark.parametrize("cells", ["one", "several"])
def test_a_refresh_ends_like_a_run_from_scratch(cells, tmp_path, monkeypatch, counted):
    if cells == "several":
        monkeypatch.setattr(partition, "EXHAUSTIVE_UP_TO", 8)
    chips, kept = world(), Place(tmp_path / "kept")
    kept.run(chips[:-15])
    for number, tonight in enumerate((chips[3:], chips[3:-4], chips, [*chips[20:], *chips[:9]])):
        counted.clear()
        refreshed = kept.run(tonight)
        in_refresh = sum(counted)
        counted.clear()
        scratch = Place(tmp_path / f"scratch {number}").run(tonight)
        pd.testing.assert_frame_equal(pairs_of(refreshed), pairs_of(scratch))
        assert compared_by(refreshed) == compared_by(scratch)
        assert len(pairs_of(refreshed))
        assert in_refresh < sum(counted), "known verdicts are taken over"


def test_what_is_alike_is_found_and_flat_chips_are_in_no_pair(tmp_path):
    chips = world()
    name = {chip.chip_id(0): chip.name for chip in chips}
    table = pairs_of(Place(tmp_path).run(chips))
    pairs = {
        frozenset((name[a], name[b])): kind
        for a, b, kind in zip(table["left"], table["right"], table["kind"], strict=True)
    }
    wanted = {frozenset((f"place {n}", f"copy {n}")): "same view" for n in range(6)}
    wanted |= {frozenset((f"place {n}", f"turned {n}")): "turned" for n in range(4, 10)}
    wanted |= {frozenset((f"place {n}", f"shifted {n}")): "overlap" for n in range(8, 14)}
    wanted |= {frozenset((f"sea {n}", f"the same sea {n}")): "same view" for n in range(2)}
    assert {pair: pairs.get(pair) for pair in wanted} == wanted
    assert not any("flat" in one for pair in pairs for one in pair)
    assert (table["left"] < table["right"]).all()


def test_other_pixels_under_one_id_are_compared_again(tmp_path):
    chips, place = world(), Place(tmp_path)
    place.run(chips)
    draw = np.random.default_rng(9)
    changed = [
        Named(draw.integers(1, 3000, (3, 64, 64)).astype(np.uint16), name="place 0"),
        *chips[1:],
    ]
    table = pairs_of(place.run(changed))
    scratch = pairs_of(Place(tmp_path / "scratch").run(changed))
    pd.testing.assert_frame_equal(table, scratch)
    first = changed[0].chip_id(0)
    assert first not in {*table["left"], *table["right"]}


def test_switched_off_compares_nothing(tmp_path):
    place, chips = Place(tmp_path), world()
    made = place.run(chips)
    assert len(pairs_of(made))
    inputs = {
        role: place.store.artifact(role, digest) for role, digest in made.manifest.inputs.items()
    }
    off = CurateSettings(pixel_duplicates=False)
    nothing = run_stage(get_stage("alike"), place.store, place.catalogue, inputs, off)
    assert pairs_of(nothing).empty
