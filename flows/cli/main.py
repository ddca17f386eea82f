"""The command line: ``geofm``. One boundary turns errors into a message and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, NoReturn

import typer

from data_catalog.errors import GeofmError
from data_catalog.redaction import mask
from flows.cli import audit as cli_audit
from flows.cli import export as cli_export
from flows.cli import server as cli_server
from flows.cli import sources as cli_sources
from flows.cli.console import err, print_failure, printable, set_up_logging
from flows.cli.options import Catalog, Json, Store

#: Exit code of a command that was stopped by Ctrl-C.
STOPPED = 130
UNFORESEEN = "This was not foreseen. `geofm -v …` shows the traceback; please report it."

app = typer.Typer(
    name="geofm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Curate imagery from STAC into a concise dataset, pretrain a geospatial foundation model "
    "on it, and prove where every sample came from.\n\n"
    "Start with `geofm demo`. Results live in a store (`--store`, GEOFM_STORE, default "
    "./geofm-store); what was done once is found there and not done again.",
)


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="More log lines, and tracebacks on errors.")
    ] = False,
) -> None:
    set_up_logging(verbose)


Recipe_ = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name from `geofm recipes`, or a YAML file.")
]
Stac = Annotated[
    str,
    typer.Option(
        "--stac",
        metavar="URL",
        help="Search this STAC API instead of the recipe's: all it offers, unless "
        "--set search.collections=…, search.bbox=… or search.datetime=… say otherwise.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="Change a field; lists are comma-separated. Repeatable.",
    ),
]
Runner = Annotated[
    str,
    typer.Option(
        "--runner", metavar="threads|processes|dask", help="What maps the parts of a stage."
    ),
]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Parts worked on at once (0: the recipe's).")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Search and plan only: print scenes, chips, and about how many requests and bytes the "
        "run would fetch.",
    ),
]
NoWait = Annotated[
    bool,
    typer.Option(
        "--no-wait",
        help="Stop at once (exit code 3) when another run refreshes the same dataset or trains the "
        "same model, instead of waiting for it.",
    ),
]


@app.command()
def demo(
    store: Store = "",
    catalog: Catalog = "",
    overrides: Set = None,
    runner: Runner = "",
    workers: Workers = 0,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    json_: Json = False,
) -> None:
    """The whole pipeline on the embedded planet: search to report in a few minutes."""
    _run("demo", "", overrides, runner, workers, store, catalog, json_, dry_run, no_wait, False)


@app.command()
def run(
    recipe: Recipe_,
    stac: Stac = "",
    store: Store = "",
    catalog: Catalog = "",
    overrides: Set = None,
    runner: Runner = "",
    workers: Workers = 0,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    json_: Json = False,
) -> None:
    """Search, cut, embed, curate, pack, pretrain, evaluate and report.

    Example: `geofm run sentinel2-concise --stac https://my.stac/api --set search.bbox=2,48,3,49`
    """
    _run(recipe, stac, overrides, runner, workers, store, catalog, json_, dry_run, no_wait, False)


@app.command()
def refresh(
    recipe: Recipe_,
    stac: Stac = "",
    store: Store = "",
    catalog: Catalog = "",
    overrides: Set = None,
    runner: Runner = "",
    workers: Workers = 0,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    json_: Json = False,
) -> None:
    """The data half only: find what is new, fetch only that, publish a dataset version.

    Where nothing is new, no version is published. Else the end says what changed since the last.
    """
    _run(recipe, stac, overrides, runner, workers, store, catalog, json_, dry_run, no_wait, True)


@app.command()
def calibrate(
    recipe: Recipe_,
    stac: Stac = "",
    store: Store = "",
    catalog: Catalog = "",
    overrides: Set = None,
    json_: Json = False,
) -> None:
    """From which similarity chips are duplicates, by pairs that are known without looking.

    A run does the same by itself where curate.threshold is empty.
    """
    from flows.cli.calibrate import calibrate as only_calibrate
    from geofm.config.recipe_book import load_recipe

    only_calibrate(load_recipe(recipe, _changes(stac, overrides)), store, catalog, json_)


@app.command()
def recipes() -> None:
    """The recipes that come with geofm, and what they are for."""
    from flows.cli.console import print_table
    from geofm.config.recipe_book import load_recipe, recipe_names

    rows = [[name, load_recipe(name).description] for name in recipe_names()]
    print_table("Recipes", ["name", "what it is for"], rows)


cli_server.add_to(app)
cli_audit.add_to(app)
cli_sources.add_to(app)
cli_export.add_to(app)


def _run(
    name: str, stac: str, overrides: list[str] | None, runner: str, workers: int,
    store: str, catalog: str, json_: bool, dry_run: bool, no_wait: bool, data_only: bool,
) -> None:  # fmt: skip
    from flows.launch import launch

    changes = _changes(stac, overrides)
    changes += [f"compute.runner={runner}"] if runner else []
    changes += [f"compute.workers={workers}"] if workers else []
    if dry_run:
        from flows.cli.dry_run import dry_run as plan_only
        from geofm.config.recipe_book import load_recipe

        plan_only(load_recipe(name, changes), store, catalog, json_)
        return
    launch(name, changes, store, catalog, json_, data_only, not no_wait)


def _changes(stac: str, overrides: list[str] | None) -> list[str]:
    """Changes to a recipe, another catalogue's address among them."""
    changes = list(overrides or [])
    if not stac:
        return changes
    # a recipe's place and time belong to its own address: another one starts from "everything"
    given = {change.partition("=")[0].strip() for change in changes}
    fields = ("collections", "bbox", "area", "places", "datetime")
    reset = [f for f in fields if f"search.{f}" not in given]
    return [f"search.stac={stac}", *(f"search.{f}=" for f in reset), *changes]


def main() -> None:
    """Run a command; each failure has one clear message and its exit code.

    With ``--json``, a failure also prints one JSON object as the last line of stdout: ``error``,
    ``kind`` and ``exit_code``.
    """
    try:
        app()  # exits by itself: 0 done, 2 bad usage, 130 stopped
    except SystemExit as stop:
        if stop.code:  # typer has shown the message: it is that of the error being handled
            _print_failure(stop.__context__, int(stop.code))
        raise
    except GeofmError as error:
        _fail(error, error.exit_code)
    except Exception as error:  # noqa: BLE001  the one boundary: an unforeseen failure is exit code 3
        _fail(error, 3, UNFORESEEN)


def _fail(error: Exception, exit_code: int, more: str = "") -> NoReturn:
    if "-v" in sys.argv or "--verbose" in sys.argv:
        sys.stderr.write(mask("".join(traceback.format_exception(error))))
    err.print("[bold red]geofm:[/] ", end="")
    err.print(printable(mask(str(error))) or type(error).__name__, markup=False, highlight=False)
    if more:
        err.print(more)
    _print_failure(error, exit_code)
    sys.exit(exit_code)


def _print_failure(error: BaseException | None, exit_code: int) -> None:
    """Print a failure as JSON where the command line has ``--json``."""
    arguments = sys.argv[1:]
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    if "--json" not in arguments:
        return
    if exit_code == STOPPED:
        print_failure("the command was stopped", "Interrupted", exit_code)
        return
    if error is None or isinstance(error, typer.Exit):
        print_failure(f"the command ended with exit code {exit_code}", "Exit", exit_code)
        return
    usage = getattr(error, "format_message", None)  # of typer's errors
    message = mask(usage() if callable(usage) else str(error))
    print_failure(message or type(error).__name__, type(error).__name__, exit_code)
