"""Findings of a verification: problems, and files that could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_catalog.errors import CheckError
from data_catalog.storage.reach import OutOfReach

#: Most problems of one artifact that are listed; the others are counted.
LISTED = 50


@dataclass
class Findings:
    """The result of a verification.

    Attributes:
        problems: Things that are damaged, missing or contradictory, one sentence each.
        unread: Things that could not be read, so nothing is known about their content.
    """

    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Add the findings on something else, at most ``LISTED`` of each list."""
        self.problems.extend(bounded(other.problems, len(other.problems)))
        self.unread.extend(bounded(other.unread, len(other.unread)))

    def add_error(self, error: CheckError | OutOfReach, where: str = "") -> None:
        """Add the error that ended a check: a problem, or unread if it was out of reach."""
        texts = self.unread if isinstance(error, OutOfReach) else self.problems
        texts.append(f"{where}{error}")


def bounded(texts: list[str], count: int) -> list[str]:
    """Return at most ``LISTED`` texts, and a line with the number of the others.

    Args:
        texts: The texts, or the first of them.
        count: Number of all texts.
    """
    more = count - LISTED
    return [*texts[:LISTED], f"… and {more:,} more like these"] if more > 0 else texts
