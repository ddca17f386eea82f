"""The GPU benchmark keeps every row, goes on where it was, and survives a row that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_day import COLUMNS, SECTIONS, add_ratios, read_table, write_table

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_day.py"


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_rows_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    table = tmp_path / "day.csv"
    first = run(table, "--only", "ceiling")
    assert first.returncode == 0, first.stderr
    rows = read_table(table)
    assert [row["row"] for row in rows] == ["fp32", "copy, read and written"]
    assert all(row["status"] == "ok" and row["versions"] and row["machine"] for row in rows)
    assert float(rows[0]["ceiling_gflops"]) > 0
    write_table(table, [{**rows[0], "ceiling_gflops": "7"}])
    second = run(table, "--only", "ceiling")
    assert second.stderr.count("ceiling ") == 1, "one row was missing"
    assert {r["row"]: r["ceiling_gflops"] for r in read_table(table)}["fp32"] == "7"


@pytest.mark.long
def test_a_row_whose_process_dies_is_written_down(tmp_path: Path) -> None:
    table = tmp_path / "day.csv"
    blank = dict.fromkeys(COLUMNS, "")
    done = [{**blank, "section": "published", "row": f"{side} fp32", "status": "ok"}
            for side in ("published", "ours")]  # fmt: skip
    write_table(table, done)
    absent = str(tmp_path / "no-checkout")
    found = run(table, "--only", "published", "ceiling", "--published", absent)
    assert found.returncode == 1
    rows = {(row["section"], row["row"]): row["status"] for row in read_table(table)}
    assert rows["published", "published code fp32"].startswith("failed: ")
    assert rows["ceiling", "fp32"] == "ok", "what comes after a failure runs"


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    table = tmp_path / "day.csv"
    assert run(table, "--only", "ceiling", "--minutes", "0.1").returncode == 0
    assert read_table(table) == []


def test_ratios() -> None:
    def row(section: str, name: str, rate: str, first: str = "") -> dict[str, str]:
        blank = dict.fromkeys(COLUMNS, "")
        known = {"section": section, "row": name, "images_per_s": rate, "first_step_s": first}
        return {**blank, **known, "device": "gpu"}

    rows = [
        row("published", "published bf16", "100"),
        row("presets", "gfm-vit-s batch 128", "700"),
        row("compile", "gfm-swin-b eager batch 100", "100", "5"),
        row("compile", "gfm-swin-b compiled batch 100", "200", "55"),
    ]
    add_ratios(rows)
    assert rows[1]["of_published"] == "7.00"
    # a step takes 1 s and 0.5 s: 50 s of compiling are earned after 100 steps
    assert rows[3]["break_even_steps"] == "100"


@pytest.mark.long
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    table = tmp_path / "day.csv"
    found = run(table, "--minutes", "20")
    assert found.returncode == 0, found.stdout
    rows = read_table(table)
    assert {row["section"] for row in rows} == set(SECTIONS)
    skipped = [row["row"] for row in rows if row["status"].startswith("skipped")]
    assert skipped == ["published code fp32"]
    assert sum(row["status"] == "ok" for row in rows) == len(rows) - 1
    smoke = [row for row in rows if row["section"] == "smoke"]
    assert len(smoke) == 6
    assert all(float(row["difference"]) <= float(row["tolerance"]) for row in smoke)
