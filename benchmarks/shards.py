"""Compare shards and loader with peers and with the bare bytes.

Every row is a process of its own, the median of ``--repeat`` runs with all files in the page cache
(the machine is shared: compare rates within a table only). The lower bounds (a bare ``pread`` loop,
the decoder alone) run in one warm process in turn with the loader, because the speed of a shared
machine changes within seconds; their ratio is the median of the rounds' ratios. Sections:

- ``write``: samples in memory to published shards. geofm hashes every member and every file, writes
  the index and publishes in one step; ``pack`` is the whole stage, which reads the chips, verifies
  their pixels, computes statistics and publishes parts and artifact. The peers hash nothing.
- ``read``: bytes of samples in order and in random order, without decoding.
- ``train``: decoded and cropped to float32 batches; ``cpu_ms`` is CPU time per sample.
- ``shuffle``: neighbours in the stream of 10^5 samples that are stored by scene; p of the
  correlation of their ground cells; buffers of 256 MiB at 60 kB per sample.
- ``versions``: bytes that a new version writes when samples are added and removed.
- ``growth``: the whole stage and the loader's start for 10^3 to 10^6 samples.
- ``kills``: the writer killed 200 times (``tests/geofm/shards/test_faults.py``).

A section is added to the table when it is finished; a failed section leaves earlier rows unchanged.

    python benchmarks/shards.py --peers PYTHON [--only write,read,...] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]
HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: Name, shape (bands, height, width), dtype and number of samples: chips of 1.5 MB and 60 kB.
SIZES = {
    "1.5 MB": ((12, 256, 256), "uint16", 200),
    "60 kB": ((3, 100, 100), "uint16", 4000),
}
JSON_BYTES = 1400
SECTIONS = ("write", "read", "train", "shuffle", "versions", "growth", "kills")
#: Sections that have rows for each of ``SIZES``.
BY_SIZE = ("write", "read", "train")
#: Rounds of two loops in turn.
ROUNDS = 21
#: Items that litdata reads in random order; each may open another chunk.
LITDATA_ITEMS = 200
COLUMNS = ("section", "what", "member", "samples", "seconds", "mib_s", "samples_s", "cpu_ms",
           "ours_is_x_times", "peak_rss_mib", "note", "machine", "cores", "versions",
           "date")  # fmt: skip


def main() -> None:
    """Run the requested sections into one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", help="python of an environment with the peers")
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--members", default=",".join(SIZES), help="sizes to write, read, train")
    parser.add_argument("--scratch", default=None, help="folder for about 6 GB")
    parser.add_argument("--note", help="said in every row, e.g. how busy the machine was")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--most", type=int, default=10**6, help="samples of the largest growth")
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        import shards_ours

        shards_ours.main(*options.ours)
        return
    table = RESULTS / "shards.csv"
    members = options.members.split(",")
    for section in options.only.split(","):
        rows = []
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            bench = Bench(Path(folder), options.peers, options.repeat, options.most, members)
            for row in SECTION[section](bench):
                note = "; ".join(filter(None, (row["note"], options.note)))
                rows.append({"section": section, **row, "note": note, **about(options.peers)})
                print({k: v for k, v in rows[-1].items() if k in COLUMNS[:11]}, flush=True)
        replaced = members if section in BY_SIZE else None
        save([*kept(table, section, replaced), *rows], table)


