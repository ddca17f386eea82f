"""Stage `cut`: frozen items -> chips.

plan    choose the windows of each scene from its metadata        (plan.py, sampling.py, overlap.py)
work    read one scene, write its chips to one tar and its rows   (writer.py, offset_check.py)
seal    cut again until the parts agree with a plan without bad items; write chips.parquet,
        assets.parquet and windows.parquet                        (stand_ins.py, schema.py)
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_catalog.artifact import Artifact
from data_catalog.database.item_states import STAND_INS, ItemState, Key, read_states
from data_catalog.errors import RunError
from data_catalog.hashing import digest_of
from data_catalog.progress import tick
from data_catalog.run import read_plan
from data_catalog.sources import count_sources
from data_catalog.stage import Job, Part, Sealed, Stage, link
from data_catalog.tables import read_note, read_rows, records, write_table
from geofm.chips.items import access_of, current_items
from geofm.chips.plan import CutPlan, forecast, plan_windows, sum_forecasts
from geofm.chips.sampling import REASONS
from geofm.chips.stand_ins import (
    copy_chips,
    is_stand_in,
    item_of,
    unlisted_stand_ins,
    write_unlisted,
)
from geofm.chips.writer import (
    CHIPS_TAR,
    PIXEL_SETTINGS,
    SCENE_ROWS,
    CutWindows,
    cut_or_quarantine,
    quarantine_item,
    to_spans,
)
from geofm.config.recipe import CutSettings
from geofm.raster.grid import Grid
from geofm.remote.quarantine import Quarantine
from geofm.runtime.threads import keep_freed_memory
from geofm.types import Json

log = logging.getLogger("geofm.cut")

#: Scenes that a worker cuts at once; they mostly wait for the network.
SCENES_AT_ONCE = 8
#: Scenes that the seal cuts again at once.
RECUT_THREADS = 4
#: State of a part whose item could not be reached.
PASSING = "passing"


# Plan


def plan(job: Job) -> list[Part]:
    """List one part per scene that has windows in the plan, those with most windows first.

    The last parts to start are then small, and no worker waits long for them. Items that can't be
    used have no part; the seal writes their rows.

    Raises:
        RunError: Too many items are bad (``cut.max_failed``), there are no items, or no item has a
            window in the plan.
    """
    settings: CutSettings = job.settings
    if not current_items(job.inputs["items"]):
        raise RunError("the search kept no item, so there is nothing to cut; widen the search")
    cut_plan = plan_windows(job)
    item_count = len(cut_plan.items) + len(cut_plan.bad)
    check_failed(cut_plan.bad.values(), item_count, settings)
    log.info("cut: %s", sum_forecasts(forecast(cut_plan, settings)).summary())
    planned = windows_by_item(cut_plan)
    size = {n: sum(end - first for _, first, end in planned[n].spans) for n in planned}
    by_size = sorted(planned, key=lambda n: (-size[n], n))
    return [part_of(job, number, planned[number]) for number in by_size]


def windows_by_item(cut_plan: CutPlan) -> dict[int, CutWindows]:
    """Return the windows to cut by item number; items without a window are left out."""
    windows = {}
    ids = [item.item_id for item in cut_plan.items]
    for candidate, (item, grid) in enumerate(zip(cut_plan.items, cut_plan.grids, strict=True)):
        cells = cut_plan.windows.chosen(candidate)
        lost = cut_plan.windows.lost(candidate)
        owners = sorted({ids[owner] for _, owner in lost})
        lost_spans = [(name, to_spans(c for c, o in lost if ids[o] == name)) for name in owners]
        if len(cells) or lost:
            spans = to_spans((int(x), int(y)) for x, y in cells)
            windows[item.number] = CutWindows(grid, spans, lost_spans)
    return windows


def part_of(job: Job, number: int, windows: CutWindows) -> Part:
    """Return the part of an item's windows as it is planned."""
    payload = {"number": number, "order": windows.to_json()}
    covers = [*item_of(job, number).covers, windows.spans, windows.lost]
    cells = sum(end - first for _, first, end in windows.spans)
    return job.part(payload, covers, PIXEL_SETTINGS, rows=cells)


