"""A small decisions artifact beside the synthetic chips of the curation room."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import pandas as pd
import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.run import run_stage
from data_catalog.store import Store
from data_catalog.tables import write_table
from geofm.config.recipe import PackSettings
from geofm.shards.pack import STAGE
from geofm.shards.reader import ShardIndex
from tests.geofm.dedup.synthetic import Chip, make_chips, make_items, publish, texture

Packer = Callable[..., Artifact]


def make_decisions(store: Store, chips: Sequence[Chip], drop: set[int]) -> Artifact:
    """Keep every usable chip but those numbered in ``drop``."""
    rows = [
        {
            "chip_id": chip.chip_id(n),
            "decision": "drop" if n in drop else "keep",
            "quality": 1.0,
            "entropy": 5.0,
            "gradient": 0.1,
            "cluster": chip.chip_id(n),
        }
        for n, chip in enumerate(chips)
        if chip.status == "ok"
    ]
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        write_table(pd.DataFrame(rows), out / "decisions.parquet")
        return publish(store, "decisions", "curate", out, {}, len(rows))


def make_inputs(
    store: Store, chips: Sequence[Chip], drop: Sequence[int] = ()
) -> dict[str, Artifact]:
    """Items, chips and decisions for ``pack``."""
    return {
        "items": make_items(store, chips),
        "chips": make_chips(store, chips),
        "decisions": make_decisions(store, chips, set(drop)),
    }


def some_chips(count: int = 24, dtype: str = "uint16") -> list[Chip]:
    return [Chip(texture(n, dtype=dtype), item=f"scene-{n % 3}") for n in range(count)]


def shards_open(index: ShardIndex) -> int:
    """How many of an index's tars this process holds open; others may close what they like."""
    places = {os.path.realpath(file) for file in index.files}
    found = 0
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(FileNotFoundError):  # the listing's own
            found += os.readlink(f"/proc/self/fd/{number}") in places  # noqa: PTH115
    return found


@pytest.fixture
def pack(store: Store, catalogue: Catalogue) -> Packer:
    """Pack chips into a dataset in the test's store."""

    def packer(
        chips: Sequence[Chip],
        drop: Sequence[int] = (),
        seed: int = 0,
        shard_mib: float = 0.06,
        **fields: float,
    ) -> Artifact:
        inputs = make_inputs(store, chips, drop)
        settings = PackSettings(shard_mib=shard_mib, name="small", **fields)
        return run_stage(STAGE, store, catalogue, inputs, settings, seed)

    return packer
