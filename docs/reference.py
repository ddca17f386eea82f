"""Write docs/cli.md and docs/recipe.md from the code itself: ``python docs/reference.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from typer.main import get_command

from flows.cli.main import app
from geofm.config.recipe import Recipe, RecipeSection

DOCS = Path(__file__).parent
NOTE = "This page is written by `python docs/reference.py`; a test compares it with the code.\n"
COMMANDS = f"""# Command line

{NOTE}
Exit codes: 0 done, 2 bad usage or settings, 3 the run failed or a file could not be read, 4 a check
failed. With `--json`, the last line of stdout is one JSON object; progress goes to stderr.
"""
RECIPE = f"""# Recipe fields

{NOTE}
A recipe is a YAML file with these sections. On the command line, `--set SECTION.FIELD=VALUE`
changes a field; in a form of the Prefect UI, a line of *changes* does. `geofm recipes` lists the
recipes that come with geofm.
"""


def render_commands() -> str:
    """Return the page of the commands, each with its arguments and options."""
    group: Any = get_command(app)
    context = group.make_context("geofm", [], resilient_parsing=True)
    parts = [COMMANDS, "## geofm\n", _options(group)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["geofm", name, *arguments, "[OPTIONS]"])
        parts.append(f"## geofm {name}\n\n`{usage}`\n\n{(command.help or '').strip()}\n")
        parts.append(_options(command))
    return "\n".join(part for part in parts if part)


def render_recipe() -> str:
    """Return the page of the recipe, each section with its fields."""
    parts = [RECIPE]
    for name, section in Recipe.model_fields.items():
        model = section.annotation
        if not (isinstance(model, type) and issubclass(model, RecipeSection)):
            continue
        rows = [
            (f"`{field}`", _allowed(info), f"`{_default(info)}`", info.description or "")
            for field, info in model.model_fields.items()
        ]
        about = (model.__doc__ or "").partition("\n")[0]
        parts.append(f"## {name}\n\n{about}\n")
        parts.append(_table(("field", "values", "default", "meaning"), rows))
    return "\n".join(parts)


def _options(command: Any) -> str:
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
        rows.append((f"`{usage}`", f"{parameter.help}{variable}"))
    return _table(("option", "meaning"), rows) if rows else ""


def _allowed(field: FieldInfo) -> str:
    """Return the choices or the bounds of a field, if it has any."""
    kinds = [field.annotation, *get_args(field.annotation)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return ", ".join(f"`{value}`" for value in get_args(kind))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(
        f"{sign} {_number(getattr(limit, name))}"
        for limit in field.metadata
        for name, sign in signs.items()
        if isinstance(getattr(limit, name, None), int | float)
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(field: FieldInfo) -> str:
    """Return a default as it is written in YAML."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "empty"
    return "empty" if value in (None, "", {}) else str(value)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    (DOCS / "cli.md").write_text(render_commands(), encoding="utf-8")
    (DOCS / "recipe.md").write_text(render_recipe(), encoding="utf-8")
