"""Proof by hashing: an artifact's manifest against its name, its files against the manifest.

The chain of an artifact is that of its manifests: each names its inputs by digest. The catalogue
is a copy of what they say, so it is checked against them (``cross_check``) and never believed.
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
from data_catalog.manifest import MANIFEST, FileEntry, Manifest, folders_of, what_is_wrong
from data_catalog.progress import tick
from data_catalog.provenance.cross_check import check_names, check_rows
from data_catalog.provenance.findings import LISTED, Findings, bounded
from data_catalog.provenance.lineage import WEIGHTS
from data_catalog.storage.reach import OutOfReach, file_size, is_remote, out_of_reach, reach
from data_catalog.store import Store
from data_catalog.tables import find_unreadable


def sealed_manifest(artifact: Artifact, recorded: Manifest | None = None) -> Manifest | None:
    """The manifest whose digest is the artifact's: its own, or the catalogue's copy of it."""
    try:
        if hashlib.sha256(artifact.manifest_bytes()).hexdigest() == artifact.digest:
            return artifact.manifest
    except (OSError, CheckError, OutOfReach):
        pass
    return recorded if recorded is not None and recorded.digest == artifact.digest else None


def verify_artifact(artifact: Artifact, recorded: Manifest | None = None) -> list[str]:
    """Problems of one artifact, one sentence each; empty when all bytes are as sealed.

    Args:
        artifact: what is verified.
        recorded: the catalogue's copy of the manifest: tells where a damaged one differs.

    Raises:
        OutOfReach: something could not be read, and no problem was found in the rest.
    """
    return _or_out_of_reach(check_artifact(artifact, recorded))


def verify_chain(catalogue: Catalogue, artifact: Artifact) -> list[str]:
    """Problems of an artifact and of everything it was made from; raises as the above."""
    return _or_out_of_reach(check_chain(catalogue, artifact))


def _or_out_of_reach(found: Findings) -> list[str]:
    if found.unread and not found.problems:
        raise OutOfReach("\n  ".join(found.unread))
    return found.problems


def check_chain(catalogue: Catalogue, artifact: Artifact) -> Findings:
    """Check an artifact and everything it was made from, as the sealed manifests say.

    What the catalogue says otherwise is a problem as well.
    """
    found = Findings()
    seen, queue = {artifact.digest}, deque([artifact])
    while queue:
        current = queue.popleft()
        recorded = recorded_manifest(catalogue, current.digest)
        found.add(check_artifact(current, recorded))
        manifest = sealed_manifest(current, recorded) or _as_it_is(current)
        if manifest is None:
            continue
        found.add(check_rows(catalogue, current, manifest))
        for role, digest in sorted(manifest.inputs.items()):
            if digest in seen:
                continue
            seen.add(digest)
            try:
                queue.append(sealed_input(current, manifest, role))
            except (CheckError, OutOfReach) as error:
                found.add_error(error)
    found.add(Findings(check_names(catalogue)))
    return found


def sealed_input(artifact: Artifact, manifest: Manifest, role: str) -> Artifact:
    """Find an input of an artifact in its store, as its sealed manifest says.

    Raises:
        CheckError: The manifest names no such input, or the store does not hold it.
        OutOfReach: The store could not be searched.
    """
    name = f"{manifest.kind} {artifact.digest[:12]}"
    digest = manifest.inputs.get(role)
    if digest is None:
        raise CheckError(f"{name}: its manifest names no input {role}")
    try:
        found = Store.of(artifact).locate(digest)
    except CheckError as error:
        raise CheckError(f"input {role} of {name}: {error}") from error
    except OutOfReach as error:
        raise OutOfReach(f"input {role} of {name}: {error}") from error
    if found is None:
        raise CheckError(
            f"{name}: its input {role} {digest} is not in the store; restore it from another copy"
        )
    return found


def sealed_ancestor(artifact: Artifact, kind: str) -> Artifact:
    """Find the nearest artifact of a kind in a lineage, the artifact itself included.

    The sealed manifests are followed, not the catalogue. Weights are not followed.

    Raises:
        CheckError: A manifest on the way is damaged, or an input is missing.
        OutOfReach: A manifest could not be read.
        UsageError: The lineage has none.
    """
    seen, queue = {artifact.digest}, deque([artifact])
    while queue:
        current = queue.popleft()
        if problems := _or_out_of_reach(_check_manifest(current, None)):
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
    """The catalogue's copy of a manifest; None where it has none that can be read."""
    try:
        return catalogue.manifest(digest)
    except (CheckError, ValueError):  # a problem that check_rows names
        return None


def _as_it_is(artifact: Artifact) -> Manifest | None:
    """A manifest that is not as sealed, if it can be read at all."""
    try:
        return artifact.manifest
    except (UsageError, CheckError, OutOfReach):
        return None


