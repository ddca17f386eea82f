"""A lease: one at a time does a thing, such as refreshing a dataset; the others wait.

The holder's heart beats in the catalogue. It is gone when its process is (told at once on the same
machine) or when its heart has not beaten for a while by the catalogue's clock, which is the same
for everybody. Then the next one takes over.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from data_catalog.errors import RunError
from data_catalog.process import is_gone, process_mark
from data_catalog.progress import tick
from data_catalog.schema import LeaseRow

log = logging.getLogger("geofm.lease")

#: Seconds between two heartbeats, and without one until the holder is taken for gone.
BEAT_S, EXPIRY_S = 5.0, 90.0
#: Seconds between two looks of one who waits.
LOOK_S = 1.0


class LeaseHeld(RunError):
    """Somebody else holds the lease, and it was asked not to wait."""


class LeaseLost(RunError):
    """The lease was taken over, since the heart of this process had stopped for too long."""


@dataclass(frozen=True)
class Lease:
    """A lease that is held."""

    engine: Engine
    name: str
    holder: str

    def confirm(self) -> None:
        """Make sure that the lease is still this process's, before something final is done.

        Raises:
            LeaseLost: it is not; nothing was published.
        """
        if not _beat(self.engine, self.name, self.holder):
            raise LeaseLost(
                f"another run has taken over {self.name!r}, since this one did not answer for "
                f"{EXPIRY_S:.0f} s; nothing was published, run it again"
            )


@contextmanager
def hold(
    engine: Engine,
    name: str,
    wait: bool = True,
    beat_s: float = BEAT_S,
    expiry_s: float = EXPIRY_S,
) -> Iterator[Lease]:
    """Hold a lease while the block runs.

    Args:
        engine: the catalogue's.
        name: what is leased.
        wait: wait for the holder; else an error at once.
        beat_s: seconds between two heartbeats.
        expiry_s: seconds without a heartbeat after which a holder is taken for gone.

    Raises:
        LeaseHeld: somebody holds it and ``wait`` is False.
    """
    lease = Lease(engine, name, uuid.uuid4().hex)
    waited = False
    while (other := _take(lease, expiry_s)) is not None:
        if not wait:
            raise LeaseHeld(
                f"{name!r} is being refreshed by {describe(other)}; run again when it has ended, "
                "or without --no-wait to wait for it"
            )
        waited = True
        tick("waiting", 0, 1, f"{name} is being refreshed by {describe(other)}")
        time.sleep(min(LOOK_S, beat_s) * (0.5 + random.random()))
    if waited:
        tick("waiting", 1, 1, "over")
    ended = threading.Event()
    heart = threading.Thread(target=_keep_beating, args=(lease, ended, beat_s), daemon=True)
    heart.start()
    try:
        yield lease
    finally:
        ended.set()
        heart.join()
        _release(lease)


def describe(row: LeaseRow) -> str:
    """Who holds a lease, in words."""
    return f"process {row.pid} on {row.host} since {aware(row.since):%Y-%m-%d %H:%M:%S} UTC"


def _take(lease: Lease, expiry_s: float) -> LeaseRow | None:
    """Take the lease; None when that worked, else who holds it."""
    mine = {
        "holder": lease.holder,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": process_mark(),
    }
    try:
        with Session(lease.engine, expire_on_commit=False) as session, session.begin():
            moment = database_time(session)
            held = session.get(LeaseRow, lease.name)
            if held is None:
                session.add(LeaseRow(name=lease.name, since=moment, beat=moment, **mine))
                return None
            silent = moment - aware(held.beat) > timedelta(seconds=expiry_s)
            if not silent and not is_gone(held.process):
                return held
            # only where it is still the same holder's: another one may be taking over as well
            taken = session.execute(
                update(LeaseRow)
                .where(LeaseRow.name == lease.name, LeaseRow.holder == held.holder)
                .values(since=moment, beat=moment, **mine)
                .execution_options(synchronize_session=False)
            )
            if taken.rowcount:  # type: ignore[attr-defined]
                log.info("lease: %s is gone; %s goes on", describe(held), lease.name)
                return None
            return held
    except (IntegrityError, OperationalError):  # taken in this very moment, or the file is busy
        with Session(lease.engine, expire_on_commit=False) as session:
            held = session.get(LeaseRow, lease.name)
        if held is None:
            return _take(lease, expiry_s)
        return held


def _keep_beating(lease: Lease, ended: threading.Event, beat_s: float) -> None:
    """The heart: until the block ends, or the lease is another's."""
    while not ended.wait(beat_s):
        try:
            if not _beat(lease.engine, lease.name, lease.holder):
                log.warning("lease: %s was taken over by another run", lease.name)
                return
        except SQLAlchemyError as error:  # the catalogue is busy or away; the next beat may work
            log.warning("lease: no heartbeat for %s (%s)", lease.name, type(error).__name__)


def _beat(engine: Engine, name: str, holder: str) -> bool:
    """One heartbeat; False when the lease is not this holder's any more."""
    with Session(engine) as session, session.begin():
        beaten = session.execute(
            update(LeaseRow)
            .where(LeaseRow.name == name, LeaseRow.holder == holder)
            .values(beat=database_time(session))
        )
        return bool(beaten.rowcount)  # type: ignore[attr-defined]


def _release(lease: Lease) -> None:
    """Give the lease back; where the catalogue is away, it expires by itself."""
    try:
        with Session(lease.engine) as session, session.begin():
            session.execute(
                delete(LeaseRow).where(LeaseRow.name == lease.name, LeaseRow.holder == lease.holder)
            )
    except SQLAlchemyError as error:
        log.warning("lease: %s could not be given back (%s)", lease.name, type(error).__name__)


def database_time(session: Session) -> datetime:
    """The time by the database's clock, UTC."""
    return aware(session.scalars(select(func.now())).one())


def aware(moment: datetime) -> datetime:
    """Add the time zone that SQLite leaves out: its times are UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
