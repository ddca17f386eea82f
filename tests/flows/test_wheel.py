"""A wheel that is built and installed elsewhere has everything that the source tree has."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from geofm.config.recipe_book import recipe_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_catalog", "flows", "geofm")

pytestmark = pytest.mark.long


def run(command: list[str], folder: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GEOFM_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([sys.executable, *build, "--wheel-dir", str(folder), str(ROOT)], folder)
    (built,) = folder.glob("geofm-*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    tracked = run(["git", "ls-files", *PACKAGES], ROOT).splitlines()
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert tracked
    assert not set(tracked) - packed
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_commands_run_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "elsewhere"
    folder.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    run([sys.executable, *install], folder)
    code = "import flows.deployments, geofm; print(geofm.__file__, flows.deployments.__file__)"
    python = [sys.executable, "-P"]
    from_wheel = run([*python, "-c", code], folder, PYTHONPATH=str(site)).split()
    assert from_wheel == [str(site / "geofm/__init__.py"), str(site / "flows/deployments.py")]
    command = [*python, "-m", "flows.cli"]
    recipes = run([*command, "recipes"], folder, PYTHONPATH=str(site), COLUMNS="200")
    assert all(name in recipes for name in recipe_names())
    sources = run([*command, "sources"], folder, PYTHONPATH=str(site), COLUMNS="200")
    assert "planetary-computer" in sources
    code = f"from flows.settings import open_place; open_place({str(folder / 'store')!r})"
    run([*python, "-c", code], folder, PYTHONPATH=str(site))
    listed = run([*command, "list", "--store", str(folder / "store"), "--json"], folder,
                 PYTHONPATH=str(site))  # fmt: skip
    assert listed.strip() == '{"artifacts": []}'