def kept(table: Path, section: str, members: list[str] | None) -> list[Json]:
    """Return the rows of a table without those of a section, for some sizes or all."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["section"] != section or (members is not None and row["member"] not in members)
        ]


def save(rows: list[Json], table: Path) -> None:
    """Write the table with the sections in order."""
    sizes = list(SIZES)

    def place(row: Json) -> tuple[int, int]:
        member = row.get("member")
        return SECTIONS.index(row["section"]), sizes.index(member) if member in sizes else 0

    ordered = sorted(rows, key=place)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ordered)


@lru_cache
def about(peers: str | None) -> Json:
    """Return machine and versions."""
    told = " ".join(f"{name} {version(name)}" for name in ("geofm", "numpy", "pyarrow", "torch"))
    if peers:
        ask = "from importlib.metadata import version; import sys; "
        ask += "print(*(f'{name} {version(name)}' for name in sys.argv[1:]))"
        told += (
            " "
            + subprocess.run(
                [peers, "-c", ask, "webdataset", "litdata"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": told,
        "date": datetime.now(UTC).date().isoformat(),
    }


class Bench:
    """A scratch folder, and functions that measure rows in it."""

    def __init__(
        self, folder: Path, peers: str | None, repeat: int, most: int, members: list[str]
    ) -> None:
        self.folder, self.peers, self.repeat, self.most = folder, peers, repeat, most
        self.sizes = {name: size for name, size in SIZES.items() if name in members}

    def ours(self, what: str, job: Json, repeat: int | None = None) -> Json:
        """Return the median of several runs of a geofm function."""
        return self._median([sys.executable, str(HERE / "shards.py"), "--ours", what], job, repeat)

    def peer(self, what: str, job: Json, repeat: int | None = None) -> Json:
        """Return the median of several runs of a peer."""
        assert self.peers is not None
        return self._median([self.peers, str(HERE / "shards_peers.py"), what], job, repeat)

    def _median(self, command: list[str], job: Json, repeat: int | None) -> Json:
        found = []
        for run in range(repeat or self.repeat):
            out = self.folder / f"out-{time.time_ns()}"
            if "out" not in job:
                out.mkdir()
            file = self.folder / "job.json"
            file.write_text(json.dumps({"out": str(out), **job}))
            env = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
            done = subprocess.run([*command, str(file)], check=False, capture_output=True,
                                  text=True, env=env)  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            found.append(json.loads(done.stdout.splitlines()[-1]))
            if run + 1 < (repeat or self.repeat) or not job.get("keep_out"):
                shutil.rmtree(out, ignore_errors=True)
            else:
                found[-1]["out"] = str(out)
        middle = sorted(found, key=lambda one: float(one["seconds"]))[len(found) // 2]
        return {**middle, "out": found[-1].get("out")}


def row(what: str, member: str, size: int, found: Json, ours: float = 0, note: str = "") -> Json:
    """Make a row of the table; ``ours`` is geofm's rate in samples per second."""
    samples, seconds = found["samples"], found["seconds"]
    return {
        "what": what,
        "member": member,
        "samples": samples,
        "seconds": round(seconds, 3),
        "mib_s": round(samples * size / 2**20 / seconds, 1),
        "samples_s": round(samples / seconds, 1),
        "cpu_ms": round(1000 * found["cpu_s"] / samples, 4),
        "ours_is_x_times": round(ours / (samples / seconds), 2) if ours else 1.0,
        "peak_rss_mib": round(found["peak_rss_mib"]),
        "note": note,
    }


def pictures(bench: Bench, member: str) -> Json:
    """Make a job that writes samples of a size, from 64 different images on disk."""
    shape, dtype, samples = SIZES[member]
    rng = np.random.default_rng(0)
    names = []
    for number in range(64):
        name = bench.folder / f"{len(shape)}-{shape[1]}-{number}.npy"
        np.save(name, rng.integers(0, 4000, shape, dtype=dtype))
        names.append(str(name))
    return {"pictures": names, "samples": samples, "json_bytes": JSON_BYTES}


def write(bench: Bench) -> Iterator[Json]:
    """Measure the writers."""
    for member, (shape, dtype, _) in bench.sizes.items():
        job = pictures(bench, member)
        size = math.prod(shape) * np.dtype(dtype).itemsize + 128 + JSON_BYTES
        ours = bench.ours("write", job)
        rate = ours["samples"] / ours["seconds"]
        yield row("geofm writer", member, size, ours,
                  note="SHA-256 of members and files, index, published in one step")  # fmt: skip
        peers = {
            "write_webdataset": "webdataset ShardWriter",
            "write_litdata": "litdata Cache",
            "write_tarfile": "tarfile",
            "write_bare": "bare write",
            "write_files": "array of files",
        }
        for what, name in peers.items():
            yield row(name, member, size, bench.peer(what, job), rate, "hashes nothing")
        kept = bench.peer("write_files", {**job, "keep_out": True}, 1)
        files = {**job, "files": f"{kept['out']}/files"}
        yield row("GNU tar of the files", member, size, bench.peer("write_gnu_tar", files), rate)
        shutil.rmtree(kept["out"])
        world = bench.ours("world", {**job, "shape": shape, "dtype": dtype, "keep_out": True}, 1)
        packed = bench.ours("pack", {**job, "world": world["out"]})
        yield row("geofm pack, whole stage", member, size, packed, note="reads and proves chips")
        shutil.rmtree(world["out"])