def check_failed(bad: Iterable[Quarantine], item_count: int, settings: CutSettings) -> None:
    """Stop the run if more items are bad than ``cut.max_failed`` allows.

    Raises:
        RunError: With the reasons.
    """
    problems = list(bad)
    if len(problems) > settings.max_failed * item_count or (
        problems and len(problems) == item_count
    ):
        reasons = Counter(problem.reason for problem in problems)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise RunError(
            f"{len(problems)} of {item_count} items can't be used ({why}; e.g. "
            f"{problems[0].detail}); the limit is cut.max_failed = {settings.max_failed:g}: check "
            "the catalogue, cut.bands and search.allow_hosts, or raise the limit"
        )


def explain_failure(cut_plan: CutPlan, settings: CutSettings) -> str:
    """Return why a run of this plan would fail, or an empty text."""
    item_count = len(cut_plan.items) + len(cut_plan.bad)
    try:
        check_failed(cut_plan.bad.values(), item_count, settings)
    except RunError as error:
        return str(error)
    may_succeed = "" in cut_plan.windows.counts() or cut_plan.unknown
    return "" if may_succeed else explain_no_chips(cut_plan, settings)


def explain_no_chips(cut_plan: CutPlan, settings: CutSettings) -> str:
    """Return why there is no chip at all, with the remedy."""
    dropped = {reason: n for reason, n in cut_plan.windows.counts().items() if reason}
    if not dropped:
        return f"no chip of {settings.size_px} px fits into any scene; lower cut.size_px or gsd_m"
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in dropped.items())
    return f"the sampling plan is empty ({reasons}); widen search.bbox or the limits in cut"


# Work


def work(job: Job, part: Part, out: Path) -> None:
    """Cut one scene, or write a row with the reason why it can't be cut."""
    keep_freed_memory()
    cut_number(job, part.payload["number"], CutWindows.from_json(part.payload["order"]), out)


def cut_number(job: Job, number: int, windows: CutWindows, out: Path) -> None:
    """Cut the windows of an item, or copy those of a stand-in."""
    if is_stand_in(job, number):
        copy_chips(job, number, windows, out)
        return
    access = access_of(job.inputs["items"], job.settings)
    cut_or_quarantine(item_of(job, number), job.settings, access, windows, out, job.attempt)


# Seal


def seal(job: Job, parts: list[Path], out: Path) -> Sealed:
    """Write the tars, ``chips.parquet``, ``assets.parquet`` and ``windows.parquet``.

    Raises:
        RunError: Too many items are bad, or no chip is left.
    """
    settings: CutSettings = job.settings
    reconciled, cut_plan = reconcile(job, parts)
    folders = list(reconciled.values())
    if not folders:
        raise RunError(explain_no_chips(cut_plan, settings))
    chips = read_rows(folder / SCENE_ROWS for folder in folders).sort_values(
        ["collection", "item_id", "item_sha256", "row", "col", "chip_id"], ignore_index=True
    )
    assets = read_rows((folder / SCENE_ROWS for folder in folders), 1).sort_values(
        ["collection", "item_id", "item_sha256", "asset", "band"], ignore_index=True
    )
    bad = chips[chips["status"] == "quarantined"]
    problems = [Quarantine(row["reason"], row["detail"]) for row in records(bad)]
    check_failed(problems, len(cut_plan.items) + len(problems), settings)
    chips["licence"] = licences(job, chips, reconciled)
    good = chips[chips["status"] == "ok"]
    if good.empty:
        raise RunError(explain_no_chips(cut_plan, settings))
    for folder in folders:
        if tar := read_state(folder)["tar"]:
            link(folder / CHIPS_TAR, out / tar)
    write_table(chips, out / "chips.parquet")
    write_table(assets, out / "assets.parquet")
    write_windows(cut_plan, out / "windows.parquet")
    stand_ins = [item_of(job, number) for number in reconciled if is_stand_in(job, number)]
    unlisted = unlisted_stand_ins(job, stand_ins, cut_plan.bad)
    if unlisted:
        write_unlisted(unlisted, out / STAND_INS)
    for item in stand_ins:
        log.warning("cut: the newer version of %s can't be read; its chips stay", item.item_id)
    dropped = chips[chips["status"] != "ok"]
    if len(bad):
        log.warning("cut: %d items can't be used; a later run tries them again", len(bad))
    facts = {"retry": len(bad)} if len(bad) else {}
    facts |= {"stand_ins": len(stand_ins)} if stand_ins else {}
    return Sealed(
        counts={"rows_in": len(chips), "rows_out": len(good)},
        dropped={str(reason): int(n) for reason, n in dropped["reason"].value_counts().items()},
        facts={
            "bands": settings.bands,
            "size_px": settings.size_px,
            "items": int(good["item_id"].nunique()),
            "items_quarantined": len(bad),
            "findings": count_findings(assets),
            "not_sampled": {r: n for r, n in cut_plan.windows.counts().items() if r},
            "sources": count_sources(records(good[["source", "licence"]])),
            **facts,
        },
        deterministic=not facts,
    )


