"""A failing command with --json ends with one JSON object, whatever its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from data_catalog.errors import CheckError, RunError, UsageError
from flows.cli import console
from flows.cli import main as cli

Run = Callable[..., tuple[int, dict[str, Any]]]
COMMANDS = sorted(typer.main.get_command(cli.app).commands)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in this process: its exit code and the last line of stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_printed", {})

    def command(*args: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["geofm", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        assert isinstance(code, int)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.mark.parametrize("command", [*COMMANDS, "no-such-command"])
def test_an_unknown_option_of_every_command(run: Run, command: str) -> None:
    code, found = run(command, "--no-such-option", "--json")
    assert code == found["exit_code"] == 2
    assert "No such" in found["error"]
    assert found["kind"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("show", "--json"), "Missing argument"),
        (("why", "chip", "--json"), "Missing option"),
        (("verify", "demo", "--recut", "few", "--json"), "--recut"),
        (("verify", "demo", "--recut", "-1", "--json"), "--recut"),
        (("diff", "--json"), "Missing argument"),
        (("run", "no-such-recipe", "--json"), "no-such-recipe"),
        (("run", "demo", "--set", "cut.nothing=1", "--json"), "nothing"),
        (("refresh", "demo", "--workers", "-3", "--json"), "--workers"),
        (("--json", "show", "demo"), "--json"),
        (("sources", "--item", "x.json", "--json"), "--check"),
        (("show", "demo", "--store", "nowhere", "--json"), "nowhere"),
    ],
)
def test_bad_usage_names_what_is_wrong(run: Run, line: tuple[str, ...], words: str) -> None:
    code, found = run(*line)
    assert code == found["exit_code"] == 2
    assert words in found["error"]


class Surprise(Exception):
    """An error that nobody foresaw."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("set x.y"), 2),
        (RunError("it failed\nhere"), 3),
        (CheckError("2 problems"), 4),
        (Surprise("what is that"), 3),
        (Surprise(), 3),
        (KeyboardInterrupt(), 130),
        (typer.Exit(130), 130),
        (typer.Exit(7), 7),
    ],
)
def test_every_kind_of_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    from geofm.config import recipe_book

    def fail() -> None:
        raise error

    monkeypatch.setattr(recipe_book, "load_recipe", lambda *_: fail())
    assert run("calibrate", "demo", "--json") == (
        code,
        {
            "error": {130: "the command was stopped", 7: "the command ended with exit code 7"}.get(
                code, str(error) or type(error).__name__
            ),
            "kind": {130: "Interrupted", 7: "Exit"}.get(code, type(error).__name__),
            "exit_code": code,
        },
    )


def test_what_was_printed_before_the_failure_is_in_the_last_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geofm.config import recipe_book

    def fail(*_: Any) -> None:
        console.print_json({"problems": ["a shard is damaged"]})
        raise CheckError("1 problem")

    monkeypatch.setattr(recipe_book, "load_recipe", fail)
    code, found = run("calibrate", "demo", "--json")
    assert (code, found["problems"], found["error"]) == (4, ["a shard is damaged"], "1 problem")


def test_without_json_stdout_is_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["geofm", "show", "--", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == ""


def test_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "show", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["exit_code"] == 2
    assert "geofm:" in done.stderr
