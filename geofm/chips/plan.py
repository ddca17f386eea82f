"""The plan of stage `cut`: the windows to cut and their cost, mostly from metadata alone.

An item that states the location and size of its bands (``proj:transform``, ``proj:shape`` and a
CRS) is planned without a request. For any other item the headers of its files are read, and the
grid is kept for later runs. A failure to read them is remembered for one attempt of the job only,
so the next run tries again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC
from pathlib import Path

from data_catalog.hashing import canonical, digest_of
from data_catalog.progress import tick
from data_catalog.stage import Job
from data_catalog.storage.atomic import write_atomic
from geofm.chips.fetch_cost import (
    FetchCost,
    bands_to_read,
    bytes_per_pixel,
    fetch_cost_of,
    stated_layout,
    whole_bytes,
)
from geofm.chips.items import (
    DESCRIPTIVE_FIELDS,
    ItemRecord,
    access_of,
    all_items,
    current_items,
)
from geofm.chips.overlap import SceneCandidate
from geofm.chips.sampling import REASONS, Windows, choose_windows
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

#: Threads that read headers; they wait for the network.
HEADER_THREADS = 8
#: Settings that a scene's grid depends on.
GRID_SETTINGS = ("size_px", "gsd_m", "anchor", "bands")


@dataclass(frozen=True)
class CutPlan:
    """Scenes with their grids, and the windows to cut.

    Attributes:
        items: Items that can be planned, by number; candidate ``n`` of ``windows`` is ``items[n]``.
        grids: Grid of each item.
        bad: Problems of the items that can't be planned, by item number.
        unknown: Items whose metadata don't state a grid, if no headers are read.
        windows: Every window of every item, with the reason if it is not cut.
    """

    items: list[ItemRecord]
    grids: list[Grid]
    bad: dict[int, Quarantine]
    unknown: list[ItemRecord]
    windows: Windows


def plan_windows(
    job: Job,
    known: Mapping[int, Grid] | None = None,
    bad: Mapping[int, Quarantine] | None = None,
    read_headers: bool = True,
) -> CutPlan:
    """Plan the windows of all items that the search kept.

    If an item can't be used, an older version of it is planned in its place.

    Args:
        job: Job of the stage ``cut``.
        known: Grids that were read from the files themselves, by item number.
        bad: Problems that occurred while reading, by item number.
        read_headers: Read the headers of files whose item does not state a grid.
    """
    settings: CutSettings = job.settings
    items = list(current_items(job.inputs["items"]).values())
    results: dict[int, Grid | Quarantine] = {**postponed(job), **(bad or {})}
    added = items
    while added:
        open_items = [item for item in added if item.number not in results]
        results |= grids_of(job, open_items, known or {}, read_headers)
        failed = {n for n, result in results.items() if isinstance(result, Quarantine)}
        added = replacements(job, items, failed & {item.number for item in items})
        items += added
    items.sort(key=lambda item: item.number)
    planned = [(i, grid) for i in items if isinstance(grid := results.get(i.number), Grid)]
    candidates = [candidate_of(job, item, grid) for item, grid in planned]
    numbers = {item.number for item in items}
    area = SearchSettings.model_validate(job.inputs["items"].manifest.settings).geometry()
    return CutPlan(
        items=[item for item, _ in planned],
        grids=[grid for _, grid in planned],
        bad={n: v for n, v in results.items() if isinstance(v, Quarantine) and n in numbers},
        unknown=[item for item in items if item.number not in results],
        windows=choose_windows(candidates, settings, area),
    )


def postponed(job: Job) -> dict[int, Quarantine]:
    """Return the items that this run does not request, with their last failure."""
    items = all_items(job.inputs["items"]) if job.postponed else {}
    return {
        number: Quarantine(*job.postponed[item.key])
        for number, item in items.items()
        if item.key in job.postponed
    }


def grids_of(
    job: Job, items: Sequence[ItemRecord], known: Mapping[int, Grid], read_headers: bool
) -> dict[int, Grid | Quarantine]:
    """Return each item's grid, or its problem, by item number."""
    results: dict[int, Grid | Quarantine] = {}
    unstated: list[ItemRecord] = []
    for count, item in enumerate(items, start=1):
        result: Grid | Quarantine | None
        if is_stand_in(job, item.number):
            result = all_stand_ins(job)[item.number].grid
        else:
            result = known.get(item.number) or stated_grid(item, job.settings)
        if result is None:
            unstated.append(item)
        else:
            results[item.number] = result
        if count % 500 == 0:
            tick("cut: planning", count, len(items), "scenes")
    return results | read_grids(job, unstated) if read_headers and unstated else results


def stated_grid(item: ItemRecord, settings: CutSettings) -> Grid | Quarantine | None:
    """Return the grid that an item's metadata state; None if they are not complete."""
    try:
        content = item.item
        bands = [find_band(content, name, item.profile) for name in settings.bands]
        layouts = [stated_layout(content, band) for band in bands]
        stated = [layout for layout in layouts if layout is not None]
        if len(stated) < len(layouts):
            return None
        return finest_grid(stated, settings, item.geometry)
    except Quarantine as problem:
        return problem


