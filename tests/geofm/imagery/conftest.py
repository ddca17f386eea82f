from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.geofm.imagery.small_world import World, serve


@pytest.fixture
def world() -> Iterator[World]:
    """An empty catalogue on loopback."""
    with serve() as served:
        yield served
