"""The embedded planet as a source: built once per user, served during a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from data_catalog.artifact import cache_folder
from geofm.remote.url_policy import PLANET_ENV


@contextmanager
def serving_source(stac: str) -> Iterator[None]:
    """Serve the planet while the block runs, if the STAC address is ``planet``.

    If ``GEOFM_PLANET_URL`` is set, the planet is served already and nothing is started.
    """
    if stac != "planet" or os.environ.get(PLANET_ENV):
        yield
        return
    from geofm.planet.catalog.server import serve_world
    from geofm.planet.world import build_world

    with serve_world(build_world(cache_folder() / "planet")) as served:
        os.environ[PLANET_ENV] = served.url
        try:
            yield
        finally:
            del os.environ[PLANET_ENV]
