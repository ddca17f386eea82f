"""``--dry-run``: the plan and its cost, without a request for imagery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from tests.geofm.stac.small_world import NORTH, World, add_scene, serve, texture


def dry_run(world: World, store: Path, *change: str) -> dict[str, Any]:
    sets = [word for one in ("cut.size_px=32", "cut.bands=red", *change) for word in ("--set", one)]
    words = ["refresh", "demo", "--stac", world.url, "--store", str(store), "--dry-run", "--json"]
    done = CliRunner().invoke(app, [*words, *sets], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def world() -> Any:
    with serve() as served:
        add_scene(served, "a", {"red": texture(96, 96)})
        add_scene(served, "b", {"red": texture(96, 96)}, north=NORTH - 6400, told=False)
        yield served


def test_the_plan_is_told_and_nothing_is_fetched(world: World, tmp_path: Path) -> None:
    told = dry_run(world, tmp_path / "store")
    assert not [path for path in world.asked if path.startswith("/files")]
    size = len(world.files["/files/a/red.tif"])
    plan = told["plan"]
    assert (plan["scenes"], plan["chips"], plan["requests"]) == (1, 9, 1)
    assert 0.5 * size < plan["bytes"] < 2 * size
    assert plan["collections"].keys() == {"sentinel-2-test"}
    assert told["unplanned_scenes"] == 1, "b does not state where it lies"
    assert told["would_fail"] is None
    limited = dry_run(world, tmp_path / "store", "cut.max_chips=4")["plan"]
    assert (limited["chips"], limited["left_out"]) == (4, {"over_budget": 5})


def test_a_run_that_would_fail_is_told(world: World, tmp_path: Path) -> None:
    told = dry_run(world, tmp_path / "store", "cut.bands=red,nir")
    assert "cut.max_failed" in told["would_fail"]
    assert told["unusable_scenes"] == 2
    world.items.pop()
    world.items[0]["geometry"]["coordinates"] = [[[10, 10], [11, 10], [11, 11], [10, 10]]]
    del world.items[0]["assets"]["red"]["proj:transform"]
    told = dry_run(world, tmp_path / "store")
    assert told["unplanned_scenes"] == 1
