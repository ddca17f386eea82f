"""Verify artifacts by hashing: the manifest against the digest, the files against the manifest.

verify_artifact    one artifact
verify_chain       an artifact and everything it was made from
sealed_ancestor    the nearest artifact of a kind, by the sealed manifests

The chain is that of the manifests: each names its inputs by digest. The catalogue holds a copy of
the manifests, so it is checked against them (``cross_check``) and never trusted.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from upath import UPath

from data_catalog.artifact import Artifact, kind_of_file
from data_catalog.catalogue import Catalogue
from data_catalog.errors import CheckError, UsageError
from data_catalog.hashing import sha256_file
from data_catalog.manifest import MANIFEST, FileEntry, Manifest, explain_invalid, folders_of
from data_catalog.progress import tick
from data_catalog.provenance.cross_check import check_names, check_rows
from data_catalog.provenance.findings import LISTED, Findings, bounded
from data_catalog.provenance.lineage import WEIGHTS
from data_catalog.storage.reach import OutOfReach, file_size, is_remote, out_of_reach, reach
from data_catalog.store import Store


def sealed_manifest(artifact: Artifact, recorded: Manifest | None = None) -> Manifest | None:
    """Return the manifest with the artifact's digest: its own, or else the catalogue's copy.

    Returns:
        None if neither has this digest.
    """
    try:
        if hashlib.sha256(artifact.manifest_bytes()).hexdigest() == artifact.digest:
            return artifact.manifest
    except (OSError, CheckError, OutOfReach):
        pass
    return recorded if recorded is not None and recorded.digest == artifact.digest else None


def verify_artifact(artifact: Artifact, recorded: Manifest | None = None) -> list[str]:
    """Verify one artifact; returns its problems, one sentence each.

    Args:
        artifact: The artifact.
        recorded: The catalogue's copy of the manifest, for the place of damage in a manifest.

    Raises:
        OutOfReach: A file could not be read, and the rest has no problem.
    """
    return _problems(check_artifact(artifact, recorded))


def verify_chain(catalogue: Catalogue, artifact: Artifact) -> list[str]:
    """Verify an artifact and everything it was made from; returns the problems.

    Raises:
        OutOfReach: A file could not be read, and the rest has no problem.
    """
    return _problems(check_chain(catalogue, artifact))


def _problems(findings: Findings) -> list[str]:
    """Return the problems; raises OutOfReach if there is none but something was not read."""
    if findings.unread and not findings.problems:
        raise OutOfReach("\n  ".join(findings.unread))
    return findings.problems


def check_chain(catalogue: Catalogue, artifact: Artifact) -> Findings:
    """Check an artifact and everything it was made from, following the sealed manifests.

    A row of the catalogue that contradicts a manifest is a problem as well.
    """
    findings = Findings()
    seen, queue = {artifact.digest}, deque([artifact])
    while queue:
        current = queue.popleft()
        recorded = recorded_manifest(catalogue, current.digest)
        findings.add(check_artifact(current, recorded))
        manifest = sealed_manifest(current, recorded) or _altered_manifest(current)
        if manifest is None:
            continue
        findings.add(check_rows(catalogue, current, manifest))
        for role, digest in sorted(manifest.inputs.items()):
            if digest in seen:
                continue
            seen.add(digest)
            try:
                queue.append(sealed_input(current, manifest, role))
            except (CheckError, OutOfReach) as error:
                findings.add_error(error)
    findings.add(Findings(check_names(catalogue)))
    return findings


def sealed_input(artifact: Artifact, manifest: Manifest, role: str) -> Artifact:
    """Find an input of an artifact in its store, by its sealed manifest.

    Raises:
        CheckError: The manifest names no such input, or the store does not hold it.
        OutOfReach: The store could not be searched.
    """
    name = f"{manifest.kind} {artifact.digest[:12]}"
    digest = manifest.inputs.get(role)
    if digest is None:
        raise CheckError(f"{name}: its manifest names no input {role}")
    try:
        located = Store.of(artifact).locate(digest)
    except CheckError as error:
        raise CheckError(f"input {role} of {name}: {error}") from error
    except OutOfReach as error:
        raise OutOfReach(f"input {role} of {name}: {error}") from error
    if located is None:
        raise CheckError(
            f"{name}: its input {role} {digest} is not in the store; restore it from another copy"
        )
    return located


def sealed_ancestor(artifact: Artifact, kind: str) -> Artifact:
    """Find the nearest artifact of a kind in a lineage, the artifact itself included.

    The sealed manifests are followed, not the catalogue. Models that were used as encoder, teacher
    or student are not followed.

    Raises:
        CheckError: A manifest on the way is damaged, or an input is missing.
        OutOfReach: A manifest could not be read.
        UsageError: The lineage has none.
    """
    seen, queue = {artifact.digest}, deque([artifact])
    while queue:
        current = queue.popleft()
        if problems := _problems(_check_manifest(current, None)):
            raise CheckError(problems[0])
        manifest = current.manifest
        if manifest.kind == kind:
            return current
        for role, digest in sorted(manifest.inputs.items()):
            if role not in WEIGHTS and digest not in seen:
                seen.add(digest)
                queue.append(sealed_input(current, manifest, role))
    raise UsageError(
        f"{artifact.manifest.kind} {artifact.digest[:12]} has no {kind} in its lineage; name a "
        "later stage"
    )


def recorded_manifest(catalogue: Catalogue, digest: str) -> Manifest | None:
    """Return the catalogue's copy of a manifest; None if it has none that can be read."""
    try:
        return catalogue.manifest(digest)
    except (CheckError, ValueError):  # check_rows reports the problem
        return None


