"""Cut chips again from their source and compare the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from data_catalog.tables import records
from geofm.chips.items import access_of, all_items
from geofm.chips.source_changes import source_changes
from geofm.chips.stand_ins import unlisted_items
from geofm.chips.writer import cut_cell
from geofm.config.recipe import CutSettings
from geofm.formats.npy import pixel_sha256
from geofm.raster.scene import open_scene
from geofm.remote.quarantine import Quarantine


@dataclass(frozen=True)
class Recut:
    """A chip cut again.

    Attributes:
        chip_id: Id of the chip.
        expected: ``pixel_sha256`` in the sealed chip table.
        got: ``pixel_sha256`` of the pixels cut now; None if the source could not be read.
        problem: Reason why the source could not be read, or empty.
        changed: Differences between the source's files and those that were sealed, or empty.
        packed: ``pixel_sha256`` of the pixels in the dataset's shard, or a problem with the shard;
            None if the shard was not compared.
    """

    chip_id: str
    expected: str
    got: str | None
    problem: str
    changed: str = ""
    packed: str | None = None

    @property
    def is_same(self) -> bool:
        """True if source, chip table and shard have the same pixels."""
        return not self.problem and not self.differences()

    def differences(self) -> list[str]:
        """Return one sentence for each difference from the chip table."""
        sentences = []
        if self.changed or (not self.problem and self.got != self.expected):
            text = f"it can't be cut again ({self.problem})"
            if not self.problem:
                text = "cut again from the source it has other pixels"
            if self.changed:
                text += f"; the source has changed since it was sealed: {self.changed}"
            sentences.append(f"sample {self.chip_id}: {text}")
        if self.packed is not None and self.packed != self.expected:
            detail = "" if len(self.packed) == len(self.expected) else f" ({self.packed})"
            sentences.append(
                f"sample {self.chip_id}: its shard has other pixels than its chip{detail}"
            )
        return sentences


def recut(chips: Artifact, items: Artifact, chip_ids: Sequence[str]) -> list[Recut]:
    """Cut chips again and compare their pixels.

    Args:
        chips: The chips artifact.
        items: The items artifact that it was made from.
        chip_ids: Ids of chips whose status is ok.

    Returns:
        One result per chip, in the given order.

    Raises:
        UsageError: The artifact does not hold a chip.
    """
    columns = ["chip_id", "item_sha256", "item_id", "cell", "pixel_sha256", "status"]
    rows = {row["chip_id"]: row for row in records(chips.table("chips.parquet", columns))}
    settings = CutSettings.model_validate(chips.manifest.settings)
    access = access_of(items, settings)
    known = [*all_items(items).values(), *unlisted_items(chips)]
    by_key = {(item.item_id, item.item_sha256): item for item in known}
    assets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in records(chips.table("assets.parquet")):
        assets.setdefault((row["item_id"], row["item_sha256"]), []).append(row)
    results: dict[str, Recut] = {}
    by_item: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(chip_ids):
        if name not in rows or rows[name]["status"] != "ok":
            raise UsageError(f"{name} is no chip with pixels in {chips.digest[:12]}")
        by_item.setdefault((rows[name]["item_id"], rows[name]["item_sha256"]), []).append(name)
    for key, names in by_item.items():
        item = by_key[key]
        try:
            with open_scene(item.item, item.geometry, item.profile, settings, access) as scene:
                for name in names:
                    x, y = rows[name]["cell"].rsplit("/", 2)[1:]
                    got = pixel_sha256(cut_cell(scene, (int(x), int(y))))
                    results[name] = Recut(name, rows[name]["pixel_sha256"], got, "")
        except Quarantine as problem:
            for name in names:
                expected = rows[name]["pixel_sha256"]
                results.setdefault(name, Recut(name, expected, None, str(problem)))
        different = [name for name in names if results[name].got != results[name].expected]
        if different:
            changed = "; ".join(source_changes(item, assets.get(key, []), settings, access))
            for name in different:
                results[name] = replace(results[name], changed=changed)
    return [results[name] for name in dict.fromkeys(chip_ids)]
