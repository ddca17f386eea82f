"""Find all pairs at cosine 0.95 or above of up to ten million vectors, beside FAISS IVF-Flat.

Each method runs in a process of its own on the same file (float16, 256 values per vector);
``pools.py`` describes its content. Recall is measured over planted pairs that reach 0.95 in
float64, and over all pairs of 2,000 random rows by exact search. Every found pair is checked again
in float64. The parameters of the search were chosen on seed 7; this pool has another seed.

    python benchmarks/join.py --rows 100000,1000000 --methods geofm,ivf,parts,identical
    python benchmarks/join.py --rows 10000000 --methods geofm --append
"""

from __future__ import annotations

import argparse
import csv
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_catalog.storage.process import peak_memory_mib

RESULTS = Path(__file__).parent / "results" / "join.csv"
THRESHOLD, SEED, PARTS = 0.95, 2028, 16
LISTS, PROBES = 4000, 4
COLUMNS = [
    "method", "rows", "seconds", "cpu_s", "frame_s", "assign_s", "search_s", "pairs", "false_pairs",
    "planted", "planted_found", "recall", "audited", "audit_pairs", "audit_missed",
    "audit_lower_bound", "audit_s", "peak_rss_mib", "ivf_is_x_times", "exponent", "note",
    "products", "machine", "cores", "versions", "date",
]  # fmt: skip


