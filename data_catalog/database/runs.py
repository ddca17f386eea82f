"""Lost runs: run records of processes that were killed before the run ended."""

from __future__ import annotations

from datetime import datetime, timedelta

from data_catalog.database.lease import EXPIRY_S, aware
from data_catalog.database.schema import RunRow
from data_catalog.storage.process import is_alive, is_gone

#: Status of a run whose process ended without finishing it.
LOST = "lost"


def is_lost(row: RunRow, moment: datetime) -> bool:
    """Return whether a run's process has ended without finishing it.

    On the machine of the process this is known at once; on other machines the run is lost when it
    has had no heartbeat for ``EXPIRY_S`` seconds.

    Args:
        row: Record of the run.
        moment: Time by the database's clock.
    """
    if row.status != "running" or is_alive(row.process or ""):
        return False
    silent = moment - aware(row.beat or row.started_at) > timedelta(seconds=EXPIRY_S)
    return silent or is_gone(row.process or "")


def last_sign(row: RunRow) -> datetime:
    """Return the time at which a lost run was last known to be running."""
    noted = aware(row.started_at) + timedelta(seconds=float(row.metrics.get("seconds", 0)))
    return max(noted, aware(row.beat)) if row.beat else noted


def describe_loss(row: RunRow) -> str:
    """Return the error text of a lost run."""
    return f"process {row.pid} on {row.host} ended before the run did"
