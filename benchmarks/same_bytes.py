"""Compare what the demo makes at two commits: equal bytes, or where they differ.

    python benchmarks/same_bytes.py 82cea30 HEAD --work /tmp/pin

Each commit is checked out beside this one, gets an environment with the versions of its own
``constraints.txt``, and runs ``geofm demo`` with a store, a home and a cache of its own (about five
minutes each). Then the sha256 of the chips' pixels, the vectors, the pairs, the decisions, the
members of the shards, the weights and the scores are compared. The libraries that compute them must
have equal versions in both environments, else the comparison says nothing about the code.

``--stores A B`` compares two stores that exist. The exit status is 0 if everything is equal and 1
if anything differs.

Nothing of geofm is imported: the artifacts are read as files, so that no change of the code can
hide a change of the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

Json = dict[str, Any]
#: Libraries whose versions must be equal: another version may give other bytes.
LIBRARIES = ("numpy", "torch", "timm", "faiss-cpu", "rasterio", "pyarrow")


def main() -> int:
    """Run both demos if they are not there yet, and compare their stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="two commits")
    parser.add_argument("--stores", nargs=2, type=Path, help="compare two existing stores")
    parser.add_argument("--work", type=Path, default=Path("pin"), help="folder for both demos")
    options = parser.parse_args()
    if options.stores:
        before, after = options.stores
    elif len(options.commits) == 2:
        options.work.mkdir(parents=True, exist_ok=True)
        runs = [run_demo(commit, options.work.resolve()) for commit in options.commits]
        if runs[0][1] != runs[1][1]:
            print(f"the environments differ: {runs[0][1]} and {runs[1][1]}", file=sys.stderr)
            return 2
        before, after = (store for store, _ in runs)
    else:
        parser.error("give two commits, or --stores A B")
    return compare(before, after)


def run_demo(commit: str, work: Path) -> tuple[Path, dict[str, str]]:
    """Run the demo of a commit.

    Returns:
        Its store, and the versions of ``LIBRARIES`` in its environment.
    """
    name = git("rev-parse", "--short=12", commit)
    tree, store = work / name, work / f"{name}-store"
    if not tree.exists():
        git("worktree", "add", "--detach", str(tree), commit)
    python = tree / ".venv" / "bin" / "python"
    env = {key: value for key, value in os.environ.items() if not key.startswith("GEOFM_")}
    env |= {
        "GEOFM_STORE": str(store),
        "GEOFM_HOME": str(work / f"{name}-home"),
        "XDG_CACHE_HOME": str(work / f"{name}-cache"),
    }
    if not store.exists():
        print(f"{name}: installing and running the demo", file=sys.stderr)
        subprocess.run(["make", "demo"], cwd=tree, env=env, check=True, stdout=sys.stderr)
        geofm = python.with_name("geofm")
        subprocess.run([geofm, "down"], cwd=tree, env=env, check=False, stdout=sys.stderr)
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"  # noqa: E501
    done = subprocess.run(
        [python, "-c", code, *LIBRARIES], check=True, capture_output=True, text=True
    )
    return store, json.loads(done.stdout)


def git(*arguments: str) -> str:
    """Run git in this repository and return what it prints."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def compare(before: Path, after: Path) -> int:
    """Print a line for each digest, and the manifest fields that differ; 1 if a digest differs."""
    old, new = newest_artifacts(before), newest_artifacts(after)
    digests = [dict(digests_of(artifacts)) for artifacts in (old, new)]
    names = list(dict.fromkeys([*digests[0], *digests[1]]))
    different = 0
    for name in names:
        values = [each.get(name, "absent") for each in digests]
        equal = values[0] == values[1]
        different += not equal
        print(f"{'equal ' if equal else 'DIFFER'}  {name:42} {' -> '.join(dict.fromkeys(values))}")
    for stage in sorted(old.keys() | new.keys()):
        for change in manifest_changes(old.get(stage, {}), new.get(stage, {})):
            print(f"manifest  {stage}: {change}")
    print(f"{len(names) - different} of {len(names)} equal")
    return int(different > 0 or not names)


def newest_artifacts(store: Path) -> dict[str, Json]:
    """Return the manifest of the newest artifact of each stage; its folder is under ``folder``."""
    newest: dict[str, tuple[float, Json]] = {}
    for path in sorted(store.glob("artifacts/*/*/manifest.json")):
        manifest = json.loads(path.read_bytes()) | {"folder": path.parent}
        entry = (path.stat().st_mtime, manifest)
        stage = manifest["stage"]
        newest[stage] = max(newest.get(stage, entry), entry, key=lambda pair: pair[0])
    return {stage: manifest for stage, (_, manifest) in newest.items()}


def digests_of(artifacts: dict[str, Json]) -> Iterator[tuple[str, str]]:
    """Yield the name and the digest of everything that is compared."""
    folder = {stage: manifest["folder"] for stage, manifest in artifacts.items()}
    if "cut" in folder:
        chips = table(folder["cut"] / "chips.parquet", "chip_id")
        yield "chips: id and sha256 of pixels", rows(chips[["chip_id", "pixel_sha256"]])
        yield "chips: members of the tars", members(folder["cut"])
    if "embed" in folder:
        for path in sorted(folder["embed"].glob("*.npy")):
            yield f"vectors: {path.name}", sha256(path.read_bytes())
    if "pairs" in folder:
        yield "pairs", rows(pd.read_parquet(folder["pairs"] / "pairs.parquet"))
    if "curate" in folder:
        decisions = table(folder["curate"] / "decisions.parquet", "chip_id")
        yield "decisions: all columns", rows(decisions)
    if "pack" in folder:
        yield "shards: members", members(folder["pack"])
        for path in sorted(folder["pack"].rglob("*.tar")):
            yield f"shards: {path.name}", sha256(path.read_bytes())
    if "pretrain" in folder:
        for path in sorted(folder["pretrain"].rglob("*.safetensors")):
            yield f"weights: {path.name}", sha256(path.read_bytes())
    if "evaluate" in folder:
        yield "scores", rows(pd.read_parquet(folder["evaluate"] / "scores.parquet"))


def table(path: Path, key: str) -> pd.DataFrame:
    """Read a Parquet table, its rows in the order of a column."""
    return pd.read_parquet(path).sort_values(key)


def rows(frame: pd.DataFrame) -> str:
    """Return the sha256 of a table's rows; the number of rows stands before it."""
    return f"{len(frame)} rows {sha256(frame.to_csv(index=False).encode())}"


def members(folder: Path) -> str:
    """Return the sha256 of the names and contents of all members of the tars below a folder."""
    lines = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                content = stream.read() if stream else b""
                lines.append(f"{member.name} {hashlib.sha256(content).hexdigest()}")
    return f"{len(lines)} members {sha256(chr(10).join(sorted(lines)).encode())}"


def sha256(data: bytes) -> str:
    """Return the first 16 digits of a sha256."""
    return hashlib.sha256(data).hexdigest()[:16]


def manifest_changes(old: Json, new: Json) -> Iterator[str]:
    """Yield the fields of a manifest that differ; digests, sizes and software are left out."""
    if not (old and new):
        yield "the artifact is absent in one of the stores"
        return
    before, after = dict(flat(old)), dict(flat(new))
    for name in sorted(before.keys() | after.keys()):
        skipped = name.startswith(("inputs.", "files", "folder", "software."))
        if not skipped and before.get(name) != after.get(name):
            yield f"{name}: {before.get(name)!r:.60} -> {after.get(name)!r:.60}"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested dictionaries with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value, default=str)


if __name__ == "__main__":
    sys.exit(main())
