"""Exclusive leases, kept in the catalogue.

A lease makes sure that only one process at a time refreshes a dataset or works on a job that keeps
state; the others wait. The holder renews its lease every 5 seconds. A lease is free again when its
process has ended (noticed at once on the same machine) or when it was not renewed for 90 seconds
by the catalogue's clock, so clocks of different machines do not matter.

If the catalogue does not answer for a while, the holder keeps the lease unless another process has
taken it. Before a process takes a lease that was not renewed, it watches the lease for two
heartbeats: after an outage of the catalogue, or after the machine slept, every heartbeat looks old.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple, TypeVar

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from data_catalog.database.schema import LeaseRow
from data_catalog.errors import RunError
from data_catalog.progress import say
from data_catalog.storage.process import is_gone, process_mark

log = logging.getLogger("geofm.lease")
T = TypeVar("T")

#: Seconds between two heartbeats; seconds without a heartbeat until a holder counts as gone.
BEAT_S, EXPIRY_S = 5.0, 90.0
#: Seconds between two attempts of a process that waits.
LOOK_S = 1.0
#: Seconds for which an operation is repeated while the catalogue does not answer.
AWAY_S = 120.0
#: Longest name (characters) in the table.
NAME_LENGTH = 64


class LeaseHeld(RunError):
    """Another process holds the lease, and this one must not wait."""


class LeaseLost(RunError):
    """Another process has taken the lease, since this one did not renew it for too long."""


class CatalogueAway(RunError):
    """The catalogue has stopped answering."""


class OtherLease(NamedTuple):
    """A lease that another process holds."""

    row: LeaseRow
    expired: bool


@dataclass(frozen=True)
class Lease:
    """A lease that this process holds."""

    engine: Engine
    name: str
    holder: str

    def confirm(self) -> None:
        """Check that this process still holds the lease, before a result is published.

        Raises:
            LeaseLost: Another process has taken it; nothing was published.
            CatalogueAway: The catalogue does not answer.
        """
        if not call_catalogue(lambda: _renew(self)):
            raise LeaseLost(
                f"another run has taken over {self.name!r}, because this run did not renew its "
                f"lease for {EXPIRY_S:.0f} s; nothing was published, run it again"
            )


@contextmanager
def hold_lease(
    engine: Engine,
    name: str,
    wait: bool = True,
    beat_s: float = BEAT_S,
    expiry_s: float = EXPIRY_S,
    verb: str = "refreshed",
) -> Iterator[Lease]:
    """Hold a lease while the block runs.

    Args:
        engine: Engine of the catalogue.
        name: Name of the lease; any text.
        wait: Wait while another process holds the lease.
        beat_s: Seconds between two heartbeats.
        expiry_s: Seconds without a heartbeat after which a holder counts as gone.
        verb: Participle for messages, e.g. ``refreshed``: the holder does this to ``name``.

    Raises:
        LeaseHeld: Another process holds the lease and ``wait`` is False.
        CatalogueAway: The catalogue does not answer.
    """
    lease = Lease(engine, name, uuid.uuid4().hex)
    waited, since = False, time.monotonic()
    last: tuple[str, datetime] | None = None
    while True:
        # A lease with an old heartbeat is taken only if this process has also seen no heartbeat
        # for a while itself.
        called = time.monotonic()
        watched = last is not None and called - since >= min(2 * beat_s, expiry_s)
        take_until = called + beat_s if watched else called
        held = call_catalogue(partial(_take, lease, expiry_s, take_until))
        if held is None:
            break
        if not wait and not held.expired:
            raise LeaseHeld(
                f"{name!r} is being {verb} by {describe(held.row)}; run again when it has ended, "
                "or without --no-wait to wait for it"
            )
        # After an outage of the catalogue the holder must have time to renew its lease.
        away = time.monotonic() - called > beat_s
        if away or last != (held.row.holder, held.row.beat):
            last, since = (held.row.holder, held.row.beat), time.monotonic()
        holder = f"{name} is being {verb} by {describe(held.row)}"
        if not waited:
            log.info("waiting: %s", holder)
        waited = True
        say("waiting", 0, 1, holder)
        time.sleep(min(LOOK_S, beat_s) * (0.5 + random.random()))
    if waited:
        say("waiting", 1, 1, "over")
    try:
        with heartbeat(lambda: _renew(lease), name, beat_s):
            yield lease
    finally:
        _release(lease)


@contextmanager
def heartbeat(beat: Callable[[], bool], what: str, every_s: float = BEAT_S) -> Iterator[None]:
    """Call a function at regular intervals in a thread while the block runs.

    Args:
        beat: Writes to the catalogue; False ends the heartbeat.
        what: Name of the run or lease, for the log.
        every_s: Seconds between two calls.
    """
    ended = threading.Event()

    def keep_beating() -> None:
        while not ended.wait(every_s):
            try:
                if not beat():
                    log.warning("heartbeat: %s was taken over by another run", what)
                    return
            except SQLAlchemyError as error:  # busy or unreachable: the next heartbeat may work
                log.warning("heartbeat: none written for %s (%s)", what, type(error).__name__)

    thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT_S)  # a catalogue that does not answer must not delay the end


def call_catalogue(call: Callable[[], T]) -> T:
    """Call a function, and repeat it for up to 120 s if the catalogue does not answer.

    Raises:
        CatalogueAway: The catalogue did not answer in this time.
    """
    started = time.monotonic()
    while True:
        try:
            return call()
        except (OperationalError, InterfaceError) as error:
            if time.monotonic() - started > AWAY_S:
                reason = str(error).partition("\n")[0]
                raise CatalogueAway(
                    f"the catalogue has not answered for {AWAY_S:.0f} s ({reason}); run again "
                    "when it does"
                ) from error
        time.sleep(LOOK_S * (0.5 + random.random()))


def describe(row: LeaseRow) -> str:
    """Describe the process that holds a lease."""
    return f"process {row.pid} on {row.host} since {aware(row.since):%Y-%m-%d %H:%M:%S} UTC"


def _take(lease: Lease, expiry_s: float, take_until: float) -> OtherLease | None:
    """Take the lease if it is free; else return its holder.

    Args:
        lease: Lease to take.
        expiry_s: Seconds without a heartbeat after which another holder's lease has expired.
        take_until: Time (``time.monotonic``) until which an expired lease is taken as well.
    """
    own = {
        "holder": lease.holder,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": process_mark(),
    }
    name = _table_name(lease.name)
    while True:
        try:
            with Session(lease.engine, expire_on_commit=False) as session, session.begin():
                moment = database_time(session)
                held = session.get(LeaseRow, name)
                if held is None:
                    session.add(LeaseRow(name=name, since=moment, beat=moment, **own))
                    return None
                expired = moment - aware(held.beat) > timedelta(seconds=expiry_s)
                if not is_gone(held.process) and not (expired and time.monotonic() < take_until):
                    return OtherLease(held, expired)
                # A third process may take it as well: only one of them still finds the old holder.
                taken = session.execute(
                    update(LeaseRow)
                    .where(LeaseRow.name == name, LeaseRow.holder == held.holder)
                    .where(LeaseRow.beat == held.beat)
                    .values(since=moment, beat=moment, **own)
                    .execution_options(synchronize_session=False)
                )
                if taken.rowcount:  # type: ignore[attr-defined]
                    log.info("lease: %s has ended; %s is taken over", describe(held), lease.name)
                    return None
        except IntegrityError:  # another process took it in the same moment
            log.debug("lease: %s was taken meanwhile", lease.name)


def _renew(lease: Lease) -> bool:
    """Renew the lease; False if another process holds it."""
    with Session(lease.engine) as session, session.begin():
        renewed = session.execute(
            update(LeaseRow)
            .where(LeaseRow.name == _table_name(lease.name), LeaseRow.holder == lease.holder)
            .values(beat=database_time(session))
        )
        return bool(renewed.rowcount)  # type: ignore[attr-defined]


def _release(lease: Lease) -> None:
    """Give the lease back. If the catalogue does not answer, the lease expires by itself."""
    name = _table_name(lease.name)
    try:
        with Session(lease.engine) as session, session.begin():
            session.execute(
                delete(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == lease.holder)
            )
    except SQLAlchemyError as error:
        log.warning("lease: %s could not be given back (%s)", lease.name, type(error).__name__)


def _table_name(name: str) -> str:
    """Return the name in the table: long and unprintable names are replaced by their digest."""
    if len(name) <= NAME_LENGTH and name.isascii() and name.isprintable():
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def database_time(session: Session) -> datetime:
    """Return the time by the database's clock, UTC."""
    return aware(session.scalars(select(func.now())).one())


def aware(moment: datetime) -> datetime:
    """Add the time zone to a time from SQLite, which stores UTC without one."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