def main() -> None:
    """Make the pools, run each method, and write a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--methods", default="geofm,ivf,parts,identical")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--append", action="store_true", help="keep the lines that are there")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(METHODS[json.loads(options.run)["method"]](**json.loads(options.run))))
        return
    lines = _before() if options.append else []
    with tempfile.TemporaryDirectory() as folder:
        for rows in map(int, options.rows.split(",")):
            pool = Path(folder) / f"{rows}.npy"
            _child(method="pool", pool=str(pool), rows=rows, seed=options.seed)
            for method in options.methods.split(","):
                line = _child(method=method, pool=str(pool), rows=rows, seed=options.seed)
                mine = (line["method"], rows)
                lines = [old for old in lines if (old["method"], int(old["rows"])) != mine]
                lines.append({**line, **_machine()})
                print(lines[-1], flush=True)
                _write(lines)
            pool.unlink()


def _child(**row: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--run", json.dumps(row)], check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def _before() -> list[dict[str, Any]]:
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def _write(lines: list[dict[str, Any]]) -> None:
    """Write all lines, with the ratio of FAISS to geofm and the growth of time with the pool."""
    seconds = {(line["method"], int(line["rows"])): float(line["seconds"]) for line in lines}
    for line in lines:
        rows, mine = int(line["rows"]), float(line["seconds"])
        if ("IVF-Flat", rows) in seconds:
            line["ivf_is_x_times"] = round(seconds["IVF-Flat", rows] / mine, 2)
        first = seconds.get((line["method"], 100_000))
        if first is not None and rows > 100_000:
            line["exponent"] = round(float(np.log(mine / first) / np.log(rows / 1e5)), 3)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(lines)


def _machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": " ".join(f"{name} {version(name)}" for name in
                             ("geofm", "faiss-cpu", "torch", "numpy")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def _peak() -> int:
    return round(peak_memory_mib())


def make(method: str, pool: str, rows: int, seed: int) -> dict[str, Any]:
    """Write the pool and its planted pairs."""
    from pools import make_pool

    np.save(f"{pool}.planted.npy", np.stack(make_pool(rows, seed, Path(pool))))
    return {"method": method}


def geofm(method: str, pool: str, rows: int, seed: int) -> dict[str, Any]:
    """Run the search of ``geofm.dedup`` in this process, part after part."""
    from geofm.dedup.edges import merge_edges
    from geofm.dedup.join import join_cells
    from geofm.dedup.matmul import best_precision
    from geofm.dedup.pairs import group_cells
    from geofm.dedup.partition import assign_cells, train_partition
    from geofm.embeddings.vectors import make_space

    marks = [time.perf_counter()]
    space = make_space(np.load(pool, mmap_mode="r"))
    partition = train_partition(space, THRESHOLD, seed)
    marks.append(time.perf_counter())
    cells = assign_cells(partition, space, 0, rows)
    marks.append(time.perf_counter())
    found = []
    for first, last in group_cells(cells, partition.count):
        found.append(join_cells(space, partition, cells, range(first, last), THRESHOLD))
    edges = merge_edges([part.edges for part in found])
    marks.append(time.perf_counter())
    peak, cpu_s = _peak(), time.process_time()
    frame_s, assign_s, search_s = np.diff(marks)
    return {
        "method": "geofm", "rows": rows, "seconds": round(marks[-1] - marks[0], 2),
        "cpu_s": round(cpu_s, 2),
        "frame_s": round(frame_s, 2), "assign_s": round(assign_s, 2),
        "search_s": round(search_s, 2), "peak_rss_mib": peak,
        "products": best_precision().name,
        "note": f"{partition.count} cells, margin {partition.margin:.4f}, "
        f"{len(cells.row) / rows:.1f} visits per row, {len(found)} parts, "
        f"{sum(len(part.dense) for part in found)} dense cells",
        **_truth(pool, edges.left, edges.right, audit=True, seed=seed),
    }  # fmt: skip


def ivf(method: str, pool: str, rows: int, seed: int) -> dict[str, Any]:
    """Run FAISS IVF-Flat: train, add, and a range search for every vector."""
    import faiss

    from geofm.embeddings.vectors import make_space

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    units = make_space(np.load(pool)).units
    lists = LISTS if rows >= 10**6 else round(LISTS * (rows / 10**6) ** 0.5)
    marks = [time.perf_counter()]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(256), 256, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.cp.niter = 10
    index.train(units)
    index.add(units)
    marks.append(time.perf_counter())
    index.nprobe = PROBES
    lefts, rights = [], []
    for first in range(0, rows, 10_000):
        limits, _, hits = index.range_search(units[first : first + 10_000], THRESHOLD)
        left = first + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
        lefts.append(np.minimum(left, hits)[left != hits])
        rights.append(np.maximum(left, hits)[left != hits])
    code = np.unique(np.concatenate(lefts) * rows + np.concatenate(rights))
    marks.append(time.perf_counter())
    return {
        "method": "IVF-Flat", "rows": rows, "seconds": round(marks[-1] - marks[0], 2),
        "frame_s": round(marks[1] - marks[0], 2), "search_s": round(marks[2] - marks[1], 2),
        "peak_rss_mib": _peak(), "products": "float32",
        "note": f"{lists} lists, nprobe {PROBES}, 64 points per list, 10 rounds",
        **_truth(pool, *np.divmod(code, rows), audit=False, seed=seed),
    }  # fmt: skip


def _truth(
    pool: str, left: NDArray[np.int64], right: NDArray[np.int64], audit: bool, seed: int
) -> dict[str, Any]:
    """Count found planted pairs, false pairs, and the audit of random rows."""
    from geofm.dedup.edges import Edges
    from geofm.embeddings.vectors import EmbeddingSpace, make_space, take_rows
    from tests.geofm.dedup.search import audit_edges

    space = make_space(np.load(pool, mmap_mode="r"))
    rows = len(space)

    def exact(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        need, at = np.unique(np.concatenate([a, b]), return_inverse=True)
        part = EmbeddingSpace(take_rows(space.stored, need), space.centre)
        return part.similarity(at[: len(a)], at[len(a) :])

    planted = np.load(f"{pool}.planted.npy")
    low, high = planted.min(axis=0), planted.max(axis=0)
    real = exact(low, high) >= THRESHOLD
    codes = np.unique(low[real] * rows + high[real])
    found = np.isin(codes, left * rows + right)
    result = {
        "pairs": len(left), "false_pairs": int((exact(left, right) < THRESHOLD).sum()),
        "planted": len(codes), "planted_found": int(found.sum()),
        "recall": round(float(found.mean()), 7),
    }  # fmt: skip
    if audit:
        started = time.perf_counter()
        report = audit_edges(space, Edges(left, right, np.zeros(len(left))), THRESHOLD, seed + 1)
        result |= {
            "audited": report["queries"], "audit_pairs": report["pairs"],
            "audit_missed": report["missed"],
            "audit_lower_bound": report["recall_lower_bound"],
            "audit_s": round(time.perf_counter() - started, 2),
        }  # fmt: skip
    return result


def parts(method: str, pool: str, rows: int, seed: int) -> dict[str, Any]:
    """Search sixteen groups of cells, each in a process of its own."""
    from geofm.dedup.edges import Edges, merge_edges
    from geofm.dedup.partition import assign_cells, train_partition
    from geofm.embeddings.vectors import make_space

    started = time.perf_counter()
    space = make_space(np.load(pool, mmap_mode="r"))
    partition = train_partition(space, THRESHOLD, seed)
    middle = time.perf_counter()
    cells = assign_cells(partition, space, 0, rows)
    assigned = time.perf_counter()
    place = Path(pool).with_suffix("")
    place.mkdir()
    np.savez(
        place / "all.npz",
        centre=partition.centre,
        centroids=partition.centroids,
        margin=partition.margin,
        home=cells.home,
        row=cells.row,
        begin=cells.begin,
    )
    lines = [_child(method="part", pool=pool, rows=rows, seed=number) for number in range(PARTS)]
    merging = time.perf_counter()
    found = []
    for number in range(PARTS):
        with np.load(place / f"{number}.npz") as data:
            found.append(Edges(data["left"], data["right"], data["similarity"]))
    edges = merge_edges(found)
    merge_s = time.perf_counter() - merging
    seconds = [line["seconds"] for line in lines]
    one_machine = middle - started + (assigned - middle) / PARTS + max(seconds) + merge_s
    at_1e8 = (1e8 / rows) ** 1.5 * ((assigned - middle) + sum(seconds)) / PARTS
    return {
        "method": f"{PARTS} parts apart", "rows": rows,
        "seconds": round(middle - started + assigned - middle + sum(seconds) + merge_s, 2),
        "frame_s": round(middle - started, 2), "assign_s": round(assigned - middle, 2),
        "search_s": round(sum(seconds), 2),
        "peak_rss_mib": max(line["peak_rss_mib"] for line in lines),
        "note": f"part {min(seconds):.2f} to {max(seconds):.2f} s; on {PARTS} such machines "
        f"{one_machine:.1f} s; 1e8 rows by n^1.5: {at_1e8 / 60:.0f} min and the frame",
        **_truth(pool, edges.left, edges.right, audit=False, seed=seed),
    }  # fmt: skip


def part(method: str, pool: str, rows: int, seed: int) -> dict[str, Any]:
    """Search one of the sixteen groups."""
    from geofm.dedup.join import join_cells
    from geofm.dedup.partition import Cells, Partition
    from geofm.embeddings.vectors import EmbeddingSpace

    place = Path(pool).with_suffix("")
    started = time.perf_counter()
    with np.load(place / "all.npz") as data:
        partition = Partition(data["centre"], data["centroids"], float(data["margin"]))
        cells = Cells(data["home"], data["row"], data["begin"])
    space = EmbeddingSpace(np.load(pool, mmap_mode="r"), partition.centre)
    ends = np.linspace(0, partition.count, PARTS + 1).astype(int)
    found = join_cells(space, partition, cells, range(ends[seed], ends[seed + 1]), THRESHOLD)
    np.savez(place / f"{seed}.npz", **vars(found.edges))
    return {"seconds": time.perf_counter() - started, "peak_rss_mib": _peak()}


def identical(method: str, pool: str, rows: int, seed: int) -> dict[str, Any]:
    """Search a pool of identical vectors and a hundred others."""
    from geofm.dedup.identical import collapse_vectors, hash_vectors
    from geofm.embeddings.vectors import make_space
    from tests.geofm.dedup.search import find_pairs

    stored = np.tile(np.load(pool, mmap_mode="r")[0], (rows, 1))
    stored[:: rows // 100] = np.load(pool, mmap_mode="r")[:: rows // 100]
    started = time.perf_counter()
    same = collapse_vectors(stored, hash_vectors(stored))
    alone = np.unique(same)
    found = find_pairs(make_space(stored[alone]), THRESHOLD)
    return {
        "method": "geofm, identical vectors", "rows": rows,
        "seconds": round(time.perf_counter() - started, 3), "pairs": len(found.edges),
        "peak_rss_mib": _peak(), "note": f"{len(alone)} distinct",
    }  # fmt: skip


METHODS = {
    "pool": make, "geofm": geofm, "ivf": ivf, "parts": parts, "part": part,
    "identical": identical,
}  # fmt: skip

if __name__ == "__main__":
    main()
