"""Peers of ``benchmarks/shards.py``: each does the same work, in a process of its own.

    PYTHON benchmarks/shards_peers.py WHAT JOB.json

PYTHON's environment: webdataset, litdata, torch, numpy. The last printed line is JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak_rss_mib

Json = dict[str, Any]
SHARD = 64 * 2**20


def main() -> None:
    """Run a function once; print seconds, CPU seconds, samples and memory."""
    what, file = sys.argv[1:]
    job = json.loads(Path(file).read_bytes())
    run = WHAT[what](job)  # import and open before the measurement
    if job.get("warm"):  # once before, so that memory is allocated
        run()
    began, before = time.perf_counter(), cpu_seconds()
    samples = run()
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - before
    peak = peak_rss_mib()
    found = {"seconds": seconds, "cpu_s": cpu, "peak_rss_mib": peak}
    print(json.dumps({**found, **(samples if isinstance(samples, dict) else {"samples": samples})}))


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def payloads(job: Json) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield key, ``.npy`` and JSON of each sample, equal for all writers."""
    pictures = [Path(name).read_bytes() for name in job["pictures"]]
    about = json.dumps({"about": "x" * (job["json_bytes"] - 13)}).encode()
    for number in range(job["samples"]):
        yield f"{number:024x}", pictures[number % len(pictures)], about


def write_webdataset(job: Json) -> Callable[[], int]:
    """Write with ``webdataset.ShardWriter``, bytes unchanged."""
    import webdataset as wds

    def run() -> int:
        pattern = f"{job['out']}/wds-%05d.tar"
        with wds.ShardWriter(pattern, maxsize=SHARD, maxcount=10**9, verbose=0) as writer:
            for key, npy, about in payloads(job):
                writer.write({"__key__": key, "npy": npy, "json": about})
        return int(job["samples"])

    return run


def write_litdata(job: Json) -> Callable[[], int]:
    """Write litdata's chunks of the same two byte strings."""
    from litdata.streaming.cache import Cache

    def run() -> int:
        cache = Cache(str(Path(job["out"]) / "litdata"), chunk_bytes=SHARD)
        for number, (_, npy, about) in enumerate(payloads(job)):
            cache[number] = {"npy": npy, "json": about}
        cache.done()
        cache.merge(1)
        return int(job["samples"])

    return run


def write_files(job: Json) -> Callable[[], int]:
    """Write two files per sample."""

    def run() -> int:
        folder = Path(job["out"]) / "files"
        folder.mkdir()
        for key, npy, about in payloads(job):
            for name, data in ((f"{key}.npy", npy), (f"{key}.json", about)):
                with open(folder / name, "wb", buffering=0) as file:  # noqa: PTH123
                    file.write(data)
        return int(job["samples"])

    return run


