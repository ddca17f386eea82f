"""The stage ``cut``: good scenes become candidate chips on a fixed grid, each with its provenance.

``plan`` looks at every item's headers and last blocks (so a bad item never owns ground), then
decides which item owns which cell. ``work`` cuts one item. ``seal`` puts the parts together; where
an item turned out bad only when all its pixels were read, its ground goes to the next in line. The
same holds in time: an item that superseded others and can't be used makes room for them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_catalog.canonical import canonical, digest_of
from data_catalog.errors import RunError
from data_catalog.progress import tick
from data_catalog.sources import count_sources
from data_catalog.stage import Job, Part, Sealed, Stage, link
from data_catalog.tables import read_table, records, write_table
from geofm.imagery.chip_table import read_rows
from geofm.imagery.cutting import (
    ASSETS,
    CHIPS,
    ROWS,
    STATE,
    Listed,
    access_of,
    cut_item,
    every_item,
    from_runs,
    listed_items,
    next_in_line,
    quarantine_item,
    to_runs,
)
from geofm.imagery.grid import Cell, Grid
from geofm.imagery.hosts import Access
from geofm.imagery.items import Json
from geofm.imagery.overlap import Claim, lost_cells
from geofm.imagery.pixels import probe
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.scene import open_scene
from geofm.settings import CutSettings

log = logging.getLogger("geofm.cut")

#: Items probed at once; probing waits for the network, not for the processor.
PROBES = 8


def plan(job: Job) -> list[Part]:
    """One part per good item: which cells to cut, which belong to another item, or why not at all.

    Raises:
        RunError: when too many items are bad (``cut.max_failed``) or there is no item.
    """
    settings: CutSettings = job.settings
    items = job.inputs["items"]
    if not listed_items(items):
        raise RunError("the search kept no item, so there is nothing to cut; widen the search")
    listed, found = look(job)
    bad = {n: verdict for n, verdict in found.items() if isinstance(verdict, Quarantine)}
    check_failed(bad.values(), len(listed), settings)
    grids = {n: grid for n, grid in found.items() if isinstance(grid, Grid)}
    lost = own(listed, grids, settings)
    parts = []
    for one in listed:
        covers = [one.collection, one.item_id, one.item_sha256, one.facts,
                  digest_of(one.profile.model_dump(mode="json"))]  # fmt: skip
        if one.number in bad:
            problem = bad[one.number]
            told = [problem.reason, problem.kept, problem.passing]
            parts.append(job.part({"number": one.number, "bad": told}, [*covers, told]))
            continue
        gone = lost[one.number]
        runs = to_runs(cell for cell in grids[one.number].cells() if cell not in gone)
        lose = [[owner, to_runs(c for c, o in gone.items() if o == owner)]
                for owner in sorted(set(gone.values()))]  # fmt: skip
        payload = {"number": one.number, "runs": runs, "lost": lose}
        parts.append(job.part(payload, [*covers, runs, lose]))
    return parts


def look(job: Job) -> tuple[list[Listed], dict[int, Grid | Quarantine]]:
    """The items to cut, with what looking at each found.

    Where an item is bad for good, those that it superseded are looked at in its place.
    """
    items = job.inputs["items"]
    access = access_of(items, job.settings)
    found: dict[int, Grid | Quarantine] = {}
    wave = list(listed_items(items).values())
    while wave:
        found |= probe_all(job, wave, access)
        bad = [n for n, verdict in found.items() if is_final(verdict)]
        wave = [one for one in next_in_line(items, bad) if one.number not in found]
    everyone = every_item(items)
    return [everyone[number] for number in sorted(found)], found


def is_final(verdict: Grid | Quarantine) -> bool:
    """Whether an item is bad, and not merely out of reach."""
    return isinstance(verdict, Quarantine) and not verdict.passing


def probe_all(job: Job, listed: list[Listed], access: Access) -> dict[int, Grid | Quarantine]:
    """The grid of each item or what is wrong with it, by row number.

    Final answers are kept beside the store under the item's digest, so that neither a killed run
    nor tomorrow's asks again.
    """
    settings: CutSettings = job.settings
    kept = job.store.scratch(digest_of({"probes of": job.identity}))
    found: dict[int, Grid | Quarantine] = {}
    with ThreadPoolExecutor(PROBES) as pool:
        calls = {one.number: pool.submit(probe_one, one, settings, access, kept) for one in listed}
        for done, (number, call) in enumerate(calls.items(), start=1):
            found[number] = call.result()
            tick("cut: items looked at", done, len(listed))
    return found


def probe_one(one: Listed, settings: CutSettings, access: Access, kept: Path) -> Grid | Quarantine:
    """Open one item and read its last blocks, or remember what came of it."""
    profile = one.profile.model_dump(mode="json")
    may = [access.stac, access.allow_hosts]
    name = digest_of([one.collection, one.item_sha256, one.item_id, profile, may])
    file = kept / f"{name}.json"
    if file.exists():
        known = json.loads(file.read_bytes())
        return Grid(**known["grid"]) if "grid" in known else Quarantine(**known["bad"])
    try:
        with open_scene(
            one.item, one.geometry, one.profile, settings, access, whole=False
        ) as scene:
            probe(scene)
            grid = scene.grid
        answer: Json = {"grid": asdict(grid)}
    except Quarantine as problem:
        log.info("cut: %s", problem)
        if problem.passing:
            return problem
        answer = {"bad": {"reason": problem.reason, "detail": problem.detail}}
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_bytes(canonical(answer))
    beside.replace(file)
    return Grid(**answer["grid"]) if "grid" in answer else Quarantine(**answer["bad"])


def check_failed(bad: Iterable[Quarantine], total: int, settings: CutSettings) -> None:
    """Stop when so many items are bad that the result would not be what was asked for.

    Raises:
        RunError: with the reasons.
    """
    reasons = Counter(problem.reason for problem in bad)
    number = sum(reasons.values())
    if number > settings.max_failed * total or number == total:
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        example = next(iter(bad)).detail
        raise RunError(
            f"{number} of {total} items can't be used ({told}; e.g. {example}); the limit is "
            f"cut.max_failed = {settings.max_failed:g}: check the catalogue, cut.bands and "
            "search.allow_hosts, or raise the limit"
        )


def own(
    listed: list[Listed], grids: dict[int, Grid], settings: CutSettings
) -> dict[int, dict[Cell, str]]:
    """Cells that belong to another item, by row number, with the owner's id."""
    good = [one for one in listed if one.number in grids]
    claims = [
        Claim(
            collection=one.collection,
            item_id=one.item_id,
            acquisition=one.acquisition,
            version=one.baseline,
            cloud=one.cloud_cover,
            grid=grids[one.number],
            geometry=one.geometry,
        )
        for one in good
    ]
    lost = lost_cells(claims, settings.max_overlap)
    return {one.number: cells for one, cells in zip(good, lost, strict=True)}


