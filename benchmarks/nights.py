"""Play thirty scripted nights on the data stages, and compare with runs from scratch.

    python -m benchmarks.nights [FOLDER]

A small world on loopback changes from night to night: items arrive late, are updated, reprocessed,
replaced, withdrawn, relisted or truncated; the API is down or skips items; a run is killed. After
five of the nights a run from scratch must give equal samples and equal shard members. A version is
published only with a change, and each change has a reason. The script prints a Markdown table.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.errors import RunError
from data_catalog.run import run_stage
from data_catalog.store import Store, open_store
from flows.versions import Published, publish, waiting_items
from geofm.config.recipe import Recipe
from geofm.stages import DATA_STAGES, get_stage, section_of
from tests.geofm.stac.nights_world import (
    ABSENT,
    DOWN,
    HERE,
    WRONG,
    Changing,
    Killed,
    changing_world,
    killed_after,
)


@dataclass(frozen=True)
class Night:
    """Event before a night, and the expected course of the night.

    Attributes:
        fails: Whether the run must end with an error.
        dies: Number of the write before which the first run is killed; it is then repeated.
        scratch: Whether a run from scratch is compared.
    """

    event: str
    happen: Callable[[Changing], object]
    fails: bool = False
    dies: int | None = None
    scratch: bool = False


def nothing(_: Changing) -> None:
    """Leave the world unchanged."""


def found(world: Changing, place: int) -> list[str]:
    """Return the names of the items of a place, the oldest first."""
    return [name for name, item in world.items.items() if item.place == place]


def files(world: Changing, name: str, state: str) -> None:
    """Change the answers for the files of an item."""
    world.items[name].files = state


def listed(world: Changing, name: str, yes: bool) -> None:
    """List or delist an item."""
    world.items[name].listed = yes


def replace(world: Changing, old: str, files: str) -> None:
    """Add a newer item and remove the older one."""
    listed(world, old, False)
    world.add(world.items[old].place, files=files)


def skip(world: Changing, number: int) -> None:
    """Let searches omit an item that they count."""
    world.api.skips = number


def several(*events: Callable[[Changing], object]) -> Callable[[Changing], None]:
    """Combine several events before a night."""

    def happen(world: Changing) -> None:
        for event in events:
            event(world)

    return happen


NIGHTS = [
    Night("four scenes", lambda w: [w.add(place) for place in range(4)]),
    Night("unchanged", nothing),
    Night("p4 announced, files 404", lambda w: w.add(4, files=ABSENT)),
    Night("p4 still 404", nothing),
    Night("p4's files are there", lambda w: files(w, "p4-b1", HERE), scratch=True),
    Night("p1 updated, files 503", lambda w: w.update(w.items["p1-b1"], DOWN)),
    Night("p1 readable", lambda w: files(w, "p1-b1", HERE)),
    Night("p2 reprocessed, files 404", lambda w: w.add(2, files=ABSENT)),
    Night("files of the new p2 are there", lambda w: files(w, "p2-b2", HERE), scratch=True),
    Night("p3 replaced, the new one 503", lambda w: replace(w, "p3-b1", DOWN)),
    Night("p3 still 503", nothing),
    Night("the new p3 readable", lambda w: files(w, "p3-b2", HERE)),
    Night("the API is down", lambda w: setattr(w.api, "down", True), fails=True),
    Night("the API is back, a page skips an item once",
          several(lambda w: setattr(w.api, "down", False), lambda w: skip(w, 1))),
    Night("pages skip an item all night", lambda w: skip(w, 10**9), fails=True),
    Night("p4 withdrawn", several(lambda w: skip(w, 0), lambda w: listed(w, "p4-b1", False))),
    Night("unchanged", nothing),
    Night("p4 relisted", lambda w: listed(w, "p4-b1", True), scratch=True),
    Night("p5 comes, too cloudy", lambda w: w.add(5, cloud=90.0)),
    Night("p5 goes", lambda w: listed(w, "p5-b1", False)),
    Night("licence of the collection changes", lambda w: setattr(w, "licence", "CC0-1.0")),
    Night("p6 announced, wrong file", lambda w: w.add(6, files=WRONG)),
    Night("p6's own file is there", lambda w: files(w, "p6-b1", HERE)),
    Night("p7 and p8 come; the run is killed and repeated",
          lambda w: [w.add(7), w.add(8, told=False)], dies=5, scratch=True),
    Night("the superseded p2 delisted", lambda w: listed(w, "p2-b1", False)),
    Night("the superseded p2 relisted", lambda w: listed(w, "p2-b1", True)),
    Night("the newer p2 withdrawn", lambda w: listed(w, "p2-b2", False)),
    Night("p1's files 503, cut long ago", lambda w: files(w, "p1-b1", DOWN)),
    Night("the newer p2 relisted, p0 updated",
          several(lambda w: listed(w, "p2-b2", True), lambda w: w.update(w.items["p0-b1"]))),
    Night("p1 back, p9 comes without projection",
          several(lambda w: files(w, "p1-b1", HERE), lambda w: w.add(9, told=False)),
          scratch=True),
]  # fmt: skip


class Dataset:
    """The data stages in one store."""

    def __init__(self, world: Changing, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.store: Store = open_store(folder / "store")
        self.catalogue: Catalogue = open_catalogue(f"sqlite:///{folder}/catalogue.db", self.store)
        search = {"stac": world.api.url, "allow_hosts": ["127.0.0.1"], "max_cloud_percent": 50}
        self.recipe = Recipe.model_validate(
            {
                "name": "nights",
                "search": search,
                "cut": {"size_px": 32, "bands": ["red"], "retries": 0, "max_failed": 1},
                "embed": {"size_px": 32},
                "curate": {"max_saturated": 1, "threshold": 1},
                "pack": {"name": "nights"},
            }
        )

    def run(self) -> Artifact:
        """Run all data stages; return the dataset."""
        made: dict[str, Artifact] = {}
        for name in DATA_STAGES:
            stage, settings = get_stage(name), getattr(self.recipe, section_of(name))
            seed = self.recipe.compute.seed
            artifact = run_stage(stage, self.store, self.catalogue, made, settings, seed, "cpu")
            made[stage.kind] = artifact
        return made["dataset"]

    def night(self) -> Published:
        """Run a refresh."""
        dataset = self.run()
        published = publish(self.catalogue, "nights", dataset)
        waiting = waiting_items(self.catalogue, dataset)
        return Published(published.row, published.new, published.difference, waiting)

    def newest(self) -> Artifact:
        """Return the published dataset."""
        return self.catalogue.resolve("nights")


def members(dataset: Artifact) -> dict[str, str]:
    """Return the SHA-256 of each shard member by name."""
    digests = {}
    for entry in dataset.manifest.files:
        if entry.path.endswith(".tar"):
            with tarfile.open(dataset.local(entry.path)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    digests[member.name] = hashlib.sha256(file.read() if file else b"").hexdigest()
    return digests


def play(world: Changing, dataset: Dataset, night: Night) -> list[str]:
    """Play a night; return the cells of the table: added and removed, version, reason."""
    night.happen(world)
    world.serve()
    if night.dies is not None:
        with killed_after(night.dies):
            try:
                dataset.run()
                raise AssertionError("the run was not killed")
            except Killed:
                pass
    try:
        published = dataset.night()
    except RunError as error:
        assert night.fails, error
        return ["", "the run fails", str(error)[:90]]
    assert not night.fails, "the run did not fail"
    waits = f"; waits: {', '.join(published.waiting)}" if published.waiting else ""
    if not published.new:
        return ["", "no new version", waits.removeprefix("; ")]
    change = published.difference
    if change is None:
        return [f"+{dataset.newest().manifest.counts['rows_out']}", published.ref, "first version"]
    assert change.added or change.removed or change.items or change.notes, "nothing changed"
    reasons = [
        f"{row['item_id']} {row['change']}" + (f" ({row['reason']})" if row["reason"] else "")
        for row in change.items
    ]
    cells = f"+{len(change.added)} −{len(change.removed)}"
    return [cells, published.ref, "; ".join([*reasons, *change.notes]) + waits]


def compare_with_scratch(world: Changing, dataset: Dataset, folder: Path) -> str:
    """Run from scratch, and compare samples and shard members with the published version."""
    scratch = Dataset(world, folder).run()
    ours = dataset.newest()
    names = [set(one.table("samples.parquet", ["chip_id"])["chip_id"]) for one in (ours, scratch)]
    assert names[0] == names[1], "other samples than from scratch"
    assert members(ours) == members(scratch), "other shard members than from scratch"
    same = "same digest" if ours.digest == scratch.digest else "another digest"
    return f"equal ({len(names[0])} samples, {same})"


def main() -> None:
    """Play all nights."""
    logging.disable(logging.CRITICAL)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="nights-"))
    print("| night | event | +/− | version | reason | from scratch | s |")
    print("|---:|---|---|---|---|---|---:|")
    with changing_world(quick=False) as world:
        dataset = Dataset(world, folder / "nights")
        for number, night in enumerate(NIGHTS, start=1):
            began = time.monotonic()
            cells = play(world, dataset, night)
            spent = time.monotonic() - began
            place = folder / f"scratch-{number}"
            scratch = compare_with_scratch(world, dataset, place) if night.scratch else ""
            row = [str(number), night.event, *cells, scratch, f"{spent:.0f}"]
            print("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |", flush=True)


if __name__ == "__main__":
    main()
