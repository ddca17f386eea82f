"""Synthetic runs, made once per session, and their pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_catalog.artifact import Artifact
from data_catalog.provenance.costs import ArtifactCost
from data_catalog.store import open_store
from geofm.config.recipe import ReportSettings
from geofm.forecasting.figures import StageForecast
from geofm.reporting.page import ReportPage, build_page
from tests.geofm.reporting.synthetic import make_run

SMALL = ReportSettings(montage=12, clusters=3)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A whole run with drops, duplicates, quarantine and scores."""
    work = tmp_path_factory.mktemp("run")
    return make_run(open_store(work / "store"), work / "made", per_scene=9, size=32)


@pytest.fixture(scope="session")
def page(run: dict[str, Artifact]) -> ReportPage:
    """The page of the run."""
    return build_page(run, SMALL, make_costs(run))


@pytest.fixture(scope="session")
def bare_page(tmp_path_factory: pytest.TempPathFactory) -> ReportPage:
    """The page of a run without duplicates, drops, training or costs."""
    work: Path = tmp_path_factory.mktemp("bare")
    made = make_run(
        open_store(work / "store"), work / "made", per_scene=4, size=32, duplicates=False,
        drops=False, trained=False,
    )  # fmt: skip
    return build_page(made, SMALL, [])


def make_costs(made: dict[str, Artifact]) -> list[ArtifactCost]:
    """Costs of the artifacts of a run, and of a stage without an artifact on the page."""
    roles = ("items", "chips", "embeddings", "decisions", "dataset", "model", "scores")
    seconds = dict(zip(roles, (2.1, 14.2, 9.8, 3.3, 1.2, 96.4, 21.7), strict=True))
    training = {"images_per_second": 148.2, "device": "cpu", "teacher_seconds": 31.5}
    found = [ArtifactCost("buckets", "ab" * 32, 0.4, 0.0, 1e-5, 5e-6, 1)]
    for role, spent in seconds.items():
        if role in made:
            more: dict[str, Any] = training if role == "model" else {}
            if role == "chips":
                noted = StageForecast("cut", 648, 10.0, source="records (3 runs)")
                more = {"forecast": noted.to_json()}
            found.append(
                ArtifactCost(
                    made[role].manifest.stage, made[role].digest, spent, 0.0, spent * 3e-5,
                    spent * 1.4e-5, sessions=2 if role == "model" else 1,
                    metrics={"peak_mib": 812.0, **more}, session_seconds=spent,
                )
            )  # fmt: skip
    return found
