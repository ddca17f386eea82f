"""What turned out otherwise than planned is settled before the stage ``cut`` seals.

Usually there is nothing to do. But a passing fault gets another chance; ground of an item that
was found bad while it was cut goes to the next in line, and an older version is cut or stands in
for it; and a scene whose file lies elsewhere than its metadata say is planned again where it lies.

No failure is kept as a finished part: the next run asks again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_catalog.canonical import digest_of
from data_catalog.progress import tick
from data_catalog.run import read_plan
from data_catalog.stage import Job, Part
from data_catalog.tables import read_note
from geofm.imagery.cutting import PIXELS, SCENE, Order, cut_or_quarantine, quarantine_item
from geofm.imagery.grid import Grid
from geofm.imagery.items import Json
from geofm.imagery.listed import access_of
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.stand_ins import copy_chips, is_stand_in, item_of
from geofm.imagery.strips import to_runs
from geofm.imagery.survey import Survey, survey

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
    deque(cut_number(job, number, order, folder), 0)
    if failed(read_state(folder)):
        return folder
    with job.store.staging() as staged:
        shutil.move(folder, staged / "part")
        job.store.publish_part(part.key, staged / "part")
    return job.store.fetch_part(part.key) or cut_again(job, number, order)


def cut_number(job: Job, number: int, order: Order, out: Path) -> Iterator[None]:
    """Cut the windows of an item in steps, or copy those of a stand-in."""
    if is_stand_in(job, number):
        copy_chips(job, number, order, out)
        return
    access = access_of(job.inputs["items"], job.settings)
    one = item_of(job, number)
    yield from cut_or_quarantine(one, job.settings, access, order, out, job.attempt)


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
