"""The catalogue: the record of artifacts, runs, versions and leases in a database.

The record serves as cache (``find``), for refreshes (``last_made``, ``results_of``) and as
provenance (``lineage``). It is a copy of the manifests, which are in the store; ``geofm verify``
compares the two. The database is SQLite (WAL) for one machine or PostgreSQL for a team; the address
decides, the code is the same.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, Select, func, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from data_catalog.artifact import Artifact
from data_catalog.database.address import shown_address
from data_catalog.database.connection import connect, readable_rows
from data_catalog.database.lease import Lease, call_catalogue, database_time, heartbeat, hold_lease
from data_catalog.database.runs import LOST, describe_loss, is_lost, last_sign
from data_catalog.database.schema import ArtifactRow, EdgeRow, NameRow, RunRow, ScoreRow, SourceRow
from data_catalog.database.sealed_rows import sealed_scores, sealed_sources
from data_catalog.errors import CheckError, RunError, UsageError, first_line
from data_catalog.manifest import Manifest
from data_catalog.redaction import mask
from data_catalog.storage.process import process_mark
from data_catalog.store import Store

log = logging.getLogger("geofm.catalogue")

#: Most attempts to publish. Each failed one means that another process has published a version.
PUBLISH_ATTEMPTS = 50


class UnknownReference(UsageError):
    """A reference (REF) that names no artifact, or more than one."""


class PublishedMeanwhile(RunError):
    """Another process published a version of the same name in the meantime."""


def now() -> datetime:
    """Return the current time of this machine, UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class LineageEntry:
    """An artifact in a lineage as the catalogue records it.

    Attributes:
        inputs: Digests of the artifacts that it was made from, by role.
    """

    kind: str
    stage: str
    inputs: dict[str, str]


