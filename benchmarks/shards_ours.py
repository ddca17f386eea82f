"""geofm's side of ``benchmarks/shards.py``: each function is a process of its own."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from data_catalog.storage.process import peak_memory_mib

Json = dict[str, Any]
SHARD = 64 * 2**20
ROLES = ("items", "chips", "decisions")


def main(what: str, file: str) -> None:
    """Run a function once; the function starts and stops the clock."""
    clock = Clock()
    found = globals()[what](json.loads(Path(file).read_bytes()), clock)
    peak = peak_memory_mib()
    print(json.dumps({"seconds": clock.seconds, "cpu_s": clock.cpu, "peak_rss_mib": peak, **found}))


@dataclass
class Clock:
    """Wall-clock and CPU seconds between start and stop."""

    seconds: float = 0.0
    cpu: float = 0.0

    def start(self) -> None:
        """Start the clock."""
        self.began, self.before = time.perf_counter(), self._cpu()

    def stop(self) -> None:
        """Stop the clock."""
        self.seconds, self.cpu = time.perf_counter() - self.began, self._cpu() - self.before

    @staticmethod
    def _cpu() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime


def write(job: Json, clock: Clock) -> Json:
    """Write samples to tars, hashed, indexed and published as an artifact."""
    from shards_peers import payloads

    from data_catalog.manifest import Manifest
    from data_catalog.store import list_files, open_store
    from geofm.formats.tar import write_tar
    from geofm.shards.index import INDEX, ShardRows, index_rows, write_index

    store = open_store(job["out"])
    clock.start()
    with store.staging() as folder:
        out = folder / "artifact"
        (out / "shards").mkdir(parents=True)
        shards = []
        coming = payloads(job)
        samples = 0
        while samples < job["samples"]:
            keys: list[str] = []

            def members(keys: list[str] = keys) -> Iterator[tuple[str, bytes]]:
                size = 0
                for key, npy, about in coming:
                    keys.append(key)
                    yield f"{key}.npy", npy
                    yield f"{key}.json", about
                    size += len(npy) + len(about)
                    if size >= SHARD:
                        return

            name = f"shards/corpus-train-{len(shards):05d}.tar"
            written = write_tar(out / name, members())
            shards.append(ShardRows(name, "train", index_rows(keys, written)))
            samples += len(keys)
        write_index(shards, out / INDEX)
        counts = {"rows_in": samples, "rows_out": samples}
        manifest = Manifest(
            kind="dataset", stage="pack", version="benchmark", inputs={}, settings={}, seed=0,
            software={}, counts=counts, dropped={}, facts={}, deterministic=True,
            files=list_files(out),
        )  # fmt: skip
        store.publish(out, manifest)
    clock.stop()
    return {"samples": samples}


def _inputs(folder: str) -> Json:
    from data_catalog.artifact import Artifact

    urls = json.loads((Path(folder) / "world.json").read_bytes())
    return {role: Artifact(urls[role]) for role in ROLES}


def world(job: Json, clock: Clock) -> Json:
    """Make a store of chips with the size of the job's images."""
    from shards_world import make_world

    from data_catalog.store import open_store

    store = open_store(f"{job['out']}/store")
    per_scene = job.get("scene", 200)
    made = make_world(store, job["samples"], tuple(job["shape"]), job["dtype"], per_scene)
    urls = {role: artifact.url for role, artifact in made.items()}
    (Path(job["out"]) / "world.json").write_text(json.dumps(urls))
    return {"samples": job["samples"]}


def tiny_world(job: Json, clock: Clock) -> Json:
    """Make a store of chips with 3 x 8 x 8 bytes."""
    return world({**job, "shape": (3, 8, 8), "dtype": "uint8", "scene": 1000}, clock)


def pack(job: Json, clock: Clock) -> Json:
    """Run the whole stage."""
    from data_catalog.run import make_job, plan_parts, seal, work_parts
    from data_catalog.store import open_store
    from geofm.config.recipe import PackSettings
    from geofm.shards.pack import STAGE

    inputs = _inputs(job["world"])
    store = open_store(job["out"])
    settings = PackSettings(shard_mib=job.get("shard_mib", 64))
    clock.start()
    here = make_job(STAGE, store, inputs, settings)
    parts = plan_parts(STAGE, here)
    planned = time.perf_counter()
    work_parts(STAGE, here, parts)
    worked = time.perf_counter()
    artifact, _ = seal(STAGE, here, parts)
    clock.stop()
    times = {"plan_s": planned - clock.began, "work_s": worked - planned,
             "seal_s": clock.began + clock.seconds - worked}  # fmt: skip
    return {"samples": artifact.manifest.counts["rows_out"], "dataset": artifact.url,
            "shards": len(parts), **times}  # fmt: skip


