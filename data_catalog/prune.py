"""Prune a store: remove what no kept version needs.

plan_prune    list what would go, and what it would free
prune         remove it

A version needs everything that it was made from, and the artifacts that describe it (reports and
scores). The parts of these artifacts stay too, so that the next refresh computes only what is new.
The catalogue keeps its record of everything: a pruned artifact can still be named and traced, and
the same run makes it again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from data_catalog.catalogue import Catalogue
from data_catalog.errors import UsageError
from data_catalog.manifest import MANIFEST
from data_catalog.progress import say
from data_catalog.storage.lock import is_abandoned
from data_catalog.storage.reach import is_remote
from data_catalog.store import LOCK, PART, Store

#: Days for which the parts and checkpoints of a run that did not end are kept.
UNFINISHED_DAYS = 7.0


class RunsNow(UsageError):
    """A run is active, whose artifacts no version names yet."""


@dataclass(frozen=True)
class Prunable:
    """What no kept version needs.

    Attributes:
        artifacts: Folders of artifacts.
        parts: Folders of parts.
        plans: Files with the parts of jobs.
        scratch: Local folders of finished jobs.
        size: Bytes that are freed; a file that a kept folder links is not counted.
    """

    artifacts: list[UPath]
    parts: list[UPath]
    plans: list[UPath]
    scratch: list[UPath]
    size: int


def plan_prune(
    store: Store, catalogue: Catalogue, keep: int, described_by: Container[str]
) -> Prunable:
    """List what no kept version needs.

    Args:
        store: The store.
        catalogue: Its catalogue. Artifacts that it does not record are left alone.
        keep: Versions of each name that are kept, the newest ones.
        described_by: Kinds of artifacts that are kept if everything they were made from is.

    Raises:
        UsageError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise UsageError(f"--keep is {keep}; keep at least 1 version of each name")
    needed = _needed(catalogue, keep, described_by)
    rows = catalogue.artifacts()
    kept_keys = {row.key for row in rows if row.digest in needed}
    made_keys = {row.key for row in rows}
    unneeded = [store.artifact(row.kind, row.digest) for row in rows if row.digest not in needed]
    folders = [artifact.root for artifact in unneeded if store.has(artifact)]
    kept_parts: set[str] = set()
    plans = []
    for file in _children(store.root / "plans"):
        key = file.name.removesuffix(".json")
        if key in kept_keys or (key not in made_keys and _is_recent(file)):
            kept_parts |= {part["key"] for part in json.loads(file.read_bytes())}
        else:
            plans.append(file)
    parts = [
        folder
        for prefix in _children(store.root / "parts")
        for folder in _children(prefix)
        if folder.name not in kept_parts
    ]
    scratch = [
        folder
        for folder in _children(UPath(store.local_root / "work"))
        if (folder.name in made_keys or not _is_recent(folder))
        and (not (folder / LOCK).exists() or is_abandoned(Path(folder.path) / LOCK))
    ]
    return Prunable(folders, parts, plans, scratch, _freed([*folders, *parts, *scratch]))


def _needed(catalogue: Catalogue, keep: int, described_by: Container[str]) -> set[str]:
    """Return the digests of the kept versions, their lineages, and what describes them.

    The last result of the stages that make versions is kept too. It may have no name, if it has the
    content of the version before, and the next refresh begins with it.
    """
    seen: Counter[str] = Counter()
    kept = []
    for version in catalogue.names():  # newest first
        seen[version.name] += 1
        if seen[version.name] <= keep:
            kept.append(version.digest)
    stages = {entry.stage for entry in catalogue.lineage(kept).values()}
    last = (next(catalogue.results_of(stage), None) for stage in sorted(stages))
    kept += [artifact.digest for artifact, _ in filter(None, last)]
    needed = set(catalogue.lineage(kept))
    for row in reversed(catalogue.artifacts()):  # oldest first: scores come before their report
        if row.kind in described_by:
            parents = set(catalogue.parents(row.digest).values())
            if parents and parents <= needed:
                needed.add(row.digest)
    return needed


def _children(folder: UPath) -> list[UPath]:
    """List a folder, sorted; empty if it does not exist."""
    return sorted(folder.iterdir(), key=lambda path: path.name) if folder.exists() else []


def _is_recent(path: UPath) -> bool:
    """Tell whether a file or folder was written in the last ``UNFINISHED_DAYS`` days."""
    written: float = path.stat().st_mtime
    return time.time() - written < UNFINISHED_DAYS * 86_400


def _freed(folders: Iterable[UPath]) -> int:
    """Add up the files of folders, without those that other folders link."""
    links: Counter[tuple[int, int]] = Counter()
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    size = 0
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        about = path.stat()
        identity = (-1, number) if is_remote(path) else (about.st_dev, about.st_ino)
        links[identity] += 1
        sizes[identity] = int(about.st_size), 1 if is_remote(path) else int(about.st_nlink)
    for identity, (file_size, count) in sizes.items():
        size += file_size if links[identity] >= count else 0
    return size


def prune(
    store: Store,
    catalogue: Catalogue,
    keep: int,
    described_by: Container[str],
) -> Prunable:
    """Remove what no kept version needs.

    The datasets and models are locked meanwhile. A prune that was stopped is continued by the next.

    Args:
        store: The store.
        catalogue: Its catalogue.
        keep: Versions of each name that are kept.
        described_by: As for ``plan_prune``.

    Raises:
        RunsNow: A run is active.
        LeaseHeld: A dataset is being refreshed.
    """
    with ExitStack() as stack:
        for name in sorted({row.name for row in catalogue.names()}):
            stack.enter_context(catalogue.lease(name, wait=False, verb="used"))
        active = [row for row in catalogue.runs() if row.status == "running"]
        if active:
            raise RunsNow(
                f"stage {active[0].stage} is running on {active[0].host}; prune when it has ended"
            )
        found = plan_prune(store, catalogue, keep, described_by)
        folders = [
            *((folder, MANIFEST) for folder in found.artifacts),
            *((folder, PART) for folder in found.parts),
            *((folder, "") for folder in found.scratch),
        ]
        for number, (folder, last) in enumerate(folders):
            _remove(folder, last)
            say("prune", number + 1, len(folders), "folders")
        for plan in found.plans:
            plan.unlink()
    return found


def _remove(folder: UPath, mark: str) -> None:
    """Remove a folder; first the file by which it counts as whole."""
    if mark and (folder / mark).exists():
        (folder / mark).unlink()
    if not is_remote(folder):
        shutil.rmtree(folder.path)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)
