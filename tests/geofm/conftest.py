"""Servers and a clean state for the tests of all rooms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from geofm.remote import retry
from tests.geofm.stac.filter_api import Api, serve_api
from tests.geofm.stac.small_world import World, serve


@pytest.fixture
def world() -> Iterator[World]:
    """An empty catalogue on loopback."""
    with serve() as served:
        yield served


@pytest.fixture(autouse=True)
def _new_hosts() -> None:
    """Forget the hosts of earlier tests, whose ports are used again."""
    retry._host_record.cache_clear()


@pytest.fixture(scope="module")
def running() -> Iterator[Api]:
    """A STAC API that filters, one for a module; each test fills it anew."""
    with serve_api() as served:
        yield served