def grow(job: Json, clock: Clock) -> Json:
    """Run the whole stage on tiny chips, kept beside its world."""
    return pack({**job, "out": f"{job['world']}/store", "shard_mib": 16}, clock)


def dataset(job: Json, clock: Clock) -> Json:
    """Make a dataset to read; return the positions of its samples for the peers."""
    from data_catalog.artifact import Artifact
    from geofm.shards.reader import open_index

    made = pack({**job, "out": f"{job['world']}/store"}, clock)
    index = open_index(Artifact(made["dataset"]))
    places = np.stack([index.shards, index.offsets, index.sizes], axis=1)
    np.save(Path(job["world"]) / "places.npy", places)
    return {**made, "tars": list(index.files), "places": f"{job['world']}/places.npy"}


def _stream(job: Json, **options: Any) -> Any:
    """Make a stream in the order of the shards, or in the job's order."""
    from data_catalog.artifact import Artifact
    from geofm.shards.loader import SampleStream
    from geofm.shards.reader import open_index

    index = open_index(Artifact(job["dataset"]), digests=bool(options.get("check")))
    return SampleStream(index, shuffled=job["random"], **options)


def _read(job: Json) -> Callable[[], int]:
    """Read the bytes of all samples."""
    stream = _stream(job, decode=False, check=job.get("check", False), **job.get("reading", {}))

    def run() -> int:
        count = 0
        for batch in stream.batches():
            count += len(batch)
        return count

    return run


def _train(job: Json) -> Callable[[], int]:
    """Decode and crop to batches, at random corners."""
    corners, crop = cycle(np.load(job["corners"]).tolist()), job["crop"]
    size, bands = job["batch"], job["shape"][0]

    def fill(samples: Iterator[Any]) -> np.ndarray:
        batch = np.empty((size, bands, crop, crop), dtype=np.float32)
        for place, sample in enumerate(samples):
            y, x = next(corners)
            batch[place] = sample.pixels[:, y : y + crop, x : x + crop]
        return batch

    stream = _stream(job, batch=size, collate=fill)

    def run() -> int:
        for batch in stream.batches():
            assert batch.shape[0] == size
        return len(stream.index)

    return run


LOOPS = {"read": _read, "train": _train}


def read(job: Json, clock: Clock) -> Json:
    """Read the bytes of all samples, for the first time in a process."""
    run = _read(job)
    clock.start()
    count = run()
    clock.stop()
    return {"samples": count}


def train(job: Json, clock: Clock) -> Json:
    """Decode and crop to batches, in the second epoch of a process."""
    run = _train(job)
    run()
    clock.start()
    count = run()
    clock.stop()
    return {"samples": count}


def turns(job: Json, clock: Clock) -> Json:
    """Run a geofm loop and a peer's loop in turn; return medians and the median ratio."""
    import shards_peers

    runs = {"ours": LOOPS[job["ours"]](job), "bare": shards_peers.WHAT[job["bare"]](job)}
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for number in range(1 + job["rounds"]):
        for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
            clock.start()
            samples = runs[name]()
            clock.stop()
            if number:  # once before, so that memory is allocated
                found[name].append((clock.seconds, clock.cpu))
    ratios = np.median(np.array(found["bare"]) / np.array(found["ours"]), axis=0).tolist()
    medians = {name: np.median(times, axis=0).tolist() for name, times in found.items()}
    return {
        "samples": samples,
        **{name: {"seconds": wall, "cpu_s": cpu} for name, (wall, cpu) in medians.items()},
        "rate": ratios[0],
        "cpu": ratios[1],
    }


