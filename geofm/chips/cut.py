"""The stage ``cut``: good scenes become candidate chips on a fixed grid, each with its provenance.

``plan`` chooses from metadata which windows of which scenes are cut. ``work`` cuts one scene.
``seal`` settles what turned out otherwise than planned, and puts the parts together.
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
from geofm.chips.items import access_of, listed_items
from geofm.chips.plan import Survey, forecast, survey, total
from geofm.chips.sampling import REASONS
from geofm.chips.stand_ins import (
    copy_chips,
    is_stand_in,
    item_of,
    unlisted_stand_ins,
    write_unlisted,
)
from geofm.chips.writer import (
    CHIPS,
    PIXELS,
    SCENE,
    Order,
    cut_or_quarantine,
    quarantine_item,
    to_runs,
)
from geofm.config.recipe import CutSettings
from geofm.raster.grid import Grid
from geofm.remote.quarantine import Quarantine
from geofm.runtime.threads import keep_freed_memory
from geofm.types import Json

# What turned out otherwise than planned is settled before the stage ``cut`` seals.
# Usually there is nothing to do. But a passing fault gets another chance; ground of an item that
# was found bad while it was cut goes to the next in line, and an older version is cut or stands in
# for it; and a scene whose file lies elsewhere than its metadata say is planned again where
# it lies.
# No failure is kept as a finished part: the next run asks again.

log = logging.getLogger("geofm.cut")

#: State of a part whose item was out of reach.
PASSING = "passing"
#: Scenes that are cut again at once; they mostly wait for the network.
AGAIN = 4


def orders_of(found: Survey) -> dict[int, Order]:
    """What is to be cut of each scene, by row number; scenes without a window are left out."""
    orders = {}
    names = [one.item_id for one in found.listed]
    for claim, (one, grid) in enumerate(zip(found.listed, found.grids, strict=True)):
        cells, lost = found.windows.chosen(claim), found.windows.lost(claim)
        owners = sorted({names[owner] for _, owner in lost})
        given = [(name, to_runs(c for c, o in lost if names[o] == name)) for name in owners]
        if len(cells) or lost:
            runs = to_runs((int(x), int(y)) for x, y in cells)
            orders[one.number] = Order(grid, runs, given)
    return orders


def settle(job: Job, folders: list[Path]) -> tuple[dict[int, Path], Survey]:
    """Cut again what the parts left open, until nothing is.

    Returns:
        The folders to seal by the number of their item, ascending, and the plan that they follow.
    """
    parts = zip(read_plan(job), folders, strict=True)
    current = {int(part.payload["number"]): folder for part, folder in parts}
    failures = {number: state for number, folder in current.items()
                if failed(state := read_state(folder))}  # fmt: skip
    # of an earlier attempt, which was killed; or a passing fault, which may be over
    again = {n for n, s in failures.items() if s["attempt"] != job.attempt or s["state"] == PASSING}
    for number in failures:
        current[number] = take_out(job, current[number])
    while True:
        states = {number: read_state(folder) for number, folder in current.items()}
        found = survey(job, known_grids(states), found_bad(states, again))
        orders = orders_of(found)
        todo = [n for n, order in orders.items() if n in again or differs(order, states.get(n))]
        with ThreadPoolExecutor(AGAIN) as pool:
            calls = {n: pool.submit(cut_again, job, n, orders[n]) for n in todo}
            for done, (number, call) in enumerate(calls.items(), start=1):
                current[number] = call.result()
                tick("cut: settling", done, len(calls), "scenes")
        for number, problem in found.bad.items():
            if number in again or number not in states:
                one = item_of(job, number)
                name = digest_of([number, one.key, problem.reason, problem.kept])
                current[number] = empty_folder(job, name)
                quarantine_item(one, job.settings, problem, current[number], job.attempt)
        if not todo and not again:
            keep = set(orders) | set(found.bad)
            return {n: current[n] for n in sorted(current) if n in keep}, found
        again = set()


def failed(state: Json) -> bool:
    """Whether a part is that of an item that could not be used."""
    return state["bad"] is not None


def take_out(job: Job, folder: Path) -> Path:
    """Move a failed part out of the store, so that a later run works on it again.

    Its files are moved, not deleted: the digests of parts' files are remembered by inode until the
    stage has sealed, and a file system gives the inode of a deleted file to the next new one.
    """
    place = empty_folder(job, folder.name)
    for path in folder.iterdir():
        path.rename(place / path.name)
    job.store.forget_part(folder.name)
    return place


def known_grids(states: Mapping[int, Json]) -> dict[int, Grid]:
    """Grids as the files themselves have them."""
    return {n: Grid(**state["grid"]) for n, state in states.items() if state["grid"]}


def found_bad(states: Mapping[int, Json], again: set[int]) -> dict[int, Quarantine]:
    """What could not be used, by row number, but for what is tried again."""
    return {n: Quarantine(*s["bad"]) for n, s in states.items() if s["bad"] and n not in again}


def differs(order: Order, state: Json | None) -> bool:
    """Whether a part is not what the plan asks for now."""
    if state is None:
        return True
    return bool(state["state"] == "moved" or state["order"] != order.windows_json())


def part_of(job: Job, number: int, order: Order) -> Part:
    """The part that a scene's windows are planned as."""
    payload = {"number": number, "order": order.to_json()}
    covers = [*item_of(job, number).covers, order.runs, order.lost]
    return job.part(payload, covers, PIXELS)


