"""Commands that read the store: its artifacts, their lineage, and the proof that they are intact.

The work is in ``artifacts``, ``lineage`` and ``verify``, which are imported when a command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.options import Catalog, Json, Ref, Store

SampleRef = Annotated[
    str,
    typer.Argument(
        metavar="REF[/SAMPLE]", help="An artifact, or one sample of a dataset by its chip id."
    ),
]


def list_(store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """List the artifacts in the store, newest first, with the names they are published under."""
    from flows.cli.artifacts import print_artifacts

    print_artifacts(store, catalog, json_)


def runs(store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """List the runs of stages, newest first: running, done, failed, or lost (killed)."""
    from flows.cli.artifacts import print_runs

    print_runs(store, catalog, json_)


def show(ref: Ref, store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """Show an artifact's manifest, and the cost of it and of everything it was made from.

    The cost (seconds, GPU seconds, energy) is the sum over the runs that made the artifacts. It is
    kept in the catalogue, not in the artifact.
    """
    from flows.cli.artifacts import print_artifact

    print_artifact(ref, store, catalog, json_)


def path(ref: Ref, store: Store = "", catalog: Catalog = "") -> None:
    """Print the folder or address of an artifact, for use in scripts.

    Example: `ls $(geofm path demo)`
    """
    from flows.cli.artifacts import print_path

    print_path(ref, store, catalog)


def diff(
    old: Annotated[
        str, typer.Argument(metavar="OLD", help="The earlier version; or, alone, the later one.")
    ],
    new: Annotated[
        str,
        typer.Argument(
            metavar="NEW", help="The later version. [default: OLD, compared with its predecessor]"
        ),
    ] = "",
    store: Store = "",
    catalog: Catalog = "",
    json_: Json = False,
) -> None:
    """Show what changed between two versions of a dataset or model, and why.

    Example: `geofm diff demo@2026-11-01 demo@2026-11-30`
    """
    from flows.cli.lineage import print_diff

    print_diff(old, new, store, catalog, json_)


def trace(ref: SampleRef, store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """Trace an artifact to its sources, or one sample to its asset, licence and window.

    Example: `geofm trace demo` lists the lineage; `geofm trace demo/CHIP` follows one sample.
    """
    from flows.cli.lineage import print_trace

    print_trace(ref, store, catalog, json_)


def why(
    chip: Annotated[str, typer.Argument(metavar="CHIP", help="Id of a candidate chip.")],
    within: Annotated[
        str,
        typer.Option(
            "--in", metavar="REF", help="The dataset, model or report whose curation is explained."
        ),
    ],
    picture: Annotated[
        str,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="File for the PNG of the chip and its witness. [default: a file in the store, or "
            "in the temporary folder if the store can't be written]",
        ),
    ] = "",
    store: Store = "",
    catalog: Catalog = "",
    json_: Json = False,
) -> None:
    """Explain why a candidate chip was kept or dropped: the rule, its scores, and the witness.

    The witness of a dropped chip is the kept chip that takes its place.
    """
    from flows.cli.lineage import print_reason

    print_reason(chip, within, picture, store, catalog, json_)


def licences(ref: Ref, store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """List the licences in an artifact's lineage, with the data or weights under each of them."""
    from flows.cli.lineage import print_licences

    print_licences(ref, store, catalog, json_)


def verify(
    ref: Ref,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also check every artifact that it was made from.")
    ] = False,
    recut: Annotated[
        int,
        typer.Option(
            "--recut",
            min=0,
            metavar="N",
            help="Cut N samples again from the source, and compare their pixels with the chip "
            "table and the shards.",
        ),
    ] = 0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="S",
            help="Seed that chooses the samples of --recut. [default: random; it is printed]",
        ),
    ] = None,
    store: Store = "",
    catalog: Catalog = "",
    json_: Json = False,
) -> None:
    """Hash an artifact again, and name the shard and sample where a bit differs.

    Exit code 4: something is damaged or contradicts the manifests. Exit code 3: something could
    not be read, and the rest is undamaged.
    """
    from flows.cli.verify import print_verification

    print_verification(ref, deep, recut, seed, store, catalog, json_)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(name="list")(list_)
    for command in (runs, show, path, diff, trace, why, licences, verify):
        app.command()(command)
