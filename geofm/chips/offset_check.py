"""Check whether the pixels of a Sentinel-2 scene agree with the offset that its item states.

Since processing baseline 04.00, 1000 counts are added to reflectance before it is stored, so that
negative values survive. A catalogue may have subtracted them again; it states this by a flag, which
has been wrong (Element84/earth-search#66 and #71). Then the offset is subtracted twice, or never.

Dark ground shows the error. Deep water, shadow and dense vegetation reflect 0 to 0.05 in some band.
Their stored counts are near 0 if the offset was subtracted, and just above 1000 if it was not.

The thresholds allow for the values of correct products:

- Sen2Cor writes slightly negative reflectance over water and in shadow, and the edge of a swath has
  single low counts: in two real products of baseline 04.00, 0.3 and 0.04 % of the valid pixels of
  B01 are below 900 counts. Noise does not put 10 % of a band below 800 counts (reflectance below
  -0.02). If the offset was subtracted already, vegetation alone puts most of the red band there.
- Snow, cloud and desert have no dark pixels and allow no conclusion. Haze without the offset may
  begin near 1000 counts in one band, but not in two with no band below. Level-1C is brightened by
  the atmosphere, so a missing offset is rarely detected there.

While a scene is cut, an ``OffsetCounter`` sums ``count_dark`` over its strips; ``check_offset``
compares the sums with the item at the end. A finding is reported and never changes pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_catalog.sources import Source
from geofm.stac.supersede import version_key

#: Offset that is added to reflectance counts, and the first baseline that adds it.
OFFSET, SINCE = 1000, "04.00"
#: A band with fewer valid pixels is not checked.
MIN_PIXELS = 10_000
#: Offset subtracted twice: at least this share of a band is below this count.
TWICE_SHARE, TWICE_BELOW = 0.10, 800
#: Offset not subtracted: at most this share of each band is below this count, ...
MISSING_SHARE, MISSING_BELOW = 0.01, 900
#: ... and at least this share of this many bands is below this count.
DARK_SHARE, DARK_BELOW, DARK_BANDS = 0.01, 1150, 2
#: Limits in counts; the pixels below each limit are counted.
LIMITS = (TWICE_BELOW, MISSING_BELOW, DARK_BELOW)

#: Numbers of valid pixels of a band: below each limit, then in total; shape (len(LIMITS) + 1,).
Dark = NDArray[np.int64]


@dataclass(frozen=True)
class OffsetFinding:
    """A contradiction between pixels and item, and the figures that show it."""

    kind: Literal["offset_twice", "offset_missing"]
    detail: str


class OffsetCounter:
    """Sums the dark pixels of a scene's bands.

    Attributes:
        counts: Dark pixels by band name.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Dark] = {}

    def __call__(self, band: str, stored: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Add a strip of a band; floats are not counts and are ignored."""
        if stored.dtype.kind in "iu":
            before = self.counts.get(band, np.zeros(len(LIMITS) + 1, np.int64))
            self.counts[band] = before + count_dark(stored, valid)


def offset_counter_for(source: Source, baseline: str) -> OffsetCounter | None:
    """Return a counter if the item of a scene may state a wrong offset, else None."""
    states_offset = bool(source.offset_applied) or source.baseline_offset is not None
    return (
        OffsetCounter() if states_offset and version_key(baseline) >= version_key(SINCE) else None
    )


def count_dark(stored: NDArray[Any], valid: NDArray[np.bool_]) -> Dark:
    """Count the dark pixels of a strip, before any offset is applied.

    Args:
        stored: Stored integers, shape (height, width).
        valid: Pixels with data, shape (height, width).
    """
    all_valid = bool(valid.all())
    below = [stored < limit for limit in LIMITS]
    dark = [np.count_nonzero(pixels if all_valid else pixels & valid) for pixels in below]
    return np.array([*dark, np.count_nonzero(valid)], dtype=np.int64)


def check_offset(
    counts: Mapping[str, Dark], added: Mapping[str, int], baseline: str
) -> OffsetFinding | None:
    """Compare dark pixels with the offset that the item states.

    Args:
        counts: Dark pixels of the scene (or of its cut windows) by band name.
        added: Counts that are added to each band: -1000, or 0 if there is no offset.
        baseline: Processing baseline, or empty.

    Returns:
        The contradiction; None if the pixels agree or allow no conclusion.
    """
    enough = {name: dark for name, dark in counts.items() if dark[-1] >= MIN_PIXELS}
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
    """Return the share of the pixels below one of the limits."""
    return float(dark[LIMITS.index(limit)] / dark[-1])
