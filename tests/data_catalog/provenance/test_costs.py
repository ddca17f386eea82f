"""What a lineage cost: every session, every ancestor once, cached stages with their first run."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import PartCostRow, RunRow
from data_catalog.provenance.costs import MEASURED, ArtifactCost, costs_at, lineage_costs, totals
from data_catalog.run import run_stage
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.store import Store
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings


def _seal(job: Job, parts: list[Path], out: Path) -> Sealed:
    (out / "note").write_text(job.stage)
    return Sealed({"rows_in": 0, "rows_out": 0})


#: A diamond: both halves are made from the chips, the dataset from both.
LEFT = Stage("embed", "1", "embeddings", ("chips",), (), no_parts, no_work, _seal)
RIGHT = Stage("describe", "1", "descriptors", ("chips",), (), no_parts, no_work, _seal)
BOTH = Stage("pack", "1", "dataset", ("embeddings", "descriptors"), (), no_parts, no_work, _seal)


def _diamond(store: Store, catalogue: Catalogue, count: int = 6) -> dict[str, Artifact]:
    made: dict[str, Artifact] = {}
    for stage in (NUMBERS, SQUARES, LEFT, RIGHT, BOTH):
        settings = Settings(count=count if stage is NUMBERS else 6)
        made[stage.kind] = run_stage(stage, store, catalogue, made, settings)
    return made


def _spend(catalogue: Catalogue, **metrics: float) -> None:
    """Pretend that every run that made something spent this."""
    with catalogue.session() as session:
        for run in session.query(RunRow):
            if not run.metrics.get("cached"):
                run.metrics = {**run.metrics, **metrics}
                run.seconds = 10.0


def _run(catalogue: Catalogue, like: RunRow, minutes: int, **fields: Any) -> None:
    """A run record of the same job, some minutes before or after."""
    known = {c.key: getattr(like, c.key) for c in RunRow.__table__.columns}
    start = datetime.now(UTC) + timedelta(minutes=minutes)
    given = {"id": f"run{minutes}", "started_at": start, "artifact": None, **fields}
    with catalogue.session() as session:
        session.add(RunRow(**{**known, **given}))


def test_an_ancestor_of_two_inputs_counts_once_and_a_cached_stage_as_when_it_was_made(
    store: Store, catalogue: Catalogue
) -> None:
    made = _diamond(store, catalogue)
    _spend(catalogue, kwh=0.5, kg_co2e=0.25)
    _diamond(store, catalogue)  # all found
    assert sum(bool(run.metrics.get("cached")) for run in catalogue.runs()) == 5
    found = lineage_costs(catalogue, [made["dataset"].digest])
    assert [cost.stage for cost in found] == ["search", "cut", "embed", "describe", "pack"]
    assert {cost.digest for cost in found} == {artifact.digest for artifact in made.values()}
    assert totals(found) == {"seconds": 50.0, "gpu_seconds": 0.0, "kwh": 2.5, "kg_co2e": 1.25}
    every = [artifact.digest for artifact in made.values()]
    assert costs_at(catalogue.url, catalogue.store, every) == found
    assert len(costs_at(catalogue.url, catalogue.store, [made["chips"].digest])) == 2
    assert costs_at("", catalogue.store, every) == []


def test_sessions_that_failed_or_were_killed_count_but_not_those_of_an_earlier_artifact(
    store: Store, catalogue: Catalogue
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    _spend(catalogue, kwh=1.0, kg_co2e=0.5)
    made = catalogue.runs()[0]
    spent = {"seconds": 7.0, "kwh": 0.25}
    _run(catalogue, made, -1, status="failed", seconds=7.5, metrics=spent)
    _run(catalogue, made, -2, status="running", seconds=None, finished_at=None, metrics=spent)
    _run(catalogue, made, -3, status="running", seconds=None, finished_at=None, metrics={})
    _run(catalogue, made, -4, status="done", artifact="f" * 64)  # the world was another one
    _run(catalogue, made, -5, status="failed", seconds=99.0, metrics={"kwh": 99.0})
    _run(catalogue, made, 6, status="failed", seconds=99.0, metrics={"kwh": 99.0})
    cost = lineage_costs(catalogue, [items.digest])[0]
    assert cost.sessions == 4
    assert cost.seconds == pytest.approx(10.0 + 7.5 + 7.0)
    assert cost.kwh == pytest.approx(1.5)
    assert cost.kg_co2e == 0.5


def test_an_interrupted_run_leaves_word_of_what_it_spent_and_the_next_one_adds_to_it(
    store: Store, catalogue: Catalogue
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    stop = store.local_root / "stop-at"
    stop.write_text("4")
    with pytest.raises(InterruptedError):
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    failed = catalogue.runs()[-1]
    assert (failed.status, failed.metrics["parts"], failed.metrics["parts_worked"]) == (
        "failed", 6, 4,
    )  # fmt: skip
    assert 0 < failed.metrics["seconds"] <= failed.seconds
    stop.unlink()
    chips = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    last = catalogue.runs()[-1]
    cost = lineage_costs(catalogue, [chips.digest])[-1]
    assert last.metrics["parts_worked"] == 2
    assert (cost.sessions, cost.parts_reused, cost.parts_unknown) == (2, 0, 0)
    assert cost.seconds == pytest.approx(failed.seconds + last.seconds)


def test_parts_of_earlier_runs_are_counted_each_once(store: Store, catalogue: Catalogue) -> None:
    first = _diamond(store, catalogue)
    spent = _spent_on_parts(catalogue)
    assert len(spent) == 6
    assert sum(spent.values()) <= _cost_of(catalogue, first["chips"]).seconds
    made = _diamond(store, catalogue, count=8)  # six squares were there
    cost = _cost_of(catalogue, made["chips"])
    own = next(run for run in catalogue.runs() if run.artifact == made["chips"].digest)
    assert (cost.parts_reused, cost.parts_unknown) == (6, 0)
    assert cost.seconds == pytest.approx(own.seconds + sum(spent.values()))
    again = _diamond(store, catalogue, count=9)  # of the eight, two are of the second run
    cost = _cost_of(catalogue, again["chips"])
    own = next(run for run in catalogue.runs() if run.artifact == again["chips"].digest)
    parts = _spent_on_parts(catalogue)
    assert len(parts) == 9
    assert cost.parts_reused == 8
    assert cost.seconds <= own.seconds + sum(parts.values())


def test_parts_that_no_run_recorded_are_told(store: Store, catalogue: Catalogue) -> None:
    _diamond(store, catalogue)
    with catalogue.session() as session:
        session.query(PartCostRow).delete()
    made = _diamond(store, catalogue, count=8)
    cost = _cost_of(catalogue, made["chips"])
    assert (cost.parts_reused, cost.parts_unknown) == (0, 6)


def test_parts_of_a_failed_run_of_another_job_are_counted(
    store: Store, catalogue: Catalogue
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    (store.local_root / "stop-at").write_text("4")
    with pytest.raises(InterruptedError):
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    (store.local_root / "stop-at").unlink()
    made = _diamond(store, catalogue, count=8)
    cost = _cost_of(catalogue, made["chips"])
    assert (cost.parts_reused, cost.parts_unknown) == (4, 0)


def _cost_of(catalogue: Catalogue, artifact: Artifact) -> ArtifactCost:
    return lineage_costs(catalogue, [artifact.digest])[-1]


def _spent_on_parts(catalogue: Catalogue) -> dict[str, float]:
    with catalogue.session() as session:
        return {row.part: row.seconds for row in session.query(PartCostRow)}


def test_gpus_are_those_the_last_session_held_for_all_sessions(
    store: Store, catalogue: Catalogue
) -> None:
    on_gpu = replace(NUMBERS, device=lambda asked: asked)
    items = run_stage(on_gpu, store, catalogue, {}, Settings(), device="cuda")
    made = catalogue.runs()[0]
    assert made.metrics["gpu_seconds"] == pytest.approx(made.metrics["seconds"])
    chips = run_stage(
        replace(SQUARES, device=lambda asked: asked), store, catalogue, {"items": items},
        Settings(), device="cpu",
    )  # fmt: skip
    _spend(catalogue, seconds=8.0)
    with catalogue.session() as session:
        row = session.get_one(RunRow, made.id)
        row.metrics = {**row.metrics, "gpu_seconds": 16.0}  # two GPUs
    _run(catalogue, made, -1, status="failed", seconds=5.0, metrics={})
    found = {cost.stage: cost for cost in lineage_costs(catalogue, [chips.digest])}
    assert found["search"].gpu_seconds == pytest.approx(2 * (10 + 5))
    assert found["cut"].gpu_seconds == 0


def test_a_stage_that_counted_its_sessions_itself_is_believed_where_it_knows_of_more(
    store: Store, catalogue: Catalogue
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    _spend(catalogue, seconds=25.0, gpu_seconds=50.0)
    _run(catalogue, catalogue.runs()[0], -1, status="running", seconds=None,
         metrics={"seconds": 9.0})  # fmt: skip
    cost = lineage_costs(catalogue, [items.digest])[0]
    assert (cost.seconds, cost.gpu_seconds) == (25.0, 50.0)


def test_what_no_run_here_made_is_there_without_numbers(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    with catalogue.session() as session:
        session.query(RunRow).delete()
    cost = lineage_costs(catalogue, [items.digest])[0]
    assert cost == ArtifactCost("search", items.digest)
    assert totals([cost]) == {}
    assert set(MEASURED) <= set(ArtifactCost.__dataclass_fields__)
    assert lineage_costs(catalogue, ["0" * 64]) == []


def test_a_catalogue_that_does_not_answer_stops_nobody(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with catalogue.run("cut", "key") as row:
        catalogue.keep(row, {"kwh": 1.0})
        assert catalogue.runs()[0].metrics == {"kwh": 1.0}
        assert catalogue.runs()[0].status == "running"

        def refuse() -> nullcontext[None]:
            raise OperationalError("insert", {}, Exception("database is locked"))

        with monkeypatch.context() as patch:
            patch.setattr(catalogue, "session", refuse)
            catalogue.keep(row, {"kwh": 2.0})
    assert "could not note" in caplog.text
    assert catalogue.runs()[0].metrics == {"kwh": 2.0}


def test_a_peak_is_the_processs_own() -> None:
    """The child of a large process must not have the peak of its parent."""
    ballast = b"x" * (400 * 2**20)
    code = (
        "from data_catalog.storage.process import peak_memory_mib\n"
        "b'x' * (50 << 20); print(peak_memory_mib())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del ballast
    assert 50 < float(told.stdout) < 400
