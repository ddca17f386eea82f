"""The sampling plan in figures, before anything is fetched: scenes, chips, requests, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from geofm.imagery.cost import Cost, cost_of
from geofm.imagery.items import Json
from geofm.imagery.sampling import REASONS
from geofm.imagery.survey import Survey
from geofm.settings import CutSettings


@dataclass(frozen=True)
class Forecast:
    """What will be cut of one collection, or of all.

    Attributes:
        scenes: scenes with windows in the plan.
        chips: windows in the plan.
        cost: what they will fetch, about.
        left_out: windows that are not in the plan, by reason.
    """

    collection: str
    scenes: int = 0
    chips: int = 0
    cost: Cost = field(default_factory=Cost)
    left_out: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """In a sentence."""
        return (
            f"{self.chips:,} chips of {self.scenes:,} scenes planned; about "
            f"{self.cost.requests:,} requests and {self.cost.bytes / 2**30:.2f} GiB"
        )

    def to_json(self) -> Json:
        """For scripts."""
        left_out = dict(sorted(self.left_out.items()))
        fetched = {"requests": self.cost.requests, "bytes": self.cost.bytes}
        return {"scenes": self.scenes, "chips": self.chips, **fetched, "left_out": left_out}


def forecast(found: Survey, settings: CutSettings) -> list[Forecast]:
    """The plan by collection."""
    by_name: dict[str, Forecast] = {}
    windows = found.windows
    for claim, (one, grid) in enumerate(zip(found.listed, found.grids, strict=True)):
        cells = windows.chosen(claim)
        codes = Counter(windows.reason[windows.of(claim)].tolist())
        out = Counter({REASONS[code]: number for code, number in codes.items() if code})
        mine = Forecast(one.collection, int(len(cells) > 0), len(cells),
                        cost_of(one, grid, cells, settings), out)  # fmt: skip
        by_name[one.collection] = total([by_name.get(one.collection, Forecast("")), mine])
    return [by_name[name] for name in sorted(by_name)]


def total(parts: Iterable[Forecast]) -> Forecast:
    """The sum; it has the name of the last."""
    found = Forecast("")
    for one in parts:
        found = Forecast(
            one.collection,
            found.scenes + one.scenes,
            found.chips + one.chips,
            found.cost + one.cost,
            found.left_out + one.left_out,
        )
    return found