def laid_out(job: Json, clock: Clock) -> Json:
    """Write tiny samples in the order of their scenes, a tar per scene, unlike the stage."""
    from data_catalog.manifest import Manifest
    from data_catalog.store import list_files, open_store
    from geofm.formats.npy import chip_bytes
    from geofm.formats.tar import write_tar
    from geofm.shards.index import INDEX, ShardRows, index_rows, write_index

    pixels = chip_bytes(np.zeros((1, 6, 6), dtype=np.uint16))
    out = Path(job["out"]) / "laid"
    (out / "shards").mkdir(parents=True)
    shards = []
    for number in range(job["samples"] // job["scene"]):
        keys = [f"{n:024x}" for n in range(number * job["scene"], (number + 1) * job["scene"])]
        members = ((f"{key}.{end}", data) for key in keys
                   for end, data in (("npy", pixels), ("json", b"{}")))  # fmt: skip
        name = f"shards/laid-train-{number:05d}.tar"
        shards.append(ShardRows(name, "train", index_rows(keys, write_tar(out / name, members))))
    write_index(shards, out / INDEX)
    count = job["samples"]
    manifest = Manifest(
        kind="dataset", stage="pack", version="benchmark", inputs={}, settings={}, seed=0,
        software={}, counts={"rows_in": count, "rows_out": count}, dropped={}, facts={},
        deterministic=True, files=list_files(out),
    )  # fmt: skip
    artifact = open_store(f"{job['out']}/store").publish(out, manifest)
    tars = [str(artifact.local(shard.shard)) for shard in shards]
    return {"samples": count, "dataset": artifact.url, "tars": tars}


def shuffle(job: Json, clock: Clock) -> Json:
    """Return the numbers of the samples in the order of an epoch."""
    stream = _stream({**job, "random": True}, decode=False, batch=64, seed=job["seed"])
    clock.start()
    keys = [int(sample.key, 16) for batch in stream.batches() for sample in batch]
    clock.stop()
    return {"samples": len(keys), "keys": keys}


def uniform(job: Json, clock: Clock) -> Json:
    """Return the permutation of another generator, for comparison."""
    clock.start()
    rng = np.random.Generator(np.random.Philox(job["seed"]))
    keys = rng.permutation(job["samples"]).tolist()
    clock.stop()
    return {"samples": len(keys), "keys": keys}


def start(job: Json, clock: Clock) -> Json:
    """Measure the time from opening to the first sample."""
    clock.start()
    stream = _stream({**job, "random": True}, batch=1)
    next(iter(stream.batches()))
    clock.stop()
    return {"samples": 1}


def epoch(job: Json, clock: Clock) -> Json:
    """Read all samples in random order."""
    stream = _stream({**job, "random": True}, batch=64)
    clock.start()
    count = sum(len(batch) for batch in stream.batches())
    clock.stop()
    return {"samples": count}


def versions(job: Json, clock: Clock) -> Json:
    """Measure the bytes written for a new version when samples are removed and return."""
    from shards_world import chip_id, decide

    from data_catalog.artifact import Artifact
    from data_catalog.run import make_job, plan_parts, seal, work_parts
    from data_catalog.store import open_store
    from geofm.config.recipe import PackSettings
    from geofm.shards.pack import STAGE

    clock.start()
    count, scene = job["samples"], job["scene"]
    world({**job, "shape": (3, 32, 32), "dtype": "uint16"}, Clock())
    inputs = _inputs(job["out"])
    store = open_store(f"{job['out']}/store")
    ids = [chip_id(n) for n in range(count)]
    changes = {
        "first version": set(),
        "one sample is forgotten": {ids[17]},
        "it comes back": set(),
        "three samples are forgotten": {ids[n] for n in (5, 9_000, 19_000)},
        f"a scene of {scene} samples is forgotten": set(ids[scene : 2 * scene]),
    }
    found, before = [], None
    for what, gone in changes.items():
        began = time.perf_counter()
        decisions = decide(store, ids, gone)
        here = make_job(STAGE, store, {**inputs, "decisions": decisions},
                        PackSettings(shard_mib=0.5))  # fmt: skip
        parts = plan_parts(STAGE, here)
        written = work_parts(STAGE, here, parts)
        artifact, _ = seal(STAGE, here, parts)
        nodes = _inodes(artifact)
        same = len(nodes & before) if before is not None else 0
        found.append({"what": what, "samples": count - len(gone), "written": written,
                      "shards": len(parts), "same": same,
                      "seconds": time.perf_counter() - began})  # fmt: skip
        before = nodes if before is None else before
        assert isinstance(artifact, Artifact)
    clock.stop()
    return {"samples": count, "changes": found}


def _inodes(artifact: Any) -> set[int]:
    tars = [entry.path for entry in artifact.manifest.files if entry.path.endswith(".tar")]
    return {artifact.local(name).stat().st_ino for name in tars}
