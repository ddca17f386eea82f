"""Options that many commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="GEOFM_STORE",
        help="Folder or s3://bucket/prefix. [default: ./geofm-store]",
    ),
]
Catalog = Annotated[
    str,
    typer.Option(
        "--catalog",
        metavar="URL",
        envvar="GEOFM_CATALOG",
        help="SQLAlchemy address. [default: catalogue.db in the store]",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")
]
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A name, name@version, digest or its unique prefix.")
]
