"""The one error that concerns a single item: the run goes on, the item gets a row with a reason."""

from __future__ import annotations

from data_catalog.errors import GeofmError
from data_catalog.redaction import mask

#: What is stored of a fault that passes: how it showed differs from run to run.
PASSING = "the source did not answer as it should; run again to ask for this item once more"


def printable(text: str) -> str:
    """A text fit for a log and a terminal: what can't be printed is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Quarantine(GeofmError):
    """An item that can't be used.

    Attributes:
        reason: short machine word, the ``reason`` column (``not_found``, ``wrong_checksum``, ...).
        detail: one sentence for people.
        passing: True when another attempt later may succeed (the network, not the item).
    """

    def __init__(self, reason: str, detail: str, passing: bool = False) -> None:
        self.reason = reason
        self.detail = mask(printable(detail))
        self.passing = passing
        super().__init__(f"{reason}: {self.detail}")

    @property
    def kept(self) -> str:
        """The detail as artifacts keep it: the same sentence for every passing fault."""
        return PASSING if self.passing else self.detail

    def __reduce__(self) -> tuple[type[Quarantine], tuple[str, str, bool]]:
        """Keep all three values when the error crosses a process."""
        return Quarantine, (self.reason, self.detail, self.passing)
