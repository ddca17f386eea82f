"""The sampling plan in figures, before anything is fetched: scenes, chips, requests, bytes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC
from pathlib import Path

from data_catalog.hashing import canonical, digest_of
from data_catalog.progress import tick
from data_catalog.stage import Job
from geofm.chips.fetch_cost import Cost, bytes_per_pixel, cost_of, stated_place, wanted, whole_bytes
from geofm.chips.items import ABOUT, Listed, access_of, every_item, listed_items
from geofm.chips.overlap import Claim
from geofm.chips.sampling import REASONS, Windows, choose
from geofm.chips.stand_ins import all_stand_ins, is_stand_in, replacements
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.raster.grid import Grid
from geofm.raster.scene import finest_grid, open_scene
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access
from geofm.runtime.timestamps import parse_time
from geofm.stac.bands import find_band
from geofm.stac.item import is_number
from geofm.types import Json

# What there is to cut and what it will cost, from metadata alone where the items tell enough.
# An item that states the place and size of its bands (``proj:transform``, ``proj:shape``, a CRS) is
# planned without a request. Of any other the headers are read, and the grid is remembered. A failed
# look is remembered for one attempt of the job only: the next run asks again.

#: Items looked at at once; looking waits for the network, not for the processor.
LOOKS = 8
#: The settings that a scene's grid depends on.
GRID = ("size_px", "gsd_m", "anchor", "bands")


@dataclass(frozen=True)
class Survey:
    """Scenes with their grids, and the plan.

    Attributes:
        listed: the scenes that can be planned, in the order of their rows; claim n of the windows.
        grids: of each.
        bad: what is wrong with others, by row number.
        unknown: scenes whose metadata do not tell, where nobody looked.
    """

    listed: list[Listed]
    grids: list[Grid]
    bad: dict[int, Quarantine]
    unknown: list[Listed]
    windows: Windows


def survey(
    job: Job,
    known: Mapping[int, Grid] | None = None,
    found_bad: Mapping[int, Quarantine] | None = None,
    look: bool = True,
) -> Survey:
    """Plan everything that the search kept.

    Where an item can't be used, an older version of it is planned in its place.

    Args:
        job: of the stage ``cut``.
        known: grids that were read from the files themselves, by number.
        found_bad: items that turned out to be bad when they were read, by number.
        look: ask for the headers of scenes whose metadata do not tell.
    """
    settings: CutSettings = job.settings
    items = job.inputs["items"]
    everyone = list(listed_items(items).values())
    found: dict[int, Grid | Quarantine] = {**postponed(job), **(found_bad or {})}
    wave = everyone
    while wave:
        found |= grids_of(job, [one for one in wave if one.number not in found], known or {}, look)
        bad = {n for n, verdict in found.items() if isinstance(verdict, Quarantine)}
        wave = replacements(job, everyone, bad & {one.number for one in everyone})
        everyone += wave
    everyone.sort(key=lambda one: one.number)
    planned = [(one, grid) for one in everyone if isinstance(grid := found.get(one.number), Grid)]
    claims = [claim_of(job, one, grid) for one, grid in planned]
    there = {one.number for one in everyone}
    area = SearchSettings.model_validate(items.manifest.settings).geometry()
    return Survey(
        listed=[one for one, _ in planned],
        grids=[grid for _, grid in planned],
        bad={n: v for n, v in found.items() if isinstance(v, Quarantine) and n in there},
        unknown=[one for one in everyone if one.number not in found],
        windows=choose(claims, settings, area),
    )


def postponed(job: Job) -> dict[int, Quarantine]:
    """The items that this run does not ask for, with the reason of their last failure."""
    everyone = every_item(job.inputs["items"]) if job.postponed else {}
    return {
        number: Quarantine(*job.postponed[one.key])
        for number, one in everyone.items()
        if one.key in job.postponed
    }


def grids_of(
    job: Job, listed: Sequence[Listed], known: Mapping[int, Grid], look: bool
) -> dict[int, Grid | Quarantine]:
    """The grid of each scene or what is wrong with it, by number."""
    found: dict[int, Grid | Quarantine] = {}
    silent: list[Listed] = []
    for number, one in enumerate(listed, start=1):
        verdict: Grid | Quarantine | None
        if is_stand_in(job, one.number):
            verdict = all_stand_ins(job)[one.number].grid
        else:
            verdict = known.get(one.number) or stated_grid(one, job.settings)
        if verdict is None:
            silent.append(one)
        else:
            found[one.number] = verdict
        if number % 500 == 0:
            tick("cut: planning", number, len(listed), "scenes")
    return found | look_at(job, silent) if look and silent else found


def claim_of(job: Job, one: Listed, grid: Grid) -> Claim:
    """A scene as the sampling plan sees it."""
    item, settings = one.item, job.settings
    nodata = item["properties"].get("s2:nodata_pixel_percentage")
    when = parse_time(one.datetime)
    if when is not None and when.tzinfo:
        when = when.astimezone(UTC)
    bands = wanted(item, one.profile, settings)
    whole = {band.asset: whole_bytes(item, band, grid, settings) for band in bands}
    per_pixel = sum(bytes_per_pixel(item, b, grid) for b in bands if not whole[b.asset])
    return Claim(
        collection=one.collection,
        item_id=one.item_id,
        item_sha256=one.item_sha256,
        acquisition=one.acquisition,
        time=when.isoformat() if when else "",
        version=one.baseline,
        cloud=one.cloud_cover,
        nodata=float(nodata) if is_number(nodata) else 0.0,
        grid=grid,
        geometry=one.geometry,
        chip_bytes=per_pixel * grid.size**2,
        scene_bytes=sum(whole.values()),
        cells=all_stand_ins(job)[one.number].cells if is_stand_in(job, one.number) else None,
    )


def stated_grid(one: Listed, settings: CutSettings) -> Grid | Quarantine | None:
    """The grid by the item's own metadata; None where it does not tell enough."""
    try:
        item = one.item
        bands = [find_band(item, name, one.profile) for name in settings.bands]
        places = [stated_place(item, band) for band in bands]
        told = [place for place in places if place is not None]
        return finest_grid(told, settings, one.geometry) if len(told) == len(places) else None
    except Quarantine as problem:
        return problem