def work(job: Job, part: Part, out: Path) -> None:
    """Cut one item, or write down why not."""
    settings: CutSettings = job.settings
    payload = part.payload
    one = every_item(job.inputs["items"])[payload["number"]]
    access = access_of(job.inputs["items"], settings)
    if "bad" in payload:
        quarantine_item(one, settings, Quarantine(*payload["bad"]), out)
        return
    lost = {cell: owner for owner, runs in payload["lost"] for cell in from_runs(runs)}
    cut_or_quarantine(one, settings, access, from_runs(payload["runs"]), lost, out)


def cut_or_quarantine(
    one: Listed,
    settings: CutSettings,
    access: Access,
    cells: list[Cell],
    lost: dict[Cell, str],
    out: Path,
) -> None:
    """Cut cells of an item into a folder; a bad item leaves one row."""
    try:
        cut_item(one, settings, access, to_runs(cells), lost, out)
    except Quarantine as problem:
        log.info("cut: %s", problem)
        quarantine_item(one, settings, problem, out)


def seal(job: Job, folders: list[Path], out: Path) -> Sealed:
    """Put the parts together and write ``chips.parquet`` and ``assets.parquet``.

    Raises:
        RunError: when too many items are bad or no chip is left.
    """
    settings: CutSettings = job.settings
    folders = settle(job, folders)
    chips = read_rows(folder / ROWS for folder in folders).sort_values(
        ["collection", "item_id", "item_sha256", "row", "col", "chip_id"], ignore_index=True
    )
    assets = read_rows(folder / ASSETS for folder in folders).sort_values(
        ["collection", "item_id", "item_sha256", "asset", "band"], ignore_index=True
    )
    bad = chips[chips["status"] == "quarantined"]
    check_failed(
        [Quarantine(row["reason"], row["detail"]) for row in records(bad)], len(folders), settings
    )
    good = chips[chips["status"] == "ok"]
    if good.empty:
        raise RunError(
            f"no chip of {settings.size_px} px fits into any scene; lower cut.size_px or cut.gsd_m"
        )
    for folder in folders:
        if (folder / CHIPS).exists():
            names = read_table(folder / ROWS, ["part"])["part"]
            link(folder / CHIPS, out / str(names.max()))
    write_table(chips, out / "chips.parquet")
    write_table(assets, out / "assets.parquet")
    gone = chips[chips["status"] != "ok"]
    retry = sum(read_state(folder)["state"] == "passing" for folder in folders)
    if retry:
        log.warning("cut: %d items were out of reach; run again to ask for them once more", retry)
    return Sealed(
        counts={"rows_in": len(chips), "rows_out": len(good)},
        dropped={str(reason): int(n) for reason, n in gone["reason"].value_counts().items()},
        facts={
            "bands": settings.bands,
            "size_px": settings.size_px,
            "items": int(good["item_id"].nunique()),
            "items_quarantined": len(bad),
            "sources": count_sources(records(good[["source", "licence"]])),
            **({"retry": retry} if retry else {}),
        },
        deterministic=not retry,
    )