def read_grids(job: Job, items: Sequence[ItemRecord]) -> dict[int, Grid | Quarantine]:
    """Read the grids of items from the headers of their files, by item number."""
    settings: CutSettings = job.settings
    access = access_of(job.inputs["items"], settings)
    kept = job.store.scratch(digest_of({"grids of": job.identity_by(GRID_SETTINGS)}))
    results: dict[int, Grid | Quarantine] = {}
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        calls = {
            item.number: pool.submit(read_grid, item, settings, access, kept, job.attempt)
            for item in items
        }
        for done, (number, call) in enumerate(calls.items(), start=1):
            results[number] = call.result()
            tick("cut: headers", done, len(items))
    return results


def read_grid(
    item: ItemRecord, settings: CutSettings, access: Access, kept: Path, attempt: str
) -> Grid | Quarantine:
    """Read an item's grid from its files, or from a file of an earlier run.

    Args:
        item: The item.
        settings: Settings of the stage.
        access: Which hosts may be read.
        kept: Folder of the grids that are kept.
        attempt: Id of the attempt; a failure is remembered for this attempt only.
    """
    profile = item.profile.model_dump(mode="json", exclude=DESCRIPTIVE_FIELDS)
    policy = [access.stac, access.allow_hosts, access.credentials_for]
    name = digest_of([item.collection, item.item_sha256, item.item_id, profile, policy])
    file = kept / f"{name}.json"
    earlier = json.loads(file.read_bytes()) if file.exists() else {}
    if "grid" in earlier:
        return Grid(**earlier["grid"])
    if earlier.get("attempt") == attempt:
        return Quarantine(**earlier["bad"])
    try:
        with open_scene(
            item.item, item.geometry, item.profile, settings, access, whole=False
        ) as scene:
            result: Json = {"grid": asdict(scene.grid)}
    except Quarantine as problem:
        if problem.passing:
            return problem
        bad = {"reason": problem.reason, "detail": problem.detail}
        result = {"bad": bad, "attempt": attempt}
    write_atomic(file, canonical(result))
    return Grid(**result["grid"]) if "grid" in result else Quarantine(**result["bad"])


def candidate_of(job: Job, item: ItemRecord, grid: Grid) -> SceneCandidate:
    """Return an item as the sampling plan sees it."""
    content, settings = item.item, job.settings
    nodata = content["properties"].get("s2:nodata_pixel_percentage")
    when = parse_time(item.datetime)
    if when is not None and when.tzinfo:
        when = when.astimezone(UTC)
    bands = bands_to_read(content, item.profile, settings)
    whole = {band.asset: whole_bytes(content, band, grid, settings) for band in bands}
    per_pixel = sum(bytes_per_pixel(content, b, grid) for b in bands if not whole[b.asset])
    return SceneCandidate(
        collection=item.collection,
        item_id=item.item_id,
        item_sha256=item.item_sha256,
        acquisition=item.acquisition,
        time=when.isoformat() if when else "",
        version=item.baseline,
        cloud=item.cloud_cover,
        nodata=float(nodata) if is_number(nodata) else 0.0,
        grid=grid,
        geometry=item.geometry,
        chip_bytes=per_pixel * grid.size**2,
        scene_bytes=sum(whole.values()),
        cells=all_stand_ins(job)[item.number].cells if is_stand_in(job, item.number) else None,
    )


# Forecast


@dataclass(frozen=True)
class Forecast:
    """A forecast of the cut, for one collection or for all.

    Attributes:
        scenes: Scenes with windows in the plan.
        chips: Windows in the plan.
        cost: Estimated requests and bytes.
        left_out: Windows that are not in the plan, by reason.
    """

    collection: str
    scenes: int = 0
    chips: int = 0
    cost: FetchCost = field(default_factory=FetchCost)
    left_out: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Return the forecast as a sentence."""
        return (
            f"{self.chips:,} chips of {self.scenes:,} scenes planned; about "
            f"{self.cost.requests:,} requests and {self.cost.bytes / 2**30:.2f} GiB"
        )

    def to_json(self) -> Json:
        """Return the forecast as JSON, for scripts."""
        left_out = dict(sorted(self.left_out.items()))
        fetched = {"requests": self.cost.requests, "bytes": self.cost.bytes}
        return {"scenes": self.scenes, "chips": self.chips, **fetched, "left_out": left_out}


def forecast(cut_plan: CutPlan, settings: CutSettings) -> list[Forecast]:
    """Forecast a plan, by collection."""
    by_name: dict[str, Forecast] = {}
    windows = cut_plan.windows
    for candidate, (item, grid) in enumerate(zip(cut_plan.items, cut_plan.grids, strict=True)):
        cells = windows.chosen(candidate)
        codes = Counter(windows.reason[windows.of(candidate)].tolist())
        left_out = Counter({REASONS[code]: count for code, count in codes.items() if code})
        cost = fetch_cost_of(item, grid, cells, settings)
        scene = Forecast(item.collection, int(len(cells) > 0), len(cells), cost, left_out)
        earlier = by_name.get(item.collection, Forecast(""))
        by_name[item.collection] = sum_forecasts([earlier, scene])
    return [by_name[name] for name in sorted(by_name)]


def sum_forecasts(forecasts: Iterable[Forecast]) -> Forecast:
    """Return the sum of forecasts, under the name of the last one."""
    total = Forecast("")
    for part in forecasts:
        total = Forecast(
            part.collection,
            total.scenes + part.scenes,
            total.chips + part.chips,
            total.cost + part.cost,
            total.left_out + part.left_out,
        )
    return total