def cut_again(job: Job, number: int, order: Order) -> Path:
    """Cut a scene's windows, unless that was done before, in this run or another night.

    The result is kept as a part, unless it is a failure.
    """
    one = item_of(job, number)
    part = job.part({}, ["settled", *one.covers, order.to_json()], PIXELS)
    for key in (part_of(job, number, order).key, part.key):
        kept = job.store.fetch_part(key) if job.store.has_part(key) else None
        if kept is not None and (key == part.key or read_state(kept)["state"] == "ok"):
            return kept
    log.info("cut: cutting %s again", one.item_id)
    folder = empty_folder(job, digest_of([number, part.key]))
    cut_number(job, number, order, folder)
    if failed(read_state(folder)):
        return folder
    with job.store.staging() as staged:
        shutil.move(folder, staged / "part")
        job.store.publish_part(part.key, staged / "part")
    return job.store.fetch_part(part.key) or cut_again(job, number, order)


def cut_number(job: Job, number: int, order: Order, out: Path) -> None:
    """Cut the windows of an item, or copy those of a stand-in."""
    if is_stand_in(job, number):
        copy_chips(job, number, order, out)
        return
    access = access_of(job.inputs["items"], job.settings)
    one = item_of(job, number)
    cut_or_quarantine(one, job.settings, access, order, out, job.attempt)


def empty_folder(job: Job, name: str) -> Path:
    """A folder in the job's scratch for what is not kept as a part."""
    folder = job.scratch / f"settled-{name[:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def read_state(folder: Path) -> Json:
    """How a part ended."""
    state: Json = json.loads(read_note(folder / SCENE))
    return state


#: Scenes that a worker cuts at once; they mostly wait for the network.
THREADS = 4


def plan(job: Job) -> list[Part]:
    """List one part per scene that has windows in the plan, those with most windows first.

    The last parts to begin are then small, and no worker waits long for them. Items that can't be
    used have no part; the seal writes their rows.

    Raises:
        RunError: when too many items are bad (``cut.max_failed``), there is none, or none has a
            window in the plan.
    """
    settings: CutSettings = job.settings
    items = job.inputs["items"]
    if not listed_items(items):
        raise RunError("the search kept no item, so there is nothing to cut; widen the search")
    found = survey(job)
    check_failed(found.bad.values(), len(found.listed) + len(found.bad), settings)
    log.info("cut: %s", total(forecast(found, settings)).told())
    orders = orders_of(found)
    windows = {n: sum(end - first for _, first, end in orders[n].runs) for n in orders}
    by_size = sorted(orders, key=lambda n: (-windows[n], n))
    return [part_of(job, number, orders[number]) for number in by_size]


def check_failed(bad: Iterable[Quarantine], total: int, settings: CutSettings) -> None:
    """Stop when so many items are bad that the result would not be what was asked for.

    Raises:
        RunError: with the reasons.
    """
    problems = list(bad)
    if len(problems) > settings.max_failed * total or (problems and len(problems) == total):
        reasons = Counter(problem.reason for problem in problems)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise RunError(
            f"{len(problems)} of {total} items can't be used ({why}; e.g. {problems[0].detail}); "
            f"the limit is cut.max_failed = {settings.max_failed:g}: check the catalogue, "
            "cut.bands and search.allow_hosts, or raise the limit"
        )


def work(job: Job, part: Part, out: Path) -> None:
    """Cut one scene, or write down why not."""
    keep_freed_memory()
    order = Order.from_json(part.payload["order"])
    cut_number(job, part.payload["number"], order, out)