def check_artifact(
    artifact: Artifact, recorded: Manifest | None = None, suffix: str = ""
) -> Findings:
    """Check one artifact's manifest, each of its files, and that there is nothing else.

    Args:
        artifact: What is checked.
        recorded: The catalogue's copy of the manifest.
        suffix: Read only the files whose name ends like this; all by default.
    """
    found = Findings()
    if artifact.is_local and Path(artifact.root.path).is_symlink():
        found.problems.append(f"{artifact.url} is a symbolic link, not a folder of the store")
    found.add(_check_manifest(artifact, recorded))
    manifest = sealed_manifest(artifact, recorded) or _as_it_is(artifact)
    if manifest is None:
        return found
    try:
        there = _listing(artifact, {entry.path for entry in manifest.files} | {MANIFEST})
    except OutOfReach as error:
        found.unread.append(str(error))
        there = None
    files = Findings(unread=[])
    entries = [entry for entry in manifest.files if entry.path.endswith(suffix)]
    for number, entry in enumerate(entries):
        tick("verify", number + 1, len(entries), entry.path)
        patient = len(files.problems) + len(files.unread) < 3  # then the store is not asked again
        try:
            files.problems += _check_file(artifact, entry, there, patient)
        except OutOfReach as error:
            files.unread.append(str(error))
    found.add(files)
    if there is not None:
        found.problems.extend(bounded(there.extra, there.extra_count))
    return found


@dataclass
class _Listing:
    """What lies in an artifact's folder.

    Attributes:
        sizes: Size of each regular file or object that the manifest names.
        wrong: What each other thing is that the manifest names.
        extra: Problems: what it does not name, ``LISTED`` of them at most.
        extra_count: How many things it does not name.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    extra_count: int = 0

    def add_extra(self, what: str) -> None:
        """Note something that the manifest does not name."""
        self.extra_count += 1
        if len(self.extra) < LISTED:
            self.extra.append(f"{what}: not in the manifest")


def _listing(artifact: Artifact, known: set[str]) -> _Listing:
    """List an artifact's folder, once; links are never followed.

    Raises:
        OutOfReach: It cannot be listed.
    """
    there = _Listing()
    if not artifact.is_local:
        root = artifact.root
        objects = reach(root, lambda: root.fs.find(root.path, detail=True))
        for address, about in objects.items():
            name = address.removeprefix(root.path).lstrip("/")
            if name in known:
                there.sizes[name] = int(about["size"])
            else:
                there.add_extra(f"{root}/{name}")
        return there
    folders = folders_of(known)
    top = Path(artifact.root.path)
    for name, about in _entries(top, folders):
        if stat.S_ISREG(about.st_mode) and name in known:
            there.sizes[name] = about.st_size
        elif name in known:
            there.wrong[name] = kind_of_file(about.st_mode)
        elif not (stat.S_ISDIR(about.st_mode) and name in folders):
            is_file = stat.S_ISREG(about.st_mode)
            what = "" if is_file else f" ({kind_of_file(about.st_mode)})"
            there.add_extra(f"{top / name}{what}")
    return there


def _entries(top: Path, folders: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a folder and in those of its folders that the manifest knows."""
    queue = [""]
    while queue:
        inner = queue.pop()
        try:
            with os.scandir(top / inner) as entries:
                for entry in entries:
                    name = f"{inner}/{entry.name}".lstrip("/")
                    about = entry.stat(follow_symlinks=False)
                    yield name, about
                    if stat.S_ISDIR(about.st_mode) and name in folders:
                        queue.append(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise out_of_reach(top / inner, error) from error


def _check_file(
    artifact: Artifact, entry: FileEntry, there: _Listing | None, patient: bool
) -> list[str]:
    """Problems of one file."""
    where = f"{artifact.url}/{entry.path}"
    size = None
    if there is not None:
        size = there.sizes.get(entry.path)
        if entry.path in there.wrong:
            return [f"{where}: is {there.wrong[entry.path]}, not a file"]
        if size is None and artifact.is_local:
            return [f"{where}: missing"]
    path = artifact.path(entry.path)
    try:
        if size is None:  # an object store is asked again before an object counts as missing
            size = file_size(path, patient)
        if size != entry.size:
            return [f"{where}: {size} bytes instead of {entry.size}"]
        if reach(path, lambda: sha256_file(path), patient) != entry.sha256:
            place = _place_of_damage(path)
            return [f"{where}: content altered, its sha256 is not {entry.sha256}{place}"]
    except FileNotFoundError:
        return [f"{where}: missing"]
    except OSError as error:
        return [f"{where}: is no file that can be read ({error.strerror or error})"]
    return []


def _place_of_damage(path: UPath) -> str:
    """Which rows of a damaged table cannot be read, as the end of a sentence."""
    if is_remote(path) or path.suffix != ".parquet":
        return ""
    found = find_unreadable(Path(path.path))
    return f"; {found}" if found else "; all its rows can be read, so the altered one is not known"


def _check_manifest(artifact: Artifact, recorded: Manifest | None) -> Findings:
    """What is wrong with the manifest's bytes, and from which on."""
    where = f"{artifact.url}/{MANIFEST}"
    try:
        found = artifact.manifest_bytes()
    except OutOfReach as error:
        return Findings(unread=[str(error)])
    except (OSError, CheckError) as error:
        return Findings([f"{where}: missing or damaged ({error})"])
    digest = hashlib.sha256(found).hexdigest()
    differs = ""
    if digest != artifact.digest and recorded is not None and recorded.digest == artifact.digest:
        wanted = recorded.to_bytes()
        at = first_difference(found, wanted)
        near = wanted[max(0, at - 20) : at + 20].decode(errors="replace")
        differs = f"; byte {at} differs from the catalogue's copy, which says …{near}…"
    try:
        if digest == artifact.digest:
            _ = artifact.manifest  # parsed once, however large it is
            return Findings()
        Manifest.model_validate_json(found)
    except (ValueError, CheckError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        return Findings([f"{where}: missing or damaged ({what_is_wrong(cause)}){differs}"])
    return Findings([f"{where}: altered, its digest is {digest}{differs}"])


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
