"""Runs made up once per session, and their pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_catalog.artifact import Artifact
from data_catalog.store import open_store
from geofm.reporting.page import Page, build_page
from geofm.settings import ReportSettings
from tests.geofm.reporting.synthetic import make_costs, make_run

SMALL = ReportSettings(montage=12, clusters=3)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A whole run with drops, duplicates, quarantine and scores."""
    work = tmp_path_factory.mktemp("run")
    return make_run(open_store(work / "store"), work / "made", per_scene=9, size=32)


@pytest.fixture(scope="session")
def page(run: dict[str, Artifact]) -> Page:
    """Its page."""
    return build_page(run, SMALL, make_costs(run))


@pytest.fixture(scope="session")
def bare_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run without duplicates, drops, training or costs."""
    work: Path = tmp_path_factory.mktemp("bare")
    made = make_run(
        open_store(work / "store"), work / "made", per_scene=4, size=32, duplicates=False,
        drops=False, trained=False,
    )  # fmt: skip
    return build_page(made, SMALL, [])
