"""Compare lossless encodings of chips by size, speed, exactness and readers (choice: ``.npy``).

The rule was set before measuring: an encoding must be exact for any number of bands, and plain
``webdataset`` must read it without a decoder of ours. Among these the least CPU time per sample
wins. ``wins_below_mib_s`` shows the advantage of the others: the bandwidth of storage (per core)
below which reading fewer bytes saves more time than decoding costs. One thread, the best of three
passes.

    PYTHON benchmarks/chip_encodings.py --set NAME=GLOB[,GLOB...] [--set ...] [--size 256]

PYTHON's environment: numpy, imagecodecs, blosc2. Each GLOB gives sorted files of one band or
several; ``NAME`` with several GLOBs stacks the n-th files of all as the bands of a scene.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import platform
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blosc2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
Array = NDArray[Any]
#: Encodings that the decoder of ``webdataset`` reads.
KNOWN = {"npy", "npz (deflate)", "png"}


def main() -> None:
    """Encode and decode every chip of every set with every codec."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--set", action="append", required=True, help="NAME=GLOB[,GLOB...]")
    parser.add_argument("--size", type=int, default=256, help="edge of a chip, pixels")
    parser.add_argument("--most", type=int, default=60, help="chips of a set")
    options = parser.parse_args()
    rows = []
    for one in options.set:
        name, _, globs = one.partition("=")
        chips = read_chips(globs.split(","), options.size, options.most)
        for codec, (encode, decode) in codecs(chips[0]).items():
            rows.append({"set": name, **measure(chips, codec, encode, decode)})
            print(rows[-1], flush=True)
    about = {
        "machine": platform.machine(),
        "versions": f"imagecodecs {imagecodecs.__version__} blosc2 {blosc2.__version__} "
        f"numpy {version('numpy')}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    with (RESULTS / "chip_encodings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


def read_chips(globs: list[str], size: int, most: int) -> list[Array]:
    """Read the whole windows of the scenes, shape (bands, size, size)."""
    layers = [sorted(glob.glob(pattern, recursive=True)) for pattern in globs]  # noqa: PTH207
    chips = []
    for files in zip(*layers, strict=True):
        scene = np.concatenate([as_bands(read(file)) for file in files])
        for row in range(0, scene.shape[1] - size + 1, size):
            for column in range(0, scene.shape[2] - size + 1, size):
                chip = scene[:, row : row + size, column : column + size]
                if (chip != 0).mean() > 0.9:
                    chips.append(np.ascontiguousarray(chip))
    if not chips:
        raise SystemExit(f"{globs} give no chip of {size} px")
    step = max(1, len(chips) // most)
    return chips[::step][:most]


def read(file: str) -> Array:
    """Read an image of any format."""
    return np.asarray(imagecodecs.imread(file))


def as_bands(picture: Array) -> Array:
    """Reshape an image with bands last, or without a band axis, to (bands, height, width)."""
    if picture.ndim == 2:
        return picture[None]
    return np.moveaxis(picture, -1, 0) if picture.shape[-1] < picture.shape[0] else picture


def codecs(chip: Array) -> dict[str, tuple[Callable[[Array], bytes], Callable[[bytes], Array]]]:
    """Return encoders and decoders that can hold such a chip."""
    shape, dtype, width = chip.shape, chip.dtype, chip.dtype.itemsize

    def array(data: bytes | bytearray) -> Array:
        return np.frombuffer(data, dtype).reshape(shape)

    def npy(a: Array) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, a)
        return buffer.getvalue()

    def npz(a: Array) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, a)
        return buffer.getvalue()

    def shuffled(a: Array) -> Array:
        """Separate low and high bytes, after the difference to the left neighbour."""
        difference = np.diff(a, axis=-1, prepend=a.dtype.type(0))
        return np.moveaxis(difference.view(np.uint8).reshape(-1, width), -1, 0)

    def unshuffled(data: bytes) -> Array:
        apart = np.frombuffer(data, np.uint8).reshape(width, -1)
        difference = np.ascontiguousarray(apart.T).reshape(-1).view(dtype).reshape(shape)
        return np.add.accumulate(difference, axis=-1, dtype=dtype)

    def blosc(codec: blosc2.Codec, level: int) -> tuple[Any, Any]:
        kind = blosc2.Filter.BITSHUFFLE
        return (
            lambda a: blosc2.compress2(
                a, codec=codec, clevel=level, typesize=width, filters=[kind], nthreads=1
            ),
            lambda data: array(blosc2.decompress2(data, nthreads=1)),
        )

    found: dict[str, tuple[Any, Any]] = {
        "npy": (npy, lambda data: array(data[128:])),
        "npz (deflate)": (npz, lambda data: np.load(io.BytesIO(data))["arr_0"]),
        "zlib 1": (lambda a: zlib.compress(a, 1), lambda data: array(zlib.decompress(data))),
        "zstd 3": (
            lambda a: imagecodecs.zstd_encode(a, level=3),
            lambda data: array(imagecodecs.zstd_decode(data, out=chip.nbytes)),
        ),
        "zstd 3, differences": (
            lambda a: imagecodecs.zstd_encode(np.ascontiguousarray(shuffled(a)), level=3),
            lambda data: unshuffled(imagecodecs.zstd_decode(data, out=chip.nbytes)),
        ),
        "lz4": (
            lambda a: imagecodecs.lz4_encode(a, header=True),
            lambda data: array(imagecodecs.lz4_decode(data, header=True)),
        ),
        "blosc2 lz4 5": blosc(blosc2.Codec.LZ4, 5),
        "blosc2 zstd 1": blosc(blosc2.Codec.ZSTD, 1),
        "blosc2 zstd 5": blosc(blosc2.Codec.ZSTD, 5),
        "jpeg-xl (bands apart)": bands_apart(
            lambda b: imagecodecs.jpegxl_encode(b, lossless=True, effort=1, numthreads=1),
            lambda data: imagecodecs.jpegxl_decode(data, numthreads=1),
        ),
        "jpeg-ls (bands apart)": bands_apart(imagecodecs.jpegls_encode, imagecodecs.jpegls_decode),
        "htj2k (bands apart)": bands_apart(
            lambda b: imagecodecs.htj2k_encode(b, reversible=True), imagecodecs.htj2k_decode
        ),
    }
    if len(chip) in (1, 3, 4) and dtype.itemsize <= 2:
        found["png"] = (
            lambda a: imagecodecs.png_encode(np.ascontiguousarray(np.moveaxis(a, 0, -1)), level=3),
            lambda data: np.moveaxis(imagecodecs.png_decode(data), -1, 0),
        )
    return found


