"""Whether the pixels of a Sentinel-2 scene agree with what its item says of the offset.

From processing baseline 04.00 on, 1000 counts are added to reflectance before it is stored, so that
values below zero survive. A catalogue may have taken them away again and says so by a flag, which
has been wrong (Element84/earth-search#66 and #71). Then the offset is subtracted twice, or never.

Dark ground tells. Deep water, shadow and dense vegetation reflect 0 to 0.05 in some band, so their
stored counts lie near 0 where the offset is gone, and right above 1000 where it is still there.

The thresholds leave room for what is seen in correct products:

- Sen2Cor writes reflectance a little below zero over water and in shadow, and the edge of a swath
  holds odd low counts: in two real products of baseline 04.00, 0.3 and 0.04 % of the valid pixels
  of B01 lie below 900 counts. That 10 % of a band lie below 800 (reflectance under -0.02) is no
  noise; vegetation alone puts most of the red band there.
- Snow, cloud and desert have no dark pixels, so nothing can be said: no finding. Haze without the
  offset may begin near 1000 counts in one band; it does not in two, with nothing below in any.
  Level-1C is brighter by the air's own light, so a missing offset is rarely told there.

While a scene is cut, an ``OffsetWatch`` adds up ``count_dark`` of every strip; at the end
``check_offset`` compares. A finding is reported; pixels are never changed by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_catalog.sources import Source
from geofm.stac.supersede import version_key

#: What is added to reflectance counts from this baseline on.
OFFSET, SINCE = 1000, "04.00"
#: Fewer valid pixels of a band say nothing.
MIN_PIXELS = 10_000
#: Offset twice: at least this share of a band lies below this count.
TWICE_SHARE, TWICE_BELOW = 0.10, 800
#: Offset missing: at most this share of each band lies below this count ...
MISSING_SHARE, MISSING_BELOW = 0.01, 900
#: ... and the darkest hundredth of at least two bands lies below this one.
DARK_SHARE, DARK_BELOW, DARK_BANDS = 0.01, 1150, 2
#: Counts below which pixels are counted.
LIMITS = (TWICE_BELOW, MISSING_BELOW, DARK_BELOW)

#: [len(LIMITS) + 1]: valid pixels of a band below each limit, and all of them.
Dark = NDArray[np.int64]


@dataclass(frozen=True)
class OffsetFinding:
    """Pixels contradict the item: how, and the figures that show it."""

    kind: Literal["offset_twice", "offset_missing"]
    detail: str


class OffsetWatch:
    """Adds up what is seen of a scene's bands."""

    def __init__(self) -> None:
        self.seen: dict[str, Dark] = {}

    def __call__(self, band: str, stored: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """See a strip of a band; numbers that are no counts say nothing."""
        if stored.dtype.kind in "iu":
            before = self.seen.get(band, np.zeros(len(LIMITS) + 1, np.int64))
            self.seen[band] = before + count_dark(stored, valid)


def watch_for(source: Source, baseline: str) -> OffsetWatch | None:
    """A watch for scenes of which an offset may be told wrongly, else None."""
    knows = bool(source.offset_applied) or source.baseline_offset is not None
    return OffsetWatch() if knows and version_key(baseline) >= version_key(SINCE) else None


def count_dark(stored: NDArray[Any], valid: NDArray[np.bool_]) -> Dark:
    """Dark pixels of a strip, before any offset; those of a scene are the sum over its strips.

    Args:
        stored: [height, width], integers as they are in the file.
        valid: [height, width], where the file has data.
    """
    whole = bool(valid.all())
    dark = [np.count_nonzero(stored < limit if whole else (stored < limit) & valid)
            for limit in LIMITS]  # fmt: skip
    return np.array([*dark, np.count_nonzero(valid)], dtype=np.int64)


def check_offset(
    seen: Mapping[str, Dark], added: Mapping[str, int], baseline: str
) -> OffsetFinding | None:
    """What the pixels say against the offset that is going to be applied.

    Args:
        seen: by band name, of a whole scene or all of it that is cut.
        added: counts that will be added to each band: -1000, or 0 where nothing is.
        baseline: the item's processing baseline, empty where it states none.

    Returns:
        None when the pixels agree, or can't tell.
    """
    enough = {name: dark for name, dark in seen.items() if dark[-1] >= MIN_PIXELS}
    for name in sorted(enough):
        share = _below(enough[name], TWICE_BELOW)
        if added[name] <= -OFFSET and share >= TWICE_SHARE:
            return OffsetFinding(
                "offset_twice",
                f"{share:.0%} of {name} lie below {TWICE_BELOW} counts, although {OFFSET} are "
                "still to be subtracted: the offset seems to be gone from the pixels already",
            )
    if version_key(baseline) < version_key(SINCE) or any(added[name] for name in enough):
        return None
    if any(_below(dark, MISSING_BELOW) > MISSING_SHARE for dark in enough.values()):
        return None
    names = sorted(n for n, dark in enough.items() if _below(dark, DARK_BELOW) >= DARK_SHARE)
    if len(names) < DARK_BANDS:
        return None
    return OffsetFinding(
        "offset_missing",
        f"baseline {baseline}, and the darkest pixels of {', '.join(names)} lie between "
        f"{MISSING_BELOW} and {DARK_BELOW} counts, none below, although nothing is going to be "
        "subtracted: the offset seems to be in the pixels still",
    )


def _below(dark: Dark, limit: int) -> float:
    """Share of the pixels below one of the limits."""
    return float(dark[LIMITS.index(limit)] / dark[-1])
