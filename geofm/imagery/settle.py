"""What turned out otherwise than planned is settled before the stage ``cut`` seals.

Usually there is nothing to do. But a passing fault gets another chance; ground of an item that
was found bad while it was cut goes to the next in line, as do the older versions that it stood
for; and a scene whose file lies elsewhere than its metadata say is planned again where it lies.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_catalog.canonical import digest_of
from data_catalog.progress import tick
from data_catalog.stage import Job
from data_catalog.tables import read_note
from geofm.imagery.cutting import PIXELS, SCENE, Order, cut_or_quarantine, quarantine_item
from geofm.imagery.grid import Grid
from geofm.imagery.items import Json
from geofm.imagery.listed import access_of, every_item
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.strips import to_runs
from geofm.imagery.survey import Survey, survey

log = logging.getLogger("geofm.cut")

#: Reasons that lie with the reader as much as with the item.
MAY_PASS = ("forbidden", "host_refused")
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


def settle(job: Job, folders: list[Path]) -> tuple[list[Path], Survey]:
    """Cut again what the parts left open, until nothing is.

    Returns:
        The folders to seal, in the order of the items' rows, and the plan that they follow.
    """
    everyone = every_item(job.inputs["items"])
    numbers = {tuple(one.key): number for number, one in everyone.items()}
    current = {numbers[tuple(read_state(folder)["item"])]: folder for folder in folders}
    asked: set[int] = set()
    while True:
        states = {number: read_state(folder) for number, folder in current.items()}
        again = {n for n, state in states.items() if may_pass(state)} - asked
        asked |= again
        # what was out of reach is planned once more as if it were good
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
                name = digest_of([everyone[number].key, problem.reason, problem.kept])
                current[number] = empty_folder(job, name)
                quarantine_item(everyone[number], job.settings, problem, current[number])
        if not todo and not again:
            keep = set(orders) | set(found.bad)
            return [current[number] for number in sorted(current) if number in keep], found


def may_pass(state: Json) -> bool:
    """Whether a part should be tried again: an outage, or what credentials and settings forbade."""
    return bool(state["state"] == "passing" or (state["bad"] and state["bad"][0] in MAY_PASS))


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


def cut_again(job: Job, number: int, order: Order) -> Path:
    """Cut a scene's windows, unless that was done before, in this run or another night.

    What comes of it is kept as a part, but for a scene that is out of reach still.
    """
    one = every_item(job.inputs["items"])[number]
    part = job.part({}, ["settled", *one.covers, order.to_json()], PIXELS)
    if job.store.has_part(part.key) and (kept := job.store.fetch_part(part.key)):
        return kept
    log.info("cut: cutting %s again", one.item_id)
    folder = empty_folder(job, part.key)
    access = access_of(job.inputs["items"], job.settings)
    deque(cut_or_quarantine(one, job.settings, access, order, folder), 0)
    if may_pass(read_state(folder)):
        return folder
    with job.store.staging() as staged:
        shutil.move(folder, staged / "part")
        job.store.publish_part(part.key, staged / "part")
    return job.store.fetch_part(part.key) or cut_again(job, number, order)


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
