"""The stage ``cut``: good scenes become candidate chips on a fixed grid, each with its provenance.

``plan`` chooses from metadata which windows of which scenes are cut. ``work`` cuts one scene.
``seal`` settles what turned out otherwise than planned, and puts the parts together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.item_states import STAND_INS, ItemState, Key, read_states
from data_catalog.sources import count_sources
from data_catalog.stage import Job, Part, Sealed, Stage, link
from data_catalog.tables import read_rows, records, write_table
from geofm.imagery.cutting import (
    CHIPS,
    PIXELS,
    SCENE,
    Order,
)
from geofm.imagery.forecast import forecast, total
from geofm.imagery.listed import listed_items
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.sampling import REASONS
from geofm.imagery.settle import cut_number, orders_of, part_of, read_state, settle
from geofm.imagery.stand_ins import is_stand_in, item_of, unlisted_stand_ins, write_unlisted
from geofm.imagery.survey import Survey, survey
from geofm.memory import keep_freed_memory
from geofm.settings import CutSettings

log = logging.getLogger("geofm.cut")

#: Most threads of a worker. Each has two more scenes under way besides the one that it cuts, so
#: that one is enough unless a server is far away or has faults.
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


def work(job: Job, part: Part, out: Path) -> Iterator[None]:
    """Cut one scene in steps, or write down why not."""
    keep_freed_memory()
    order = Order.from_json(part.payload["order"])
    yield from cut_number(job, part.payload["number"], order, out)


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