def seal(job: Job, parts: list[Path], out: Path) -> Sealed:
    """Put the parts together: tars, ``chips.parquet``, ``assets.parquet``, ``windows.parquet``.

    Raises:
        RunError: when too many items are bad or no chip is left.
    """
    settings: CutSettings = job.settings
    settled, found = settle(job, parts)
    folders = list(settled.values())
    if not folders:
        raise RunError(nothing(found, settings))
    chips = read_rows(folder / SCENE for folder in folders).sort_values(
        ["collection", "item_id", "item_sha256", "row", "col", "chip_id"], ignore_index=True
    )
    assets = read_rows((folder / SCENE for folder in folders), 1).sort_values(
        ["collection", "item_id", "item_sha256", "asset", "band"], ignore_index=True
    )
    bad = chips[chips["status"] == "quarantined"]
    problems = [Quarantine(row["reason"], row["detail"]) for row in records(bad)]
    check_failed(problems, len(found.listed) + len(problems), settings)
    chips["licence"] = licences(job, chips, settled)
    good = chips[chips["status"] == "ok"]
    if good.empty:
        raise RunError(nothing(found, settings))
    for folder in folders:
        if tar := read_state(folder)["tar"]:
            link(folder / CHIPS, out / tar)
    write_table(chips, out / "chips.parquet")
    write_table(assets, out / "assets.parquet")
    write_windows(found, out / "windows.parquet")
    stand_ins = [item_of(job, number) for number in settled if is_stand_in(job, number)]
    unlisted = unlisted_stand_ins(job, stand_ins, found.bad)
    if unlisted:
        write_unlisted(unlisted, out / STAND_INS)
    for one in stand_ins:
        log.warning("cut: the newer version of %s can't be read; its chips stay", one.item_id)
    gone = chips[chips["status"] != "ok"]
    if len(bad):
        log.warning("cut: %d items can't be used; a later run asks for them again", len(bad))
    facts = {"retry": len(bad)} if len(bad) else {}
    facts |= {"stand_ins": len(stand_ins)} if stand_ins else {}
    return Sealed(
        counts={"rows_in": len(chips), "rows_out": len(good)},
        dropped={str(reason): int(n) for reason, n in gone["reason"].value_counts().items()},
        facts={
            "bands": settings.bands,
            "size_px": settings.size_px,
            "items": int(good["item_id"].nunique()),
            "items_quarantined": len(bad),
            "findings": findings(assets),
            "not_sampled": {r: n for r, n in found.windows.counts().items() if r},
            "sources": count_sources(records(good[["source", "licence"]])),
            **facts,
        },
        deterministic=not facts,
    )


def licences(job: Job, chips: pd.DataFrame, settled: Iterable[int]) -> list[str]:
    """The licence of each chip as the items state it now: parts may be older than a licence."""
    now = {one.key: one.licence for one in (item_of(job, number) for number in settled)}
    keys = zip(chips["collection"], chips["item_id"], chips["item_sha256"], strict=True)
    return [now[key] for key in keys]


def item_states_of(job: Job, artifact: Artifact) -> dict[Key, ItemState]:
    """The state of each item, for the catalogue."""
    return read_states(job.inputs["items"], artifact)


def findings(assets: pd.DataFrame) -> dict[str, int]:
    """Scenes whose pixels contradict their items, by what was found."""
    found = assets[assets["finding"] != ""].drop_duplicates(["item_sha256", "finding"])
    return {str(kind): int(n) for kind, n in found["finding"].value_counts().sort_index().items()}


def why_not(found: Survey, settings: CutSettings) -> str:
    """Why a run of this plan would fail, empty where it would not."""
    try:
        check_failed(found.bad.values(), len(found.listed) + len(found.bad), settings)
    except RunError as error:
        return str(error)
    return "" if "" in found.windows.counts() or found.unknown else nothing(found, settings)


def nothing(found: Survey, settings: CutSettings) -> str:
    """Why there is no chip at all, with the remedy."""
    why = {reason: n for reason, n in found.windows.counts().items() if reason}
    if not why:
        return f"no chip of {settings.size_px} px fits into any scene; lower cut.size_px or gsd_m"
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in why.items())
    return f"the sampling plan is empty ({reasons}); widen search.bbox or the limits in cut"


def write_windows(found: Survey, path: Path) -> None:
    """Every candidate window with why it is not in the plan; the answer to "why not there?"."""
    windows, ids = found.windows, [one.item_id for one in found.listed]
    owners = pa.array([*ids, ""], pa.string())
    table = pa.table(
        {
            "item_id": owners.take(pa.array(windows.claim)).dictionary_encode(),
            "item_sha256": pa.array([one.item_sha256 for one in found.listed], pa.string())
            .take(pa.array(windows.claim))
            .dictionary_encode(),
            "x": windows.cells[:, 0],
            "y": windows.cells[:, 1],
            "status": pa.array(["dropped", "ok"]).take(pa.array((windows.reason == 0) * 1)),
            "reason": pa.array(REASONS).take(pa.array(windows.reason)).dictionary_encode(),
            "witness": owners.take(pa.array(windows.owner % len(owners))).dictionary_encode(),
        }
    )
    pq.write_table(table, path, compression="zstd")


STAGE = Stage(
    name="cut",
    version="6",
    kind="chips",
    inputs=("items",),
    software=("imagecodecs", "numpy", "pandas", "pyproj", "rasterio", "shapely"),
    plan=plan,
    work=work,
    seal=seal,
    at_once=THREADS,
    exclusive=True,
    follows=True,
    follows_fields=PIXELS,
    states=item_states_of,
)
