"""Refreshes of a small world: versions with their differences, and two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_catalog.catalogue import open_catalogue
from tests.data_catalog.helpers import NO_STORE
from tests.flows.conftest import Outcome
from tests.geofm.stac.small_world import WEST, World, add_scene, identity, serve, texture

pytestmark = pytest.mark.slow
Geofm = Callable[..., Outcome]


@pytest.fixture
def world() -> Iterator[World]:
    with serve() as served:
        yield served


def scene(world: World, tile: str, version: str, seed: int, east_px: int = 0) -> str:
    """A scene of 2 x 2 chips; returns its id."""
    name = f"{tile}_{version}"
    made = f"2020-01-0{version[1]}T00:00:00Z"
    bands = {
        band: texture(64, 64, seed * 10 + n) for n, band in enumerate(("red", "green", "blue"))
    }
    add_scene(world, name, bands, west=WEST + east_px * 10, **identity(tile, version, made))
    return name


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> str:
    content = {
        "search": {"stac": world.url},
        "cut": {"size_px": 32},
        "embed": {"size_px": 32},
        "curate": {"max_saturated": 1, "threshold": 1},
        "pack": {"name": "small"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_versions_come_with_their_difference(world: World, recipe: str, geofm: Geofm) -> None:
    scene(world, "31UDQ", "04.00", 1)
    first = geofm("refresh", recipe, "--json")
    assert first.code == 0, first.stderr[-3000:]
    version = first.json["version"]
    assert (version["new"], version["predecessor"], first.json["diff"]) == (True, None, None)
    assert geofm("diff", "small").code == 2  # nothing to compare with

    asked = len([path for path in world.asked if path.startswith("/files")])
    again = geofm("refresh", recipe)
    assert again.code == 0
    assert f"no new version, nothing changed ({version['ref']})" in again.stdout
    assert len([path for path in world.asked if path.startswith("/files")]) == asked

    world.items.clear()
    old = scene(world, "31UDQ", "04.00", 1)
    new = scene(world, "31UDQ", "05.00", 2)
    more = scene(world, "31UDR", "05.00", 3, east_px=640)
    third = geofm("refresh", recipe, "--json")
    assert third.code == 0, third.stderr[-3000:]
    assert third.json["version"]["predecessor"] == version["ref"].partition("@")[2]
    diff = third.json["diff"]
    assert (diff["added"], diff["removed"], diff["kept"]) == (8, 4, 0)
    assert diff["item_counts"] == {"added": 2, "superseded": 1}
    told = {row["item_id"]: (row["change"], row["by"]) for row in diff["items"]}
    assert told == {old: ("superseded", new), new: ("added", ""), more: ("added", "")}
    assert diff["why_added"] == {"item added": 4, "supersedes an item": 4}
    assert diff["why_removed"] == {"item superseded": 4}
    assert diff["cells"] == 8

    shown = geofm("diff", "small")
    assert shown.code == 0, shown.stderr
    assert "+8 −4 (2 items added, 1 superseded), kept 0" in shown.stdout
    back = geofm("diff", "small", version["ref"], "--json").json
    assert (len(back["added"]), len(back["removed"]), back["kept"]) == (4, 8, 0)
    assert geofm("diff", "small", "nothing").code == 2
    gone = geofm("why", back["added"][0], "--in", "small", "--json").json
    assert (gone["was_in"], gone["left_in"]) == (version["ref"], third.json["version"]["ref"])
    assert (gone["rule"], gone["superseded_by"]) == ("item superseded", new)
    assert Path(gone["picture"]).read_bytes().startswith(b"\x89PNG")
    assert geofm("why", "0" * 24, "--in", "small", "--json").json["kind"] == "UnknownSample"

    world.items = [item for item in world.items if item["id"] != more]
    fourth = geofm("refresh", recipe)
    assert fourth.code == 0, fourth.stderr[-3000:]
    assert "+0 −4 (1 item withdrawn)" in fourth.stdout
    last = geofm("diff", "small", "--json").json
    assert last["why_removed"] == {"item withdrawn": 4}
    assert [row["change"] for row in last["items"]] == ["withdrawn"]


def begin(
    recipe: str, environment: dict[str, str], tmp_path: Path, *more: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "refresh", recipe, "--json", *more],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_lease(store: Path) -> int:
    """Wait until somebody holds the lease; returns the process id."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (store / "catalogue.db").exists():
            catalogue = open_catalogue(f"sqlite:///{store}/catalogue.db", NO_STORE)
            with catalogue.engine.connect() as connection:
                held = connection.exec_driver_sql("select pid from lease").fetchone()
            catalogue.engine.dispose()
            if held is not None:
                return int(held[0])
        time.sleep(0.05)
    raise AssertionError("nobody holds the lease")


@pytest.mark.long
def test_two_refreshes_at_once_take_turns(
    world: World, recipe: str, geofm: Geofm, environment: dict[str, str], tmp_path: Path
) -> None:
    scene(world, "31UDQ", "04.00", 1)
    store = tmp_path / "geofm-store"
    killed = begin(recipe, environment, tmp_path)
    assert wait_for_lease(store) == killed.pid
    os.kill(killed.pid, signal.SIGSTOP)  # else a slow start of the second would find it done
    refused = geofm("refresh", recipe, "--no-wait")
    assert refused.code == 3, refused.stderr
    assert f"'small' is being refreshed by process {killed.pid}" in refused.stderr
    assert "Traceback" not in refused.stderr
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()

    both = [begin(recipe, environment, tmp_path) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    told = [json.loads(out.strip().splitlines()[-1]) for out, _ in ends]
    assert sorted(one["version"]["new"] for one in told) == [False, True]
    assert told[0]["version"]["ref"] == told[1]["version"]["ref"]
    assert told[0]["artifacts"] == told[1]["artifacts"]
    assert sum("small is being refreshed by process" in err for _, err in ends) == 1

    catalogue = open_catalogue(f"sqlite:///{store}/catalogue.db", NO_STORE)
    assert len(catalogue.names()) == 1
    checked = geofm("verify", "small", "--deep", "--json")
    assert (checked.code, checked.json["problems"]) == (0, [])
    assert not list((store / "staging").iterdir())
    assert np.sum([row.kind == "dataset" for row in catalogue.artifacts()]) == 1


@pytest.mark.long
def test_a_store_on_s3_gives_the_digests_of_a_local_one(
    world: World, recipe: str, geofm: Geofm, s3: str
) -> None:
    scene(world, "31UDQ", "04.00", 1)
    scene(world, "31UDR", "05.00", 3, east_px=640)
    local = geofm("refresh", recipe, "--json")
    assert local.code == 0, local.stderr[-3000:]
    bucket = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    store = ("--store", f"{s3}/refresh")
    remote = geofm("refresh", recipe, "--json", *store, **bucket)
    assert remote.code == 0, remote.stderr[-3000:]
    assert remote.json["artifacts"] == local.json["artifacts"]
    again = geofm("refresh", recipe, "--json", *store, "--runner", "processes", **bucket)
    assert again.json["version"] == {**remote.json["version"], "new": False}
    checked = geofm("verify", "small", "--deep", "--recut", "4", "--json", *store, **bucket)
    assert (checked.code, checked.json["problems"]) == (0, [])
    assert checked.json["recut_identical"] == 4
