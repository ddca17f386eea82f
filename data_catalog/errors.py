"""One base error; the exit code of the command line is part of each."""

from __future__ import annotations


class GeofmError(Exception):
    """Anything geofm raises on purpose. The message says what is wrong and the remedy."""

    exit_code = 3


class UsageError(GeofmError):
    """Bad usage or settings: the message names the field and the remedy."""

    exit_code = 2


class RunError(GeofmError):
    """A run failed for a reason outside the settings."""


class CheckError(GeofmError):
    """A check (verify, release gate) found something wrong."""

    exit_code = 4