def licences(job: Job, chips: pd.DataFrame, numbers: Iterable[int]) -> list[str]:
    """Return the licence of each chip as its item states it now; a part may be older."""
    items = [item_of(job, number) for number in numbers]
    now = {item.key: item.licence for item in items}
    keys = zip(chips["collection"], chips["item_id"], chips["item_sha256"], strict=True)
    return [now[key] for key in keys]


def count_findings(assets: pd.DataFrame) -> dict[str, int]:
    """Count the scenes whose pixels contradict their items, by kind of finding."""
    scenes = assets[assets["finding"] != ""].drop_duplicates(["item_sha256", "finding"])
    return {str(kind): int(n) for kind, n in scenes["finding"].value_counts().sort_index().items()}


def write_windows(cut_plan: CutPlan, path: Path) -> None:
    """Write every candidate window with the reason why it is not in the plan."""
    windows, ids = cut_plan.windows, [item.item_id for item in cut_plan.items]
    owners = pa.array([*ids, ""], pa.string())
    scene = pa.array(windows.scene)
    table = pa.table(
        {
            "item_id": owners.take(scene).dictionary_encode(),
            "item_sha256": pa.array([item.item_sha256 for item in cut_plan.items], pa.string())
            .take(scene)
            .dictionary_encode(),
            "x": windows.cells[:, 0],
            "y": windows.cells[:, 1],
            "status": pa.array(["dropped", "ok"]).take(pa.array((windows.reason == 0) * 1)),
            "reason": pa.array(REASONS).take(pa.array(windows.reason)).dictionary_encode(),
            "witness": owners.take(pa.array(windows.owner % len(owners))).dictionary_encode(),
        }
    )
    pq.write_table(table, path, compression="zstd")


def item_states_of(job: Job, artifact: Artifact) -> dict[Key, ItemState]:
    """Return the state of each item, for the catalogue."""
    return read_states(job.inputs["items"], artifact)


# Reconcile: before the seal, the windows are planned again with the failures of this run, and the
# parts are compared with this plan. Usually nothing differs. Otherwise: a passing failure is tried
# once more; the ground of a bad item goes to the next scene that covers it; an older version of the
# item is cut or copied in its place; and a scene whose file has another location than its metadata
# state is planned at the location of the file. A failure is never kept as a finished part, so the
# next run tries the item again.


