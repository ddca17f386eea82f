"""Changes of a scene's source files since it was cut, by the digests that were sealed then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from geofm.chips.items import ItemRecord
from geofm.config.recipe import CutSettings
from geofm.raster.reader import where_is
from geofm.raster.scene import prefetch_scene
from geofm.remote.assets import Piece
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import RangeSource
from geofm.remote.url_policy import Access


def source_changes(
    item: ItemRecord, sealed: Sequence[Mapping[str, Any]], settings: CutSettings, access: Access
) -> list[str]:
    """Compare the assets of an item with the digests that were sealed.

    Args:
        item: The frozen item.
        sealed: The item's rows of ``assets.parquet``.
        settings: Settings with which it was cut.
        access: Which hosts may be read, and the timeouts.

    Returns:
        One sentence for each asset that is another file now, or is gone. Assets that can't be
        reached now are left out.
    """
    sealed_rows = {str(row["asset"]): row for row in sealed}
    sentences = []
    with prefetch_scene(item.item, item.profile, settings, access) as pending:
        for key, (band, call) in pending.files.items():
            where = f"asset {key} ({where_is(band.href)})"
            try:
                fetched = call.result()
            except Quarantine as problem:
                if not problem.passing:
                    sentences.append(f"{where} can't be read any more: {problem}")
                continue
            changes = _changes(sealed_rows[key], fetched) if key in sealed_rows else []
            if changes:
                sentences.append(f"{where}: {', '.join(changes)}")
            if isinstance(fetched, RangeSource):
                fetched.close()
    return sentences


def _changes(then: Mapping[str, Any], fetched: Piece | RangeSource) -> list[str]:
    """Name the differences: the sha256 of a file that is read whole, else ETag and size."""
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
