"""Identity first, pixels last: which items are the same acquisition of the same tile.

A catalogue may list a scene again after reprocessing, or once per receiving station. Both are told
from properties and footprints, before a byte of imagery is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from functools import cmp_to_key
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from data_catalog.sources import Identity
from geofm.runtime.text import instant

#: An item is superseded only by one that covers at least this share of its ground.
MIN_COVER = 0.95
#: Reasons of items that another one stands for.
SUPERSEDED = ("reprocessed", "second_station")


@dataclass(frozen=True)
class Scene:
    """What identity is decided by; all texts, empty when the item does not say.

    Attributes:
        acquisition: the same for every tile and every reprocessing of one overpass.
        version: processing baseline.
        generated: time of processing (RFC 3339).
        sequence: datastrip and sequence, differing between two receptions.
        product: the provider's name of the product.
        geometry: footprint, EPSG:4326.
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
    """Why an item is dropped: ``reprocessed`` or ``second_station``, and by which item."""

    reason: str
    by: str


def text_of(value: Any) -> str:
    """A property as text; only texts and integers count."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def first_of(properties: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the properties that is there, as text."""
    return next((text for name in names if (text := text_of(properties.get(name)))), "")


def scene_of(item: dict[str, Any], rule: Identity, geometry: BaseGeometry) -> Scene:
    """The identity of a checked item by its source's rule."""
    properties = item["properties"]
    words = [text_of(properties.get(name)) for name in rule.acquisition]
    acquisition = "|".join(words) if words and all(words) else ""
    return Scene(
        collection=item["collection"],
        item_id=item["id"],
        acquisition=re.sub(rule.strip, "", acquisition) if rule.strip else acquisition,
        tile=first_of(properties, rule.tile),
        version=first_of(properties, rule.version),
        generated=first_of(properties, rule.generated),
        sequence="|".join(text_of(properties.get(name)) for name in rule.sequence),
        product=text_of(properties.get(rule.product)) if rule.product else "",
        geometry=geometry,
    )


def version_key(version: str) -> tuple[int, ...]:
    """Numbers of a version in order, so that 05.10 follows 05.09 and 5.2."""
    return tuple(int(number) for number in re.findall(r"\d{1,12}", version))


def compare(a: Scene, b: Scene) -> int:
    """Positive when ``a`` is to be kept rather than ``b``: newest baseline, processing, then id."""
    for key_a, key_b in (
        (version_key(a.version), version_key(b.version)),
        (moment(a.generated), moment(b.generated)),
        (version_key(a.sequence.rpartition("|")[2]), version_key(b.sequence.rpartition("|")[2])),
        (a.item_id, b.item_id),
    ):
        if key_a != key_b:
            return 1 if key_a > key_b else -1  # type: ignore[operator]
    return 0


def moment(text: str) -> float:
    """Seconds since the epoch, minus infinity where there is no time."""
    when = instant(text)
    if when is None:
        return float("-inf")
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def superseded(scenes: Sequence[Scene]) -> dict[int, Superseded]:
    """Which of the scenes are superseded, by their position.

    Scenes of different collections are never compared, nor scenes without an acquisition or tile.
    Two items that claim the very same product under different ids are not told apart here: either
    may be the false one, so both go on and the pixels decide.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, scene in enumerate(scenes):
        if scene.acquisition and scene.tile:
            groups[scene.collection, scene.acquisition, scene.tile].append(number)
    found: dict[int, Superseded] = {}
    for members in groups.values():
        kept: list[int] = []
        for number in by_priority(members, scenes):
            winner = next((k for k in kept if replaces(scenes[k], scenes[number])), None)
            if winner is None:
                kept.append(number)
            else:
                reason = why(scenes[winner], scenes[number])
                found[number] = Superseded(reason, scenes[winner].item_id)
    return found


def by_priority(members: Sequence[int], scenes: Sequence[Scene]) -> list[int]:
    """Positions of scenes, the one to be kept first."""

    def order(a: int, b: int) -> int:
        return compare(scenes[b], scenes[a])

    return sorted(members, key=cmp_to_key(order))


def replaces(winner: Scene, other: Scene) -> bool:
    """Whether ``other`` is the same product line and ground, so that ``winner`` stands for it."""
    if winner.product and winner.product == other.product:
        return False
    differs = (
        winner.version != other.version
        or winner.generated != other.generated
        or winner.sequence != other.sequence
    )
    return differs and cover(winner.geometry, other.geometry) >= MIN_COVER


def why(winner: Scene, other: Scene) -> str:
    """The reason in a word."""
    return SUPERSEDED[0] if winner.version != other.version else SUPERSEDED[1]


def cover(winner: BaseGeometry, other: BaseGeometry) -> float:
    """Share of ``other`` that ``winner`` covers; areas in degrees, which a share does not mind.

    Footprints across the antimeridian, in one piece or two, are brought to 0..360 first.
    """
    a, b = winner, other
    if shapely.distance(a, b) > 180 or max(_width(a), _width(b)) > 180:
        a, b = _eastern(a), _eastern(b)
    return float(a.intersection(b).area / b.area)


def _width(area: BaseGeometry) -> float:
    west, _, east, _ = area.bounds
    return float(east - west)


def _eastern(area: BaseGeometry) -> BaseGeometry:
    """The area with its western longitudes moved by 360 degrees, point by point."""

    def move(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return points + np.where(points[:, :1] < 0, [360.0, 0.0], [0.0, 0.0])

    return shapely.make_valid(shapely.transform(area, move))