def settle(job: Job, folders: list[Path]) -> list[Path]:
    """Cut again what the parts left open, until nothing is: usually nothing.

    A part that failed for a passing fault gets another chance. And when an item was found bad
    while it was cut, cells that others had lost to it are theirs again, and those that it
    superseded come in its place.
    """
    settings: CutSettings = job.settings
    items = job.inputs["items"]
    access, everyone = access_of(items, settings), every_item(items)
    current = {read_state(folder)["number"]: folder for folder in folders}
    asked: set[int] = set()
    while True:
        known = {number: read_state(folder) for number, folder in current.items()}
        grids = {n: Grid(**s["grid"]) for n, s in known.items() if s["state"] == "ok"}
        bad = [n for n, s in known.items() if s["state"] == "bad"]
        again = [n for n, s in known.items() if s["state"] == "passing"]
        again += [one.number for one in next_in_line(items, bad) if one.number not in known]
        again = [number for number in again if number not in asked]
        asked.update(again)
        for number in again:
            verdict = probe_one(everyone[number], settings, access, job.scratch)
            if isinstance(verdict, Grid):
                grids[number] = verdict
            else:
                current[number] = empty_folder(job, [number, verdict.reason, verdict.kept])
                quarantine_item(everyone[number], settings, verdict, current[number])
        lost = own([everyone[number] for number in sorted(grids)], grids, settings)
        todo = [n for n in grids if n in again or lost[n] != lost_in(current[n], grids[n])]
        if not todo and not again:
            return [current[number] for number in sorted(current)]
        for number in todo:
            cells = [cell for cell in grids[number].cells() if cell not in lost[number]]
            runs = [to_runs(cells), sorted([*cell, who] for cell, who in lost[number].items())]
            folder = empty_folder(job, [number, runs])
            log.info("cut: cutting %s again", everyone[number].item_id)
            cut_or_quarantine(everyone[number], settings, access, cells, lost[number], folder)
            current[number] = folder


def empty_folder(job: Job, what: Any) -> Path:
    """A folder in the job's scratch for what is cut while sealing."""
    folder = job.scratch / f"settled-{digest_of([job.key, what])[:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def read_state(folder: Path) -> Json:
    """How a part ended."""
    state: Json = json.loads((folder / STATE).read_bytes())
    return state


def lost_in(folder: Path, grid: Grid) -> dict[Cell, str]:
    """The cells that a part gave up to others."""
    rows: list[dict[str, Any]] = records(read_table(folder / ROWS, ["cell", "reason", "witness"]))
    found = {}
    for row in rows:
        if row["reason"] == "overlap":
            x, y = row["cell"].rsplit("/", 2)[1:]
            found[int(x), int(y)] = row["witness"]
    return found


STAGE = Stage(
    name="cut",
    version="2",
    kind="chips",
    inputs=("items",),
    software=("numpy", "pyproj", "rasterio", "shapely"),
    plan=plan,
    work=work,
    seal=seal,
)
