"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="GEOFM_STORE",
        help="Store: a folder, or s3://bucket/prefix. [default: ./geofm-store]",
    ),
]
Catalog = Annotated[
    str,
    typer.Option(
        "--catalog",
        metavar="URL",
        envvar="GEOFM_CATALOG",
        help="Catalogue: a SQLAlchemy address of SQLite or PostgreSQL. "
        "[default: catalogue.db in the store]",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object, the last line of stdout."),
]
Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF", help="A name, name@version, or a digest or its first characters."
    ),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name from `geofm recipes`, or a YAML file.")
]
Stac = Annotated[
    str,
    typer.Option(
        "--stac",
        metavar="URL",
        help="Search this STAC API instead of the recipe's. Everything it offers is searched, "
        "unless --set search.collections=…, search.bbox=… or search.datetime=… limit it.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="Change one field of the recipe, such as cut.size_px=128. Items of a list are "
        "separated by commas. Repeatable.",
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """The options of `demo`, `run` and `refresh`."""

    store: Store = ""
    catalog: Catalog = ""
    overrides: Overrides = None
    runner: Annotated[
        str,
        typer.Option(
            "--runner",
            metavar="threads|processes|dask",
            help="Where the parts of a stage are worked on. [default: compute.runner of the "
            "recipe]",
        ),
    ] = ""
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=0,
            metavar="N",
            help="Number of workers; 0 takes compute.workers of the recipe.",
        ),
    ] = 0
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Search and plan only. Print scenes and chips, and for each stage a forecast of "
            "bytes to fetch, disk, time, GPU time and energy.",
        ),
    ] = False
    no_wait: Annotated[
        bool,
        typer.Option(
            "--no-wait",
            help="If another run refreshes the same dataset or trains the same model, stop at once "
            "(exit code 3) instead of waiting for it.",
        ),
    ] = False
    json_: Json = False


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one parameter per field of ``RunOptions`` in place of ``options``.

    Typer makes an option of each parameter of a function; it has no groups of parameters.
    """
    own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "options"]
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default,
                  annotation=hints[field.name])
        for field in fields(RunOptions)
    ]  # fmt: skip

    @wraps(command)
    def flat(**values: Any) -> None:
        options = RunOptions(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        command(**values, options=options)

    flat.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return flat
