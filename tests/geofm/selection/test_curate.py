from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_catalog.errors import RunError, UsageError
from data_catalog.run import run_stage
from data_catalog.store import open_store
from geofm.config.recipe import CurateSettings
from geofm.dedup import describe
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.pool import pool
from tests.geofm.dedup.synthetic import Chip, curate_from, make_chips, make_embeddings, texture

GROUPS, COPIES, WIDTH = 12, 4, 32


def _world() -> tuple[list[Chip], np.ndarray]:
    """48 chips in 12 groups of like vectors, then one for each gate, then copies."""
    draw = np.random.default_rng(5)
    chips = [
        Chip(texture(n), item=f"scene-{n % 3}", x=500_000.0 + 40_000 * (n % 5))
        for n in range(GROUPS * COPIES)
    ]
    centres = draw.normal(size=(GROUPS, WIDTH)) * 3 + 2
    vectors = np.repeat(centres, COPIES, axis=0) + draw.normal(0, 0.15, (len(chips), WIDTH))
    chips += [
        Chip(np.full((3, 32, 32), 700, dtype=np.uint16)),
        Chip(texture(100), valid=0.4),
        Chip(texture(101), cloud=0.8),
        Chip(texture(102), saturated=0.6),
        Chip(texture(103), status="dropped"),
        Chip(texture(0), item="scene-9"),  # the pixels of chip 0
        Chip(texture(0), item="scene-9", scale=2e-4),  # the same numbers, another meaning
    ]
    vectors = np.concatenate([vectors, draw.normal(size=(6, WIDTH)) * 3])
    vectors[-2] = vectors[0]
    return chips, vectors


def _curate(store, catalogue, *, seed=0, order=None, **fields):
    chips, vectors = _world()
    ids = [chip.chip_id(n) for n, chip in enumerate(chips) if chip.status == "ok"]
    order = np.arange(len(ids)) if order is None else order
    settings = CurateSettings(**{"threshold": 0.9, "pixel_duplicates": False, **fields})
    embeddings = make_embeddings(store, np.array(ids)[order], vectors[order])
    made = curate_from(store, catalogue, make_chips(store, chips), embeddings, settings, seed)
    found = made["decisions"]
    table = found.table("decisions.parquet").set_index("chip_id")
    space = EmbeddingSpace(vectors.astype(np.float16), np.load(made["buckets"].local("centre.npy")))
    return found, table, {chip_id: row for row, chip_id in enumerate(ids)}, space


def _check(
    table: pd.DataFrame, rows: dict[str, int], space: EmbeddingSpace, threshold: float
) -> None:
    """What every decisions table promises."""
    kept = table[table["decision"] == "keep"]
    of = np.array([rows[i] for i in kept.index])
    for chip_id, row in table[table["decision"] == "drop"].iterrows():
        assert row["reason"]
        if row["rule"].startswith("gate_"):
            assert row["witness_id"] == ""
            continue
        # a chip that lost to the budget is no duplicate: it has no witness
        other, none = row["witness_id"], row["nearest_id"]
        if row["rule"] == "selection":
            other, none = none, other
        assert none == ""
        assert other in kept.index, row["reason"]
        mine = np.array([rows[str(chip_id)]])
        exact = space.similarity(mine, np.array([rows[other]]))[0]
        assert row["similarity"] == pytest.approx(exact, abs=1e-12)
        assert row["rule"] != "near_duplicate" or row["similarity"] >= threshold
        if row["rule"] == "selection":
            assert row["similarity"] < threshold
            assert row["similarity"] == max(space.similarity(np.repeat(mine, len(of)), of))
    pairs = [space.similarity(np.full(len(of), row), of) for row in of]
    assert (np.array(pairs) - 2 * np.eye(len(of)) < threshold).all()
    assert (kept["witness_id"] == "").all()
    assert kept["similarity"].isna().all()
    assert (kept["cluster"] == kept.index).all()


