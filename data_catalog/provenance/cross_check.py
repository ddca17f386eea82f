"""The catalogue's rows against the sealed manifests that they are a copy of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import select

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import ArtifactRow, EdgeRow, NameRow, ScoreRow, SourceRow
from data_catalog.database.sealed_rows import SCORES, sealed_scores, sealed_sources
from data_catalog.errors import CheckError
from data_catalog.hashing import digest_of
from data_catalog.manifest import Manifest
from data_catalog.provenance.findings import Findings
from data_catalog.storage.reach import OutOfReach

#: Kinds of artifacts that are published under names.
NAMED = ("dataset", "model")


def check_rows(catalogue: Catalogue, artifact: Artifact, manifest: Manifest) -> Findings:
    """Find what the catalogue says of an artifact that its manifest contradicts.

    Args:
        catalogue: The catalogue.
        artifact: The artifact; its digest is that of the manifest.
        manifest: Its sealed manifest.

    Returns:
        One sentence for each contradiction, and for what could not be read.
    """
    label, found = f"catalogue: {manifest.kind} {artifact.digest[:12]}", Findings()
    try:
        for problem in _contradictions(catalogue, artifact, manifest):
            found.problems.append(f"{label} {problem}")
        if manifest.kind == "scores" and _scores_differ(catalogue, artifact):
            found.problems.append(f"{label} has other scores than {SCORES}")
    except (CheckError, OutOfReach) as error:
        found.add_error(error, f"{label}: ")
    return found


def _contradictions(catalogue: Catalogue, artifact: Artifact, manifest: Manifest) -> Iterator[str]:
    digest = artifact.digest
    with catalogue.session() as session:
        row = session.get(ArtifactRow, digest)
        edges = {e.role: e.parent for e in session.scalars(_of(EdgeRow, EdgeRow.child, digest))}
        sources = list(session.scalars(_of(SourceRow, SourceRow.artifact, digest)))
    if row is None:
        yield "has no row"
        return
    if digest_of(row.manifest) != digest:
        yield "has another manifest than the one that was sealed"
    for name in ("kind", "stage"):
        if getattr(row, name) != getattr(manifest, name):
            yield f"has {name} {getattr(row, name)!r}, not {getattr(manifest, name)!r}"
    for role in sorted(manifest.inputs.keys() | edges.keys()):
        sealed, said = manifest.inputs.get(role), edges.get(role)
        if said is None:
            yield f"lacks the edge to its input {role} {sealed}"
        elif said != sealed:
            yield f"has an edge to {role} {said}, its manifest says {sealed or 'none'}"
    if _differ(sealed_sources(manifest), sources):
        yield "has other sources or licences than its manifest"


def _scores_differ(catalogue: Catalogue, artifact: Artifact) -> bool:
    with catalogue.session() as session:
        if session.get(ArtifactRow, artifact.digest) is None:
            return False  # that is a problem of its own
        scores = list(session.scalars(_of(ScoreRow, ScoreRow.artifact, artifact.digest)))
    return _differ(sealed_scores(artifact), scores)


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
    """A value as Python writes it, whatever library it comes from."""
    return value.tolist() if hasattr(value, "tolist") else value
