"""The tables of the catalogue. Rows of samples, chips and items stay in Parquet in the artifacts.

A change of a table needs a migration in ``migrations/versions``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import JSON, DateTime, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of all tables."""


def _numbered(table: str) -> Mapped[int]:
    """Define a column that numbers the rows of a table in the order of insertion.

    The newest row is the one with the highest number. Times are not compared, because the clocks of
    machines differ.
    """
    last = sa.select(sa.func.coalesce(sa.func.max(sa.column("number", Integer)), 0))
    following = last.select_from(sa.table(table)).scalar_subquery() + 1
    return mapped_column(Integer, default=following, index=True)


class ArtifactRow(Base):
    """A sealed artifact with its manifest; kind and digest give its address in the store."""

    __tablename__ = "artifact"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)
    stage: Mapped[str] = mapped_column(String(32))
    key: Mapped[str] = mapped_column(String(64), index=True)
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    number: Mapped[int] = _numbered("artifact")


class EdgeRow(Base):
    """An input of an artifact: ``child`` was made from ``parent``, its input called ``role``."""

    __tablename__ = "edge"

    child: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), primary_key=True)
    role: Mapped[str] = mapped_column(String(32), primary_key=True)
    parent: Mapped[str] = mapped_column(String(64), index=True)


class RunRow(Base):
    """A run of a stage: times, host, metrics and result.

    The status is running, done, failed, or lost (the process was killed).
    """

    __tablename__ = "run"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    stage: Mapped[str] = mapped_column(String(32))
    key: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    finished_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    seconds: Mapped[float | None] = mapped_column(Float)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    #: Identifies the process (``process_mark``); empty in records of earlier versions.
    process: Mapped[str | None] = mapped_column(String(255))
    #: Time of the last heartbeat.
    beat: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    artifact: Mapped[str | None] = mapped_column(String(64), index=True)
    error: Mapped[str | None] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    number: Mapped[int] = _numbered("run")


class PartCostRow(Base):
    """The cost of one part of a stage's work: its share of the run that computed it.

    A part that is damaged and computed again has the cost of the last time.
    """

    __tablename__ = "part_cost"

    part: Mapped[str] = mapped_column(String(64), primary_key=True)
    #: Key of the job that computed it.
    job: Mapped[str] = mapped_column(String(64))
    seconds: Mapped[float] = mapped_column(Float)
    gpu_seconds: Mapped[float | None] = mapped_column(Float)
    kwh: Mapped[float | None] = mapped_column(Float)
    kg_co2e: Mapped[float | None] = mapped_column(Float)


class NameRow(Base):
    """A published version of a named dataset or model."""

    __tablename__ = "name"
    __table_args__ = (
        Index("ix_name_digest", "digest"),
        Index("ix_name_number", "number", unique=True),
    )

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("artifact.digest"))
    predecessor: Mapped[str | None] = mapped_column(String(64))
    #: Time of publication by the database's clock, for people; the order is that of ``number``.
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    #: Order of publication in this catalogue. It is unique, so two writers that publish at once
    #: can't both follow the same predecessor (``Catalogue.publish``).
    number: Mapped[int] = mapped_column(Integer)
    #: Changes against the predecessor, in numbers; empty for a first version.
    difference: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class LeaseRow(Base):
    """A lease: the process that holds it, with the time of its last heartbeat."""

    __tablename__ = "lease"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(32))
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    process: Mapped[str] = mapped_column(String(255))
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    beat: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class ItemRow(Base):
    """The state of an item in a record (one search and cut), since when, and the attempts."""

    __tablename__ = "item"

    record: Mapped[str] = mapped_column(String(64), primary_key=True)
    collection: Mapped[str] = mapped_column(String(255), primary_key=True)
    item_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    item_sha256: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(Text)
    detail: Mapped[str] = mapped_column(Text)
    by: Mapped[str] = mapped_column(Text)
    stand_in: Mapped[str] = mapped_column(String(64))
    licence: Mapped[str] = mapped_column(Text)
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    tried: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    tries: Mapped[int] = mapped_column(Integer)


class SourceRow(Base):
    """A source of an artifact's imagery: licence, attribution and number of rows."""

    __tablename__ = "source"

    artifact: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), primary_key=True)
    source: Mapped[str] = mapped_column(String(128), primary_key=True)
    licence: Mapped[str] = mapped_column(String(255), primary_key=True)
    attribution: Mapped[str] = mapped_column(Text, default="")
    rows: Mapped[int] = mapped_column(Integer)


class ScoreRow(Base):
    """A row of a scores artifact, for comparing models without opening files."""

    __tablename__ = "score"

    artifact: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    model: Mapped[str] = mapped_column(String(128))
    feature: Mapped[str] = mapped_column(String(32))
    task: Mapped[str] = mapped_column(String(128))
    protocol: Mapped[str] = mapped_column(String(32))
    metric: Mapped[str] = mapped_column(String(32))
    value: Mapped[float] = mapped_column(Float)
    ci_low: Mapped[float] = mapped_column(Float)
    ci_high: Mapped[float] = mapped_column(Float)
    n: Mapped[int] = mapped_column(Integer)
    seed: Mapped[int] = mapped_column(Integer)
