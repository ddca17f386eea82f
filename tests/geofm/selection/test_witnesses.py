"""Each dropped chip names the rule that dropped it, and a duplicate's witness is a stored pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_catalog.catalogue import open_catalogue
from data_catalog.store import open_store
from geofm.config.recipe import CurateSettings
from geofm.dedup import join, partition
from tests.geofm.dedup.synthetic import Chip, curate_from, make_chips, make_embeddings, texture
from tests.geofm.dedup.test_pairs import clusters
from tests.geofm.dedup.test_signature import ground

WIDTH = 32


def water(seed: int) -> np.ndarray:
    """Monotone pixels: noise around one value."""
    draw = np.random.default_rng(seed)
    return np.clip(draw.normal(400, 6, (3, 32, 32)), 1, None).astype(np.uint16)


def world(seed: int, seas: int, groups: int) -> tuple[list[Chip], np.ndarray]:
    """Groups of near duplicates and of equal vectors, and seas whose embeddings are all alike."""
    draw = np.random.default_rng(seed)
    chips = [Chip(texture(seed * 1000 + n), valid=1 - n % 7 / 200) for n in range(groups * 4)]
    centres = draw.normal(size=(groups, WIDTH)) * 3 + 2
    vectors = np.repeat(centres, 4, axis=0) + draw.normal(0, 0.3, (len(chips), WIDTH))
    vectors[1::8] = vectors[::8]
    chips += [Chip(water(seed * 1000 + n)) for n in range(seas)]
    sea = draw.normal(size=WIDTH) * 3 + draw.normal(0, 0.05, (seas, WIDTH))
    return chips, np.concatenate([vectors, sea])


def stored_pairs(made: dict) -> dict[str, set[frozenset[str]]]:
    """Pairs by the rule that they are evidence for; equal vectors stand for each other."""
    identical = made["pairs"].table("identical.parquet")
    same = dict(zip(identical["chip_id"], identical["same_as"], strict=True))
    found: dict[str, set[frozenset[str]]] = {"near_duplicate": set(), "pixel_duplicate": set()}
    for rule, kind, name in (
        ("near_duplicate", "pairs", "pairs.parquet"),
        ("near_duplicate", "decisions", "dense_pairs.parquet"),
        ("pixel_duplicate", "alike", "alike.parquet"),
    ):
        table = made[kind].table(name)
        for left, right in zip(table["left"], table["right"], strict=True):
            found[rule].add(frozenset((same.get(left, left), same.get(right, right))))
    return found


def check(made: dict) -> pd.DataFrame:
    """Check each dropped chip's rule and witness; returns the decisions."""
    table = made["decisions"].table("decisions.parquet").set_index("chip_id")
    identical = made["pairs"].table("identical.parquet")
    same = dict(zip(identical["chip_id"], identical["same_as"], strict=True))
    pairs, kept = stored_pairs(made), set(table.index[table["decision"] == "keep"])
    for chip, row in table[table["decision"] == "drop"].iterrows():
        other = row["nearest_id"] if row["rule"] == "selection" else row["witness_id"]
        assert other in kept
        assert (row["witness_id"] == "") == (row["rule"] == "selection")
        pair = frozenset(same.get(name, name) for name in (str(chip), other))
        if row["rule"] == "near_duplicate":
            assert len(pair) == 1 or pair in pairs["near_duplicate"], row["reason"]
        elif row["rule"] == "pixel_duplicate":
            assert pair in pairs["pixel_duplicate"], row["reason"]
        elif row["rule"] == "selection":
            assert pair not in pairs["near_duplicate"] | pairs["pixel_duplicate"], row["reason"]
            assert "not chosen" in row["reason"]
        if row["cluster"] == chip:  # a leader is a duplicate of no kept chip
            assert row["rule"] == "selection", row["reason"]
    return table


@pytest.mark.parametrize(
    ("seed", "budget", "method"),
    [(1, 0.3, "facility-location"), (2, 3, "random"), (3, 0.6, "density"), (4, 1.0, "random")],
)
def test_each_rule_and_witness_is_what_the_search_found(
    store, catalogue, seed: int, budget: float, method: str
) -> None:
    chips, vectors = world(seed, seas=3 * seed, groups=5)
    ids = [chip.chip_id(number) for number, chip in enumerate(chips)]
    settings = CurateSettings(threshold=0.9, budget=budget, method=method)
    embeddings = make_embeddings(store, ids, vectors)
    check(curate_from(store, catalogue, make_chips(store, chips), embeddings, settings, seed))