def prepared(bench: Bench, member: str) -> tuple[Json, int]:
    """Make a dataset, litdata's chunks and files of the same samples; return a job for readers."""
    shape, dtype, samples = SIZES[member]
    size = math.prod(shape) * np.dtype(dtype).itemsize + 128
    job = pictures(bench, member)
    world = bench.ours("world", {**job, "shape": shape, "dtype": dtype, "keep_out": True}, 1)
    made = bench.ours("dataset", {**job, "world": world["out"], "out": world["out"]}, 1)
    rng = np.random.default_rng(1)
    np.save(bench.folder / "order.npy", rng.permutation(samples))
    crop = shape[1] * 3 // 4
    np.save(bench.folder / "corners.npy", rng.integers(0, shape[1] - crop, (samples, 2)))
    return {
        **job, "world": world["out"], "dataset": made["dataset"], "tars": made["tars"],
        "places": made["places"], "order": str(bench.folder / "order.npy"), "random": False,
        "corners": str(bench.folder / "corners.npy"), "shape": shape, "dtype": dtype, "crop": crop,
        "batch": 64,
    }, size  # fmt: skip


def in_turns(
    bench: Bench, job: Json, size: int, ours: str, bare: str, names: tuple[str, str], member: str
) -> Iterator[Json]:
    """Measure a geofm loop in turn with a loop that does only the necessary work."""
    found = bench.ours("turns", {**job, "ours": ours, "bare": bare, "rounds": ROUNDS}, 1)
    note = (f"in turns with the {names[1]}: {found['rate']:.2f} of its rate, "
            f"{1 / found['cpu']:.2f} x its processor time")  # fmt: skip
    yield row(f"geofm loader, {names[0]}", member, size, {**found, **found["ours"]}, note=note)
    yield {
        **row(f"{names[1]}, {names[0]}", member, size, {**found, **found["bare"]}),
        "ours_is_x_times": round(found["rate"], 2),
    }


def read(bench: Bench) -> Iterator[Json]:
    """Measure the readers, without decoding."""
    for member in bench.sizes:
        job, size = prepared(bench, member)
        write_job = {**job, "keep_out": True}
        litdata = bench.peer("write_litdata", write_job, 1)["out"]
        files = f"{bench.peer('write_files', write_job, 1)['out']}/files"
        for random in (False, True):
            order = "random order" if random else "in order"
            here = {**job, "random": random, "files": files}
            for keep in (1, 64):
                name = f"{order}, {'lists of 64' if keep > 1 else 'one by one'}"
                loops = {**here, "keep": keep, "reading": {"batch": keep}}
                yield from in_turns(bench, loops, size, "read", "read_pread",
                                    (name, "bare pread loop"), member)  # fmt: skip
            ours = bench.ours("read", here)
            rate = ours["samples"] / ours["seconds"]
            yield row(f"geofm loader, {order}", member, size, ours, note="as the peers: cold")
            checked = bench.ours("read", {**here, "check": True})
            yield row(f"geofm loader, {order}, checked", member, size, checked)
            if not random:
                for what, name in (("webdataset", "webdataset"), ("tarfile", "tarfile")):
                    found = bench.peer(f"read_{what}", here)
                    yield row(f"{name}, {order}", member, size, found, rate)
            peer = {**here, "out": litdata, "most": LITDATA_ITEMS if random else job["samples"]}
            found = bench.peer("read_litdata", peer, 1 if random else None)
            yield row(f"litdata, {order}", member, size, found, rate)
            yield row(f"array of files, {order}", member, size, bench.peer("read_files", here),
                      rate)  # fmt: skip


def train(bench: Bench) -> Iterator[Json]:
    """Measure decoding and cropping to batches."""
    for member in bench.sizes:
        job, size = prepared(bench, member)
        for random in (False, True):
            order = "random order" if random else "in order"
            yield from in_turns(bench, {**job, "random": random}, size, "train", "decode_alone",
                                (order, "decoder alone"), member)  # fmt: skip
        ours = bench.ours("train", {**job, "random": False})
        yield row("geofm loader, in order, a process of its own", member, size, ours)
        found = bench.peer("decode_webdataset", {**job, "warm": True})
        yield row("webdataset, in order", member, size, found, ours["samples"] / ours["seconds"])


def shuffle(bench: Bench) -> Iterator[Json]:
    """Measure the correlation of the ground cells of neighbours in the stream."""
    samples, scene = 100_000, 1000
    laid = bench.ours("laid_out", {"samples": samples, "scene": scene, "keep_out": True}, 1)
    job = {"dataset": laid["dataset"], "tars": laid["tars"], "samples": samples, "seed": 0}
    buffer = 256 * 2**20 // 61_440
    seeds = 20
    for name, what in (("geofm loader", "shuffle"), ("uniform permutation", "uniform")):
        ps = []
        for seed in range(seeds):
            found = bench.ours(what, {**job, "seed": seed}, 1)
            ps.append(neighbours(found["keys"], scene)[1])
            if seed == 0:
                first = found
        yield shuffled(name, first, scene, f"{sum(p < 0.05 for p in ps)} of {seeds} seeds have "
                       "p < 0.05")  # fmt: skip
    found = bench.peer("shuffle_webdataset", {**job, "buffer": buffer}, 1)
    found["keys"] = [int(key, 16) for key in found["keys"]]
    yield shuffled("webdataset, shards and buffer", found, scene, f"buffer {buffer} samples")
    made = bench.peer("make_litdata", {**job, "keep_out": True}, 1)
    found = bench.peer("shuffle_litdata", {**job, "out": made["out"]}, 1)
    yield shuffled("litdata shuffle=True", found, scene, "chunks of 1,000 samples")


