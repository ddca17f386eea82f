"""Write docs/cli.md from the command line itself: ``python docs/cli_reference.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from flows.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

This page is written by `python docs/cli_reference.py`; a test compares it with the commands.

Exit codes: 0 done, 2 bad usage or settings, 3 the run failed or a file could not be read, 4 a check
failed. With `--json`, the last line of stdout is one JSON object; progress goes to stderr.
"""


def render() -> str:
    """Return the page: each command with its arguments and options."""
    group: Any = get_command(app)
    context = group.make_context("geofm", [], resilient_parsing=True)
    parts = [HEAD, "## geofm\n", _table(group)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["geofm", name, *arguments, "[OPTIONS]"])
        parts.append(f"## geofm {name}\n\n`{usage}`\n\n{(command.help or '').strip()}\n")
        parts.append(_table(command))
    return "\n".join(part for part in parts if part)


def _table(command: Any) -> str:
    """Return a table of a command's arguments and options with their help texts."""
    rows = []
    for parameter in command.params:
        if parameter.name == "help" or not getattr(parameter, "help", ""):
            continue
        usage = parameter.metavar or ""
        if parameter.param_type_name == "option":
            if not usage and not getattr(parameter, "is_flag", False):
                usage = "N" if isinstance(parameter.default, int) else "VALUE"
            usage = f"{', '.join(parameter.opts)} {usage}".strip()
        variable = f" Environment variable: `{parameter.envvar}`." if parameter.envvar else ""
        cells = (f"`{usage}`", f"{parameter.help}{variable}")
        rows.append("| {} | {} |".format(*(cell.replace("|", "\\|") for cell in cells)))
    return "\n".join(["| option | meaning |", "|---|---|", *rows, ""]) if rows else ""


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
