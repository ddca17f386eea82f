"""The items that may be cut, as ``items.parquet`` holds them, and which item replaces another."""

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
from data_catalog.database.item_states import SUPERSEDED_REASONS, VersionKey
from data_catalog.hashing import digest_of
from data_catalog.sources import Source
from data_catalog.tables import records
from geofm.config.recipe import CutSettings
from geofm.remote.url_policy import Access
from geofm.stac.supersede import Acquisition, find_superseded, read_acquisition
from geofm.types import Json

_lock = threading.Lock()
#: Fields of a source profile that do not affect pixels.
DESCRIPTIVE_FIELDS = {"title", "provider", "licence", "licence_url", "attribution", "notes"}


@dataclass(frozen=True)
class ItemRecord:
    """A row of ``items.parquet``.

    Attributes:
        number: Row number.
        text: The frozen item, as JSON.
        superseded_by: Id of the newer item that replaces this one, or empty.
        profile: Source profile of the collection at the time of the search.
    """

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
    profile: Source

    @property
    def item(self) -> Json:
        """The frozen item."""
        content: Json = json.loads(self.text)
        return content

    @property
    def key(self) -> VersionKey:
        """Collection, id and sha256; unlike the row number they are the same in every run."""
        return self.collection, self.item_id, self.item_sha256

    @property
    def covers(self) -> list[Any]:
        """Identity of the facts that determine the pixels of a part, apart from its windows.

        The licence is left out: chips whose licence changes are not cut again.
        """
        facts = {name: value for name, value in self.facts.items() if name != "licence"}
        profile = self.profile.model_dump(mode="json", exclude=DESCRIPTIVE_FIELDS)
        return [*self.key, facts, digest_of(profile)]

    @property
    def facts(self) -> Json:
        """The columns that are the same in all rows of the item."""
        names = ("item_id", "item_sha256", "collection", "datetime", "licence", "source")
        return {name: getattr(self, name) for name in names}


def all_items(items: Artifact) -> dict[int, ItemRecord]:
    """Return the items that may be cut, by row number; superseded ones are included.

    The result is cached, since each part needs one item of it.
    """
    with _lock:  # threads that start together read the table once
        return _all_items(items)


@lru_cache(maxsize=4)
def _all_items(items: Artifact) -> dict[int, ItemRecord]:
    rows = records(items.table("items.parquet"))
    kept = items.manifest.facts["profiles"]
    profiles = {name: Source.model_validate(profile) for name, profile in kept.items()}
    return {
        number: record_from_row(number, row, profiles[row["source"]])
        for number, row in enumerate(rows)
        if row["status"] == "ok" or row["reason"] in SUPERSEDED_REASONS
    }


def record_from_row(number: int, row: Json, profile: Source) -> ItemRecord:
    """Make a record from a row of ``items.parquet``."""
    return ItemRecord(
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


def current_items(items: Artifact) -> dict[int, ItemRecord]:
    """Return the items that no newer item supersedes, by row number."""
    return {n: item for n, item in all_items(items).items() if not item.superseded_by}


def superseded_items(items: Artifact, bad: Collection[int]) -> list[ItemRecord]:
    """Find superseded items that are used again because the newer item can't be used.

    Args:
        items: The artifact.
        bad: Row numbers of items that turned out to be unusable.
    """
    everything = all_items(items)
    failed = {everything[n].key[:2] for n in bad if n in everything}
    return [
        item
        for item in everything.values()
        if (item.collection, item.superseded_by) in failed and item.number not in bad
    ]


def best_versions(items: Sequence[ItemRecord]) -> list[ItemRecord]:
    """Keep the best item of each acquisition and tile."""
    replaced = find_superseded([identity_of(item) for item in items])
    return [item for position, item in enumerate(items) if position not in replaced]


def identity_of(item: ItemRecord) -> Acquisition:
    """Return the properties that tell versions of one acquisition apart."""
    return read_acquisition(item.item, item.profile.identity, item.geometry)


def access_of(items: Artifact, settings: CutSettings) -> Access:
    """Return which hosts the search allowed, with the timeouts and retries of the cut."""
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
