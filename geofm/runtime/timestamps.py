"""Times as catalogues write them (RFC 3339)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

MAX_LENGTH = 40


def parse_time(value: Any) -> datetime | None:
    """Parse a time; it has a zone only if the text has one. None for any other value."""
    if not isinstance(value, str) or len(value) > MAX_LENGTH:
        return None
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        return None


def parse_utc(value: Any) -> datetime | None:
    """Parse a time, taken as UTC if it has no zone; None for any other value."""
    when = parse_time(value)
    return when if when is None or when.tzinfo else when.replace(tzinfo=UTC)


def epoch_seconds(value: Any) -> float:
    """Return seconds since 1970; minus infinity without a time."""
    when = parse_utc(value)
    return float("-inf") if when is None else when.timestamp()


def format_utc(when: datetime) -> str:
    """Write a time with a zone as UTC, without trailing zeros of the second.

    Raises:
        OverflowError: The time in UTC lies outside the years 1 to 9999.
    """
    text = when.astimezone(UTC).isoformat().removesuffix("+00:00")
    return f"{text.rstrip('0') if '.' in text else text}Z"
