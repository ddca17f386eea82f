"""The embedded planet as a source: built once per user, served while somebody reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from data_catalog.artifact import cache_folder

#: Where readers, also those in other processes, find the planet that is being served.
ADDRESS = "GEOFM_PLANET_URL"


@contextmanager
def serving_source(stac: str) -> Iterator[None]:
    """Make a STAC address readable: serves the planet where it is ``planet``, else does nothing.

    A planet that is already served (``GEOFM_PLANET_URL``) is used as it is.
    """
    if stac != "planet" or os.environ.get(ADDRESS):
        yield
        return
    from geofm.planet.server import serve_world
    from geofm.planet.world import build_world

    with serve_world(build_world(cache_folder() / "planet")) as served:
        os.environ[ADDRESS] = served.url
        try:
            yield
        finally:
            del os.environ[ADDRESS]
