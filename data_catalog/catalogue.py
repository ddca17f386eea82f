"""The catalogue: one record of artifacts and runs that is cache, resume, refresh and provenance.

SQLite (WAL) for one machine, PostgreSQL for a team: the address decides, the code is the same.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, Select, func, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from data_catalog.artifact import Artifact
from data_catalog.database.connection import CatalogueUnreachable, connect, rows_that_read
from data_catalog.database.lease import Lease, call_catalogue, database_time, heartbeat, hold
from data_catalog.database.runs import LOST, how_lost, is_lost, last_sign
from data_catalog.database.schema import ArtifactRow, EdgeRow, NameRow, RunRow, ScoreRow, SourceRow
from data_catalog.database.sealed_rows import sealed_scores, sealed_sources
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.manifest import Manifest
from data_catalog.redaction import mask
from data_catalog.storage.address import shown_address, sqlite_path
from data_catalog.storage.process import process_mark
from data_catalog.store import ARTIFACTS, Store

__all__ = [
    "Catalogue",
    "CatalogueUnreachable",
    "PublishedMeanwhile",
    "UnknownReference",
    "now",
    "open_catalogue",
]

log = logging.getLogger("geofm.catalogue")

#: Each failed attempt means that another process has published a version.
PUBLISH_ATTEMPTS = 50


class UnknownReference(UsageError):
    """A REF names no artifact, or more than one."""


class PublishedMeanwhile(RunError):
    """Another process published a version of the same name in the meantime."""


def now() -> datetime:
    """The current time of this machine, UTC."""
    return datetime.now(UTC)


class Catalogue:
    """A connection to the record. Every method is one short transaction.

    The catalogue knows artifacts by kind and digest; they are looked for in the store that was
    opened with it.
    """

    def __init__(self, url: str, engine: Engine, store: Store | None = None) -> None:
        self.url = url
        self.engine = engine
        self._store = store
        self._last: Store | None = None

    @property
    def store(self) -> Store:
        """The store in which the artifacts are.

        Raises:
            UsageError: the catalogue was opened without one.
        """
        store = self._store or self._last
        if store is None:
            raise UsageError(
                f"the catalogue {shown_address(self.url)} was opened without a store: give "
                "open_catalogue the store that holds its artifacts"
            )
        return store

    def at(self, store: Store) -> Catalogue:
        """The same catalogue with its artifacts in another store."""
        return Catalogue(self.url, self.engine, store)

    def _artifact(self, row: ArtifactRow) -> Artifact:
        return self.store.artifact(row.kind, row.digest)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block.

        Raises:
            CheckError: a row cannot be read.
        """
        with (
            rows_that_read(self.url),
            Session(self.engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def record(self, artifact: Artifact, key: str) -> None:
        """Enter a sealed artifact with its edges, sources and scores; again is harmless.

        Raises:
            CheckError: its sources or scores have another shape.
        """
        self._last = Store.of(artifact)
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
        """Whether an artifact is recorded."""
        with self.session() as session:
            return session.get(ArtifactRow, digest) is not None

    def find(self, key: str) -> Artifact | None:
        """The newest artifact made by a job with this key."""
        query = select(ArtifactRow).where(ArtifactRow.key == key)
        with self.session() as session:
            row = session.scalars(query.order_by(ArtifactRow.number.desc())).first()
        return None if row is None else self._artifact(row)

    def last_made(self, key: str) -> Artifact | None:
        """What the newest finished run of a job with this key came to.

        Not the newest artifact: a world that went from A to B and back to A is at A again.
        """
        done = select(RunRow.artifact).where(RunRow.key == key, RunRow.status == "done")
        with self.session() as session:
            digest = session.scalars(
                done.where(RunRow.artifact.is_not(None)).order_by(RunRow.number.desc())
            ).first()
            row = None if digest is None else session.get(ArtifactRow, digest)
        return None if row is None else self._artifact(row)

    def results_of(self, stage: str) -> Iterator[tuple[Artifact, dict[str, Any]]]:
        """The results of a stage's finished runs with their manifests, newest first."""
        runs = select(RunRow.artifact).where(RunRow.stage == stage, RunRow.status == "done")
        with self.session() as session:
            for digest in session.scalars(
                runs.where(RunRow.artifact.is_not(None)).order_by(RunRow.number.desc())
            ):
                row = session.get(ArtifactRow, digest)
                if row is not None:
                    yield self._artifact(row), row.manifest

    def artifacts(self, kind: str | None = None) -> list[ArtifactRow]:
        """All artifacts, newest first."""
        query = select(ArtifactRow).order_by(ArtifactRow.number.desc())
        if kind is not None:
            query = query.where(ArtifactRow.kind == kind)
        with self.session() as session:
            return list(session.scalars(query))

    def resolve(self, ref: str) -> Artifact:
        """The artifact that a name, ``name@version``, digest or unique digest prefix means.

        Raises:
            UnknownReference: nothing or more than one thing has this name.
        """
        name, _, version = ref.partition("@")
        with self.session() as session:
            named = _newest_first(name)
            if version:
                named = named.where(NameRow.version == version)
            found = session.scalars(named).first()
            if found is not None:
                digests = [found.digest]
            elif version or len(ref) < 4:
                digests = []
            else:
                begins = ArtifactRow.digest.startswith(ref, autoescape=True)
                digests = list(session.scalars(select(ArtifactRow.digest).where(begins).limit(3)))
            rows = [session.get(ArtifactRow, digest) for digest in digests]
        if len(rows) == 1 and rows[0] is None:
            raise CheckError(
                f"the catalogue {shown_address(self.url)} is damaged: {ref!r} means {digests[0]}, "
                "of which it has no row; restore it from another copy"
            )
        if len(rows) != 1 or rows[0] is None:
            problem = "is ambiguous: give more digits" if rows else "names nothing"
            raise UnknownReference(f"{ref!r} {problem}; `geofm list` shows what there is")
        return self._artifact(rows[0])

    def get(self, digest: str) -> Artifact:
        """The artifact with exactly this digest.

        Raises:
            UnknownReference: the catalogue does not know it.
        """
        with self.session() as session:
            row = session.get(ArtifactRow, digest)
        if row is None:
            raise UnknownReference(f"no artifact {digest} in this catalogue")
        return self._artifact(row)

    def parents(self, digest: str) -> dict[str, str]:
        """Digests of an artifact's inputs by role, as recorded when it was sealed."""
        query = select(EdgeRow).where(EdgeRow.child == digest).order_by(EdgeRow.role)
        with self.session() as session:
            return {edge.role: edge.parent for edge in session.scalars(query)}

    def kind(self, digest: str) -> str:
        """The kind of an artifact, as recorded when it was sealed."""
        with self.session() as session:
            row = session.get(ArtifactRow, digest)
        if row is None:
            raise UnknownReference(f"no artifact {digest} in this catalogue")
        return row.kind

    def manifest(self, digest: str) -> Manifest | None:
        """The manifest as recorded when the artifact was sealed: a second copy of it."""
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
        """Give an artifact a version of a name: ``name@day``, ``name@day.2`` when that is taken.

        Publishing what is already the newest version changes nothing. The new version follows
        the newest one, also when several processes publish at once.

        Args:
            name: of the dataset or model.
            artifact: what is published.
            day: ISO date.
            difference: what changed against the newest version, in numbers.
            after: ``number`` of the version that ``difference`` was computed against; 0 for a
                first version; None if there is no difference to keep right.

        Raises:
            PublishedMeanwhile: ``after`` is not the newest version any more, or other processes
                publish all the time.
            UnknownReference: the artifact is not recorded in this catalogue.
        """
        for _ in range(PUBLISH_ATTEMPTS):
            try:
                return self._publish(name, artifact, day, difference, after)
            except IntegrityError:  # another process published in the same moment: follow it
                log.debug("publish %s: another version was published, trying again", name)
        raise PublishedMeanwhile(f"other runs publish {name} all the time; run again later")

    def _publish(
        self,
        name: str,
        artifact: Artifact,
        day: str,
        difference: dict[str, Any] | None,
        after: int | None,
    ) -> NameRow:
        """Publish once; an IntegrityError where another process was faster."""
        self.kind(artifact.digest)  # raises UnknownReference
        with self.session() as session:
            # read before the versions: a version that is published from here on takes this number
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
        """The newest version of a name: the one that no other version follows."""
        with self.session() as session:
            return session.scalars(_newest_first(name)).first()

    def clock(self) -> datetime:
        """The database's time, UTC: the same for every machine that uses this catalogue."""
        with self.session() as session:
            return database_time(session)

    def version_of(self, ref: str) -> NameRow:
        """The published version that a REF means: by name, or the newest with its digest.

        Raises:
            UnknownReference: it was never published.
        """
        name, _, version = ref.partition("@")
        digest = self.resolve(ref).digest
        found = [row for row in self.names() if row.digest == digest]
        named = [r for r in found if r.name == name and version in ("", r.version)]
        if not found:
            raise UnknownReference(f"{ref!r} is no published version; `geofm list` shows those")
        return (named or found)[0]

    def names(self) -> list[NameRow]:
        """All published versions, newest first."""
        with self.session() as session:
            return list(session.scalars(_newest_first()))

    def lease(
        self, name: str, wait: bool = True, verb: str = "refreshed"
    ) -> AbstractContextManager[Lease]:
        """Exclude other processes from ``name`` while the block runs; see ``lease.hold``."""
        return hold(self.engine, name, wait, verb=verb)

    def sources(self, digest: str) -> list[SourceRow]:
        """Sources and licences recorded for an artifact."""
        with self.session() as session:
            return list(session.scalars(select(SourceRow).where(SourceRow.artifact == digest)))

    @contextmanager
    def run(self, stage: str, key: str) -> Iterator[RunRow]:
        """Record one execution: running, then done or failed, with times, host and metrics.

        The caller sets ``artifact`` and ``metrics`` on the row it is given. A heartbeat keeps the
        record from being taken for that of a killed process.
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
        """Note that a run goes on, also if it was taken for lost; False if it has finished."""
        unfinished = RunRow.id == run_id, RunRow.status.in_(("running", LOST))
        with self.session() as session:
            beaten = session.execute(
                update(RunRow)
                .where(*unfinished)
                .values(status="running", finished_at=None, error=None, beat=database_time(session))
            )
            return bool(beaten.rowcount)  # type: ignore[attr-defined]

    def keep(self, row: RunRow, metrics: dict[str, Any]) -> None:
        """Note what a run has come to so far, in case it is killed.

        A catalogue that does not answer now is no reason to stop: the next note says more.
        """
        row.metrics = metrics
        try:
            with self.session() as session:
                session.execute(update(RunRow).where(RunRow.id == row.id).values(metrics=metrics))
        except SQLAlchemyError as error:
            said = mask(str(error).splitlines()[0])
            log.warning("the catalogue could not note a run's cost: %s", said)

    def runs(self, digests: list[str] | None = None) -> list[RunRow]:
        """Run records, oldest first; of these artifacts only where given.

        A run whose process has ended without finishing it has the status ``lost``, whether or
        not the catalogue says so yet.
        """
        query = select(RunRow).order_by(RunRow.number)
        if digests is not None:
            query = query.where(RunRow.artifact.in_(digests))
        with self.session() as session:
            rows, moment = list(session.scalars(query)), database_time(session)
        for row in rows:
            if is_lost(row, moment):
                row.status, row.finished_at, row.error = LOST, last_sign(row), how_lost(row)
        return rows

    def close_lost_runs(self) -> int:
        """Give the runs whose process was killed the status ``lost``; returns how many."""
        with self.session() as session:
            moment = database_time(session)
            running = list(session.scalars(select(RunRow).where(RunRow.status == "running")))
        lost = [row for row in running if is_lost(row, moment)]
        closed = 0
        for row in lost:
            # another process may close it as well, or the run may have come back
            same = RunRow.id == row.id, RunRow.status == "running", RunRow.beat == row.beat
            values = {"status": LOST, "finished_at": last_sign(row), "error": how_lost(row)}
            with self.session() as session:
                done = session.execute(update(RunRow).where(*same).values(**values))
                closed += done.rowcount  # type: ignore[attr-defined]
        return closed


def _newest_first(name: str | None = None) -> Select[tuple[NameRow]]:
    """Select published versions in the reverse order of their publication, of one name if given."""
    query = select(NameRow).order_by(NameRow.number.desc())
    return query if name is None else query.where(NameRow.name == name)


def open_catalogue(url: str, store: Store | None = None, write: bool = True) -> Catalogue:
    """Open a catalogue and bring its tables up to date.

    Args:
        url: a SQLAlchemy address, e.g. ``sqlite:////data/catalogue.db`` or
            ``postgresql+psycopg://user@host/geofm``.
        store: where its artifacts are. None: the folder of a SQLite file that is in a store, else
            the store of the artifact that was recorded last through this connection.
        write: create the catalogue where there is none; see ``database.connect``.

    Raises:
        CatalogueUnreachable: with the address (no password) and the remedy.
    """
    address, engine = connect(url, write)
    path = sqlite_path(address)
    if store is None and path is not None and (path.parent / ARTIFACTS).is_dir():
        store = Store(str(path.parent))
    catalogue = Catalogue(address, engine, store)
    if engine.url.database:  # closing the last connection folds a SQLite log into its file
        weakref.finalize(catalogue, engine.dispose)
    return catalogue
