"""Compare selection methods at equal budgets with exact lazy greedy, and measure a million chips.

Pool: nine tenths of the embeddings are six monotone modes (water, desert, …); most of the rest are
common modes of very different sizes; the others are isolated outliers and rare modes of 5 to 12
chips. Monotone modes come from fewer tiles than the others.

``small`` (20,000 chips, several seeds): facility-location value as a share of that of lazy greedy
on all similarities (dense; the published heap rule), covering radius, share of rare modes with a
kept chip, share of monotone chips. ``large`` (1,000,000 to 100,000): seconds and peak memory of a
process that does nothing else, and the value on 20,000 sampled chips.

The defaults of ``geofm.selection.methods`` were chosen on seeds 1 and 2; other seeds are reported.

    python benchmarks/selection.py [--seeds 11,12,13] [--large 1000000] [--peer PYTHON]

``PYTHON`` is the interpreter of an environment with ``apricot-select scikit-learn``, whose lazy
greedy is measured too (dense, once per pool for the largest budget).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import heapq
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
SMALL, WIDTH = 20_000, 256
BUDGETS = (0.01, 0.1, 0.25)
MONOTONE, OUTLIERS, SHARE = 6, 0.002, 0.9
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("facility-location", {}),
    ("facility-location", {"rarity": 0.0}),
    ("facility-location", {"strata": "tile"}),
    ("k-centre", {}),
    ("balanced-kmeans", {}),
    ("density", {}),
    ("entropy", {}),
    ("per-tile", {}),
    ("random", {}),
)
LARGE_SEED = 11
LARGE_METHODS = ("facility-location", "balanced-kmeans", "per-tile", "random")


def skewed_pool(chips: int, seed: int, file: Path) -> tuple[NDArray[np.int64], list[str]]:
    """Write embeddings, float16 (chips, 256); return mode and tile of each chip.

    Modes 0 to 5 are monotone, then come common modes; outliers have −1, rare modes 10**6 and above.
    """
    draw = np.random.default_rng(seed)

    def unit(vectors: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))

    common, rare = int(100 * (chips / 20_000) ** 0.5), int(25 * (chips / 20_000) ** 0.5)
    families = unit(draw.normal(size=(20, WIDTH)))
    sizes = draw.integers(5, 13, rare)
    monotone, outliers = int(SHARE * chips), int(OUTLIERS * chips)
    weights = 1 / np.arange(1, common + 1) ** 0.8
    others = chips - monotone - outliers - int(sizes.sum())
    modes = np.concatenate([
        draw.choice(MONOTONE, monotone, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05]),
        MONOTONE + draw.choice(common, others, p=weights / weights.sum()),
        np.full(outliers, -1),
        10**6 + np.repeat(np.arange(rare), sizes),
    ])  # fmt: skip
    modes = draw.permutation(modes)
    # per kind of mode: distance from its family, length of its axes, noise, number of axes
    shape = {"monotone": (0.8, 0.45, 0.2, 6), "common": (0.9, 0.6, 0.35, 12),
             "rare": (0.9, 0.4, 0.35, 6)}  # fmt: skip
    made = {}
    for mode in np.unique(modes):
        kind = "monotone" if 0 <= mode < MONOTONE else "rare" if mode >= 10**6 else "common"
        apart, axis, noise, axes = shape[kind]
        centre = unit(families[draw.integers(20)] + apart * unit(draw.normal(size=WIDTH)))
        made[mode] = centre, axis * draw.normal(size=(axes, WIDTH)) / np.sqrt(axes * WIDTH), noise
    stored = np.lib.format.open_memmap(file, "w+", np.float16, (chips, WIDTH))
    for first in range(0, chips, 50_000):
        part = modes[first : first + 50_000]
        vectors = draw.normal(size=(len(part), WIDTH)).astype(np.float32) / WIDTH**0.5
        for mode in np.unique(part[part >= 0]):
            at = np.flatnonzero(part == mode)
            centre, axes, noise = made[mode]
            vectors[at] = (
                centre + draw.normal(size=(len(at), len(axes))) @ axes + noise * vectors[at]
            )
        vectors = vectors * draw.uniform(1, 2, (len(part), 1)) + 0.5 * families.mean(axis=0)
        stored[first : first + 50_000] = vectors
    stored.flush()
    crowded = draw.integers(0, 30, chips)
    tiles = np.where((modes >= 0) & (modes < MONOTONE), crowded, draw.integers(0, 100, chips))
    return modes, [f"tile {tile}" for tile in tiles]


def lazy_greedy(worth: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Apply Minoux' rule with a heap on a dense matrix: exact, and quadratic in memory."""
    reached = np.zeros(len(worth), dtype=np.float32)
    heap = [(-float(row.sum(dtype=np.float64)), i) for i, row in enumerate(worth)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < count:
        bound, i = heapq.heappop(heap)
        gain = float(np.maximum(worth[i] - reached, 0).sum(dtype=np.float64))
        if gain < -bound:
            heapq.heappush(heap, (-gain, i))
            continue
        chosen.append(i)
        np.maximum(reached, worth[i], out=reached)
    return np.array(chosen)


def candidates(file: Path, tiles: list[str], seed: int) -> Any:
    """Return the pool in the pipeline's form: embeddings on disk, centred on their mean."""
    from geofm.embeddings.vectors import make_space
    from geofm.selection.methods import Candidates

    space = make_space(np.load(file, mmap_mode="r"))
    ids = sorted(hashlib.sha256(f"{n}".encode()).hexdigest()[:24] for n in range(len(tiles)))
    entropy = np.random.default_rng([seed, 7]).uniform(0, 8, len(tiles))
    return Candidates(space, np.arange(len(tiles)), ids, entropy, tiles)


def apricot(matrix: str, count: int, out: str) -> None:
    """Run the peer's lazy greedy on a saved matrix; return ranking and seconds."""
    from apricot import FacilityLocationSelection

    worth = np.load(matrix, mmap_mode="r").astype(np.float64)
    few = np.ascontiguousarray(worth[:100, :100])  # compiled before the measurement
    FacilityLocationSelection(5, metric="precomputed", optimizer="lazy").fit(few)
    began = time.perf_counter()
    chosen = FacilityLocationSelection(count, metric="precomputed", optimizer="lazy").fit(worth)
    took = time.perf_counter() - began
    Path(out).write_text(json.dumps({"rows": chosen.ranking.tolist(), "seconds": took}))


def small(seed: int, peer: str = "") -> list[dict[str, Any]]:
    """Run all methods and exact lazy greedy on a pool."""
    from geofm.embeddings.vectors import QUANTIZED_ONE, quantize
    from geofm.selection.methods import select
    from geofm.selection.strata import divide_into_strata

    with tempfile.TemporaryDirectory() as folder:
        modes, tiles = skewed_pool(SMALL, seed, Path(folder) / "pool.npy")
        pool = candidates(Path(folder) / "pool.npy", tiles, seed)
        vectors = quantize(pool.space, pool.rows)
        worth = np.clip(vectors @ vectors.T, 0, QUANTIZED_ONE)
        np.fill_diagonal(worth, QUANTIZED_ONE)
        counts = [int(share * SMALL) for share in BUDGETS]
        began = time.perf_counter()
        exact = lazy_greedy(worth, counts[-1])
        took = time.perf_counter() - began
        values = [float(worth[exact[:n]].max(axis=0).mean(dtype=np.float64)) for n in counts]
        found = []

        def add(method: str, options: str, n: int, value: float, rows: Any, s: float) -> None:
            best = worth[rows].max(axis=0)
            found.append({
                "seed": seed, "pool": SMALL, "chips": n, "method": method,
                "options": options,
                "facility_location": round(float(best.mean(dtype=np.float64)) / QUANTIZED_ONE, 5),
                "of_exact": round(float(best.mean(dtype=np.float64)) / value, 5),
                "covering_radius": round(1 - float(best.min()) / QUANTIZED_ONE, 4),
                **modes_kept(modes, rows), "seconds": round(s, 2),
            })  # fmt: skip

        if peer:
            matrix, out = f"{folder}/worth.npy", f"{folder}/apricot.json"
            np.save(matrix, worth / QUANTIZED_ONE)
            order = json.dumps([matrix, counts[-1], out])
            subprocess.run([peer, __file__, "--apricot", order], check=True)
            theirs = json.loads(Path(out).read_text())
        for n, value in zip(counts, values, strict=True):
            add("exact lazy greedy", "dense, no strata", n, value, np.sort(exact[:n]), took)
            if peer:
                mine = np.sort(theirs["rows"][:n])
                add("apricot lazy greedy", "dense, no strata", n, value, mine, theirs["seconds"])
            for method, options in METHODS:
                arguments = dict(options)
                strata = (
                    divide_into_strata({"tile": tiles}, n)[0]
                    if arguments.pop("strata", "")
                    else None
                )
                began = time.perf_counter()
                rows = select(pool, method, n, strata, **arguments).rows  # type: ignore[arg-type]
                add(method, text(options), n, value, rows, time.perf_counter() - began)
    return found


def modes_kept(modes: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, float]:
    """Return the shares of rare modes with a kept chip, of monotone chips and of outliers."""
    rare = np.unique(modes[modes >= 10**6])
    kept = modes[rows]
    return {
        "rare_modes_kept": round(float(np.isin(rare, kept).mean()), 4),
        "monotone": round(float(((kept >= 0) & (kept < MONOTONE)).mean()), 4),
        "outliers": round(float((kept == -1).mean()), 4),
    }


def text(options: dict[str, Any]) -> str:
    """Format options for the table."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


def large(method: str, chips: int, seed: int, folder: str) -> list[dict[str, Any]]:
    """Run a method on the large pool; memory is that of the selection alone."""
    from data_catalog.storage.process import peak_memory_mib
    from geofm.selection.methods import select
    from geofm.selection.metrics import MEASURED, coverage

    place = Path(folder)
    tiles = json.loads((place / "tiles.json").read_text())
    count = chips // 10
    began = time.perf_counter()
    pool = candidates(place / "pool.npy", tiles, seed)
    rows = select(pool, method, count).rows  # type: ignore[arg-type]
    took = time.perf_counter() - began
    peak = peak_memory_mib()
    seen = np.sort(np.random.default_rng([seed, 1]).permutation(chips)[:MEASURED])
    best = np.maximum(coverage(pool.space, seen, rows), 0)
    return [{
        "seed": seed, "pool": chips, "chips": count, "method": method,
        "facility_location": round(float(best.mean()), 5),
        "covering_radius": round(1 - float(best.min()), 4),
        **modes_kept(np.load(place / "modes.npy"), rows),
        "seconds": round(took, 1), "peak_rss_mib": round(peak),
    }]  # fmt: skip


def main() -> None:
    """Run a process per pool and, for the large pool, per method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", default="11,12,13", help="pools of the small part; empty: none")
    parser.add_argument("--large", type=int, default=1_000_000, help="chips; 0 leaves it out")
    parser.add_argument("--peer", default="", help="interpreter of an environment with apricot")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--apricot", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.apricot:
        apricot(*json.loads(arguments.apricot))
        return
    if arguments.row:
        row = json.loads(arguments.row)
        rows = large(**row) if "folder" in row else small(**row)
        print(json.dumps(rows))
        return
    seeds = [int(seed) for seed in arguments.seeds.split(",") if seed]
    if seeds:
        pools = [{"seed": seed, "peer": arguments.peer} for seed in seeds]
        write("selection.csv", [row for pool in pools for row in child(pool)])
    if arguments.large:
        with tempfile.TemporaryDirectory() as folder:
            modes, tiles = skewed_pool(arguments.large, LARGE_SEED, Path(folder) / "pool.npy")
            np.save(Path(folder) / "modes.npy", modes)
            (Path(folder) / "tiles.json").write_text(json.dumps(tiles))
            common = {"chips": arguments.large, "seed": LARGE_SEED, "folder": folder}
            rows = [row for name in LARGE_METHODS for row in child({"method": name, **common})]
        write("selection-large.csv", rows)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a result with the machine it was measured on."""
    machine = {
        "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": f"geofm {version('geofm')} numpy {version('numpy')} "
        f"faiss-cpu {version('faiss-cpu')}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in rows)


def child(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure rows in a process of their own."""
    done = subprocess.run([sys.executable, __file__, "--row", json.dumps(row)], check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for one in rows:
        print(one, flush=True)
    return rows


if __name__ == "__main__":
    main()
