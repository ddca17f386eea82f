from __future__ import annotations

from collections.abc import Iterator

import pytest

from geofm.imagery import patience
from tests.geofm.imagery.filter_api import Api, serve_api
from tests.geofm.imagery.small_world import World, serve


@pytest.fixture
def world() -> Iterator[World]:
    """An empty catalogue on loopback."""
    with serve() as served:
        yield served


@pytest.fixture(autouse=True)
def _strangers() -> None:
    """Each test meets its hosts for the first time: ports are used again."""
    patience._host.cache_clear()


@pytest.fixture(scope="module")
def running() -> Iterator[Api]:
    """A STAC API that filters, one for a module; each test fills it anew."""
    with serve_api() as served:
        yield served
