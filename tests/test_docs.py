"""What the documentation says can be typed: each command parses, each link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli.main import app
from geofm.config.recipe import Recipe
from geofm.config.recipe_book import load_recipe
from geofm.stages import ALL_STAGES
from tests.test_structure import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NOTES = ROOT / "benchmarks" / "NOTES.md"
#: Files of the repository and modules of the code, as the pages write them in code style.
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|yaml|yml|toml|csv|svg)|(?:[\w.-]+/)+)`")


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


@pytest.mark.parametrize("page", [*PAGES, NOTES], ids=lambda p: p.name)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    for name, anchor in re.findall(
        r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")
    ):
        target = page.parent / name if name else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
        assert anchor in anchors, f"{name}#{anchor}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "AGENTS.md", "docs/architecture.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    named = set(PATH.findall((ROOT / name).read_text(encoding="utf-8")))
    assert len(named) > 2
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not {path for path in missing if not list(ROOT.glob(f"*/**/{path}"))}


def test_the_architecture_has_every_room_in_order_and_every_stage() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("geofm/            ")[2].partition("flows/")[0]
    rooms = re.findall(r"^  (\w+)/", tree, re.MULTILINE)
    assert tuple(rooms) == ROOMS
    table = page.partition("## The stages")[2].partition("## The store")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ALL_STAGES
    drawing = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert set(ALL_STAGES) <= set(re.findall(r">(\w+)</text>", drawing))


def test_every_command_option_and_field_is_documented() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, render in (("cli.md", module.render_commands), ("recipe.md", module.render_recipe)):
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == render(), f"run `python docs/reference.py` to renew docs/{name}"


def site_pages(part: Any) -> list[str]:
    """Return the pages of a part of mkdocs' navigation."""
    if isinstance(part, str):
        return [part]
    parts = part.values() if isinstance(part, dict) else part
    return [page for inner in parts for page in site_pages(inner)]


def test_the_site_shows_every_page_and_its_modules_exist() -> None:
    shown = site_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = ROOT / "docs"
    assert sorted(shown) == sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))
    for page in (docs / "api").glob("*.md"):
        for module in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_every_field_of_the_recipe_is_described_and_bounded() -> None:
    for section, field in Recipe.model_fields.items():
        model = field.annotation
        for name, inner in getattr(model, "model_fields", {}).items():
            assert inner.description, f"{section}.{name} has no description"
            numeric = inner.annotation in (int, float)
            assert not numeric or inner.metadata, f"{section}.{name} has no bounds"


def test_the_citation_and_the_issue_forms_are_valid() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert all(work["title"] and work["authors"] for work in (citation, *citation["references"]))
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 4
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert form["name"]
            assert form["description"]
            inputs = [field for field in form["body"] if field["type"] != "markdown"]
            names = [field["id"] for field in inputs]
            assert len(set(names)) == len(names) > 0
            assert all(field["attributes"]["label"] for field in inputs)