def look_at(job: Job, listed: Sequence[Listed]) -> dict[int, Grid | Quarantine]:
    """The grid of each scene by its headers, or what is wrong with it, by row number."""
    settings: CutSettings = job.settings
    access = access_of(job.inputs["items"], settings)
    kept = job.store.scratch(digest_of({"grids of": job.identity_by(GRID)}))
    found: dict[int, Grid | Quarantine] = {}
    with ThreadPoolExecutor(LOOKS) as pool:
        calls = {
            one.number: pool.submit(look_once, one, settings, access, kept, job.attempt)
            for one in listed
        }
        for done, (number, call) in enumerate(calls.items(), start=1):
            found[number] = call.result()
            tick("cut: headers", done, len(listed))
    return found


def look_once(
    one: Listed, settings: CutSettings, access: Access, kept: Path, attempt: str
) -> Grid | Quarantine:
    """Open one scene, or remember its grid; a failure is remembered for this attempt only."""
    profile = one.profile.model_dump(mode="json", exclude=ABOUT)
    may = [access.stac, access.allow_hosts, access.credentials_for]
    name = digest_of([one.collection, one.item_sha256, one.item_id, profile, may])
    file = kept / f"{name}.json"
    known = json.loads(file.read_bytes()) if file.exists() else {}
    if "grid" in known:
        return Grid(**known["grid"])
    if known.get("attempt") == attempt:
        return Quarantine(**known["bad"])
    try:
        with open_scene(
            one.item, one.geometry, one.profile, settings, access, whole=False
        ) as scene:
            answer: Json = {"grid": asdict(scene.grid)}
    except Quarantine as problem:
        if problem.passing:
            return problem
        bad = {"reason": problem.reason, "detail": problem.detail}
        answer = {"bad": bad, "attempt": attempt}
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_bytes(canonical(answer))
    beside.replace(file)
    return Grid(**answer["grid"]) if "grid" in answer else Quarantine(**answer["bad"])


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