def _altered_manifest(artifact: Artifact) -> Manifest | None:
    """Return a manifest that is not as sealed, if it can be read at all."""
    try:
        return artifact.manifest
    except (UsageError, CheckError, OutOfReach):
        return None


def check_artifact(
    artifact: Artifact, recorded: Manifest | None = None, suffix: str = ""
) -> Findings:
    """Check one artifact's manifest, each of its files, and that it has no other files.

    Args:
        artifact: The artifact.
        recorded: The catalogue's copy of the manifest.
        suffix: Read only the files whose name has this ending; all by default.
    """
    findings = Findings()
    if artifact.is_local and Path(artifact.root.path).is_symlink():
        findings.problems.append(f"{artifact.url} is a symbolic link, not a folder of the store")
    findings.add(_check_manifest(artifact, recorded))
    manifest = sealed_manifest(artifact, recorded) or _altered_manifest(artifact)
    if manifest is None:
        return findings
    try:
        listing = _list_folder(artifact, {entry.path for entry in manifest.files} | {MANIFEST})
    except OutOfReach as error:
        findings.unread.append(str(error))
        listing = None
    files = Findings(unread=[])
    entries = [entry for entry in manifest.files if entry.path.endswith(suffix)]
    for number, entry in enumerate(entries):
        tick("verify", number + 1, len(entries), entry.path)
        retry = len(files.problems) + len(files.unread) < 3  # many problems: no time for retries
        try:
            files.problems += _check_file(artifact, entry, listing, retry)
        except OutOfReach as error:
            files.unread.append(str(error))
    findings.add(files)
    if listing is not None:
        findings.problems.extend(bounded(listing.extra, listing.extra_count))
    return findings


