"""A small world that changes from night to night, and the expected content of its dataset.

The world has places. Each place has versions of a scene: a reprocessed version has another id and a
newer baseline; an updated item has the same id, other pixels and another file. ``Nights`` runs
search and cut in this process. ``expect`` follows from the rules alone, not from the tested code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from data_catalog import run
from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.run import run_stage
from data_catalog.store import Store, open_store
from geofm.chips import cut
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.formats.npy import pixel_sha256
from geofm.remote import retry
from geofm.stac import api_client, api_listing, search
from geofm.types import Json
from tests.geofm.stac.filter_api import Api, serve_api
from tests.geofm.stac.small_world import NORTH, WEST, World, identity, polygon, serve, texture, tiff

COLLECTION = "sentinel-2-test"
#: State of the files of a version.
HERE, ABSENT, DOWN, WRONG = "here", "absent", "down", "wrong"


class Killed(BaseException):
    """Raised in place of SIGKILL."""


@dataclass
class Item:
    """An item as the catalogue has it now.

    Attributes:
        place: Number of the place.
        baseline: Processing of the place; a greater number is newer.
        edition: Number of updates; each has its own pixels.
        files: ``HERE``, ``ABSENT`` (404), ``DOWN`` (503) or ``WRONG`` (another file than stated).
        listed: The catalogue lists the item.
        told: The item states the grid of its pixels.
        cloud: Cloud cover in percent.
    """

    place: int
    baseline: int
    edition: int = 0
    files: str = HERE
    listed: bool = True
    told: bool = True
    cloud: float = 0.0

    @property
    def name(self) -> str:
        return f"p{self.place}-b{self.baseline}"

    @property
    def seed(self) -> int:
        return self.place * 10_000 + self.baseline * 100 + self.edition

    @property
    def version(self) -> tuple[str, int]:
        return self.name, self.edition


@dataclass
class Changing:
    """The world: an API for items, a server for files, and the items."""

    api: Api
    server: World
    items: dict[str, Item] = field(default_factory=dict)
    licence: str = "CC-BY-4.0"
    clock: int = 0

    def add(self, place: int, **more: Any) -> Item:
        """Add a scene of 2 × 2 chips at a place, newer than the scenes there."""
        taken = [item.baseline for item in self.items.values() if item.place == place]
        item = Item(place, max(taken, default=0) + 1, **more)
        self.items[item.name] = item
        return item

    def update(self, item: Item, files: str = HERE) -> None:
        """Update an item: it gets another edition."""
        item.edition += 1
        item.files = files

    def serve(self) -> None:
        """Make both servers answer with the current world."""
        self.clock += 1
        self.server.files.clear()
        self.server.faults.clear()
        licence = {"license": self.licence}
        self.api.collections = [{"type": "Collection", "id": COLLECTION, **licence}]
        self.api.items = [self._json(item) for item in self.items.values() if item.listed]

    def _json(self, item: Item) -> Json:
        west, north = WEST, NORTH - 6400 * item.place
        data = tiff(texture(64, 64, item.seed), west, north)
        path = f"/files/{item.name}/{item.edition}.tif"
        if item.files in (HERE, DOWN):
            self.server.add(path, data)
        elif item.files == WRONG:
            self.server.add(path, tiff(texture(64, 64, item.seed + 7), west, north))
        if item.files == DOWN:
            self.server.faults[path] = [503] * 1000
        place = {"proj:transform": [10.0, 0.0, west, 0.0, -10.0, north]} if item.told else {}
        asset = {
            "href": f"{self.server.url}{path}",
            "eo:bands": [{"name": "red", "common_name": "red"}],
            "raster:bands": [{"nodata": 0, "scale": 0.0001, "offset": 0}],
            "proj:shape": [64, 64],
            "file:checksum": "1220" + hashlib.sha256(data).hexdigest(),
            **place,
        }
        made = f"2020-01-{item.baseline + 1:02}T00:00:00Z"
        properties = {
            "datetime": f"2020-01-01T00:{item.place:02}:00Z",
            "updated": f"2024-01-01T{item.edition // 60:02}:{item.edition % 60:02}:00Z",
            "proj:epsg": 32631,
            "eo:cloud_cover": item.cloud,
            **identity(f"31U{item.place:02}", f"{item.baseline:02}.00", made),
        }
        return {
            "type": "Feature", "stac_version": "1.0.0", "id": item.name, "collection": COLLECTION,
            "geometry": polygon(west, north, 640, 640), "properties": properties,
            "assets": {"red": asset}, "links": [],
        }  # fmt: skip

    def places(self) -> list[int]:
        return sorted({item.place for item in self.items.values()})


@contextmanager
def changing_world(quick: bool = True) -> Iterator[Changing]:
    """Serve an empty world until the block ends, without pauses before retries.

    With ``quick`` the parts of a night that cost most and prove nothing are left out.
    """
    with serve() as server, serve_api() as api, pytest.MonkeyPatch.context() as patch:
        patch.setattr(api_listing, "LISTING_PAUSE_S", 0.0)
        patch.setattr(api_client, "RETRIES", 0)
        patch.setattr(retry, "MAX_FAILURES", 10**9)
        if quick:
            patch.setattr(search, "write_items", lambda texts, path: True)
            patch.setattr(run, "software_versions", lambda names: {})
        yield Changing(api, server)


class Nights:
    """Search and cut of a world, night after night, in one store."""

    def __init__(self, world: Changing, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.world, self.folder = world, folder
        self.store: Store = open_store(folder / "store")
        self.catalogue: Catalogue = open_catalogue(f"sqlite:///{folder}/catalogue.db", self.store)
        #: The version of each place that the last night used, and all that were ever cut.
        self.used: dict[int, Item] = {}
        self.cut_once: set[tuple[str, int]] = set()
        #: Items of each place that tonight asks for in vain.
        self.failing: dict[int, set[str]] = {}
        self.items: Artifact | None = None

    def search(self) -> Artifact:
        settings = SearchSettings(
            stac=self.world.api.url, allow_hosts=["127.0.0.1"], max_withdrawn=1.0,
            max_cloud_percent=50,
        )  # fmt: skip
        self.items = run_stage(search.STAGE, self.store, self.catalogue, {}, settings)
        return self.items

    def night(self) -> Artifact:
        """One refresh."""
        found = CutSettings(size_px=32, bands=["red"], retries=0, max_failed=1.0)
        inputs = {"items": self.search()}
        return run_stage(cut.STAGE, self.store, self.catalogue, inputs, found)

    def fresh(self, name: str) -> Artifact:
        """The same night from scratch, in another store."""
        return Nights(self.world, self.folder / name).night()

    def expect(self) -> dict[int, Item]:
        """The version of each place that tonight's dataset must hold."""
        found = {}
        for place in self.world.places():
            version = self._expect_at(place)
            if version is not None:
                found[place] = version
        self.used = found
        self.cut_once |= {item.version for item in found.values()}
        return found

    def _expect_at(self, place: int) -> Item | None:
        here = [i for i in self.world.items.values() if i.place == place and i.listed]
        here = [item for item in here if item.cloud <= 50]
        before = self.used.get(place)
        failed = False
        self.failing.setdefault(place, set()).clear()
        for item in sorted(here, key=lambda item: -item.baseline):
            if failed and before and before.baseline > item.baseline:
                return before  # it is better than the next of the listing
            if item.files == HERE or item.version in self.cut_once:
                return copy(item)
            failed = True
            self.failing[place].add(item.name)
            if before and before.name == item.name:
                return before
        older = before and any(item.baseline > before.baseline for item in here)
        return before if failed and older else None


