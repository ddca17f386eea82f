"""The app of the command ``geofm``, and the boundary that turns errors into messages.

Heavy imports (Prefect, the catalogue, torch) belong into the functions, so that ``geofm --help`` is
fast.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, NoReturn

import typer

from data_catalog.errors import GeofmError
from data_catalog.redaction import mask, printable
from flows.cli import audit, export, prune, server, sources
from flows.cli.console import err, print_failure, set_up_logging
from flows.cli.options import (
    Catalog,
    Json,
    Overrides,
    RecipeName,
    RunOptions,
    Stac,
    Store,
    with_run_options,
)

#: Exit code of a command that Ctrl-C stopped.
STOPPED = 130
#: Printed after the message of an error that is not geofm's own.
UNFORESEEN = "This error was not foreseen. `geofm -v …` shows its traceback; please report it."

app = typer.Typer(
    name="geofm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Curate imagery from STAC into a concise dataset, pretrain a geospatial foundation model "
    "on it, and prove where every sample came from.\n\n"
    "Start with `geofm demo`, which needs no network. Results are kept in a store (`--store`, "
    "GEOFM_STORE; default ./geofm-store): work that is already done is found there and not "
    "repeated.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import geofm

        print(f"geofm {geofm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print more log lines, and tracebacks of errors."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version, and exit."
        ),
    ] = False,
) -> None:
    set_up_logging(verbose)


@app.command()
@with_run_options
def demo(options: RunOptions) -> None:
    """Run the whole pipeline on a small synthetic planet, without a network.

    The demo makes its own imagery, and takes a few minutes on two cores. Every option of
    `geofm run` works here too.

    Example: `geofm demo --set curate.budget=0.5`
    """
    _run("demo", "", options, data_only=False)


@app.command()
@with_run_options
def run(
    recipe: RecipeName,
    options: RunOptions,
    stac: Stac = "",
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            metavar="NAME[@VERSION]",
            help="Train on this published dataset, without a search. [default: refresh the "
            "recipe's dataset first]",
        ),
    ] = "",
) -> None:
    """Run a recipe: search, cut, embed, curate, pack, pretrain, evaluate and report.

    A run that was stopped goes on where it was when the same command is given again. With
    --dataset it goes on with that dataset, whatever the catalogue lists today.

    Example: `geofm run sentinel2-concise --stac https://my.stac/api --set search.bbox=2,48,3,49`
    """
    _run(recipe, stac, options, data_only=False, dataset=dataset)


@app.command()
@with_run_options
def refresh(recipe: RecipeName, options: RunOptions, stac: Stac = "") -> None:
    """Update a dataset: find new items, fetch only these, and publish a new version.

    If nothing changed, no version is published. Otherwise the summary shows what changed since the
    last version. A refresh ends with the dataset; it trains no model.

    Example: `geofm refresh sentinel2-concise --workers 8`
    """
    _run(recipe, stac, options, data_only=True)


@app.command()
def calibrate(
    recipe: RecipeName,
    stac: Stac = "",
    store: Store = "",
    catalog: Catalog = "",
    overrides: Overrides = None,
    json_: Json = False,
) -> None:
    """Measure from which cosine similarity two chips are duplicates, for each collection.

    The measurement uses pairs of chips whose truth is known from their place and time. A run does
    the same if curate.threshold is empty.

    Example: `geofm calibrate sentinel2-concise --set calibrate.sample=500`
    """
    from flows.cli.calibrate import calibrate_recipe
    from geofm.config.recipe_book import load_recipe

    calibrate_recipe(load_recipe(recipe, _changes(stac, overrides)), store, catalog, json_)


@app.command()
def recipes() -> None:
    """List the recipes that come with geofm, and the purpose of each."""
    from flows.cli.console import print_table
    from geofm.config.recipe_book import load_recipe, recipe_names

    rows = [[name, load_recipe(name).description] for name in recipe_names()]
    print_table("Recipes", ["name", "purpose"], rows)


for module in (server, audit, sources, export, prune):
    module.add_to(app)


def _run(name: str, stac: str, options: RunOptions, data_only: bool, dataset: str = "") -> None:
    changes = _changes(stac, options.overrides)
    changes += [f"compute.runner={options.runner}"] if options.runner else []
    changes += [f"compute.workers={options.workers}"] if options.workers else []
    if options.dry_run:
        from flows.cli.dry_run import print_plan
        from geofm.config.recipe_book import load_recipe

        made = load_recipe(name, changes)
        print_plan(made, options.store, options.catalog, options.json_, data_only, dataset)
        return
    from flows.launch import launch

    launch(
        name,
        changes,
        options.store,
        options.catalog,
        options.json_,
        data_only,
        not options.no_wait,
        dataset,
    )


def _changes(stac: str, overrides: list[str] | None) -> list[str]:
    """Return the changes to a recipe, with those that ``--stac`` implies."""
    changes = list(overrides or [])
    if not stac:
        return changes
    # The recipe's area and dates fit its own API. For another API the search has no limits, except
    # those that are given by --set.
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
