"""Run a near-duplicate tool on a folder of PNG files; print the pairs per setting as JSON.

The script runs in the peers' own environment (``pip install imagededup cleanvision fastdup``),
started by ``eo_duplicates.py``. imagededup imports torchvision only for its CNN: if that import
fails, an empty module replaces it. fastdup is for non-commercial use: it is only measured here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import types
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any


def tell(
    tool: str, setting: str, pairs: set[tuple[int, int]], seconds: float, note: str = ""
) -> None:
    """Print a result."""
    line = {"setting": setting, "pairs": sorted(pairs), "seconds": round(seconds, 2),
            "versions": f"{tool} {version(tool)}", "note": note}  # fmt: skip
    print("\n" + json.dumps(line), flush=True)


def number(name: Any) -> int:
    """Return the chip of a file."""
    return int(Path(str(name)).stem)


def imagededup(folder: Path) -> None:
    """Run the perceptual hash at three distances."""
    note = ""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        note = "torchvision does not import and is stubbed"
        stub: Any = types.ModuleType("torchvision")
        stub.transforms = types.ModuleType("torchvision.transforms")
        stub.transforms.transforms = types.ModuleType("torchvision.transforms.transforms")
        stub.models = types.ModuleType("torchvision.models")
        for name in ("", ".transforms", ".transforms.transforms", ".models"):
            sys.modules[f"torchvision{name}"] = stub
    from imagededup.methods import PHash

    hasher = PHash(verbose=False)
    for distance in (0, 4, 10):
        began = time.perf_counter()
        codes = hasher.encode_images(image_dir=str(folder))
        found = hasher.find_duplicates(encoding_map=codes, max_distance_threshold=distance)
        seconds = time.perf_counter() - began
        pairs = {tuple(sorted((number(a), number(b)))) for a, more in found.items() for b in more}
        tell("imagededup", f"pHash d <= {distance}", pairs, seconds, note)


def cleanvision(folder: Path) -> None:
    """Run the default checks for exact and near duplicates."""
    from cleanvision import Imagelab

    began = time.perf_counter()
    lab = Imagelab(data_path=str(folder), verbose=False)
    lab.find_issues({"exact_duplicates": {}, "near_duplicates": {}}, verbose=False)
    seconds = time.perf_counter() - began
    groups = [g for kind in ("exact_duplicates", "near_duplicates")
              for g in lab.info.get(kind, {}).get("sets", [])]  # fmt: skip
    pairs = {tuple(sorted((number(a), number(b)))) for g in groups for a, b in combinations(g, 2)}
    tell("cleanvision", "exact and near duplicates", pairs, seconds)


def fastdup(folder: Path) -> None:
    """Run the default model at three similarities."""
    import fastdup as tool

    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        run = tool.create(work_dir=work, input_dir=str(folder))
        run.run(threshold=0.85, nearest_neighbors_k=16, overwrite=True, num_threads=os.cpu_count())
        seconds = time.perf_counter() - began
        table = run.similarity()
        names = [name for name in table.columns if name.startswith("filename")][:2]
        for least in (0.9, 0.96, 0.98):
            some = table[table["distance"] >= least]
            pairs = {
                tuple(sorted((number(a), number(b))))
                for a, b in zip(some[names[0]], some[names[1]], strict=True)
            }
            tell("fastdup", f"similarity >= {least}", pairs, seconds, "non-commercial licence")


if __name__ == "__main__":
    {"imagededup": imagededup, "cleanvision": cleanvision, "fastdup": fastdup}[sys.argv[1]](
        Path(sys.argv[2])
    )
