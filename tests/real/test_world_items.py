"""Search and cut of the development world: planted cases, hostile items, and the cost."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
import shapely
from shapely.geometry import shape

from data_catalog.artifact import Artifact
from data_catalog.catalogue import open_catalogue
from data_catalog.run import run_stage
from data_catalog.store import open_store
from geofm.chips import cut
from geofm.chips.recut import Recut, recut
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.stac import search
from tests.geofm.stac.world_server import served

BANDS = ["red", "green", "blue", "nir"]
FAULTS = "429=0.05,503=0.05,truncate=0.02,reset=0.02,slow=0.02,etag=0.01"
#: Expected reason of each kind of hostile item.
SENSIBLE = {
    "traversal_id": "bad_id",
    "absolute_id": "bad_id",
    "long_id": "bad_id",
    "control_id": "bad_id",
    "file_scheme": "bad_scheme",
    "dead_port": "host_refused",
    "vsi_href": "bad_scheme",
    "vrt_local": "not_imagery",
    "vrt_as_tiff": "not_a_tiff",
    "html_as_tiff": "not_a_tiff",
    "truncated": "truncated",
    "huge_raster": "shape_mismatch",
    "wrong_checksum": "wrong_checksum",
    "float_nan": "nan_values",
    "no_crs": "no_crs",
    "missing_band": "missing_band",
    "zero_area": "no_area",
    "null_datetime": "no_datetime",
    "duplicate_id": "duplicate_id",
    "huge_properties": "item_too_large",
    "wrong_types": "wrong_types",
}


@dataclass
class Outcome:
    truth: dict[str, Any]
    items: gpd.GeoDataFrame
    chips: gpd.GeoDataFrame
    items_artifact: Artifact
    chips_artifact: Artifact
    root: Path
    recut: list[Recut]
    digest_with_faults: str


def run_both(url: str, folder: Path) -> tuple[Artifact, Artifact, float]:
    store = open_store(folder / "store")
    catalogue = open_catalogue(f"sqlite:///{folder}/c.db", store)
    items = run_stage(search.STAGE, store, catalogue, {}, SearchSettings(stac=url))
    began = time.monotonic()
    settings = CutSettings(bands=BANDS, size_px=128)
    chips = run_stage(cut.STAGE, store, catalogue, {"items": items}, settings)
    return items, chips, time.monotonic() - began


@pytest.fixture(scope="module")
def outcome(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root = tmp_path_factory.mktemp("world")
    inner = root / "inner"
    inner.mkdir()
    with served(shared) as url:
        items, chips, seconds = run_both(url, inner)
        frame = chips.table("chips.parquet")
        some = list(frame[frame.status == "ok"].chip_id)[::20]
        again = recut(chips, items, some)
        port = url.rstrip("/").rpartition(":")[2]
    with served(shared, "--port", port, "--faults", FAULTS, "--seed", "5", "--retry-after", "0",
                "--slow", "0.1") as url:  # fmt: skip
        _, faulty, slow = run_both(url, root / "faulty")
    good = int((frame.status == "ok").sum())
    print(f"\n{items.manifest.counts} {items.manifest.dropped}")
    print(f"{chips.manifest.counts} {chips.manifest.dropped}")
    print(
        f"{good} chips in {seconds:.1f} s = {good / seconds:.1f} chips/s, {slow:.1f} s with faults"
    )
    return Outcome(
        truth=json.loads((shared / "worlds" / "dev" / "truth.json").read_text()),
        items=items.table("items.parquet"),
        chips=frame,
        items_artifact=items,
        chips_artifact=chips,
        root=root,
        recut=again,
        digest_with_faults=faulty.digest,
    )


def test_reprocessed_and_second_stations_exactly(outcome: Outcome) -> None:
    expected: dict[str, set[str]] = {"reprocessed": set(), "second_station": set()}
    real = outcome.items[outcome.items.collection == "sentinel-2-l1c"]
    status = dict(zip(real.item_id, real.status, strict=True))
    for case in outcome.truth["cases"]:
        if case["kind"] == "reprocessed":
            expected["reprocessed"] |= set(case["expect"]["drop"])
            assert all(status[name] == "ok" for name in case["expect"]["keep"])
        elif case["kind"] == "second_station":
            kept = [name for name in case["items"] if status[name] == "ok"]
            assert len(kept) == 1
            expected["second_station"] |= set(case["items"]) - set(kept)
    for reason, names in expected.items():
        rejected = set(real[real.reason == reason].item_id)
        print(f"{reason}: {len(rejected)} found, {len(names)} planted")
        assert rejected == names
    dropped = outcome.items[outcome.items.status == "dropped"]
    assert len(dropped) == sum(map(len, expected.values()))
    assert (dropped.superseded_by != "").all()


def test_overlap_is_dropped_once_and_nowhere_else(outcome: Outcome) -> None:
    chips = outcome.chips
    kept, lost = chips[chips.status == "ok"], chips[chips.reason == "overlap"]
    cases = [c for c in outcome.truth["cases"] if c["kind"] == "tile_overlap"]
    assert len(cases) == 3
    explained: set[str] = set()
    for case in cases:
        first, second = (kept[kept.item_id == name] for name in case["items"])
        assert len(first) and len(second), "both items stay"
        for own, other in ((first, second), (second, first)):
            union = shapely.union_all(other.geometry)
            shares = [a.intersection(union).area / a.area for a in own.geometry]
            assert max(shares) < 0.51, "no ground is kept twice"
        common = shape(case["overlap"]).buffer(1e-4)
        for row in lost[lost.item_id.isin(case["items"])].itertuples():
            assert row.witness in set(case["items"]) - {row.item_id}
            assert row.geometry.intersection(common).area / row.geometry.area >= 0.5
            owner = shapely.union_all(kept[kept.item_id == row.witness].geometry)
            assert row.geometry.intersection(owner).area / row.geometry.area >= 0.49
            explained.add(row.chip_id)
    print(f"overlap: {len(lost)} chips dropped, {len(explained)} in planted overlaps")
    assert explained == set(lost.chip_id)


def test_two_dates_of_a_place_stay(outcome: Outcome) -> None:
    frame = outcome.items
    stands_for = {r.item_id: r.superseded_by or r.item_id for r in frame.itertuples()}
    day = {r.item_id: str(r.datetime)[:10] for r in frame.itertuples()}
    kept = set(outcome.chips[outcome.chips.status == "ok"].item_id)
    pairs = [c for c in outcome.truth["cases"] if c["kind"] == "temporal_pair"]
    assert pairs
    for case in pairs:
        there = {stands_for[name] for name in case["items"]}
        assert there <= kept
        assert len({day[name] for name in there}) == len(case["dates"])


def test_each_hostile_item_has_a_reason_and_no_chip(outcome: Outcome) -> None:
    items = outcome.items[outcome.items.collection == "hostile"]
    chips = outcome.chips[outcome.chips.collection == "hostile"]
    assert len(items) == len(outcome.truth["hostile"]) == 22
    for case in outcome.truth["hostile"]:
        rows = [*items[items.item_id == case["id"]].itertuples()]
        rows += [*chips[chips.item_id == case["id"]].itertuples()]
        reasons = {row.reason for row in rows if row.status == "quarantined"}
        print(f"{case['kind']}: {', '.join(sorted(reasons))}")
        assert reasons == {SENSIBLE[case["kind"]]}
    assert not (chips.status == "ok").any()
    assert not (chips.reason == "overlap").any(), "a bad item owns no ground"


def test_real_items_are_untouched_by_their_hostile_twins(outcome: Outcome) -> None:
    real = outcome.chips[outcome.chips.item_id == "S2A_22LHH_20150916_0_L1C"]
    assert len(real) == 9
    assert (real.status == "ok").all()
    copies = outcome.chips[outcome.chips.collection == "derived-copies"]
    assert (copies.status == "ok").all()
    assert copies.item_id.nunique() == 26


def test_offset_clouds_and_nodata(outcome: Outcome) -> None:
    kept = outcome.chips[outcome.chips.status == "ok"]
    shifted = kept[[list(v) == [-1000] * 4 for v in kept.dn_offset]]
    winners = {"S2A_22LHH_20171015_2_L1C", "S2B_36SYC_20171003_1_L1C"}
    assert set(shifted.item_id) == winners
    cloudy = next(c for c in outcome.truth["cases"] if c["kind"] == "cloud_deck")["items"][0]
    assert kept[kept.item_id == cloudy].cloud_fraction.max() > 0.9
    empty = next(c for c in outcome.truth["cases"] if c["kind"] == "nodata_border")["items"][0]
    assert kept[kept.item_id == empty].valid_fraction.min() < 0.5


def test_nothing_is_lost_or_written_outside_the_store(outcome: Outcome) -> None:
    for artifact in (outcome.items_artifact, outcome.chips_artifact):
        counts, dropped = artifact.manifest.counts, artifact.manifest.dropped
        assert counts["rows_in"] == counts["rows_out"] + sum(dropped.values())
    listed = set(outcome.items[outcome.items.status == "ok"].item_id)
    assert set(outcome.chips.item_id) == listed
    assert {p.name for p in outcome.root.iterdir()} == {"inner", "faulty"}
    assert {p.name.partition(".db")[0] for p in (outcome.root / "inner").iterdir()} == {
        "store", "c",
    }  # fmt: skip


def test_cutting_again_and_through_faults_gives_the_same(outcome: Outcome) -> None:
    assert len(outcome.recut) > 5
    assert all(row.expected == row.got for row in outcome.recut)
    assert outcome.digest_with_faults == outcome.chips_artifact.digest
