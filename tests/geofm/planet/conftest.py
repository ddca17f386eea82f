"""One small world for all tests of the planet, built once and served once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from geofm.planet.catalog.server import ServedWorld, serve_world
from geofm.planet.scenes import small_plan
from geofm.planet.world import build_world


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("planet"), seed=7, plan=small_plan())


@pytest.fixture(scope="session")
def served(small_world: Path) -> Iterator[ServedWorld]:
    with serve_world(small_world) as running:
        yield running
