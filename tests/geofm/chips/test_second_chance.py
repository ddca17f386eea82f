"""What was out of reach, and what takes the place of scenes that can't be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import s3fs

from data_catalog.catalogue import open_catalogue
from data_catalog.errors import RunError
from data_catalog.run import run_stage
from data_catalog.store import open_store
from geofm.chips import cut
from geofm.config.recipe import CutSettings
from geofm.remote.quarantine import PASSING
from tests.geofm.chips.test_cut import Run, good, reasons
from tests.geofm.stac.small_world import NORTH, World, add_scene, identity, texture

RED = texture(64, 64)


@pytest.fixture
def run(store: Any, catalogue: Any, world: World) -> Run:
    return Run(store, catalogue, world)


def elsewhere(run: Run, folder: Path) -> Run:
    """The same world with nothing remembered."""
    folder.mkdir()
    store = open_store(folder / "store")
    return Run(store, open_catalogue(f"sqlite:///{folder}/c.db", store), run.world)


@pytest.mark.parametrize("works", [0, 1], ids=["since the plan", "since the cut"])
def test_an_outage_is_not_the_last_word(
    run: Run, tmp_path: Path, works: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_scene(run.world, "a", {"red": RED})
    # an item that does not tell where it lies is looked at when the cut is planned
    add_scene(run.world, "b", {"red": RED}, north=NORTH - 6400, told=not works)
    expected = elsewhere(run, tmp_path / "clean").chips()
    assert "retry" not in expected.manifest.facts
    assert expected.manifest.deterministic
    run.world.faults["/files/b/red.tif"] += [0] * works + [503] * 60
    first = run.chips()
    assert reasons(first) == {"b": "unreachable"}
    assert first.manifest.facts["retry"] == 1
    assert not first.manifest.deterministic
    frame = first.table("chips.parquet")
    assert set(frame[frame.status == "quarantined"].detail) == {PASSING}
    run.world.faults.clear()
    run.world.asked.clear()
    inputs, settings = (
        {"items": run.items()},
        CutSettings(size_px=32, bands=["red"], retries=1, max_failed=0.9),
    )
    monkeypatch.setattr(run.catalogue, "find", lambda key: None)
    second = run_stage(cut.STAGE, run.store, run.catalogue, inputs, settings)
    assert second.digest == expected.digest
    assert {p for p in run.world.asked if p.startswith("/files")} == {"/files/b/red.tif"}


def test_two_outages_that_show_differently_are_one(run: Run, tmp_path: Path) -> None:
    add_scene(run.world, "a", {"red": RED})
    add_scene(run.world, "b", {"red": RED}, north=NORTH - 6400)
    digests = set()
    for fault in (503, "cut"):
        run.world.faults["/files/b/red.tif"] = [fault] * 60
        digests.add(elsewhere(run, tmp_path / str(fault)).chips().digest)
    assert len(digests) == 1


def versions(run: Run) -> list[dict[str, Any]]:
    """Three versions of one scene, the newest last, and another scene."""
    add_scene(run.world, "other", {"red": RED}, north=NORTH - 6400)
    return [
        add_scene(run.world, f"v{n}", {"red": texture(64, 64, n)},
                  **identity("31UDQ", f"0{n}.00", f"202{n}-01-01T00:00:00Z"))
        for n in (2, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["at the probe", "while cutting"])
def test_a_bad_new_version_does_not_take_the_old_one_with_it(
    run: Run, late: bool, tmp_path: Path
) -> None:
    _, middle, newest = versions(run)
    if late:
        newest["assets"]["red"]["file:checksum"] = "1220" + "0" * 64
    else:
        newest["assets"]["red"]["href"] += "x"
    items = run.items().table("items.parquet").set_index("item_id")
    assert dict(items.superseded_by) == {"other": "", "v2": "v4", "v3": "v4", "v4": ""}
    chips = run.chips()
    assert reasons(chips) == {"v4": "wrong_checksum" if late else "not_found"}
    assert set(good(chips).item_id) == {"other", "v3"}
    assert len(good(chips)) == 8
    middle["assets"]["red"]["href"] += "x"
    chips = elsewhere(run, tmp_path / "other").chips()
    assert set(reasons(chips)) == {"v3", "v4"}
    assert set(good(chips).item_id) == {"other", "v2"}
    chips = run.chips()
    assert set(good(chips).item_id) == {"other", "v3"}, "v3 was updated: its last chips stand in"


def test_of_what_was_settled_once_only_the_failure_is_asked_for_again(run: Run) -> None:
    _, _, newest = versions(run)
    newest["assets"]["red"]["file:checksum"] = "1220" + "0" * 64
    first = good(run.chips())
    assert set(first.item_id) == {"other", "v3"}
    add_scene(run.world, "a", {"red": RED}, north=NORTH - 12_800)
    run.world.asked.clear()
    second = good(run.chips())
    assert set(second.item_id) == {"a", "other", "v3"}
    asked = {path.split("/")[2] for path in run.world.asked if path.startswith("/files")}
    assert asked == {"a", "v4"}


def test_raising_a_limit_fetches_nothing_again_but_what_failed(run: Run) -> None:
    add_scene(run.world, "a", {"red": RED})
    spoilt = add_scene(run.world, "b", {"red": RED}, north=NORTH - 6400)
    spoilt["assets"]["red"]["file:checksum"] = "1220" + "0" * 64
    with pytest.raises(RunError, match=r"cut\.max_failed"):
        run.chips(max_failed=0.1)
    run.world.asked.clear()
    assert len(good(run.chips(max_failed=0.6, retries=2, requests_per_s=1000.0))) == 4
    asked = {path.split("/")[2] for path in run.world.asked if path.startswith("/files")}
    assert asked == {"b"}


def test_what_was_forbidden_is_asked_for_again(run: Run) -> None:
    add_scene(run.world, "a", {"red": RED})
    add_scene(run.world, "b", {"red": RED}, north=NORTH - 6400)
    run.world.faults["/files/b/red.tif"] += [403] * 20
    first = run.chips()
    assert reasons(first) == {"b": "forbidden"}
    assert first.manifest.facts["retry"] == 1
    run.world.faults.clear()
    second = run.chips()
    assert set(good(second).item_id) == {"a", "b"}
    assert "retry" not in second.manifest.facts


def test_a_scene_that_lost_all_its_ground_is_not_read(run: Run) -> None:
    day = identity("31UDQ", "05.00", "2023-01-01")
    add_scene(run.world, "a", {"red": texture(128, 128)}, **day)
    add_scene(run.world, "b", {"red": RED}, **{**day, **identity("31UEQ", "05.00", "2023-01-01")})
    run.world.asked.clear()
    frame = run.chips().table("chips.parquet")
    assert set(frame[frame.item_id == "b"].reason) == {"overlap"}
    assert set(frame[frame.item_id == "b"].witness) == {"a"}
    assert not [path for path in run.world.asked if path.startswith("/files/b")]


def test_while_a_new_version_is_out_of_reach_the_one_before_stands_in(run: Run) -> None:
    versions(run)
    run.world.faults["/files/v4/red.tif"] += [503] * 60
    chips = run.chips()
    assert reasons(chips) == {"v4": "unreachable"}
    assert set(good(chips).item_id) == {"other", "v3"}


@pytest.mark.parametrize("whole_max_mib", [64.0, 0.0], ids=["whole", "by window"])
def test_chips_from_a_bucket_are_the_chips_from_http(
    run: Run, s3: str, whole_max_mib: float, tmp_path: Path
) -> None:
    item = add_scene(run.world, "a", {"red": texture(200, 200), "green": texture(200, 200, 1)})
    settings = {"bands": ["red", "green"], "whole_max_mib": whole_max_mib}
    by_http = good(run.chips(**settings)).set_index("cell")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    for key, asset in item["assets"].items():
        place = f"{s3}/scenes-{whole_max_mib:g}/{key}.tif"
        files.pipe_file(place, run.world.files[f"/files/a/{key}.tif"])
        asset["href"] = place
    run.world.files.clear()
    refused = run.chips(**settings)
    assert reasons(refused) == {"a": "forbidden"}, "the chips of the version before stand in"
    with pytest.raises(RunError, match=r"forbidden 1.*search\.credentials_for"):
        elsewhere(run, tmp_path / "scratch").chips(**settings)
    run.search = {"credentials_for": [f"bucket/scenes-{whole_max_mib:g}"]}
    chips = run.chips(**settings)
    from_bucket = good(chips).set_index("cell")
    assert len(from_bucket) == 36
    assert dict(from_bucket.pixel_sha256) == dict(by_http.pixel_sha256)
    assets = chips.table("assets.parquet")
    assert set(assets.sha256_from) == {"declared" if whole_max_mib == 0 else "computed"}
    assert all(href.startswith("s3://") for href in assets.href)