def bands_apart(encode: Callable[[Array], bytes], decode: Callable[[bytes], Array]) -> Any:
    """Extend an image codec to any number of bands: one stream per band, after its length."""

    def all_bands(a: Array) -> bytes:
        parts = [encode(np.ascontiguousarray(band)) for band in a]
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    def back(data: bytes) -> Array:
        bands, place = [], 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 4], "little")
            bands.append(decode(data[place + 4 : place + 4 + size]))
            place += 4 + size
        return np.stack(bands)

    return all_bands, back


def measure(
    chips: list[Array], codec: str, encode: Callable[[Array], bytes],
    decode: Callable[[bytes], Array],
) -> dict[str, Any]:  # fmt: skip
    """Measure ratio, MiB/s of pixels and exactness over all chips."""
    raw = sum(chip.nbytes for chip in chips)
    coded = [encode(chip) for chip in chips]
    exact = all(np.array_equal(decode(data), a) for data, a in zip(coded, chips, strict=True))
    encoding = min(timed(encode, chips) for _ in range(2))
    decoding = min(timed(decode, coded) for _ in range(3))
    size = sum(map(len, coded))
    saved = (raw - size) / 2**20 / decoding
    return {
        "codec": codec,
        "dtype": chips[0].dtype.name,
        "bands": len(chips[0]),
        "size_px": chips[0].shape[1],
        "chips": len(chips),
        "ratio": round(raw / size, 3),
        "encode_mib_s": round(raw / 2**20 / encoding),
        "decode_mib_s": round(raw / 2**20 / decoding),
        "decode_ms_per_chip": round(1000 * decoding / len(chips), 4),
        "exact": exact,
        "plain_webdataset": codec in KNOWN,
        "wins_below_mib_s": max(0, round(saved)) if codec != "npy" else "",
    }


def timed(function: Callable[[Any], Any], things: list[Any]) -> float:
    """Measure the seconds for all chips."""
    began = time.perf_counter()
    for thing in things:
        function(thing)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
