"""Fixtures that every room uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.store import Store, open_store

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return open_store(tmp_path / "store")


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """An empty SQLite catalogue."""
    return open_catalogue(f"sqlite:///{tmp_path}/catalogue.db")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real imagery for tests, where it is available; skips otherwise."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("GEOFM_SHARED", default))
    if not (folder / "worlds").is_dir():
        pytest.skip("needs the shared real imagery: set GEOFM_SHARED to its folder")
    return folder
