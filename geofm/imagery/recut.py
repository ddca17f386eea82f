"""Cutting chips again from their source, to prove that the pixels are what they say."""

from __future__ import annotations

from collections.abc import Sequence

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from data_catalog.tables import records
from geofm.imagery.chips import pixel_sha256
from geofm.imagery.cutting import access_of, cut_one, listed_items
from geofm.imagery.quarantine import Quarantine
from geofm.imagery.scene import open_scene
from geofm.settings import CutSettings


def recut(chips: Artifact, items: Artifact, chip_ids: Sequence[str]) -> list[tuple[str, str, str]]:
    """Cut chips again and compare.

    Args:
        chips: the chips artifact.
        items: the items artifact that it was made from.
        chip_ids: chips whose status is ok.

    Returns:
        (chip id, expected ``pixel_sha256``, what came now) in the order asked for; what came is a
        reason such as ``not_found`` where the source can't be read any more.

    Raises:
        UsageError: for a chip that the artifact does not hold.
    """
    columns = ["chip_id", "item_sha256", "item_id", "cell", "pixel_sha256", "status"]
    rows = {row["chip_id"]: row for row in records(chips.table("chips.parquet", columns))}
    settings = CutSettings.model_validate(chips.manifest.settings)
    access = access_of(items, settings)
    listed = {(one.item_id, one.item_sha256): one for one in listed_items(items).values()}
    results: dict[str, tuple[str, str, str]] = {}
    by_item: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(chip_ids):
        if name not in rows or rows[name]["status"] != "ok":
            raise UsageError(f"{name} is no chip with pixels in {chips.digest[:12]}")
        by_item.setdefault((rows[name]["item_id"], rows[name]["item_sha256"]), []).append(name)
    for item, names in by_item.items():
        one = listed[item]
        try:
            with open_scene(one.item, one.geometry, one.profile, settings, access) as scene:
                for name in names:
                    x, y = rows[name]["cell"].rsplit("/", 2)[1:]
                    got = pixel_sha256(cut_one(scene, (int(x), int(y))))
                    results[name] = (name, rows[name]["pixel_sha256"], got)
        except Quarantine as problem:
            for name in names:
                results.setdefault(name, (name, rows[name]["pixel_sha256"], problem.reason))
    return [results[name] for name in dict.fromkeys(chip_ids)]
