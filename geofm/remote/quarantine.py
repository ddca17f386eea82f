"""The error of a single item: the run continues, and the item gets a row with the reason."""

from __future__ import annotations

from data_catalog.errors import GeofmError
from data_catalog.redaction import mask, printable

#: Detail that is stored for a passing fault; its own text would differ from run to run.
PASSING = "the source did not answer as it should; run again to ask for this item once more"


class Quarantine(GeofmError):
    """An item that can't be used.

    Attributes:
        reason: Machine-readable word, the ``reason`` column (``not_found``, ``wrong_checksum``).
        detail: Sentence for people.
        passing: A later attempt may succeed: the network failed, not the item.
    """

    def __init__(self, reason: str, detail: str, passing: bool = False) -> None:
        self.reason = reason
        self.detail = mask(printable(detail, keep=""))
        self.passing = passing
        super().__init__(f"{reason}: {self.detail}")

    @property
    def kept(self) -> str:
        """The detail that artifacts keep: the same sentence for every passing fault."""
        return PASSING if self.passing else self.detail

    def __reduce__(self) -> tuple[type[Quarantine], tuple[str, str, bool]]:
        """Keep all three values when the error crosses a process."""
        return Quarantine, (self.reason, self.detail, self.passing)