@dataclass
class _Listing:
    """The content of an artifact's folder.

    Attributes:
        sizes: Size of each regular file or object that the manifest names.
        wrong: Type of each other thing that the manifest names, e.g. ``a folder``.
        extra: Problems with things that the manifest does not name, at most ``LISTED``.
        extra_count: Number of things that the manifest does not name.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    extra_count: int = 0

    def add_extra(self, path: str) -> None:
        """Note a file or folder that the manifest does not name."""
        self.extra_count += 1
        if len(self.extra) < LISTED:
            self.extra.append(f"{path}: not in the manifest")


def _list_folder(artifact: Artifact, known: set[str]) -> _Listing:
    """List an artifact's folder; links are never followed.

    Args:
        artifact: The artifact.
        known: Names in the manifest, and that of the manifest.

    Raises:
        OutOfReach: The folder cannot be listed.
    """
    listing = _Listing()
    if not artifact.is_local:
        root = artifact.root
        objects = reach(root, lambda: root.fs.find(root.path, detail=True))
        for address, about in objects.items():
            name = address.removeprefix(root.path).lstrip("/")
            if name in known:
                listing.sizes[name] = int(about["size"])
            else:
                listing.add_extra(f"{root}/{name}")
        return listing
    folders = folders_of(known)
    top = Path(artifact.root.path)
    for name, status in _entries(top, folders):
        if stat.S_ISREG(status.st_mode) and name in known:
            listing.sizes[name] = status.st_size
        elif name in known:
            listing.wrong[name] = kind_of_file(status.st_mode)
        elif not (stat.S_ISDIR(status.st_mode) and name in folders):
            is_file = stat.S_ISREG(status.st_mode)
            kind = "" if is_file else f" ({kind_of_file(status.st_mode)})"
            listing.add_extra(f"{top / name}{kind}")
    return listing


def _entries(top: Path, folders: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything in a folder, and in those of its folders that the manifest names."""
    queue = [""]
    while queue:
        inner = queue.pop()
        try:
            with os.scandir(top / inner) as entries:
                for entry in entries:
                    name = f"{inner}/{entry.name}".lstrip("/")
                    status = entry.stat(follow_symlinks=False)
                    yield name, status
                    if stat.S_ISDIR(status.st_mode) and name in folders:
                        queue.append(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise out_of_reach(top / inner, error) from error


def _check_file(
    artifact: Artifact, entry: FileEntry, listing: _Listing | None, retry: bool
) -> list[str]:
    """Check one file; returns its problems.

    Args:
        artifact: The artifact.
        entry: Entry of the file in the manifest.
        listing: Content of the folder; None if it could not be listed.
        retry: Repeat reads that fail.
    """
    where = f"{artifact.url}/{entry.path}"
    size = None
    if listing is not None:
        size = listing.sizes.get(entry.path)
        if entry.path in listing.wrong:
            return [f"{where}: is {listing.wrong[entry.path]}, not a file"]
        if size is None and artifact.is_local:
            return [f"{where}: missing"]
    path = artifact.path(entry.path)
    try:
        if size is None:  # an object counts as missing only after a second request
            size = file_size(path, retry)
        if size != entry.size:
            return [f"{where}: {size} bytes instead of {entry.size}"]
        if reach(path, lambda: sha256_file(path), retry) != entry.sha256:
            damage = _locate_damage(path)
            return [f"{where}: content altered, its sha256 is not {entry.sha256}{damage}"]
    except FileNotFoundError:
        return [f"{where}: missing"]
    except OSError as error:
        return [f"{where}: is not a file that can be read ({error.strerror or error})"]
    return []


def _locate_damage(path: UPath) -> str:
    """Describe the rows of a damaged local table that cannot be read, as the end of a sentence."""
    if is_remote(path) or path.suffix != ".parquet":
        return ""
    from data_catalog.tables import find_unreadable

    rows = find_unreadable(Path(path.path))
    return f"; {rows}" if rows else "; all its rows can be read, so the altered one is not known"


def _check_manifest(artifact: Artifact, recorded: Manifest | None) -> Findings:
    """Check the manifest's bytes; a problem names the first byte that differs from the copy."""
    where = f"{artifact.url}/{MANIFEST}"
    try:
        data = artifact.manifest_bytes()
    except OutOfReach as error:
        return Findings(unread=[str(error)])
    except (OSError, CheckError) as error:
        return Findings([f"{where}: missing or damaged ({error})"])
    digest = hashlib.sha256(data).hexdigest()
    differs = ""
    if digest != artifact.digest and recorded is not None and recorded.digest == artifact.digest:
        sealed = recorded.to_bytes()
        position = first_difference(data, sealed)
        context = sealed[max(0, position - 20) : position + 20].decode(errors="replace")
        differs = f"; byte {position} differs from the catalogue's copy, which has …{context}…"
    try:
        if digest == artifact.digest:
            _ = artifact.manifest  # keeps the parsed manifest: it may be large
            return Findings()
        Manifest.model_validate_json(data)
    except (ValueError, CheckError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        return Findings([f"{where}: missing or damaged ({explain_invalid(cause)}){differs}"])
    return Findings([f"{where}: altered, its digest is {digest}{differs}"])


def first_difference(left: bytes, right: bytes) -> int:
    """Return the first position where two byte strings differ, or the length of the shorter one.

    The search halves the range: comparing slices is much faster than a loop over bytes.
    """
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
