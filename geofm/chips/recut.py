"""Cutting chips again from their source, to prove that the pixels are what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from data_catalog.tables import records
from geofm.chips.items import access_of, every_item
from geofm.chips.source_changes import source_changes
from geofm.chips.stand_ins import unlisted_items
from geofm.chips.writer import cut_one
from geofm.config.recipe import CutSettings
from geofm.formats.npy import pixel_sha256
from geofm.raster.scene import open_scene
from geofm.remote.quarantine import Quarantine


@dataclass(frozen=True)
class Recut:
    """A chip cut again.

    Attributes:
        chip_id: Its id.
        expected: ``pixel_sha256`` in the sealed chip table.
        got: That of the pixels cut now; None where the source could not be read.
        problem: Why not, empty otherwise.
        changed: How the source's files differ from those that were sealed, empty if they do not.
        packed: That of the pixels in the dataset's shard, or what is wrong there; None if the
            shard was not compared.
    """

    chip_id: str
    expected: str
    got: str | None
    problem: str
    changed: str = ""
    packed: str | None = None

    @property
    def is_same(self) -> bool:
        """Whether source, chip table and shard have the same pixels."""
        return not self.problem and not self.differences()

    def differences(self) -> list[str]:
        """What is not as the chip table says, one sentence each."""
        found = []
        if self.changed or (not self.problem and self.got != self.expected):
            what = f"it can't be cut again ({self.problem})"
            if not self.problem:
                what = "cut again from the source it has other pixels"
            if self.changed:
                what += f"; the source has changed since it was sealed: {self.changed}"
            found.append(f"sample {self.chip_id}: {what}")
        if self.packed is not None and self.packed != self.expected:
            what = "" if len(self.packed) == len(self.expected) else f" ({self.packed})"
            found.append(f"sample {self.chip_id}: its shard has other pixels than its chip{what}")
        return found


def recut(chips: Artifact, items: Artifact, chip_ids: Sequence[str]) -> list[Recut]:
    """Cut chips again and compare.

    Args:
        chips: the chips artifact.
        items: the items artifact that it was made from.
        chip_ids: chips whose status is ok.

    Returns:
        What came of each, in the order asked for.

    Raises:
        UsageError: for a chip that the artifact does not hold.
    """
    columns = ["chip_id", "item_sha256", "item_id", "cell", "pixel_sha256", "status"]
    rows = {row["chip_id"]: row for row in records(chips.table("chips.parquet", columns))}
    settings = CutSettings.model_validate(chips.manifest.settings)
    access = access_of(items, settings)
    everyone = [*every_item(items).values(), *unlisted_items(chips)]
    listed = {(one.item_id, one.item_sha256): one for one in everyone}
    assets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in records(chips.table("assets.parquet")):
        assets.setdefault((row["item_id"], row["item_sha256"]), []).append(row)
    results: dict[str, Recut] = {}
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
                    results[name] = Recut(name, rows[name]["pixel_sha256"], got, "")
        except Quarantine as problem:
            for name in names:
                expected = rows[name]["pixel_sha256"]
                results.setdefault(name, Recut(name, expected, None, str(problem)))
        other = [name for name in names if results[name].got != results[name].expected]
        if other:
            changed = "; ".join(source_changes(one, assets.get(item, []), settings, access))
            for name in other:
                results[name] = replace(results[name], changed=changed)
    return [results[name] for name in dict.fromkeys(chip_ids)]
