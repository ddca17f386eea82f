"""What turned out otherwise than planned is settled before the stage ``cut`` seals.

Usually there is nothing to do. But a passing fault gets another chance; ground of an item that
was found bad while it was cut goes to the next in line, as do the older versions that it stood
for; and a scene whose file lies elsewhere than its metadata say is planned again where it lies.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from data_catalog.canonical import digest_of
from data_catalog.stage import Job
from geofm.imagery.cutting import STATE, Order, cut_or_quarantine, quarantine_item
from geofm.imagery.grid import Grid
from geofm.imagery.items import Json
from geofm.imagery.listed import access_of, every_item
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.strips import to_runs
from geofm.imagery.survey import Survey, survey

log = logging.getLogger("geofm.cut")


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
        again = {n for n, state in states.items() if state["state"] == "passing"} - asked
        asked |= again
        # what was out of reach is planned once more as if it were good
        found = survey(job, known_grids(states), found_bad(states, again))
        orders = orders_of(found)
        todo = [n for n, order in orders.items() if n in again or differs(order, states.get(n))]
        for number in todo:
            current[number] = cut_again(job, number, orders[number])
        for number, problem in found.bad.items():
            if number in again or number not in states:
                current[number] = empty_folder(job, [number, problem.reason, problem.kept])
                quarantine_item(everyone[number], job.settings, problem, current[number])
        if not todo and not again:
            keep = set(orders) | set(found.bad)
            return [current[number] for number in sorted(current) if number in keep], found


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
    """Cut a scene's windows into the job's scratch, unless that was done before."""
    one = every_item(job.inputs["items"])[number]
    folder = settled_folder(job, [number, order.to_json()])
    if (folder / STATE).exists() and read_state(folder)["state"] != "passing":
        return folder
    log.info("cut: cutting %s again", one.item_id)
    access = access_of(job.inputs["items"], job.settings)
    cut_or_quarantine(
        one, job.settings, access, order, empty_folder(job, [number, order.to_json()])
    )
    return folder


def settled_folder(job: Job, what: Json | list[object]) -> Path:
    """Where something is kept that is cut while sealing."""
    return job.scratch / f"settled-{digest_of([job.key, what])[:16]}"


def empty_folder(job: Job, what: Json | list[object]) -> Path:
    """The same, emptied."""
    folder = settled_folder(job, what)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def read_state(folder: Path) -> Json:
    """How a part ended."""
    state: Json = json.loads((folder / STATE).read_bytes())
    return state
