"""Small pieces of the top floor, without a server."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.cli import app
from flows.stage_flow import MOST_TASKS, ranges


@given(st.integers(0, 50_000), st.integers(1, 200))
def test_ranges_cover_all_parts_once_in_few_tasks(parts: int, workers: int) -> None:
    found = ranges(parts, workers)
    assert [i for a, b in found for i in range(a, b)] == list(range(parts))
    assert len(found) <= MOST_TASKS
    assert all(b > a for a, b in found)


def test_every_command_explains_itself() -> None:
    runner = CliRunner()
    names = {c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands}
    expected = {
        "demo", "run", "refresh", "recipes", "up", "down", "list", "show", "path", "diff",
        "trace", "why", "licences", "verify",
    }  # fmt: skip
    assert names == expected
    for name in names:
        shown = runner.invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert len(shown.stdout.splitlines()) > 6
    for command in app.registered_commands:
        assert command.callback.__doc__
