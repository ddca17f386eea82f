"""Compare the leader rule with connected components and with "drop if similar to any earlier item".

The pool has 20,000 unit vectors of 128 values, similar to satellite chips: 400 places that drift
over 25 dates, 3,000 chips of open water, 500 scenes four times each, 5,000 single chips. A dropped
item without a kept neighbour is a loss; two kept items within the threshold are a duplicate. The
second table shows the time of the rounds on random graphs of a million rows.

    python benchmarks/leader.py
"""

from __future__ import annotations

import csv
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

sys.path.insert(0, str(Path(__file__).parents[1]))

from geofm.dedup.edges import Edges, sort_edges
from geofm.dedup.leader import choose_leaders
from geofm.embeddings.vectors import make_space
from tests.geofm.dedup.search import find_edges

RESULTS = Path(__file__).parent / "results" / "leader.csv"
THRESHOLD, SEED, WIDTH = 0.95, 2026, 128


def main() -> None:
    """Measure and write the tables."""
    draw = np.random.default_rng(SEED)
    vectors = draw.permutation(pool(draw))
    edges = find_edges(make_space(vectors), THRESHOLD)
    order = np.arange(len(vectors))  # in random order, like quality
    started = time.perf_counter()
    leaders = choose_leaders(order, edges).kept
    seconds = time.perf_counter() - started
    lines = [
        score("connected components", components(edges, len(vectors)), edges),
        score("any earlier item", any_earlier(edges, len(vectors)), edges),
        {**score("leader", leaders, edges), "seconds": round(seconds, 3)},
    ]
    for rows, degree in ((1_000_000, 2), (1_000_000, 20)):
        left, right = draw.integers(0, rows, (2, rows * degree // 2))
        real = left != right
        graph = sort_edges(left[real], right[real], np.ones(int(real.sum())))
        shuffled = draw.permutation(rows)
        started = time.perf_counter()
        kept = choose_leaders(shuffled, graph).kept
        seconds = time.perf_counter() - started
        lines.append({**score(f"leader, random graph of degree {degree}", kept, graph),
                      "seconds": round(seconds, 3)})  # fmt: skip
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "seconds", "machine", "cores", "versions",
                                       "date"], restval="")  # fmt: skip
        writer.writeheader()
        for line in lines:
            print(line)
            writer.writerow({**line, **machine()})


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pool(draw: np.random.Generator) -> NDArray[np.float16]:
    """Make the vectors, kind by kind."""
    at = _unit(draw.normal(size=(400, WIDTH)))
    dates = []
    for _ in range(25):
        dates.append(at)
        at = _unit(at + 0.18 * _unit(draw.normal(size=at.shape)))
    sea = _unit(draw.normal(size=WIDTH)) + 0.17 * _unit(draw.normal(size=(3000, WIDTH)))
    scenes = np.repeat(_unit(draw.normal(size=(500, WIDTH))), 4, axis=0)
    scenes = scenes + 0.12 * _unit(draw.normal(size=scenes.shape))
    alone = _unit(draw.normal(size=(5000, WIDTH)))
    return _unit(np.concatenate([*dates, sea, scenes, alone])).astype(np.float16)


def components(edges: Edges, rows: int) -> NDArray[np.bool_]:
    """Keep the first item of each connected component."""
    graph = coo_array((np.ones(len(edges)), (edges.left, edges.right)), shape=(rows, rows))
    _, label = connected_components(graph, directed=False)
    kept = np.zeros(rows, dtype=np.bool_)
    kept[np.unique(label, return_index=True)[1]] = True
    return kept


def any_earlier(edges: Edges, rows: int) -> NDArray[np.bool_]:
    """Drop each item that is similar to any earlier one (SemDeDup, NeMo Curator)."""
    kept = np.ones(rows, dtype=np.bool_)
    kept[edges.right] = False
    return kept


def score(rule: str, kept: NDArray[np.bool_], edges: Edges) -> dict[str, Any]:
    """Count losses and remaining duplicates of a rule."""
    near = np.zeros(len(kept), dtype=np.bool_)
    near[edges.left[kept[edges.right]]] = True
    near[edges.right[kept[edges.left]]] = True
    gone = ~kept
    alone = int((gone & ~near).sum())
    return {
        "rule": rule, "rows": len(kept), "pairs": len(edges), "kept": int(kept.sum()),
        "dropped": int(gone.sum()), "dropped_without_kept_neighbour": alone,
        "share_of_dropped": round(alone / max(1, int(gone.sum())), 4),
        "kept_pairs": int((kept[edges.left] & kept[edges.right]).sum()),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Return the columns that describe machine and versions."""
    return {
        "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": f"geofm {version('geofm')} numpy {version('numpy')}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
