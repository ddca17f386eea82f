"""Proof by hashing: an artifact's manifest against its name, its files against the manifest."""

from __future__ import annotations

from data_catalog.artifact import MANIFEST, Artifact
from data_catalog.canonical import sha256_file
from data_catalog.catalogue import Catalogue
from data_catalog.lineage import ancestry, walk
from data_catalog.progress import tick


def verify_artifact(artifact: Artifact) -> list[str]:
    """Problems of one artifact, one sentence each; empty when all bytes are as sealed."""
    try:
        manifest = artifact.manifest
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        return [f"{artifact.url}/{MANIFEST}: missing or damaged ({first})"]
    problems = []
    if manifest.digest != artifact.digest:
        problems.append(f"{artifact.url}/{MANIFEST}: altered, its digest is {manifest.digest}")
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


def verify_chain(catalogue: Catalogue, artifact: Artifact) -> list[str]:
    """Problems of an artifact and of everything it was made from."""
    problems = []
    for node in walk(ancestry(catalogue, artifact)):
        problems += verify_artifact(node.artifact)
    return problems
