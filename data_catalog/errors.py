"""One base error; the exit code of the command line is part of each."""

from __future__ import annotations

from typing import Any

from data_catalog.redaction import mask


class GeofmError(Exception):
    """Anything geofm raises on purpose. The message says what is wrong and the remedy.

    Credentials of addresses in the message are masked here, because a message reaches the
    terminal, the run's record and the database of Prefect.
    """

    exit_code = 3

    def __init__(self, *arguments: Any) -> None:
        masked = (mask(given) if isinstance(given, str) else given for given in arguments)
        super().__init__(*masked)


class UsageError(GeofmError):
    """Bad usage or settings: the message names the field and the remedy."""

    exit_code = 2


class RunError(GeofmError):
    """A run failed for a reason outside the settings."""


class CheckError(GeofmError):
    """A check (verify, release gate) found something wrong."""

    exit_code = 4