def write_tarfile(job: Json) -> Callable[[], int]:
    """Write with Python's ``tarfile``, a tar per shard, without hashes."""

    def run() -> int:
        import io

        tar, size, number = None, SHARD, 0
        for key, npy, about in payloads(job):
            if size >= SHARD:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(f"{job['out']}/plain-{number:05d}.tar", "w")  # noqa: SIM115
                number, size = number + 1, 0
            for name, data in ((f"{key}.npy", npy), (f"{key}.json", about)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                assert tar is not None
                tar.addfile(info, io.BytesIO(data))
                size += len(data)
        assert tar is not None
        tar.close()
        return int(job["samples"])

    return run


def write_gnu_tar(job: Json) -> Callable[[], int]:
    """Run GNU tar on existing files."""

    def run() -> int:
        subprocess.run(["tar", "-cf", f"{job['out']}/gnu.tar", "-C", job["files"], "."], check=True)
        return int(job["samples"])

    return run


def write_bare(job: Json) -> Callable[[], int]:
    """Write the same bytes to files of a shard's size: no tar, no hash, no index."""

    def run() -> int:
        size, file, number = SHARD, -1, 0
        for _, npy, about in payloads(job):
            if size >= SHARD:
                if file >= 0:
                    os.close(file)
                place = f"{job['out']}/bare-{number:05d}"
                file, size, number = os.open(place, os.O_CREAT | os.O_WRONLY), 0, number + 1
            os.write(file, npy)
            os.write(file, about)
            size += len(npy) + len(about)
        os.close(file)
        return int(job["samples"])

    return run


def places(job: Json) -> list[tuple[int, int, int]]:
    """Return shard, offset and size of every sample, in the job's order."""
    table = np.load(job["places"])
    return [tuple(row) for row in table[np.load(job["order"])].tolist()] if job["random"] else [
        tuple(row) for row in table.tolist()
    ]  # fmt: skip


def read_pread(job: Json) -> Callable[[], int]:
    """Read with a bare loop of ``os.pread``; ``keep`` is the number of samples in a list.

    The caller holds a list until the next one arrives, as in every loop over batches.
    """
    files = [os.open(name, os.O_RDONLY) for name in job["tars"]]
    rows, keep = places(job), job.get("keep", 1)

    def one_by_one() -> int:
        return sum(1 for shard, offset, size in rows if os.pread(files[shard], size, offset))

    def lists() -> Iterator[list[bytes]]:
        coming = iter(rows)
        while kept := [os.pread(files[n], size, at) for n, at, size in islice(coming, keep)]:
            yield kept

    def in_lists() -> int:
        count = 0
        for batch in lists():
            count += len(batch)
        return count

    return in_lists if keep > 1 else one_by_one


def read_webdataset(job: Json) -> Callable[[], int]:
    """Read with the default ``webdataset.WebDataset``, without decoding."""
    import webdataset as wds

    data = wds.WebDataset(job["tars"], shardshuffle=False, empty_check=False)
    return lambda: sum(1 for _ in data)


def read_tarfile(job: Json) -> Callable[[], int]:
    """Read all members with Python's ``tarfile``."""

    def run() -> int:
        count = 0
        for name in job["tars"]:
            with tarfile.open(name) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    file.read()
                    count += member.name.endswith(".npy")
        return count

    return run


def read_litdata(job: Json) -> Callable[[], int]:
    """Read litdata's dataset, in order or item by item in the job's order.

    It returns views of a mapped file whose bytes have not been read, so the copy is the read.
    """
    import litdata

    def copied(item: Json) -> bool:
        return bool({key: bytes(value) for key, value in item.items()})

    data = litdata.StreamingDataset(str(Path(job["out"]) / "litdata"), shuffle=False)
    order = np.load(job["order"])[: job["most"]].tolist()
    if job["random"]:
        return lambda: sum(copied(data[number]) for number in order)
    return lambda: sum(copied(item) for item in data)


def read_files(job: Json) -> Callable[[], int]:
    """Open and read a file per sample."""
    names = sorted(Path(job["files"]).glob("*.npy"))
    chosen = [str(names[n]) for n in np.load(job["order"]).tolist()] if job["random"] else [
        str(name) for name in names
    ]  # fmt: skip

    def run() -> int:
        for name in chosen:
            with open(name, "rb", buffering=0) as file:  # noqa: PTH123
                file.read()
        return len(chosen)

    return run


def decode_alone(job: Json) -> Callable[[], int]:
    """Read, view as pixels and crop to a float32 batch: the necessary work of any loader."""
    files = [os.open(name, os.O_RDONLY) for name in job["tars"]]
    rows, (bands, height, width), crop = places(job), job["shape"], job["crop"]
    corners = np.load(job["corners"]).tolist()

    def run() -> int:
        batch = np.empty((0,))
        for number, (shard, offset, size) in enumerate(rows):
            place = number % job["batch"]
            if place == 0:
                batch = np.empty((job["batch"], bands, crop, crop), dtype=np.float32)
            data = os.pread(files[shard], size, offset)
            pixels = np.frombuffer(data, job["dtype"], offset=128).reshape(bands, height, width)
            y, x = corners[number]
            batch[place] = pixels[:, y : y + crop, x : x + crop]
        return len(rows) + 0 * len(batch)

    return run


def decode_webdataset(job: Json) -> Callable[[], int]:
    """Read with webdataset and its own ``.npy`` decoder, cropped to the same batches."""
    import webdataset as wds

    corners, crop = np.load(job["corners"]).tolist(), job["crop"]
    data = wds.WebDataset(job["tars"], shardshuffle=False, empty_check=False).decode(only=["npy"])

    def run() -> int:
        count = 0
        batch = np.empty((0,))
        for sample in data:
            place = count % job["batch"]
            if place == 0:
                batch = np.empty((job["batch"], job["shape"][0], crop, crop), dtype=np.float32)
            y, x = corners[count]
            batch[place] = sample["npy"][:, y : y + crop, x : x + crop]
            count += 1
        return count

    return run


def shuffle_webdataset(job: Json) -> Callable[[], Json]:
    """Return keys in the order of webdataset's shuffle of shards and buffer."""
    import webdataset as wds

    data = wds.WebDataset(job["tars"], shardshuffle=len(job["tars"]), seed=job["seed"],
                          empty_check=False)  # fmt: skip
    data = data.shuffle(job["buffer"], initial=job["buffer"], seed=job["seed"])
    return lambda: {"keys": [sample["__key__"] for sample in data]}


def shuffle_litdata(job: Json) -> Callable[[], Json]:
    """Return numbers in the order of litdata's shuffle."""
    import litdata

    data = litdata.StreamingDataset(str(Path(job["out"]) / "litdata"), shuffle=True,
                                    seed=job["seed"])  # fmt: skip
    return lambda: {"keys": [int(json.loads(bytes(sample["json"]))["n"]) for sample in data]}


def make_litdata(job: Json) -> Callable[[], int]:
    """Write litdata's chunks for ``shuffle_litdata``: samples in tar order, 1,000 per chunk."""
    from litdata.streaming.cache import Cache

    def run() -> int:
        cache = Cache(str(Path(job["out"]) / "litdata"), chunk_size=1000)
        for number in range(job["samples"]):
            cache[number] = {"json": json.dumps({"n": number}).encode()}
        cache.done()
        cache.merge(1)
        return int(job["samples"])

    return run


WHAT: dict[str, Callable[[Json], Callable[[], Any]]] = {
    function.__name__: function
    for function in (
        write_webdataset, write_litdata, write_files, write_tarfile, write_gnu_tar, write_bare,
        read_pread, read_webdataset, read_tarfile, read_litdata, read_files, decode_alone,
        decode_webdataset, shuffle_webdataset, shuffle_litdata, make_litdata,
    )
}  # fmt: skip


if __name__ == "__main__":
    main()
