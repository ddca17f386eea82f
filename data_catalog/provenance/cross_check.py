"""Check the rows of the catalogue against the sealed manifests, of which they are copies."""

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
    """Find the rows of an artifact that contradict its manifest.

    Args:
        catalogue: The catalogue.
        artifact: The artifact; its digest is that of the manifest.
        manifest: Its sealed manifest.

    Returns:
        A sentence for each contradiction, and for each thing that could not be read.
    """
    label, findings = f"catalogue: {manifest.kind} {artifact.digest[:12]}", Findings()
    try:
        for problem in _contradictions(catalogue, artifact, manifest):
            findings.problems.append(f"{label} {problem}")
        if manifest.kind == "scores" and _scores_differ(catalogue, artifact):
            findings.problems.append(f"{label} has other scores than {SCORES}")
    except (CheckError, OutOfReach) as error:
        findings.add_error(error, f"{label}: ")
    return findings


def _contradictions(catalogue: Catalogue, artifact: Artifact, manifest: Manifest) -> Iterator[str]:
    """Yield the contradictions of the rows of an artifact, its edges and its sources."""
    digest = artifact.digest
    with catalogue.session() as session:
        row = session.get(ArtifactRow, digest)
        edge_rows = session.scalars(select(EdgeRow).where(EdgeRow.child == digest))
        edges = {edge.role: edge.parent for edge in edge_rows}
        sources = list(session.scalars(select(SourceRow).where(SourceRow.artifact == digest)))
    if row is None:
        yield "has no row"
        return
    if digest_of(row.manifest) != digest:
        yield "has another manifest than the one that was sealed"
    for name in ("kind", "stage"):
        if getattr(row, name) != getattr(manifest, name):
            yield f"has {name} {getattr(row, name)!r}, not {getattr(manifest, name)!r}"
    for role in sorted(manifest.inputs.keys() | edges.keys()):
        sealed, recorded = manifest.inputs.get(role), edges.get(role)
        if recorded is None:
            yield f"lacks the edge to its input {role} {sealed}"
        elif recorded != sealed:
            yield f"has an edge to {role} {recorded}, its manifest has {sealed or 'none'}"
    if _differ(sealed_sources(manifest), sources):
        yield "has other sources or licences than its manifest"


def _scores_differ(catalogue: Catalogue, artifact: Artifact) -> bool:
    """Return whether the recorded scores differ from the artifact's table."""
    query = select(ScoreRow).where(ScoreRow.artifact == artifact.digest)
    with catalogue.session() as session:
        if session.get(ArtifactRow, artifact.digest) is None:
            return False  # the missing row is reported as a problem of its own
        scores = list(session.scalars(query))
    return _differ(sealed_scores(artifact), scores)


def check_names(catalogue: Catalogue) -> list[str]:
    """Find published names without an artifact, or with an artifact of another kind."""
    problems = []
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
            problems.append(f"catalogue: {name}@{version} means {digest}, which has no row")
        elif kind not in NAMED:
            problems.append(f"catalogue: {name}@{version} means {digest[:12]} of kind {kind}")
    return problems


def _differ(sealed: list[dict[str, Any]], rows: list[Any]) -> bool:
    """Return whether rows of the catalogue differ from sealed rows, in any order."""
    names = list(sealed[0]) if sealed else []
    recorded = sorted(repr([_python_value(getattr(row, name)) for name in names]) for row in rows)
    return recorded != sorted(repr([_python_value(row[name]) for name in names]) for row in sealed)


def _python_value(value: Any) -> Any:
    """Convert a NumPy value to a Python value, so that both have the same text."""
    return value.tolist() if hasattr(value, "tolist") else value
