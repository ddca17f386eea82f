"""Rows that the catalogue copies from a sealed artifact, checked where they are read.

The schema of a manifest leaves ``facts`` open, and a table may have any columns: an artifact that
somebody else sealed can hold anything there.
"""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_catalog.artifact import Artifact
from data_catalog.database.schema import ScoreRow
from data_catalog.errors import CheckError
from data_catalog.manifest import Manifest, what_is_wrong
from data_catalog.tables import records

#: The table of an artifact of kind ``scores``.
SCORES = "scores.parquet"


class SourceEntry(BaseModel):
    """One entry of ``facts.sources``: a source whose material is in the artifact."""

    model_config = ConfigDict(frozen=True, strict=True)

    source: str
    licence: str
    rows: Annotated[int, Field(ge=0, lt=2**63)]
    attribution: str = ""


_SOURCES = TypeAdapter(list[SourceEntry])


def sealed_sources(manifest: Manifest) -> list[dict[str, Any]]:
    """Sources, licences and rows that a manifest names.

    Raises:
        CheckError: ``facts.sources`` has another shape.
    """
    try:
        entries = _SOURCES.validate_python(manifest.facts.get("sources", []))
    except ValidationError as error:
        raise CheckError(
            f"facts.sources of its manifest is no list of sources ({what_is_wrong(error)})"
        ) from error
    if len({(entry.source, entry.licence) for entry in entries}) != len(entries):
        raise CheckError("facts.sources of its manifest names a source and licence twice")
    return [entry.model_dump() for entry in entries]


def sealed_scores(artifact: Artifact) -> list[dict[str, Any]]:
    """Rows of a scores artifact's table, with the columns that the catalogue has.

    Raises:
        CheckError: The table is missing, damaged, or has other columns.
        OutOfReach: It could not be read.
    """
    columns = [c.key for c in ScoreRow.__table__.columns][2:]
    try:
        return records(artifact.table(SCORES, columns))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{SCORES} is no table of scores ({what_is_wrong(error)})") from error