def test_one_decision_per_usable_chip_with_rules_and_witnesses(store, catalogue):
    found, table, rows, space = _curate(store, catalogue)
    assert set(table.index) == set(rows)
    _check(table, rows, space, 0.9)
    chips, _ = _world()
    names = {n: chip.chip_id(n) for n, chip in enumerate(chips)}
    gates = ["gate_constant", "gate_valid", "gate_cloud", "gate_saturated"]
    assert [table.loc[names[48 + n], "rule"] for n in range(4)] == gates
    copies = table.loc[[names[0], names[53]]]
    assert set(copies["rule"]) <= {"kept", "identical", "near_duplicate"}
    assert table.loc[names[54], "rule"] == "kept"  # other reflectances are other chips
    manifest = found.manifest
    assert manifest.counts["rows_out"] == (table["decision"] == "keep").sum() == GROUPS + 1
    assert sum(manifest.dropped.values()) == (table["decision"] == "drop").sum()
    scored = table[table["rule"].isin(["kept", "near_duplicate"])]
    assert scored[["novelty", "density", "spectral_rarity"]].notna().all(axis=None)
    assert table.loc[table["rule"].str.startswith("gate_"), "novelty"].isna().all()
    certificate = manifest.facts["certificate"]
    assert certificate["missed"] == 0
    assert certificate["pairs"] >= GROUPS * 6
    assert 0 < certificate["recall_lower_bound"] <= 1
    assert manifest.facts["largest_group"] == 5
    assert manifest.facts["measures"]["kept"]["covering_radius"] <= 0.1
    survival = found.table("survival.parquet").set_index(["stratum_of", "stratum"])
    whole = survival.loc[("collection", "c")]
    assert (whole["candidates"], whole["passed"], whole["kept"]) == (54, 50, GROUPS + 1)


def test_the_same_view_is_a_duplicate_whatever_its_embedding_says(store, catalogue):
    _, apart, *_ = _curate(store, catalogue)
    _, table, *_ = _curate(store, catalogue, pixel_duplicates=True)
    chips, _ = _world()
    brighter = chips[54].chip_id(54)  # the picture of chip 0 with twice the reflectance
    assert apart.loc[brighter, "decision"] == "keep"
    group = {chip.chip_id(n) for n, chip in enumerate(chips) if n in (0, 53, 54)}
    seen = table.loc[sorted(group)]
    assert (seen["decision"] == "keep").sum() <= 1
    fallen = table[table["rule"] == "pixel_duplicate"]
    assert set(fallen.index) <= group
    assert len(fallen) == 1
    assert set(fallen["witness_id"]) <= group & set(table.index[table["decision"] == "keep"])
    assert (fallen["similarity"] >= 0.98).all()


def test_monotone_chips_are_not_told_by_their_embedding(store, catalogue):
    """Water of two places has one embedding; only the same water is the same chip."""
    draw = np.random.default_rng(4)
    sea = [np.clip(draw.normal(400, 6, (3, 64, 64)), 1, None).astype(np.uint16) for _ in range(2)]
    chips = [Chip(pixels) for pixels in (sea[0], sea[1], sea[0] + np.uint16(15), texture(1))]
    ids = [chip.chip_id(number) for number, chip in enumerate(chips)]
    vectors = np.tile(np.arange(1.0, 9.0), (4, 1))
    vectors[3] = -vectors[3]
    embeddings = make_embeddings(store, ids, vectors)
    settings = CurateSettings(threshold=0.9)
    made = curate_from(store, catalogue, make_chips(store, chips), embeddings, settings)
    table = made["decisions"].table("decisions.parquet").set_index("chip_id")
    assert made["pairs"].manifest.counts["pairs"] == 0
    assert table.loc[[ids[1], ids[3]], "decision"].tolist() == ["keep", "keep"]
    brighter = table.loc[[ids[0], ids[2]]]
    assert sorted(brighter["decision"]) == ["drop", "keep"]
    assert set(brighter["rule"]) == {"kept", "pixel_duplicate"}


def test_identical_pixels_name_the_copy_that_stays(store, catalogue):
    _, table, rows, space = _curate(store, catalogue, threshold=1.0)
    _check(table, rows, space, 1.0)
    gone = table[table["rule"] == "identical"]
    assert len(gone) == 1
    assert gone["similarity"].iloc[0] == 1.0
    assert gone.index[0] > gone["witness_id"].iloc[0]  # equal quality: the lower id stays


