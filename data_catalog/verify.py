"""Proof by hashing: an artifact's manifest against its name, its files against the manifest."""

from __future__ import annotations

import hashlib

from data_catalog.artifact import MANIFEST, Artifact
from data_catalog.canonical import sha256_file
from data_catalog.catalogue import Catalogue
from data_catalog.lineage import ancestry, walk
from data_catalog.manifest import Manifest
from data_catalog.progress import tick


def sealed_manifest(artifact: Artifact, recorded: Manifest | None = None) -> Manifest | None:
    """The manifest whose digest is the artifact's: its own, or the catalogue's copy of it."""
    try:
        if artifact.manifest.digest == artifact.digest:
            return artifact.manifest
    except (OSError, ValueError):
        pass
    return recorded if recorded is not None and recorded.digest == artifact.digest else None


def verify_artifact(artifact: Artifact, recorded: Manifest | None = None) -> list[str]:
    """Problems of one artifact, one sentence each; empty when all bytes are as sealed.

    Args:
        artifact: what is verified.
        recorded: the catalogue's copy of the manifest: tells where a damaged one differs.
    """
    problems = _verify_manifest(artifact, recorded)
    manifest = sealed_manifest(artifact, recorded)
    if manifest is None:
        try:
            manifest = artifact.manifest
        except (OSError, ValueError):
            return problems
    for number, entry in enumerate(manifest.files):
        tick("verify", number + 1, len(manifest.files), entry.path)
        path = artifact.path(entry.path)
        if not path.exists():
            problems.append(f"{path}: missing")
            continue
        size = path.stat().st_size
        if size != entry.size:
            problems.append(f"{path}: {size} bytes instead of {entry.size}")
        elif sha256_file(path) != entry.sha256:  # the file itself, not a cached copy
            problems.append(f"{path}: content altered, its sha256 is not {entry.sha256}")
    known = {entry.path for entry in manifest.files} | {MANIFEST}
    for found in artifact.root.rglob("*"):
        name = found.path.removeprefix(artifact.root.path).lstrip("/")
        if found.is_file() and name not in known:
            problems.append(f"{found}: not in the manifest")
    return problems


def _verify_manifest(artifact: Artifact, recorded: Manifest | None) -> list[str]:
    """What is wrong with the manifest's bytes, and from which on."""
    try:
        found = artifact.path(MANIFEST).read_bytes()
    except OSError as error:
        return [f"{artifact.url}/{MANIFEST}: missing or damaged ({error})"]
    digest = hashlib.sha256(found).hexdigest()
    if digest == artifact.digest:
        return []
    where = ""
    if recorded is not None and recorded.digest == artifact.digest:
        wanted = recorded.to_bytes()
        at = first_difference(found, wanted)
        near = wanted[max(0, at - 20) : at + 20].decode(errors="replace")
        where = f"; byte {at} differs from the catalogue's copy, which says …{near}…"
    try:
        Manifest.model_validate_json(found)
    except ValueError as error:
        first = str(error).splitlines()[0]
        return [f"{artifact.url}/{MANIFEST}: missing or damaged ({first}){where}"]
    return [f"{artifact.url}/{MANIFEST}: altered, its digest is {digest}{where}"]


def first_difference(found: bytes, wanted: bytes) -> int:
    """The first place where two differ: at most the length of the shorter one."""
    low, high = 0, min(len(found), len(wanted))
    while low < high:  # halves compare at the speed of memory
        middle = (low + high + 1) // 2
        if found[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def verify_chain(catalogue: Catalogue, artifact: Artifact) -> list[str]:
    """Problems of an artifact and of everything it was made from."""
    problems = []
    for node in walk(ancestry(catalogue, artifact)):
        recorded = catalogue.manifest(node.artifact.digest)
        problems += verify_artifact(node.artifact, recorded)
    return problems
