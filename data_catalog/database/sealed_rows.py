"""Rows that the catalogue copies from a sealed artifact: its sources and its scores.

They are checked here, because the manifest's schema does not check ``facts`` and a table may have
any columns: an artifact from an untrusted source can hold anything.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_catalog.artifact import Artifact
from data_catalog.database.schema import ScoreRow
from data_catalog.errors import CheckError
from data_catalog.manifest import Manifest, explain_invalid

#: The table of an artifact of kind ``scores``.
SCORES = "scores.parquet"


class SourceEntry(BaseModel):
    """An entry of ``facts.sources``: a source of the artifact's imagery."""

    model_config = ConfigDict(frozen=True, strict=True)

    source: str
    licence: str
    rows: Annotated[int, Field(ge=0, lt=2**63)]
    attribution: str = ""


_SOURCES = TypeAdapter(list[SourceEntry])


def sealed_sources(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the sources, licences and numbers of rows in a manifest.

    Raises:
        CheckError: ``facts.sources`` has another shape.
    """
    try:
        entries = _SOURCES.validate_python(manifest.facts.get("sources", []))
    except ValidationError as error:
        raise CheckError(
            f"facts.sources of its manifest is not a list of sources ({explain_invalid(error)})"
        ) from error
    if len({(entry.source, entry.licence) for entry in entries}) != len(entries):
        raise CheckError("facts.sources of its manifest names a source and licence twice")
    return [entry.model_dump() for entry in entries]


def sealed_scores(artifact: Artifact) -> list[dict[str, Any]]:
    """Return the rows of a scores artifact's table, with the columns of the catalogue's table.

    Raises:
        CheckError: The table is missing, damaged, or has other columns.
        OutOfReach: The table could not be read.
    """
    import pyarrow as pa

    from data_catalog.tables import records

    columns = [c.key for c in ScoreRow.__table__.columns][2:]
    try:
        return records(artifact.table(SCORES, columns))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{SCORES} is not a table of scores ({explain_invalid(error)})") from error
