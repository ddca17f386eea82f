"""Items of the same acquisition and tile: find those that another item supersedes.

A catalogue may list an acquisition again after reprocessing, or once per receiving station. Both
cases are recognised from properties and footprints, before any imagery is read. The names of the
properties come from the source profile (`data_catalog.sources.Identity`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key

import shapely
from shapely.geometry.base import BaseGeometry

from data_catalog.database.item_states import SUPERSEDED_REASONS
from data_catalog.sources import Identity
from geofm.config.area import to_eastern_longitudes
from geofm.runtime.timestamps import epoch_seconds
from geofm.stac.item import first_text, text_of
from geofm.types import Json

#: Share of an item's ground that a superseding item covers at least.
MIN_COVER = 0.95


@dataclass(frozen=True)
class Acquisition:
    """Properties of an item that decide what it supersedes; texts, empty if not stated.

    Attributes:
        acquisition: Id of the overpass: equal for all tiles and reprocessings of it.
        version: Processing baseline.
        generated: Time of processing (RFC 3339).
        sequence: Datastrip and sequence; different for two receptions of one overpass.
        product: The provider's name of the product.
        geometry: Footprint, EPSG:4326.
    """

    collection: str
    item_id: str
    acquisition: str
    tile: str
    version: str
    generated: str
    sequence: str
    product: str
    geometry: BaseGeometry


@dataclass(frozen=True)
class Superseded:
    """The reason for dropping an item (``reprocessed``, ``second_station``) and its successor."""

    reason: str
    by: str


def read_acquisition(item: Json, rule: Identity, geometry: BaseGeometry) -> Acquisition:
    """Read the identity of a checked item by the rule of its source profile."""
    properties = item["properties"]
    parts = [text_of(properties.get(name)) for name in rule.acquisition]
    acquisition = "|".join(parts) if parts and all(parts) else ""
    return Acquisition(
        collection=item["collection"],
        item_id=item["id"],
        acquisition=re.sub(rule.strip, "", acquisition) if rule.strip else acquisition,
        tile=first_text(properties, rule.tile),
        version=first_text(properties, rule.version),
        generated=first_text(properties, rule.generated),
        sequence="|".join(text_of(properties.get(name)) for name in rule.sequence),
        product=text_of(properties.get(rule.product)) if rule.product else "",
        geometry=geometry,
    )


def find_superseded(acquisitions: Sequence[Acquisition]) -> dict[int, Superseded]:
    """Find the superseded items, by position.

    Only items of one collection with the same acquisition and tile are compared. Two items with
    the same product name and different ids both stay: either may be wrong, so the comparison of
    pixels decides later.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, item in enumerate(acquisitions):
        if item.acquisition and item.tile:
            groups[item.collection, item.acquisition, item.tile].append(number)
    superseded: dict[int, Superseded] = {}
    for members in groups.values():
        kept: list[int] = []
        for number in _best_first(members, acquisitions):
            item = acquisitions[number]
            winner = next((k for k in kept if _supersedes(acquisitions[k], item)), None)
            if winner is None:
                kept.append(number)
            else:
                reprocessed, second_station = SUPERSEDED_REASONS
                same_version = acquisitions[winner].version == item.version
                reason = second_station if same_version else reprocessed
                superseded[number] = Superseded(reason, acquisitions[winner].item_id)
    return superseded


def _best_first(members: Sequence[int], acquisitions: Sequence[Acquisition]) -> list[int]:
    """Sort positions by preference, the preferred item first."""

    def order(a: int, b: int) -> int:
        return _preference(acquisitions[b], acquisitions[a])

    return sorted(members, key=cmp_to_key(order))


def _preference(a: Acquisition, b: Acquisition) -> int:
    """Compare two items by baseline, processing time, sequence and id; positive if a is better."""
    for key_a, key_b in (
        (version_key(a.version), version_key(b.version)),
        (epoch_seconds(a.generated), epoch_seconds(b.generated)),
        (version_key(a.sequence.rpartition("|")[2]), version_key(b.sequence.rpartition("|")[2])),
        (a.item_id, b.item_id),
    ):
        if key_a != key_b:
            return 1 if key_a > key_b else -1  # type: ignore[operator]
    return 0


def version_key(version: str) -> tuple[int, ...]:
    """Return the numbers of a version as a sort key, so that 05.10 follows 05.09 and 5.2."""
    return tuple(int(number) for number in re.findall(r"\d{1,12}", version))


def _supersedes(winner: Acquisition, other: Acquisition) -> bool:
    """Check that two items are different processings or receptions of the same ground."""
    if winner.product and winner.product == other.product:
        return False
    differs = (
        winner.version != other.version
        or winner.generated != other.generated
        or winner.sequence != other.sequence
    )
    return differs and cover(winner.geometry, other.geometry) >= MIN_COVER


def cover(winner: BaseGeometry, other: BaseGeometry) -> float:
    """Compute the share of ``other`` that ``winner`` covers, from areas in square degrees.

    If the footprints lie on both sides of the antimeridian, in one piece or two, both are brought
    to longitudes 0 to 360 first.
    """
    a, b = winner, other
    if shapely.distance(a, b) > 180 or max(_width(a), _width(b)) > 180:
        a, b = (shapely.make_valid(to_eastern_longitudes(area)) for area in (a, b))
    return float(a.intersection(b).area / b.area)


def _width(area: BaseGeometry) -> float:
    west, _, east, _ = area.bounds
    return float(east - west)
