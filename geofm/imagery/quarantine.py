"""The one error that concerns a single item: the run goes on, the item gets a row with a reason."""

from __future__ import annotations

from data_catalog.errors import GeofmError


class Quarantine(GeofmError):
    """An item that can't be used.

    Attributes:
        reason: short machine word, the ``reason`` column (``not_found``, ``wrong_checksum``, ...).
        detail: one sentence for people.
        passing: True when another attempt later may succeed (the network, not the item).
    """

    def __init__(self, reason: str, detail: str, passing: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.passing = passing

    def __reduce__(self) -> tuple[type[Quarantine], tuple[str, str, bool]]:
        """Keep all three values when the error crosses a process."""
        return Quarantine, (self.reason, self.detail, self.passing)
