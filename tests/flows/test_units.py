"""Small pieces of the top floor, without a server."""

from __future__ import annotations

import inspect
import logging
import logging.config

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_catalog.redaction import printable
from flows import deployments
from flows.cli.main import app
from flows.service import serve
from flows.stage_flow import MOST_TASKS, count_tasks


@given(st.integers(0, 50_000), st.integers(1, 200), st.integers(1, 8))
def test_few_tasks_share_all_parts(parts: int, workers: int, at_once: int) -> None:
    tasks = count_tasks(parts, workers, at_once)
    shares = [range(number, parts, tasks) for number in range(tasks)]
    assert sorted(part for share in shares for part in share) == list(range(parts))
    assert all(shares) and tasks <= MOST_TASKS
    assert tasks >= min(parts, workers, MOST_TASKS)


def test_a_task_that_works_on_many_parts_at_once_gets_many() -> None:
    assert count_tasks(25, 2) == 8
    assert count_tasks(25, 2, at_once=4) == 2
    assert count_tasks(1000, 2, at_once=4) == 8


def test_every_command_explains_itself() -> None:
    runner = CliRunner()
    names = {c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands}
    expected = {
        "demo", "run", "refresh", "calibrate", "recipes", "up", "down", "env", "list", "show",
        "path", "diff", "runs",
        "trace", "why", "licences", "verify", "sources", "export", "prune",
    }  # fmt: skip
    assert names == expected
    for name in names:
        shown = runner.invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert len(shown.stdout.splitlines()) > 6
    for command in app.registered_commands:
        assert command.callback.__doc__


@given(st.text())
def test_nothing_a_catalogue_says_reaches_the_terminal_as_an_order(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert printable("Königsberg 2 m²") == "Königsberg 2 m²"
    assert printable("\x1b[2Jgone\x9b") == "\\x1b[2Jgone\\x9b"


def test_a_password_is_in_no_deployment() -> None:
    source = inspect.getsource(deployments)
    assert "catalog" not in source


def test_headers_of_requests_are_never_logged() -> None:
    serve.hide_headers()
    logging.config.dictConfig(
        {"version": 1, "disable_existing_loggers": False,
         "loggers": {"uvicorn.error": {"level": "DEBUG"}}}
    )  # fmt: skip
    logger = logging.getLogger("uvicorn.error")
    assert logger.isEnabledFor(logging.DEBUG)
    for level, is_logged in ((logging.DEBUG, False), (logging.INFO, True)):
        record = logger.makeRecord(logger.name, level, "", 0, "authorization: …", (), None)
        assert bool(logger.filter(record)) is is_logged
