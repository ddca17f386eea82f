"""The items that may be cut, as ``items.parquet`` has them, and which item replaces another."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shapely.geometry.base import BaseGeometry

from data_catalog.artifact import Artifact
from data_catalog.database.item_states import VersionKey
from data_catalog.hashing import digest_of
from data_catalog.sources import Source
from data_catalog.tables import records
from geofm.config.recipe import CutSettings
from geofm.remote.url_policy import Access
from geofm.stac.supersede import SUPERSEDED, Acquisition, find_superseded, read_acquisition
from geofm.types import Json

_lock = threading.Lock()
#: Fields of a source profile that say nothing about pixels.
ABOUT = {"title", "provider", "licence", "licence_url", "attribution", "notes"}


@dataclass(frozen=True)
class Listed:
    """An item as ``items.parquet`` has it."""

    number: int
    item_id: str
    item_sha256: str
    collection: str
    text: str
    geometry: BaseGeometry
    datetime: str
    licence: str
    source: str
    acquisition: str
    baseline: str
    cloud_cover: float
    superseded_by: str
    #: The profile of its collection, as it was when the item was searched.
    profile: Source

    @property
    def item(self) -> Json:
        """The frozen item."""
        found: Json = json.loads(self.text)
        return found

    @property
    def key(self) -> VersionKey:
        """Collection, id and sha256: parts outlive the table that they were planned by."""
        return self.collection, self.item_id, self.item_sha256

    @property
    def covers(self) -> list[Any]:
        """What the pixels of a part depend on, apart from its windows.

        A licence is no pixel: chips whose licence changes are not cut again.
        """
        facts = {name: value for name, value in self.facts.items() if name != "licence"}
        profile = self.profile.model_dump(mode="json", exclude=ABOUT)
        return [*self.key, facts, digest_of(profile)]

    @property
    def facts(self) -> Json:
        """The columns that are the same in all rows of the item."""
        names = ("item_id", "item_sha256", "collection", "datetime", "licence", "source")
        return {name: getattr(self, name) for name in names}


def every_item(items: Artifact) -> dict[int, Listed]:
    """The items that may be cut by row number; kept, since each part asks for one.

    These are the good ones, and those that another good one stands for (``superseded_by``).
    """
    with _lock:  # threads that start together read the table once
        return _every_item(items)


@lru_cache(maxsize=4)
def _every_item(items: Artifact) -> dict[int, Listed]:
    """The same, read."""
    rows = records(items.table("items.parquet"))
    kept = items.manifest.facts["profiles"]
    profiles = {name: Source.model_validate(profile) for name, profile in kept.items()}
    return {
        number: listed_from(number, row, profiles[row["source"]])
        for number, row in enumerate(rows)
        if row["status"] == "ok" or row["reason"] in SUPERSEDED
    }


def listed_from(number: int, row: Json, profile: Source) -> Listed:
    """Make an item from a row of ``items.parquet``."""
    return Listed(
        number=number,
        item_id=row["item_id"],
        item_sha256=row["item_sha256"],
        collection=row["collection"],
        text=row["item_json"],
        geometry=row["geometry"],
        datetime=row["datetime"] if isinstance(row["datetime"], str) else "",
        licence=row["licence"],
        source=row["source"],
        acquisition=row["acquisition"],
        baseline=row["baseline"],
        cloud_cover=100.0 if math.isnan(row["cloud_cover"]) else float(row["cloud_cover"]),
        superseded_by=row["superseded_by"],
        profile=profile,
    )


def listed_items(items: Artifact) -> dict[int, Listed]:
    """The good items alone."""
    return {n: one for n, one in every_item(items).items() if not one.superseded_by}


def superseded_items(items: Artifact, bad: Collection[int]) -> list[Listed]:
    """Find superseded items whose ground is free again, since the newer item can't be used.

    Args:
        items: The artifact.
        bad: Row numbers of items that turned out to be unusable.
    """
    everyone = every_item(items)
    gone = {everyone[n].key[:2] for n in bad if n in everyone}
    return [
        one
        for one in everyone.values()
        if (one.collection, one.superseded_by) in gone and one.number not in bad
    ]


def best_of(items: Sequence[Listed]) -> list[Listed]:
    """Keep the best item of each acquisition and tile."""
    again = find_superseded([identity_of(one) for one in items])
    return [one for position, one in enumerate(items) if position not in again]


def identity_of(one: Listed) -> Acquisition:
    """The properties of an item by which versions of one acquisition are told apart."""
    return read_acquisition(one.item, one.profile.identity, one.geometry)


def access_of(items: Artifact, settings: CutSettings) -> Access:
    """What the search allowed to be read, and how patiently."""
    search = items.manifest.settings
    return Access(
        stac=search["stac"],
        allow_hosts=tuple(search["allow_hosts"]),
        retries=settings.retries,
        timeout_s=settings.timeout_s,
        whole_max=int(settings.whole_max_mib * 2**20),
        requests_per_s=settings.requests_per_s,
        credentials_for=tuple(search.get("credentials_for", ())),
    )
