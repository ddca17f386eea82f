"""``geofm export``: a dataset in the formats of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_catalog.catalogue import Catalogue
from data_catalog.errors import UsageError
from flows.console import out, print_json, progress_bars
from flows.options import Catalog, Json, Ref, Store
from flows.settings import open_place

FORMATS = ("hf", "croissant")

Format = Annotated[str, typer.Option("--format", metavar="|".join(FORMATS), help="What to write.")]
Out = Annotated[
    str,
    typer.Option(
        "--out", metavar="PATH", help="Folder (hf) or file (croissant) to write. Default: by name."
    ),
]
Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="hf: link the store's own files instead of copying them (same disk; don't change "
        "them in place).",
    ),
]


def export(
    ref: Ref, format_: Format = "hf", target: Out = "", link: Link = False,
    store: Store = "", catalog: Catalog = "", json_: Json = False,
) -> None:  # fmt: skip
    """Write a dataset for others: a Hugging Face folder with its card, or Croissant 1.1."""
    from geofm.shards.export import export_croissant, export_huggingface, require_dataset

    if format_ not in FORMATS:
        raise UsageError(f"--format {format_} is not known; choose {' or '.join(FORMATS)}")
    catalogue = open_place(store, catalog).catalogue
    dataset = catalogue.resolve(ref)
    require_dataset(dataset)
    title, version, published = _published(catalogue, dataset.digest)
    title = title or str(dataset.manifest.facts["name"])
    path = Path(target or (f"{title}-hf" if format_ == "hf" else f"{title}.croissant.json"))
    try:
        with progress_bars():
            if format_ == "hf":
                export_huggingface(dataset, path, title, version, published, link)
            else:
                export_croissant(dataset, path, title, version, published)
    except OSError as error:
        raise UsageError(f"--out {path} can't be written ({error.strerror})") from error
    if json_:
        print_json({"digest": dataset.digest, "format": format_, "path": str(path.absolute())})
        return
    out.print(f"{ref}: {path}", highlight=False)


def _published(catalogue: Catalogue, digest: str) -> tuple[str, str, str]:
    """Name, version and day under which an artifact was last published; empty where it wasn't."""
    found = [name for name in catalogue.names() if name.digest == digest]
    if not found:
        return "", "", ""
    last = max(found, key=lambda name: name.created_at)
    return last.name, str(last.version), f"{last.created_at:%Y-%m-%d}"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)