def reconcile(job: Job, folders: list[Path]) -> tuple[dict[int, Path], CutPlan]:
    """Cut again until the parts agree with the plan.

    Returns:
        The folder to seal of each item by its number, ascending, and the plan of these folders.
    """
    parts = zip(read_plan(job), folders, strict=True)
    current = {int(part.payload["number"]): folder for part, folder in parts}
    failures = {n: state for n, folder in current.items() if (state := read_state(folder))["bad"]}
    # try again: failures of an earlier, killed attempt, and passing failures
    again = {n for n, s in failures.items() if s["attempt"] != job.attempt or s["state"] == PASSING}
    for number in failures:
        current[number] = take_out(job, current[number])
    while True:
        states = {number: read_state(folder) for number, folder in current.items()}
        bad = {n: Quarantine(*s["bad"]) for n, s in states.items() if s["bad"] and n not in again}
        cut_plan = plan_windows(job, known_grids(states), bad)
        planned = windows_by_item(cut_plan)
        todo = [n for n, want in planned.items() if n in again or differs(want, states.get(n))]
        with ThreadPoolExecutor(RECUT_THREADS) as pool:
            calls = {n: pool.submit(cut_again, job, n, planned[n]) for n in todo}
            for done, (number, call) in enumerate(calls.items(), start=1):
                current[number] = call.result()
                tick("cut: reconciling", done, len(calls), "scenes")
        for number, problem in cut_plan.bad.items():
            if number in again or number not in states:
                item = item_of(job, number)
                name = digest_of([number, item.key, problem.reason, problem.kept])
                current[number] = empty_folder(job, name)
                quarantine_item(item, job.settings, problem, current[number], job.attempt)
        if not todo and not again:
            kept = set(planned) | set(cut_plan.bad)
            return {n: current[n] for n in sorted(current) if n in kept}, cut_plan
        again = set()


def take_out(job: Job, folder: Path) -> Path:
    """Move a failed part out of the store, so that a later run computes it again.

    Its files are moved rather than deleted: the digests of parts' files are remembered by inode
    until the stage has sealed, and a file system reuses the inode of a deleted file.
    """
    target = empty_folder(job, folder.name)
    for path in folder.iterdir():
        path.rename(target / path.name)
    job.store.forget_part(folder.name)
    return target


def known_grids(states: Mapping[int, Json]) -> dict[int, Grid]:
    """Return the grids that were read from the files themselves."""
    return {n: Grid(**state["grid"]) for n, state in states.items() if state["grid"]}


def differs(windows: CutWindows, state: Json | None) -> bool:
    """Return whether a part does not hold the windows of the current plan."""
    if state is None:
        return True
    return bool(state["state"] == "moved" or state["order"] != windows.windows_json())


def cut_again(job: Job, number: int, windows: CutWindows) -> Path:
    """Cut an item's windows, unless a part of this run or of an earlier one has them.

    The result is kept as a part, unless it is a failure.
    """
    item = item_of(job, number)
    part = job.part({}, ["settled", *item.covers, windows.to_json()], PIXEL_SETTINGS)
    for key in (part_of(job, number, windows).key, part.key):
        kept = job.store.fetch_part(key) if job.store.has_part(key) else None
        if kept is not None and (key == part.key or read_state(kept)["state"] == "ok"):
            return kept
    log.info("cut: cutting %s again", item.item_id)
    folder = empty_folder(job, digest_of([number, part.key]))
    cut_number(job, number, windows, folder)
    if read_state(folder)["bad"]:
        return folder
    with job.store.staging() as staged:
        shutil.move(folder, staged / "part")
        job.store.publish_part(part.key, staged / "part")
    return job.store.fetch_part(part.key) or cut_again(job, number, windows)


def empty_folder(job: Job, name: str) -> Path:
    """Return an empty folder in the job's scratch, for results that are not kept as parts."""
    folder = job.scratch / f"settled-{name[:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def read_state(folder: Path) -> Json:
    """Read how a part ended."""
    state: Json = json.loads(read_note(folder / SCENE_ROWS))
    return state


STAGE = Stage(
    name="cut",
    version="6",
    kind="chips",
    inputs=("items",),
    software=("imagecodecs", "numpy", "pandas", "pyproj", "rasterio", "shapely"),
    plan=plan,
    work=work,
    seal=seal,
    at_once=SCENES_AT_ONCE,
    exclusive=True,
    follows=True,
    follows_fields=PIXEL_SETTINGS,
    states=item_states_of,
)
