"""Commands import only what they use: no torch for the help, or for a stage that is found."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from geofm.stages import ALL_STAGES

#: Libraries whose import takes seconds.
NETWORKS = {"faiss", "lightning_fabric", "timm", "torch"}


def imported_by(code: str, *args: str, **how: object) -> set[str]:
    """Top-level names of the modules that a program imports in a process of its own."""
    program = f"""
import json, sys
try:
    exec({code!r})
except SystemExit as end:
    assert not end.code, end.code
finally:
    names = sorted({{name.partition(".")[0] for name in sys.modules}})
    print(json.dumps(names), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, check=False, **how
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("command", [(), ("refresh",), ("sources",), ("up",)], ids=" ".join)
def test_the_help_imports_no_work(command: tuple[str, ...]) -> None:
    names = imported_by("from flows.cli.main import main; main()", *command, "--help")
    heavy = {"numpy", "pandas", "prefect", "rasterio", "sqlalchemy", *NETWORKS}
    assert "typer" in names
    assert not names & heavy


def test_the_modules_of_stages_import_no_networks() -> None:
    names = imported_by(
        f"from geofm.stages import get_stage; [get_stage(name) for name in {ALL_STAGES!r}]"
    )
    assert "geofm" in names
    assert not names & NETWORKS
