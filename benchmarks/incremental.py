"""Adding 1 % to a searched corpus, and withdrawing 1 %, beside a full pass.

The full pass hashes and collapses the vectors, trains the frame, assigns, joins, sketches, audits
2,000 rows and applies the leader rule; what follows does all that for the new pool from what the
full pass left. Both must come to the same pairs, decisions and audit: afterwards, untimed, the
new pool is searched as a whole over the same frame, and the columns say whether it is the same.

    python benchmarks/incremental.py [--rows 1000000]
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  before torch
import numpy as np
from geofm.dedup.newcomers import factors_of, join_new, pairs_of
from geofm.dedup.sketch import WIDTH, Sketches, sketch_all
from numpy.typing import NDArray
from pools import make_pool

from geofm.dedup import certificate as audit
from geofm.dedup.edges import Edges, merge_edges
from geofm.dedup.identical import collapse_vectors, hash_vectors
from geofm.dedup.incremental import carry_edges, carry_sketches, collapse_known, extend, match_rows
from geofm.dedup.leader import choose_leaders
from geofm.dedup.partition import Cells, Partition
from geofm.embeddings.vectors import EmbeddingSpace, make_space, take_rows
from tests.geofm.dedup.search import find_pairs

RESULTS = Path(__file__).parent / "results" / "incremental.csv"
THRESHOLD, SEED = 0.95, 2027


@dataclass
class Spent:
    """Seconds on the clock, and of processors (which others at work disturb less)."""

    seconds: float
    cpu_s: float


@dataclass
class Searched:
    """All that one pass leaves."""

    hashes: NDArray[np.uint64]
    frame: Partition
    cells: Cells
    sketches: Sketches
    edges: Edges
    audited: audit.Audited
    kept: NDArray[np.bool_]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "pool.npy"
        make_pool(rows + rows // 100, SEED, place)
        everything = np.load(place, mmap_mode="r")
        np.save(Path(folder) / "first.npy", everything[:rows])
        np.save(Path(folder) / "less.npy", everything[rows // 100 : rows])
        first = np.load(Path(folder) / "first.npy", mmap_mode="r")
        less = np.load(Path(folder) / "less.npy", mmap_mode="r")
        lines: list[dict[str, Any]] = []
        before, full_s = _timed(lambda: full(first, None))
        lines.append(_line("full pass", first, before, full_s, full_s))
        changed = {"1 % added": everything, "1 % withdrawn": less}
        followed = {}
        for name, pool in changed.items():
            followed[name], seconds = _timed(lambda pool=pool: follow(pool, before))
            lines.append(_line(name, pool, followed[name], seconds, full_s))
        for line, (name, pool) in zip(lines[1:], changed.items(), strict=True):
            after, again = followed[name], full(pool, before.frame)
            line["same_pairs"] = _same(after.edges, again.edges)
            line["same_decisions"] = bool((after.kept == again.kept).all())
            line["same_audit"] = _same_audit(after.audited, again.audited)
            print(name, line, flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[1]), restval="")
        writer.writeheader()
        writer.writerows(lines)


def _timed(function: Callable[[], Searched]) -> tuple[Searched, Spent]:
    started, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, Spent(time.perf_counter() - started, time.process_time() - cpu)


def decide(rows: int, edges: Edges) -> NDArray[np.bool_]:
    """The leader rule; quality depends on the row from the end, so that rows keep theirs."""
    return choose_leaders(np.arange(rows)[::-1].copy(), edges).kept


def full(stored: NDArray[np.float16], frame: Partition | None) -> Searched:
    """Everything, over a frame of its own or a given one."""
    hashes = hash_vectors(stored)
    pool = np.flatnonzero(collapse_vectors(stored, hashes) == np.arange(len(stored)))
    space = make_space(stored, pool) if frame is None else EmbeddingSpace(stored, frame.centre)
    found = find_pairs(space, THRESHOLD, frame, SEED, pool)
    sketches = sketch_all(space, found.frame.axes)
    audited = audit.audit_rows(space, hashes, pool, THRESHOLD, SEED)
    kept = decide(len(stored), found.edges)
    return Searched(hashes, found.frame, found.cells, sketches, found.edges, audited, kept)


def follow(stored: NDArray[np.float16], before: Searched) -> Searched:
    """The same from what a pass before left."""
    marks = [("start", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    hashes = hash_vectors(stored)
    mark("hash")
    of = match_rows(before.hashes, before.cells.home, hashes)
    mark("match")
    mask = collapse_known(stored, hashes, of) == np.arange(len(stored))
    pool = np.flatnonzero(mask)
    mark("collapse")
    space = EmbeddingSpace(stored, before.frame.centre)
    cells, to, new = extend(space, before.frame, before.cells, of, mask)
    sketches = np.empty((len(stored), WIDTH), dtype=np.int16)
    carry_sketches(before.sketches, of, mask, sketches)
    sketches[new] = sketch_all(
        EmbeddingSpace(take_rows(stored, new), space.centre), before.frame.axes
    )
    mark("cells")
    asked = pool[audit.choose_queries(hashes[pool], SEED)]
    known, rest = audit.carry_audit(space, before.audited, to, asked, new, THRESHOLD)
    mark("audit")
    factors = factors_of(space, sketches, THRESHOLD)
    edges = carry_edges(before.edges, to)
    if len(new):
        more = join_new(space, before.frame, cells, THRESHOLD, new, factors)
        edges = merge_edges([edges, more])
    anew = pairs_of(space, factors, rest, THRESHOLD)
    audited = audit.merge_audit(known, rest, *anew, cells.home)
    mark("join")
    kept = decide(len(stored), edges)
    mark("leader")
    print({b[0]: round(b[1] - a[1], 2) for a, b in pairwise(marks)})
    return Searched(hashes, before.frame, cells, sketches, edges, audited, kept)


def _same_audit(one: audit.Audited, other: audit.Audited) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("asked", "low", "high")
    )


def _same(one: Edges, other: Edges) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("left", "right", "similarity")
    )


def _line(
    name: str, stored: NDArray[np.float16], found: Searched, spent: Spent, whole: Spent
) -> dict[str, Any]:
    report = audit.certify(found.audited, found.edges, len(stored))
    line = {
        "pass": name, "rows": len(stored), "seconds": round(spent.seconds, 2),
        "share_of_full_pass": round(spent.seconds / whole.seconds, 4),
        "cpu_s": round(spent.cpu_s, 2), "cpu_share": round(spent.cpu_s / whole.cpu_s, 4),
        "pairs": len(found.edges),
        "kept": int(found.kept.sum()), "audited": report["queries"],
        "audit_pairs": report["pairs"], "audit_missed": report["missed"], "same_pairs": "",
        "same_decisions": "", "same_audit": "", "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": " ".join(f"{n} {version(n)}" for n in ("geofm", "faiss-cpu", "torch", "numpy")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
