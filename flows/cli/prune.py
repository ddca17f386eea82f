"""The command ``geofm prune``."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.console import out, print_json, progress_bars
from flows.cli.options import Catalog, Json, Store

#: Kinds of artifacts that are kept with the versions that they describe.
DESCRIBED_BY = frozenset({"scores", "report"})


def prune(
    keep: Annotated[
        int,
        typer.Option("--keep", min=1, metavar="N", help="Newest versions of each name to keep."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
    store: Store = "",
    catalog: Catalog = "",
    json_: Json = False,
) -> None:
    """Remove from the store what the newest versions of each dataset and model do not need.

    A kept version keeps everything it was made from, its scores and reports, and the parts by which
    the next refresh computes only what is new. Parts and checkpoints of runs that did not end are
    kept for a week. The catalogue keeps its record of everything, so a removed version can still be
    listed, and be made again by the same run.

    Example: `geofm prune --keep 3 --dry-run`
    """
    from data_catalog import prune as pruning
    from flows.settings import open_place

    place = open_place(store, catalog, write=not dry_run)
    if dry_run:
        found = pruning.plan_prune(place.store, place.catalogue, keep, DESCRIBED_BY)
    else:
        place.clean_up()
        with progress_bars():
            found = pruning.prune(place.store, place.catalogue, keep, DESCRIBED_BY)
    mib = found.size / 2**20
    if json_:
        print_json(
            {
                "artifacts": len(found.artifacts),
                "parts": len(found.parts),
                "scratch": len(found.scratch),
                "mib": round(mib, 2),
                "removed": not dry_run,
            }
        )
        return
    verb = "would be removed" if dry_run else "removed"
    out.print(
        f"{len(found.artifacts):,} artifacts, {len(found.parts):,} parts and "
        f"{len(found.scratch):,} scratch folders {verb}: {mib:,.1f} MiB",
        highlight=False,
    )


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(prune)
