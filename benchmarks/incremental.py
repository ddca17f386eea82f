"""A refresh of a searched pool: 1 % of the vectors added, or withdrawn, beside a full pass.

The full pass hashes and collapses the vectors, trains the partition, assigns the cells, joins them,
audits 2,000 rows and applies the leader rule. The refresh does the same for the new pool, from the
results of the full pass. Both must give the same pairs, decisions and audit. This is checked
afterwards, untimed, by a full pass over the new pool with the same partition.

    python benchmarks/incremental.py [--rows 1000000] [--unchecked]
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pools import make_pool

sys.path.insert(0, str(Path(__file__).parents[1]))

from geofm.dedup.certificate import Audit, audit_sample, certify, choose_sample
from geofm.dedup.edges import Edges, merge_edges
from geofm.dedup.identical import collapse_vectors, hash_vectors
from geofm.dedup.incremental import (
    carry_audit,
    carry_cells,
    carry_edges,
    current_rows,
    join_new_rows,
    match_previous_rows,
)
from geofm.dedup.leader import choose_leaders
from geofm.dedup.partition import Cells, Partition, assign_cells
from geofm.embeddings.vectors import EmbeddingSpace, make_space, take_rows
from tests.geofm.dedup.search import find_pairs

RESULTS = Path(__file__).parent / "results" / "incremental.csv"
THRESHOLD, SEED = 0.95, 2027


@dataclass
class Spent:
    """Wall-clock seconds and processor seconds (which other processes disturb less)."""

    seconds: float
    cpu_s: float


@dataclass
class Pass:
    """Results of one pass."""

    hashes: NDArray[np.uint64]
    partition: Partition
    cells: Cells
    edges: Edges
    audit: Audit
    kept: NDArray[np.bool_]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--unchecked", action="store_true", help="skip the check, write nothing")
    options = parser.parse_args()
    rows = options.rows
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.npy" for name in ("all", "first", "less")}
        make_pool(rows + rows // 100, SEED, files["all"])
        everything = np.load(files["all"], mmap_mode="r")
        np.save(files["first"], everything[:rows])
        np.save(files["less"], everything[rows // 100 : rows])
        first, less = (np.load(files[name], mmap_mode="r") for name in ("first", "less"))
        lines: list[dict[str, Any]] = []
        previous, full_s = timed(lambda: full_pass(first, None))
        lines.append(describe("full pass", first, previous, full_s, full_s))
        changed = {"1 % added": everything, "1 % withdrawn": less}
        refreshed = {}
        for name, pool in changed.items():
            refreshed[name], seconds = timed(lambda pool=pool: refresh(pool, previous))
            lines.append(describe(name, pool, refreshed[name], seconds, full_s))
        if options.unchecked:
            return
        for line, (name, pool) in zip(lines[1:], changed.items(), strict=True):
            result, expected = refreshed[name], full_pass(pool, previous.partition)
            line["same_pairs"] = equal(result.edges, expected.edges)
            line["same_decisions"] = bool((result.kept == expected.kept).all())
            line["same_audit"] = equal(result.audit, expected.audit)
            print(name, line, flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[1]), restval="")
        writer.writeheader()
        writer.writerows(lines)


def timed(function: Callable[[], Pass]) -> tuple[Pass, Spent]:
    """Run a pass and measure it."""
    started, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, Spent(time.perf_counter() - started, time.process_time() - cpu)


def keep(rows: int, edges: Edges) -> NDArray[np.bool_]:
    """Apply the leader rule, the last row first, so that the order of known rows is stable."""
    return choose_leaders(np.arange(rows)[::-1].copy(), edges).kept


def full_pass(stored: NDArray[np.float16], partition: Partition | None) -> Pass:
    """Search a pool with a given partition, or train one."""
    hashes = hash_vectors(stored)
    pool = np.flatnonzero(collapse_vectors(stored, hashes) == np.arange(len(stored)))
    if partition is None:
        space = make_space(stored, pool)
    else:
        space = EmbeddingSpace(stored, partition.centre)
    search = find_pairs(space, THRESHOLD, partition, SEED, pool)
    audit = audit_sample(space, hashes, pool, THRESHOLD, SEED)
    kept = keep(len(stored), search.edges)
    return Pass(hashes, search.partition, search.cells, search.edges, audit, kept)


def refresh(stored: NDArray[np.float16], previous: Pass) -> Pass:
    """Search a pool with the results of an earlier pass."""
    marks = [("start", time.perf_counter(), time.process_time())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter(), time.process_time()))

    hashes = hash_vectors(stored)
    mark("hash")
    previous_row = match_previous_rows(previous.hashes, previous.cells.home, hashes)
    mark("match")
    in_pool = collapse_vectors(stored, hashes) == np.arange(len(stored))
    mark("collapse")
    pool, new = np.flatnonzero(in_pool), np.flatnonzero(in_pool & (previous_row < 0))
    partition = previous.partition
    space = EmbeddingSpace(stored, partition.centre)
    new_space = EmbeddingSpace(take_rows(stored, new), partition.centre)
    new_cells = assign_cells(partition, new_space, 0, len(new))
    current = current_rows(previous_row, len(previous.hashes), in_pool)
    cells = carry_cells(previous.cells, current, new, new_cells, len(stored))
    mark("cells")
    sample = pool[choose_sample(hashes[pool], SEED)]
    audit = carry_audit(space, previous.audit, current, sample, new, cells.home, THRESHOLD)
    mark("audit")
    new_edges = join_new_rows(space, partition, cells, new, THRESHOLD)
    assert new_edges is not None
    edges = merge_edges([carry_edges(previous.edges, current), new_edges])
    mark("join")
    kept = keep(len(stored), edges)
    mark("leader")
    for before, after in pairwise(marks):
        print(f"  {after[0]}: {after[1] - before[1]:.2f} s, cpu {after[2] - before[2]:.2f} s")
    return Pass(hashes, partition, cells, edges, audit, kept)


def equal(result: Any, expected: Any) -> bool:
    """Whether all arrays of two records are equal."""
    return all(
        np.array_equal(values, vars(expected)[name]) for name, values in vars(result).items()
    )


def describe(
    name: str, stored: NDArray[np.float16], result: Pass, spent: Spent, full: Spent
) -> dict[str, Any]:
    """Make a line of the results."""
    report = certify(result.audit, result.edges, len(stored))
    line = {
        "pass": name,
        "rows": len(stored),
        "seconds": round(spent.seconds, 2),
        "share_of_full_pass": round(spent.seconds / full.seconds, 4),
        "cpu_s": round(spent.cpu_s, 2),
        "cpu_share": round(spent.cpu_s / full.cpu_s, 4),
        "pairs": len(result.edges),
        "kept": int(result.kept.sum()),
        "audited": report["queries"],
        "audit_pairs": report["pairs"],
        "audit_missed": report["missed"],
        "same_pairs": "",
        "same_decisions": "",
        "same_audit": "",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": " ".join(f"{n} {version(n)}" for n in ("geofm", "faiss-cpu", "torch", "numpy")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
