"""What has changed at a source since a scene was cut, by the digests that were sealed then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from geofm.chips.items import Listed
from geofm.config.recipe import CutSettings
from geofm.raster.reader import where_is
from geofm.raster.scene import prefetch_scene
from geofm.remote.assets import Piece
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import RangeSource
from geofm.remote.url_policy import Access


def source_changes(
    item: Listed, sealed: Sequence[Mapping[str, Any]], settings: CutSettings, access: Access
) -> list[str]:
    """Compare the assets of an item with what was sealed of them.

    Args:
        item: the item, as it was frozen.
        sealed: its rows of ``assets.parquet``.
        settings: with which it was cut.
        access: what may be read, and how.

    Returns:
        One sentence for each asset that is another file now, or is gone. An asset that can't be
        reached now is left out.
    """
    then = {str(row["asset"]): row for row in sealed}
    found = []
    with prefetch_scene(item.item, item.profile, settings, access) as pending:
        for key, (band, call) in pending.files.items():
            where = f"asset {key} ({where_is(band.href)})"
            try:
                fetched = call.result()
            except Quarantine as problem:
                if not problem.passing:
                    found.append(f"{where} can't be read any more: {problem}")
                continue
            changes = _changes(then[key], fetched) if key in then else []
            if changes:
                found.append(f"{where}: {', '.join(changes)}")
            if isinstance(fetched, RangeSource):
                fetched.close()
    return found


def _changes(then: Mapping[str, Any], fetched: Piece | RangeSource) -> list[str]:
    """Name what differs: the sha256 where the file is read whole, else ETag and size."""
    now: dict[str, str] = {"etag": fetched.etag}
    if isinstance(fetched, Piece):
        now["sha256"] = hashlib.sha256(fetched.data).hexdigest()
    now["size"] = str(fetched.total if isinstance(fetched, Piece) else fetched.size)
    sealed = {name: str(then[name]) for name in ("sha256", "etag", "size")}
    sealed["size"] = "" if then["size"] < 0 else sealed["size"]
    return [
        f"{name} is {now[name]}, was {sealed[name]} when it was sealed"
        for name in ("sha256", "etag", "size")
        if sealed[name] and now.get(name) and sealed[name] != now[name]
    ]