@pytest.mark.parametrize(("budget", "count"), [(0.5, 7), (5, 5), (1.0, 13)])
@pytest.mark.parametrize("method", ["facility-location", "random"])
def test_budget_keeps_so_many_and_all_witnesses_stay(store, catalogue, budget, count, method):
    found, table, rows, space = _curate(store, catalogue, budget=budget, method=method)
    assert (table["decision"] == "keep").sum() == count
    _check(table, rows, space, 0.9)
    assert found.manifest.counts["leaders"] == 13
    if method == "facility-location" and budget == 5:
        measures = found.manifest.facts["measures"]
        assert measures["kept"]["facility_location"] > measures["random"]["facility_location"]


def test_rarity_moves_the_budget_to_rare_chips(store, catalogue):
    draw = np.random.default_rng(6)
    chips = [Chip(texture(n)) for n in range(60)]
    vectors = draw.normal(size=(len(chips), WIDTH))
    vectors[:45] += 1.5 * draw.normal(size=WIDTH)  # a crowd, of which no two are duplicates
    ids = [chip.chip_id(n) for n, chip in enumerate(chips)]
    embeddings, cut = make_embeddings(store, np.array(ids), vectors), make_chips(store, chips)
    share = {}
    for rarity in (0.0, 4.0):
        settings = CurateSettings(
            threshold=0.95, pixel_duplicates=False, budget=12, strata=[], rarity=rarity
        )
        made = curate_from(store, catalogue, cut, embeddings, settings)
        table = made["decisions"].table("decisions.parquet").set_index("chip_id")
        share[rarity] = (table.loc[ids[45:], "decision"] == "keep").sum()
    assert share[4.0] > share[0.0]


def test_budget_beyond_the_pool(store, catalogue):
    with pytest.raises(UsageError, match=r"curate\.budget asks for 500 chips.*pool has 13"):
        _curate(store, catalogue, budget=500)


def test_bytes_do_not_depend_on_the_order_of_the_vectors(tmp_path: Path, catalogue):
    files = set()
    for run in range(2):
        order = None if run == 0 else np.random.default_rng(1).permutation(54)
        found, *_ = _curate(open_store(tmp_path / f"s{run}"), catalogue, order=order, budget=0.5)
        files.add(tuple(f.sha256 for f in found.manifest.files))
    assert len(files) == 1


def test_seed_decides_random_selection(store, catalogue):
    kept = []
    for seed in (0, 1):
        _, table, *_ = _curate(store, catalogue, seed=seed, budget=6, method="random")
        kept.append(set(table.index[table["decision"] == "keep"]))
    assert kept[0] != kept[1]


def test_everything_gated_keeps_nothing(store, catalogue):
    chips = [Chip(texture(n), cloud=1.0) for n in range(3)]
    ids = [chip.chip_id(n) for n, chip in enumerate(chips)]
    embeddings = make_embeddings(store, ids, np.eye(3, 8))
    made = curate_from(store, catalogue, make_chips(store, chips), embeddings, CurateSettings())
    found = made["decisions"]
    assert found.manifest.counts["rows_out"] == 0
    assert found.manifest.dropped == {"gate_cloud": 3}


def test_descriptors_and_embeddings_of_other_chips_are_refused(store, catalogue):
    art = make_chips(store, [Chip(texture(0))])
    other = make_chips(store, [Chip(texture(1)), Chip(texture(2))])
    of_other = run_stage(describe.STAGE, store, catalogue, {"chips": other}, CurateSettings())
    vectors = make_embeddings(store, ["x"], np.eye(1, 8))
    inputs = {"chips": art, "descriptors": of_other, "embeddings": vectors}
    with pytest.raises(RunError, match="describe these chips"):
        run_stage(pool.STAGE, store, catalogue, inputs, CurateSettings())
    with pytest.raises(RunError, match="have no vector; embed these chips"):
        curate_from(store, catalogue, art, vectors, CurateSettings())
