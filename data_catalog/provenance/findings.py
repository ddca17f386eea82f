"""What a verification found: problems, and what could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_catalog.errors import CheckError
from data_catalog.storage.reach import OutOfReach

#: Problems of one artifact that are listed; the others are counted.
LISTED = 50


@dataclass
class Findings:
    """What a verification found.

    Attributes:
        problems: What is damaged, missing or contradictory, one sentence each.
        unread: What could not be read, which says nothing about its content.
    """

    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Add the findings on something else, each at most ``LISTED`` times."""
        self.problems.extend(bounded(other.problems, len(other.problems)))
        self.unread.extend(bounded(other.unread, len(other.unread)))

    def add_error(self, error: CheckError | OutOfReach, where: str = "") -> None:
        """Add the error that a check ended with: out of reach is no damage."""
        kept = self.unread if isinstance(error, OutOfReach) else self.problems
        kept.append(f"{where}{error}")


def bounded(texts: list[str], count: int) -> list[str]:
    """List at most ``LISTED`` of ``count`` texts, and say how many more there are."""
    more = count - LISTED
    return [*texts[:LISTED], f"… and {more:,} more like these"] if more > 0 else texts
