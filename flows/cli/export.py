"""``geofm export``: write a dataset or a model in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_catalog.errors import UsageError
from flows.cli.console import out, print_json, progress_bars
from flows.cli.options import Catalog, Json, Ref, Store

if TYPE_CHECKING:
    from data_catalog.artifact import Artifact
    from data_catalog.catalogue import Catalogue

#: Formats of each kind of artifact.
FORMATS = {"dataset": ("hf", "croissant"), "model": ("hf", "stac")}
#: Suffix of the default path, by format.
SUFFIX = {"hf": "-hf", "croissant": ".croissant.json", "stac": ".stac.json"}

Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="|".join(SUFFIX),
        help="hf: a folder for Hugging Face, of a dataset or a model. croissant: the description "
        "of a dataset. stac: a model as a STAC item (MLM extension).",
    ),
]
Out = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="PATH",
        help="Folder (hf) or file to write. [default: the name with a suffix]",
    ),
]
Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="hf: make hard links to the store's files instead of copies. Needs the same disk; "
        "don't change the linked files.",
    ),
]


def export(
    ref: Ref,
    format_: Format = "hf",
    target: Out = "",
    link: Link = False,
    store: Store = "",
    catalog: Catalog = "",
    json_: Json = False,
) -> None:
    """Export a dataset or a model: Hugging Face folder with its card, Croissant, or STAC MLM.

    timm loads an exported model by `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Example: `geofm export demo --out demo-dataset`
    """
    from flows.settings import open_place

    if format_ not in SUFFIX:
        raise UsageError(f"--format {format_} is not known; choose {' or '.join(SUFFIX)}")
    catalogue = open_place(store, catalog, write=False).catalogue
    artifact = catalogue.resolve(ref)
    known = FORMATS.get(artifact.kind, ())
    if format_ not in known:
        remedy = f"choose {' or '.join(known)}" if known else "name a dataset or a model"
        raise UsageError(
            f"{artifact.digest[:12]} is of kind {artifact.kind}, which has no --format {format_}: "
            f"{remedy} (`geofm list`)"
        )
    title, version, published = _published(catalogue, artifact.digest)
    title = title or _title(artifact, catalogue)
    path = Path(target or f"{title}{SUFFIX[format_]}")
    write = _write_dataset if artifact.kind == "dataset" else _write_model
    try:
        with progress_bars():
            write(catalogue, artifact, format_, path, (title, version, published), link)
    except OSError as error:
        raise UsageError(
            f"--out {path} can't be written ({error.strerror}); name another path"
        ) from error
    if json_:
        print_json({"digest": artifact.digest, "format": format_, "path": str(path.absolute())})
        return
    out.print(f"{ref}: {path}", highlight=False)


def _write_dataset(
    catalogue: Catalogue,
    dataset: Artifact,
    format_: str,
    path: Path,
    name: tuple[str, str, str],
    link: bool,
) -> None:
    from geofm.shards.export import export_croissant, export_huggingface

    if format_ == "hf":
        export_huggingface(dataset, path, *name, link)
    else:
        export_croissant(dataset, path, *name)


def _write_model(
    catalogue: Catalogue,
    model: Artifact,
    format_: str,
    path: Path,
    name: tuple[str, str, str],
    link: bool,
) -> None:
    from data_catalog.provenance.costs import lineage_costs
    from geofm.pretraining.export.hub import export_model
    from geofm.pretraining.export.mlm import item_json, mlm_item

    dataset = catalogue.get(model.manifest.inputs["dataset"])
    if format_ == "hf":
        costs = lineage_costs(catalogue, [model.digest])
        export_model(model, dataset, path, name[0], costs, link)
    else:
        path.write_text(item_json(mlm_item(model, dataset, name[0])), encoding="utf-8")


def _title(artifact: Artifact, catalogue: Catalogue) -> str:
    """Return a title for an artifact without a published name."""
    if artifact.kind == "dataset":
        return str(artifact.manifest.facts["name"])
    dataset = catalogue.get(artifact.manifest.inputs["dataset"])
    return f"{dataset.manifest.facts['name']}-{artifact.manifest.facts['student']}"


def _published(catalogue: Catalogue, digest: str) -> tuple[str, str, str]:
    """Return name, version and day of an artifact's last publication; empty if there is none."""
    versions = [name for name in catalogue.names() if name.digest == digest]
    if not versions:
        return "", "", ""
    newest = versions[0]
    return newest.name, str(newest.version), f"{newest.created_at:%Y-%m-%d}"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)