def test_seas_that_lose_to_the_budget_are_no_duplicates(store, catalogue):
    """Their embeddings are equal but for noise, and are not compared by rule."""
    chips, vectors = world(1, seas=21, groups=4)
    ids = [chip.chip_id(number) for number, chip in enumerate(chips)]
    embeddings = make_embeddings(store, ids, vectors)
    settings = CurateSettings(threshold=0.9, budget=4, pixel_duplicates=False, rarity=0)
    made = curate_from(store, catalogue, make_chips(store, chips), embeddings, settings)
    seas = check(made).loc[ids[16:]]
    lost = seas[seas["decision"] == "drop"]
    assert len(lost) >= 17
    assert set(lost["rule"]) == {"selection"}
    assert (lost["similarity"] > 0.9).all()  # above the threshold, and no pair


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_witness_in_a_dense_cell_is_a_stored_pair(
    store, catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    draw = np.random.default_rng(3)
    sea = draw.normal(size=WIDTH) * 2 + draw.normal(0, 0.3, (200, WIDTH))
    vectors = np.concatenate([clusters(300), sea.astype(np.float16)])
    chips = [Chip(texture(n)) for n in range(len(vectors))]
    ids = [chip.chip_id(number) for number, chip in enumerate(chips)]
    settings = CurateSettings(threshold=0.95, budget=budget, pixel_duplicates=False, strata=[])
    cut = make_chips(store, chips, per_part=500)
    monkeypatch.setattr(partition, "EXHAUSTIVE_UP_TO", 100)
    tables = {}
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(join, "DENSE_PAIRS", 1000)
            monkeypatch.setattr(join, "DENSE_PER_ROW", 2)
        room = open_store(tmp_path / f"store{dense}")
        where = open_catalogue(f"sqlite:///{tmp_path}/{dense}.db", room)
        made = curate_from(room, where, cut, make_embeddings(room, ids, vectors), settings)
        assert (made["pairs"].manifest.facts["dense_cells"] > 0) == dense
        named = made["decisions"].table("dense_pairs.parquet")
        assert list(named.columns) == ["left", "right", "similarity"]
        assert (len(named) > 0) == (dense and budget == 1)
        tables[dense] = check(made)
    # a dense cell changes how pairs are found, not what is decided
    assert tables[True]["decision"].equals(tables[False]["decision"])
    assert tables[True]["rule"].equals(tables[False]["rule"])


def test_a_chip_with_the_vector_of_a_pixel_duplicate_is_none_itself(tmp_path):
    """R shows what W shows. C and D have the vector of R, but only D shows what W shows."""
    store = open_store(tmp_path / "store")
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/c.db", store)
    view, other = np.clip(ground(1)[32:96, 32:96] * 12, 1, 4000), ground(2)[32:96, 32:96] * 12
    pixels = [view, view * 1.04, other, view * 1.06, other]
    valid = [1.0, 0.999, 0.998, 0.997, 0.996]  # in this order they are taken
    chips = [
        Chip(np.rint(np.stack([picture] * 3)).astype(np.uint16), valid=share)
        for picture, share in zip(pixels, valid, strict=True)
    ]
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(5, WIDTH))
    vectors[2:] = vectors[1]
    ids = [chip.chip_id(number) for number, chip in enumerate(chips)]
    embeddings = make_embeddings(store, ids, vectors)
    made = curate_from(store, catalogue, make_chips(store, chips), embeddings, CurateSettings())
    table = made["decisions"].table("decisions.parquet").set_index("chip_id").loc[ids]
    w, r, c, d, like_c = (row for _, row in table.iterrows())
    assert w["decision"] == "keep"
    assert (r["rule"], r["witness_id"]) == ("pixel_duplicate", ids[0])
    assert (d["rule"], d["witness_id"]) == ("pixel_duplicate", ids[0])
    for row in (c, like_c):
        assert (row["rule"], row["witness_id"]) == ("selection", "")
        assert row["nearest_id"] == ids[0]
    pairs = stored_pairs(made)["pixel_duplicate"]
    assert {frozenset((ids[0], ids[1])), frozenset((ids[0], ids[1]))} <= pairs
