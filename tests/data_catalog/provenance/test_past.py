"""Chips of earlier versions are explained: which version had them, and why they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import BaseModel

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.item_states import ITEM_COLUMNS
from data_catalog.provenance.past import last_sample_in, why_left
from data_catalog.run import run_stage
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.store import Store
from data_catalog.tables import write_table


class Night(BaseModel):
    """The items that are listed, by id: status, reason and what stands for it; kept chips."""

    items: dict[str, tuple[str, str, str]]
    kept: list[str]


def chips_of(night: Night) -> pd.DataFrame:
    """Two chips of each item that counts."""
    rows = [
        (f"{item}{n}", "s2", item, item, f"cell{n}", "ok", "", "", "CC0-1.0")
        for item, (status, *_) in sorted(night.items.items())
        for n in (1, 2)
        if status == "ok"
    ]
    columns = [
        "chip_id", "collection", "item_id", "item_sha256", "cell", "status", "reason", "detail",
        "licence",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def seal_items(job: Job, _: list[Path], out: Path) -> Sealed:
    rows = [
        ("s2", item, item, *state, "CC0-1.0") for item, state in sorted(job.settings.items.items())
    ]
    write_table(pd.DataFrame(rows, columns=ITEM_COLUMNS), out / "items.parquet")
    return Sealed({"rows_in": len(rows), "rows_out": len(rows)})


def seal_chips(job: Job, _: list[Path], out: Path) -> Sealed:
    table = chips_of(job.settings)
    write_table(table, out / "chips.parquet")
    return Sealed({"rows_in": len(table), "rows_out": len(table)})


def seal_decisions(job: Job, _: list[Path], out: Path) -> Sealed:
    table = chips_of(job.settings)[["chip_id"]]
    kept = table["chip_id"].isin(job.settings.kept)
    table["decision"] = kept.map({True: "keep", False: "drop"})
    table["rule"] = kept.map({True: "kept", False: "selection"})
    write_table(table, out / "decisions.parquet")
    return Sealed({"rows_in": len(table), "rows_out": len(table)})


def seal_dataset(job: Job, _: list[Path], out: Path) -> Sealed:
    table = chips_of(job.settings)
    table = table[table["chip_id"].isin(job.settings.kept)].assign(source="generic")
    write_table(table, out / "samples.parquet")
    return Sealed({"rows_in": len(table), "rows_out": len(table)})


STAGES = [
    Stage(
        name=name, version="1", kind=kind, inputs=inputs, software=(), plan=no_parts,
        work=no_work, seal=seal,
    )
    for name, kind, inputs, seal in (
        ("search", "items", (), seal_items),
        ("cut", "chips", ("items",), seal_chips),
        ("curate", "decisions", ("chips",), seal_decisions),
        ("pack", "dataset", ("items", "chips", "decisions"), seal_dataset),
    )
]  # fmt: skip

OK = ("ok", "", "")
NIGHTS = [
    Night(items={"a": OK, "b": OK, "c": OK}, kept=["a1", "b1", "c1", "c2"]),
    Night(items={"a": ("dropped", "withdrawn", ""), "b": OK, "c": OK}, kept=["b1", "c1"]),
    Night(items={"b": ("dropped", "reprocessed", "B"), "B": OK, "c": OK}, kept=["B1", "c1"]),
    Night(items={"B": OK}, kept=["B1"]),
]


@pytest.fixture
def versions(store: Store, catalogue: Catalogue) -> list[dict[str, Artifact]]:
    """Four nights, each a version."""
    found = []
    for number, night in enumerate(NIGHTS, start=1):
        made: dict[str, Artifact] = {}
        for stage in STAGES:
            made[stage.kind] = run_stage(stage, store, catalogue, made, night)
        catalogue.publish("demo", made["dataset"], f"2026-11-0{number}")
        found.append(made)
    return found


@pytest.mark.parametrize(
    ("night", "chip", "was_in", "left_in", "rule", "was_kept"),
    [
        (1, "a1", 1, 2, "item withdrawn", True),
        (3, "a1", 1, 2, "item withdrawn", True),
        (3, "a2", 1, 2, "item withdrawn", False),
        (2, "b1", 2, 3, "item superseded", True),
        (3, "c1", 3, 4, "item gone", True),
        (3, "c2", 3, 4, "item gone", False),
    ],
)
def test_a_chip_of_an_earlier_version_is_explained(
    catalogue: Catalogue, versions: list[dict[str, Artifact]],
    night: int, chip: str, was_in: int, left_in: int, rule: str, was_kept: bool,
) -> None:  # fmt: skip
    found: Any = why_left(catalogue, versions[night]["dataset"], chip)
    assert found["was_in"] == f"demo@2026-11-0{was_in}"
    assert found["left_in"] == f"demo@2026-11-0{left_in}"
    assert (found["rule"], found["was_kept"]) == (rule, was_kept)
    assert found["superseded_by"] == ("B" if chip == "b1" else "")
    assert found["was_in"] in found["reason"]
    assert rule in found["reason"]
    assert found["artifact"] == versions[was_in - 1]["dataset"].digest


def test_what_no_earlier_version_had_is_not_explained(
    catalogue: Catalogue, versions: list[dict[str, Artifact]]
) -> None:
    assert why_left(catalogue, versions[3]["dataset"], "z9") is None
    assert why_left(catalogue, versions[0]["dataset"], "B1") is None  # it came later
    assert why_left(catalogue, versions[3]["decisions"], "a1") is None  # before any dataset


def test_a_candidate_that_was_a_sample_before_says_so(
    catalogue: Catalogue, versions: list[dict[str, Artifact]]
) -> None:
    assert last_sample_in(catalogue, versions[2]["dataset"], "c2") == "demo@2026-11-01"
    assert last_sample_in(catalogue, versions[1]["dataset"], "b2") == ""
    assert last_sample_in(catalogue, versions[1]["decisions"], "c2") == ""


def test_a_version_whose_tables_are_gone_is_passed_over(
    catalogue: Catalogue, versions: list[dict[str, Artifact]]
) -> None:
    versions[1]["chips"].path("chips.parquet").unlink()
    found: Any = why_left(catalogue, versions[3]["dataset"], "a1")
    assert (found["was_in"], found["left_in"]) == ("demo@2026-11-01", "demo@2026-11-03")
