"""What the documentation says can be typed: each command parses, each link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from geofm.config.recipe import Recipe
from geofm.config.recipe_book import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's ``sh`` blocks, comments stripped."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for line in shell_lines(page)
    if "geofm " in line and line.split()[0].endswith("geofm")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_documented_commands_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    # `--help` at the end is answered only when every option before it is known
    shown = CliRunner().invoke(app, [*words, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "Usage:" in shown.output
    assert CliRunner().invoke(app, [words[0], "--no-such-option", "--help"]).exit_code == 2
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    load_recipe("demo", overrides)


def test_readme_has_the_makefile_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {line.split()[1] for page in PAGES for line in shell_lines(page) if line[:5] == "make "}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_field_of_the_recipe_is_described_and_bounded() -> None:
    for section, field in Recipe.model_fields.items():
        model = field.annotation
        for name, inner in getattr(model, "model_fields", {}).items():
            assert inner.description, f"{section}.{name} has no description"
            numeric = inner.annotation in (int, float)
            assert not numeric or inner.metadata, f"{section}.{name} has no bounds"
