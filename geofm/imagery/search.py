"""The stage ``search``: which scenes there are, which of them count, and why the others do not."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from data_catalog.errors import RunError
from data_catalog.sources import count_sources, source_named
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.imagery.frozen import Frozen
from geofm.imagery.judge import judge, to_frame
from geofm.imagery.listing import list_catalogue
from geofm.imagery.stac_table import write_items
from geofm.imagery.watermark import Before, read_before, withdrawn
from geofm.settings import SearchSettings

log = logging.getLogger("geofm.search")


def seal(job: Job, folders: list[Path], out: Path) -> Sealed:
    """List, judge every item listed, and write ``items.parquet`` and ``stac.parquet``."""
    settings: SearchSettings = job.settings
    before = read_before(job.previous)
    listing = list_catalogue(settings, before)
    chosen = sorted(listing.collections)
    if not listing.items:
        raise RunError(_nothing(settings, chosen))
    gone = withdrawn(before, listing.items)
    check_withdrawn(before, gone, settings)
    rows = judge(listing.items, settings, listing.collections, listing.own)
    if gone:
        log.info("search: %d items are withdrawn", len(gone))
    write_table(to_frame(rows), out / "items.parquet")
    good = [row for row in rows if row["status"] == "ok"]
    texts = [row["item_json"] for row in good]
    strict = write_items(texts, out / "stac.parquet")
    dropped = Counter(row["reason"] for row in rows if row["status"] != "ok")
    for reason, number in sorted(dropped.items()):
        log.info("search: %d items %s", number, reason)
    return Sealed(
        counts={"rows_in": len(rows), "rows_out": len(good)},
        dropped=dict(dropped),
        facts={
            "collections": chosen,
            "profiles": {
                name: frozen_profile(name) for name in sorted({row["source"] for row in rows})
            },
            "quarantined": sum(row["status"] == "quarantined" for row in rows),
            "sources": count_sources(good),
            "stac_parquet": strict,
        },
        metrics=listing.asked,
    )


def check_withdrawn(before: Before, gone: list[Frozen], settings: SearchSettings) -> None:
    """Stop when so much is gone at once that the catalogue itself seems to be in trouble.

    Raises:
        RunError: with the figures and the remedy.
    """
    known = {one.key for one in before.listed}
    lost = len(gone)
    if lost > settings.max_withdrawn * len(known):
        raise RunError(
            f"{lost} of {len(known)} items that {settings.stac} listed last time are gone; the "
            f"limit is search.max_withdrawn = {settings.max_withdrawn:g}: if the catalogue is "
            "right, raise it, else run again when it is whole"
        )


def frozen_profile(name: str) -> dict[str, Any]:
    """A source profile as the items keep it: it decides scales and cloud codes.

    Whatever is made of the items is made by this profile, wherever and whenever. The search runs
    every time, so a changed profile changes the items and all that follows from them.
    """
    return source_named(name).model_dump(mode="json")


def _nothing(settings: SearchSettings, collections: list[str]) -> str:
    box = "everywhere" if settings.bbox is None else ",".join(f"{v:g}" for v in settings.bbox)
    where = f"search.bbox {box}"
    if settings.area is not None:
        where = "search.area"
    elif settings.places:
        where = f"search.places {', '.join(settings.places)}"
    return (
        f"no item matches at {settings.stac}: search.collections {', '.join(collections)}, "
        f"{where}, search.datetime {settings.datetime or 'any'}; widen one of them"
    )


STAGE = Stage(
    name="search",
    version="4",
    kind="items",
    inputs=(),
    software=("pyarrow", "pystac", "pystac-client", "shapely", "stac-geoparquet"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    live=True,
)