def neighbours(keys: list[int], scene: int) -> tuple[float, float]:
    """Compute the correlation of positions on the ground between neighbours, and its two-sided p.

    Under a uniform permutation it is normal with mean -1/(n-1) and variance near 1/n.
    """
    place = np.asarray(keys, dtype=np.float64) // scene
    place -= place.mean()
    n = len(place)
    r = float((place[:-1] * place[1:]).sum() / (place * place).sum())
    z = (r + 1 / (n - 1)) * math.sqrt(n)
    return r, math.erfc(abs(z) / math.sqrt(2))


def shuffled(name: str, found: Json, scene: int, note: str) -> Json:
    """Make a row of the section."""
    keys = found["keys"]
    r, p = neighbours(keys, scene)
    assert len(set(keys)) == len(keys)
    same = np.asarray(keys) // scene
    together = float((same[1:] == same[:-1]).mean())
    told = f"r = {r:.5f}, p = {p:.3g}; same scene as the one before: {together:.4f}; {note}"
    return {**row(name, "tiny", 0, {**found, "samples": len(keys)}, note=told), "mib_s": ""}


def versions(bench: Bench) -> Iterator[Json]:
    """Measure the bytes that a new version writes."""
    found = bench.ours("versions", {"samples": 20_000, "scene": 200}, 1)
    for one in found["changes"]:
        yield {
            "what": one["what"], "member": "7 kB", "samples": one["samples"],
            "seconds": round(one["seconds"], 2),
            "note": f"{one['written']} of {one['shards']} shards written, "
            f"{one['same']} the same files as before",
        }  # fmt: skip


def growth(bench: Bench) -> Iterator[Json]:
    """Measure the whole stage, and the start of the loader."""
    counts = [n for n in (10**3, 10**4, 10**5, 10**6) if n <= bench.most]
    seen = []
    for count in counts:
        world = bench.ours("tiny_world", {"samples": count, "keep_out": True}, 1)
        found = bench.ours("grow", {"samples": count, "world": world["out"]}, 1)
        seen.append(found)
        exponent = ""
        if len(seen) > 1:
            slope = math.log(found["seconds"] / seen[-2]["seconds"]) / math.log(
                count / seen[-2]["samples"]
            )
            exponent = f", exponent {slope:.2f} against the row above"
        yield row("geofm pack, whole stage", "tiny", 0, found,
                  note=f"plan {found['plan_s']:.1f}, work {found['work_s']:.1f}, seal "
                  f"{found['seal_s']:.1f} s; {found['shards']} shards{exponent}")  # fmt: skip
        out = {"dataset": found["dataset"], "samples": count}
        start = bench.ours("start", out)
        yield row("geofm loader, start to first sample", "tiny", 0, start,
                  note=f"index of {count:,} samples opened, an epoch ordered")  # fmt: skip
        whole = bench.ours("epoch", out, 1)
        yield row("geofm loader, an epoch in random order", "tiny", 0, whole)
        shutil.rmtree(world["out"])


def kills(bench: Bench) -> Iterator[Json]:
    """Run the test of the killed writer 200 times."""
    began = time.perf_counter()
    test = "tests/geofm/shards/test_faults.py::"
    test += "test_a_writer_killed_again_and_again_ends_with_the_same_dataset"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", test], cwd=HERE.parent, check=False,
        capture_output=True, text=True, env={**os.environ, "GEOFM_KILLS": "200",
                                             "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    verdict = "same digest, no sample lost, doubled or half" if not done.returncode else "FAILED"
    yield {
        "what": "geofm pack killed by SIGKILL", "samples": 200,
        "seconds": round(time.perf_counter() - began, 1), "note": f"200 kills: {verdict}",
    }  # fmt: skip


SECTION = {
    "write": write, "read": read, "train": train, "shuffle": shuffle, "versions": versions,
    "growth": growth, "kills": kills,
}  # fmt: skip


if __name__ == "__main__":
    main()