class Catalogue:
    """A connection to the record. Every method is one short transaction.

    The catalogue records artifacts by kind and digest; ``store`` is the store that holds them.
    """

    def __init__(self, url: str, engine: Engine, store: Store) -> None:
        self.url = url
        self.engine = engine
        self.store = store

    def at(self, store: Store) -> Catalogue:
        """Return the same catalogue for artifacts in another store."""
        return Catalogue(self.url, self.engine, store)

    def _artifact(self, row: ArtifactRow) -> Artifact:
        return self.store.artifact(row.kind, row.digest)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open a transaction that commits at the end of the block.

        Raises:
            CheckError: A row cannot be read.
        """
        with (
            readable_rows(self.url),
            Session(self.engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def record(self, artifact: Artifact, key: str) -> None:
        """Enter a sealed artifact with its edges, sources and scores, unless it is recorded.

        Args:
            artifact: The artifact.
            key: Key of the job that made it.

        Raises:
            CheckError: Its sources or scores do not have the shape of the tables.
        """
        try:
            self._record(artifact, key)
        except IntegrityError:  # another process entered it in the same moment
            self._record(artifact, key)

    def _record(self, artifact: Artifact, key: str) -> None:
        manifest = artifact.manifest
        sources = sealed_sources(manifest)
        with self.session() as session:
            if session.get(ArtifactRow, artifact.digest) is not None:
                return
            session.add(
                ArtifactRow(
                    digest=artifact.digest,
                    kind=manifest.kind,
                    stage=manifest.stage,
                    key=key,
                    manifest=manifest.model_dump(mode="json"),
                    created_at=database_time(session),
                )
            )
            session.flush()
            for role, parent in manifest.inputs.items():
                session.add(EdgeRow(child=artifact.digest, role=role, parent=parent))
            for source in sources:
                session.add(SourceRow(artifact=artifact.digest, **source))
            if manifest.kind == "scores":
                for number, row in enumerate(sealed_scores(artifact)):
                    session.add(ScoreRow(artifact=artifact.digest, number=number, **row))

    def knows(self, digest: str) -> bool:
        """Return whether an artifact is recorded."""
        with self.session() as session:
            return session.get(ArtifactRow, digest) is not None

    def find(self, key: str) -> Artifact | None:
        """Find the newest artifact made by a job with this key."""
        query = select(ArtifactRow).where(ArtifactRow.key == key)
        with self.session() as session:
            row = session.scalars(query.order_by(ArtifactRow.number.desc())).first()
        return None if row is None else self._artifact(row)

    def last_made(self, key: str) -> Artifact | None:
        """Find the artifact of the newest finished run of a job with this key.

        It need not be the newest artifact: if a catalogue of scenes changes and changes back, the
        newest run gives the first artifact again.
        """
        done = select(RunRow.artifact).where(RunRow.key == key, RunRow.status == "done")
        with self.session() as session:
            digest = session.scalars(
                done.where(RunRow.artifact.is_not(None)).order_by(RunRow.number.desc())
            ).first()
            row = None if digest is None else session.get(ArtifactRow, digest)
        return None if row is None else self._artifact(row)

    def results_of(self, stage: str) -> Iterator[tuple[Artifact, dict[str, Any]]]:
        """Yield the artifacts of a stage's finished runs with their manifests, newest first."""
        runs = select(RunRow.artifact).where(RunRow.stage == stage, RunRow.status == "done")
        with self.session() as session:
            for digest in session.scalars(
                runs.where(RunRow.artifact.is_not(None)).order_by(RunRow.number.desc())
            ):
                row = session.get(ArtifactRow, digest)
                if row is not None:
                    yield self._artifact(row), row.manifest

    def artifacts(self, kind: str | None = None) -> list[ArtifactRow]:
        """List the artifacts, newest first, of one kind if given."""
        query = select(ArtifactRow).order_by(ArtifactRow.number.desc())
        if kind is not None:
            query = query.where(ArtifactRow.kind == kind)
        with self.session() as session:
            return list(session.scalars(query))

    def resolve(self, ref: str) -> Artifact:
        """Find the artifact that a name, ``name@version``, digest or unique digest prefix means.

        Raises:
            UnknownReference: No artifact is meant, or more than one.
        """
        name, _, version = ref.partition("@")
        with self.session() as session:
            named = _newest_first(name)
            if version:
                named = named.where(NameRow.version == version)
            newest = session.scalars(named).first()
            if newest is not None:
                digests = [newest.digest]
            elif version or len(ref) < 4:
                digests = []
            else:
                begins = ArtifactRow.digest.startswith(ref, autoescape=True)
                digests = list(session.scalars(select(ArtifactRow.digest).where(begins).limit(3)))
            rows = [session.get(ArtifactRow, digest) for digest in digests]
        if len(rows) == 1 and rows[0] is None:
            raise CheckError(
                f"the catalogue {shown_address(self.url)} is damaged: {ref!r} means {digests[0]}, "
                "which has no row; restore it from another copy"
            )
        if len(rows) != 1 or rows[0] is None:
            problem = "is ambiguous: give more digits" if rows else "names no artifact"
            raise UnknownReference(f"{ref!r} {problem}; `geofm list` shows what there is")
        return self._artifact(rows[0])

    def get(self, digest: str) -> Artifact:
        """Return the artifact with exactly this digest.

        Raises:
            UnknownReference: It is not recorded.
        """
        return self.store.artifact(self.kind(digest), digest)

    def parents(self, digest: str) -> dict[str, str]:
        """Return the digests of an artifact's inputs by role, as recorded when it was sealed."""
        query = select(EdgeRow).where(EdgeRow.child == digest).order_by(EdgeRow.role)
        with self.session() as session:
            return {edge.role: edge.parent for edge in session.scalars(query)}

    def kind(self, digest: str) -> str:
        """Return the kind of an artifact, as recorded when it was sealed.

        Raises:
            UnknownReference: It is not recorded.
        """
        with self.session() as session:
            kind = session.scalar(select(ArtifactRow.kind).where(ArtifactRow.digest == digest))
        if kind is None:
            raise UnknownReference(f"no artifact {digest} in this catalogue")
        return kind

    def lineage(self, digests: Iterable[str]) -> dict[str, LineageEntry]:
        """Read artifacts and everything they were made from, nearest first.

        Each artifact is read once, and each generation costs two queries. Digests that are not
        recorded are left out.
        """
        entries: dict[str, LineageEntry] = {}
        generation = sorted(set(digests))
        with self.session() as session:
            while generation:
                artifacts = session.execute(
                    select(ArtifactRow.digest, ArtifactRow.kind, ArtifactRow.stage)
                    .where(ArtifactRow.digest.in_(generation))
                    .order_by(ArtifactRow.number.desc())
                ).all()
                inputs: dict[str, dict[str, str]] = {row.digest: {} for row in artifacts}
                edges = select(EdgeRow.child, EdgeRow.role, EdgeRow.parent)
                edges = edges.where(EdgeRow.child.in_(list(inputs))).order_by(EdgeRow.role)
                for child, role, parent in session.execute(edges):
                    inputs[child][role] = parent
                for row in artifacts:
                    entry = LineageEntry(row.kind, row.stage, inputs[row.digest])
                    entries[row.digest] = entry
                parents = {parent for roles in inputs.values() for parent in roles.values()}
                generation = sorted(parents - entries.keys())
        return entries

    def manifest(self, digest: str) -> Manifest | None:
        """Return the catalogue's copy of a manifest, recorded when the artifact was sealed."""
        with self.session() as session:
            row = session.get(ArtifactRow, digest)
        return None if row is None else Manifest.model_validate(row.manifest)

    def publish(
        self,
        name: str,
        artifact: Artifact,
        day: str,
        difference: dict[str, Any] | None = None,
        after: int | None = None,
    ) -> NameRow:
        """Publish an artifact as ``name@day``, or ``name@day.2`` if that version exists.

        If the artifact is the newest version already, nothing changes. The new version follows the
        newest one, also when several processes publish at once.

        Args:
            name: Name of the dataset or model.
            artifact: The artifact.
            day: ISO date.
            difference: Changes against the newest version, in numbers.
            after: ``number`` of the version that ``difference`` was computed against; 0 for a
                first version; None if no difference is given.

        Raises:
            PublishedMeanwhile: ``after`` is not the newest version any more, or other processes
                kept publishing.
            UnknownReference: The artifact is not recorded in this catalogue.
        """
        for _ in range(PUBLISH_ATTEMPTS):
            try:
                return self._publish(name, artifact, day, difference, after)
            except IntegrityError:  # another process published in the same moment: follow it
                log.debug("publish %s: another version was published, trying again", name)
        raise PublishedMeanwhile(
            f"other runs published {name} {PUBLISH_ATTEMPTS} times meanwhile; run again later"
        )

    def _publish(
        self,
        name: str,
        artifact: Artifact,
        day: str,
        difference: dict[str, Any] | None,
        after: int | None,
    ) -> NameRow:
        """Try to publish once; raises IntegrityError if another process was faster."""
        self.kind(artifact.digest)  # raises UnknownReference
        with self.session() as session:
            # The number is read before the versions, so a version that another process publishes
            # from here on takes the same number, and one of the two fails.
            number = (session.scalar(select(func.max(NameRow.number))) or 0) + 1
            rows = list(session.scalars(_newest_first(name)))
            if rows and rows[0].digest == artifact.digest:
                return rows[0]
            if after is not None and after != (rows[0].number if rows else 0):
                raise PublishedMeanwhile(
                    f"another run published {name}@{rows[0].version} in the meantime; run again"
                )
            taken = {row.version for row in rows}
            version, count = day, 1
            while version in taken:
                count += 1
                version = f"{day}.{count}"
            row = NameRow(
                name=name,
                version=version,
                digest=artifact.digest,
                created_at=database_time(session),
                number=number,
                predecessor=rows[0].version if rows else None,
                difference=difference,
            )
            session.add(row)
        return row

    def newest(self, name: str) -> NameRow | None:
        """Return the newest version of a name: the one that no other version follows."""
        with self.session() as session:
            return session.scalars(_newest_first(name)).first()

    def clock(self) -> datetime:
        """Return the database's time, UTC: the same on every machine that uses the catalogue."""
        with self.session() as session:
            return database_time(session)

    def version_of(self, ref: str) -> NameRow:
        """Return the published version that a reference means: by name, or the newest by digest.

        Raises:
            UnknownReference: The artifact was never published.
        """
        name, _, version = ref.partition("@")
        digest = self.resolve(ref).digest
        rows = [row for row in self.names() if row.digest == digest]
        named = [row for row in rows if row.name == name and version in ("", row.version)]
        if not rows:
            raise UnknownReference(f"{ref!r} is no published version; `geofm list` shows those")
        return (named or rows)[0]

    def names(self) -> list[NameRow]:
        """List all published versions, newest first."""
        with self.session() as session:
            return list(session.scalars(_newest_first()))

    def lease(
        self, name: str, wait: bool = True, verb: str = "refreshed"
    ) -> AbstractContextManager[Lease]:
        """Keep other processes out of ``name`` while a block runs; see ``hold_lease``."""
        return hold_lease(self.engine, name, wait, verb=verb)

    def sources(self, digest: str) -> list[SourceRow]:
        """List the sources and licences recorded for an artifact."""
        with self.session() as session:
            return list(session.scalars(select(SourceRow).where(SourceRow.artifact == digest)))

    @contextmanager
    def run(self, stage: str, key: str) -> Iterator[RunRow]:
        """Record a run of a stage: running, then done or failed, with times, host and metrics.

        The caller sets ``artifact`` and ``metrics`` on the row that is yielded. A heartbeat shows
        that the process lives.

        Args:
            stage: Name of the stage.
            key: Key of the job.
        """
        row = RunRow(
            id=str(uuid.uuid4()),
            stage=stage,
            key=key,
            status="running",
            started_at=now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_mark(),
            metrics={},
        )
        with self.session() as session:
            row.beat = database_time(session)
            session.add(row)
        started = time.perf_counter()
        try:
            with heartbeat(lambda: self._beat(row.id), f"run {row.id}"):
                yield row
            row.status = "done"
        except BaseException as error:
            row.status = "failed"
            row.error = mask(f"{type(error).__name__}: {error}")[:2000]
            raise
        finally:
            row.finished_at = now()
            row.seconds = time.perf_counter() - started
            call_catalogue(lambda: self._finish(row))

    def _finish(self, row: RunRow) -> None:
        with self.session() as session:
            row.beat = database_time(session)
            session.merge(row)

    def _beat(self, run_id: str) -> bool:
        """Note that a run goes on, even if it is marked as lost; False if it has finished."""
        unfinished = RunRow.id == run_id, RunRow.status.in_(("running", LOST))
        with self.session() as session:
            updated = session.execute(
                update(RunRow)
                .where(*unfinished)
                .values(status="running", finished_at=None, error=None, beat=database_time(session))
            )
            return bool(updated.rowcount)  # type: ignore[attr-defined]

    def keep(self, row: RunRow, metrics: dict[str, Any]) -> None:
        """Note the metrics of a run so far, in case its process is killed.

        If the catalogue does not answer now, a warning is logged; the next note is more complete.
        """
        row.metrics = metrics
        try:
            with self.session() as session:
                session.execute(update(RunRow).where(RunRow.id == row.id).values(metrics=metrics))
        except SQLAlchemyError as error:
            reason = mask(first_line(error))
            log.warning("the catalogue could not note a run's cost: %s", reason)

    def runs(self, digests: list[str] | None = None) -> list[RunRow]:
        """List run records, oldest first; if digests are given, those of these artifacts only.

        A run whose process has ended without finishing it has the status ``lost``, whether or not
        the catalogue records that yet.
        """
        query = select(RunRow).order_by(RunRow.number)
        if digests is not None:
            query = query.where(RunRow.artifact.in_(digests))
        with self.session() as session:
            rows, moment = list(session.scalars(query)), database_time(session)
        for row in rows:
            if is_lost(row, moment):
                row.status, row.finished_at, row.error = LOST, last_sign(row), describe_loss(row)
        return rows

    def close_lost_runs(self) -> int:
        """Mark the runs whose process was killed as lost; returns their number."""
        with self.session() as session:
            moment = database_time(session)
            running = list(session.scalars(select(RunRow).where(RunRow.status == "running")))
        lost = [row for row in running if is_lost(row, moment)]
        closed = 0
        for row in lost:
            # Another process may mark it as well, or the run may have come back.
            same = RunRow.id == row.id, RunRow.status == "running", RunRow.beat == row.beat
            values = {"status": LOST, "finished_at": last_sign(row), "error": describe_loss(row)}
            with self.session() as session:
                updated = session.execute(update(RunRow).where(*same).values(**values))
                closed += updated.rowcount  # type: ignore[attr-defined]
        return closed


def _newest_first(name: str | None = None) -> Select[tuple[NameRow]]:
    """Select published versions, newest first, of one name if given."""
    query = select(NameRow).order_by(NameRow.number.desc())
    return query if name is None else query.where(NameRow.name == name)


def open_catalogue(url: str, store: Store, write: bool = True) -> Catalogue:
    """Open a catalogue and bring its tables up to date.

    Args:
        url: SQLAlchemy address, e.g. ``sqlite:////data/catalogue.db`` or
            ``postgresql+psycopg://user@host/geofm``.
        store: Store that holds its artifacts.
        write: Create the catalogue if it does not exist; see ``database.connection.connect``.

    Raises:
        CatalogueUnreachable: The catalogue cannot be opened; the message has no password.
    """
    address, engine = connect(url, write)
    catalogue = Catalogue(address, engine, store)
    if engine.url.database:  # closing the last connection folds a SQLite log into its file
        weakref.finalize(catalogue, engine.dispose)
    return catalogue
