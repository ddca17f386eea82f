"""The catalogue's rows against the sealed manifests that they are a copy of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select

from data_catalog.artifact import Artifact
from data_catalog.canonical import digest_of
from data_catalog.catalogue import Catalogue
from data_catalog.errors import CheckError
from data_catalog.manifest import Manifest
from data_catalog.schema import ArtifactRow, EdgeRow, NameRow, ScoreRow, SourceRow
from data_catalog.tables import records

#: Kinds of artifacts that are published under names.
NAMED = ("dataset", "model")


def check_rows(catalogue: Catalogue, artifact: Artifact, manifest: Manifest) -> list[str]:
    """Find what the catalogue says of an artifact that its manifest contradicts.

    Args:
        catalogue: The catalogue.
        artifact: The artifact; its digest is that of the manifest.
        manifest: Its sealed manifest.

    Returns:
        One sentence for each contradiction.
    """
    label = f"catalogue: {manifest.kind} {artifact.digest[:12]}"
    try:
        return [f"{label} {problem}" for problem in _contradictions(catalogue, artifact, manifest)]
    except CheckError as error:
        return [f"{label}: {error}"]


def _contradictions(catalogue: Catalogue, artifact: Artifact, manifest: Manifest) -> Iterable[str]:
    digest = artifact.digest
    with catalogue.session() as session:
        row = session.get(ArtifactRow, digest)
        edges = {e.role: e.parent for e in session.scalars(_of(EdgeRow, EdgeRow.child, digest))}
        sources = list(session.scalars(_of(SourceRow, SourceRow.artifact, digest)))
        scores = list(session.scalars(_of(ScoreRow, ScoreRow.artifact, digest)))
    if row is None:
        return ["has no row"]
    found = []
    if digest_of(row.manifest) != digest:
        found.append("has another manifest than the one that was sealed")
    for name in ("kind", "stage"):
        if getattr(row, name) != getattr(manifest, name):
            found.append(f"has {name} {getattr(row, name)!r}, not {getattr(manifest, name)!r}")
    for role in sorted(manifest.inputs.keys() | edges.keys()):
        sealed, said = manifest.inputs.get(role), edges.get(role)
        if said is None:
            found.append(f"lacks the edge to its input {role} {sealed}")
        elif said != sealed:
            found.append(f"has an edge to {role} {said}, its manifest says {sealed or 'none'}")
    wanted = [
        {"source": s["source"], "licence": s["licence"], "rows": s["rows"],
         "attribution": s.get("attribution", "")}
        for s in manifest.facts.get("sources", [])
    ]  # fmt: skip
    if _differ(wanted, sources):
        found.append("has other sources or licences than its manifest")
    if manifest.kind == "scores":
        columns = [c.key for c in ScoreRow.__table__.columns][2:]
        if _differ(records(artifact.table("scores.parquet", columns)), scores):
            found.append("has other scores than scores.parquet")
    return found


def check_names(catalogue: Catalogue) -> list[str]:
    """Find names that mean no artifact, or one of a kind that is not published."""
    found = []
    try:
        with catalogue.session() as session:
            named = session.execute(
                select(NameRow.name, NameRow.version, NameRow.digest, ArtifactRow.kind).outerjoin(
                    ArtifactRow, ArtifactRow.digest == NameRow.digest
                )
            ).all()
    except CheckError as error:
        return [str(error)]
    for name, version, digest, kind in named:
        if kind is None:
            found.append(f"catalogue: {name}@{version} means {digest}, of which it has no row")
        elif kind not in NAMED:
            found.append(f"catalogue: {name}@{version} means {digest[:12]} of kind {kind}")
    return found


def _of(table: Any, column: Any, digest: str) -> Any:
    return select(table).where(column == digest)


def _differ(wanted: list[dict[str, Any]], rows: list[Any]) -> bool:
    """Whether rows of the catalogue say something else than these dictionaries, in any order."""
    names = list(wanted[0]) if wanted else []
    said = sorted(repr([_plain(getattr(row, name)) for name in names]) for row in rows)
    return said != sorted(repr([_plain(row[name]) for name in names]) for row in wanted)


def _plain(value: Any) -> Any:
    """A number as Python writes it, whatever library it comes from."""
    return value.item() if hasattr(value, "item") else value