def copy(item: Item) -> Item:
    return Item(**item.__dict__)


def held(chips: Artifact) -> set[tuple[str, int, int, str]]:
    """Item, row, column and pixel digest of each chip."""
    frame = chips.table("chips.parquet")
    frame = frame[frame["status"] == "ok"]
    assert frame["chip_id"].is_unique
    return {(r.item_id, r.row, r.col, r.pixel_sha256) for r in frame.itertuples()}


def wanted(versions: dict[int, Item]) -> set[tuple[str, int, int, str]]:
    """The same, from the pixels that were made up."""
    found = set()
    for item in versions.values():
        pixels = texture(64, 64, item.seed)
        for row in (0, 32):
            for col in (0, 32):
                window = pixels[None, row : row + 32, col : col + 32]
                found.add((item.name, row, col, pixel_sha256(window)))
    return found


@contextmanager
def killed_after(number: int) -> Iterator[None]:
    """Kill the process when it is about to write to the store or the catalogue for the nth time."""
    left = count(number, -1)

    def dying(function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if next(left) <= 0:
                raise Killed
            return function(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (Store, "publish_part"), (Store, "publish"), (Store, "forget_part"),
            (Catalogue, "record"), (Store, "write_whole"),
        ):  # fmt: skip
            patch.setattr(owner, name, dying(getattr(owner, name)))
        yield
