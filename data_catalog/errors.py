"""The errors that geofm raises on purpose. Each class has an exit code of the command line."""

from __future__ import annotations

from typing import Any

from data_catalog.redaction import mask


class GeofmError(Exception):
    """Base of geofm's errors. The message says what happened, where, and what to do.

    Credentials of addresses in the message are masked here, because a message is shown in the
    terminal and stored in the run record and in Prefect's database.
    """

    exit_code = 3

    def __init__(self, *arguments: Any) -> None:
        masked = (mask(value) if isinstance(value, str) else value for value in arguments)
        super().__init__(*masked)


class UsageError(GeofmError):
    """Wrong usage or settings; the message names the field and the remedy."""

    exit_code = 2


class RunError(GeofmError):
    """A run failed for a reason outside the settings."""


class CheckError(GeofmError):
    """A check (``verify``, a release gate) found a problem."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
