"""The store: artifacts and finished parts, published in one atomic step and never changed.

Layout below the store's address (a local folder or anything fsspec supports, e.g. ``s3://...``)::

    artifacts/<kind>/<digest>/    sealed artifacts
    parts/<2 hex>/<key>/          finished parts, which a later run does not compute again
    plans/<key>.json              the list of a job's parts
    work/<key>/                   scratch folder of a job (checkpoints); always local
    staging/                      files that are being written; always local
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from upath import UPath

from data_catalog.artifact import Artifact, cache_folder
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.hashing import canonical, digest_of, sha256_file
from data_catalog.manifest import KIND, MANIFEST, FileEntry, Manifest
from data_catalog.storage.address import store_address
from data_catalog.storage.atomic import atomic_folder, move_folder, write_atomic
from data_catalog.storage.lock import is_abandoned, lock_file
from data_catalog.storage.reach import exists, reach, read_file
from data_catalog.storage.s3 import upload_file

ARTIFACTS = "artifacts"
PART = "part.json"
LOCK = "lock"
DIGEST = re.compile(r"[0-9a-f]{64}")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger("geofm.store")


class StoreNotWritable(UsageError):
    """The store cannot be written."""


class NoStore(UsageError):
    """There is no store at the address."""


class StoreFull(RunError):
    """The disk is full, or a quota or a limit on the size of files is reached."""


#: Device and inode number: the identity of a local file, whatever its names.
Inode = tuple[int, int]


class PartFile(NamedTuple):
    """A file of a finished part: key of the part, path in its folder, SHA-256 (hex)."""

    key: str
    path: str
    sha256: str


def list_files(folder: Path, known: Mapping[Inode, PartFile] | None = None) -> list[FileEntry]:
    """List every file below a folder with its digest and size, sorted by path.

    Args:
        folder: The folder.
        known: Files that were hashed before under another name; they are not read again.
    """
    entries = []
    for inner, _, names in os.walk(folder):  # many times as fast as ``rglob``
        for path in (Path(inner, name) for name in names):
            status = path.stat()
            same = (known or {}).get((status.st_dev, status.st_ino))
            digest = same.sha256 if same else sha256_file(path)
            name = path.relative_to(folder).as_posix()
            entries.append(FileEntry(path=name, sha256=digest, size=status.st_size))
    return sorted(entries, key=lambda entry: Path(entry.path))


def part_files_by_inode(folders: Iterable[Path]) -> dict[Inode, PartFile]:
    """Index the files of complete parts (folders named by key) by inode.

    A file of an artifact that is a hard link to a part's file is found by its inode.
    """
    files = {}
    for folder in folders:
        for entry in json.loads((folder / PART).read_bytes())["files"]:
            status = (folder / entry["path"]).stat()
            file = PartFile(folder.name, str(entry["path"]), str(entry["sha256"]))
            files[status.st_dev, status.st_ino] = file
    return files


def _listed_files(note: bytes) -> list[FileEntry] | None:
    """Return the files that the note of a part (``part.json``) lists; None if it is damaged."""
    try:
        return [FileEntry.model_validate(entry) for entry in json.loads(note)["files"]]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _is_intact(folder: Path) -> bool:
    """Return whether a part's local folder holds exactly the files of its note.

    Raises:
        OutOfReach: A file cannot be read, so it is not known whether the part is intact.
    """
    path = UPath(folder)
    try:
        listed = _listed_files(read_file(path / PART))
        present = reach(path, lambda: [f for f in list_files(folder) if f.path != PART])
    except (OSError, ValueError):  # a folder in the place of a file, or an invalid name
        return False
    return listed == present


@dataclass(frozen=True)
class Store:
    """A store by its address. It is cheap to create and to pickle; ``open_store`` checks it."""

    url: str

    @cached_property
    def root(self) -> UPath:
        """Folder of the store."""
        return UPath(self.url)

    @property
    def is_local(self) -> bool:
        """Whether the store is on a local file system."""
        return self.root.protocol in ("", "file", "local")

    @property
    def local_root(self) -> Path:
        """Local folder for scratch and staging: the store itself, or one in the cache."""
        if self.is_local:
            return Path(self.root.path)
        return cache_folder() / "stores" / digest_of(self.url)[:16]

    @staticmethod
    def of(artifact: Artifact) -> Store:
        """Return the store that holds an artifact."""
        return Store(str(artifact.root.parent.parent.parent))

    def artifact(self, kind: str, digest: str) -> Artifact:
        """Return the artifact with this kind and digest, which need not exist.

        Raises:
            CheckError: The kind or the digest has another form.
        """
        if not re.fullmatch(KIND, kind) or not DIGEST.fullmatch(digest):
            raise CheckError(f"{kind!r} {digest!r} is not a kind and a digest of an artifact")
        return Artifact(str(self.root / ARTIFACTS / kind / digest))

    def locate(self, digest: str) -> Artifact | None:
        """Find the artifact with this digest among all kinds; None if the store has none."""
        artifacts = (self.artifact(kind, digest) for kind in self.kinds())
        return next(filter(self.has, artifacts), None)

    def kinds(self) -> list[str]:
        """List the kinds of artifacts in the store."""
        folder = self.root / ARTIFACTS
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return sorted(name for name in names if re.fullmatch(KIND, name))

    def digests(self) -> set[str]:
        """Return the digests of all artifacts in the store."""
        folders = [self.root / ARTIFACTS / kind for kind in self.kinds()]
        return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}

    def has(self, artifact: Artifact) -> bool:
        """Return whether the artifact is in the store, complete (its manifest is written last)."""
        return exists(artifact.path(MANIFEST))

    def scratch(self, key: str) -> Path:
        """Return a local folder of one job that is kept between its runs."""
        folder = self.local_root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock_scratch(self, key: str, wait: bool = True) -> AbstractContextManager[None]:
        """Keep other processes of this machine out of a job's scratch folder while a block runs.

        Raises:
            Locked: Another process uses it and ``wait`` is False.
        """
        folder = self.scratch(key)
        return lock_file(folder / LOCK, f"the scratch folder {folder}", wait)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield an empty local folder for files being written; it is removed at the end.

        A lock beside the folder shows ``sweep`` that this process lives.

        Raises:
            StoreFull: There is no space left.
        """
        name = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        outer = self.local_root / "staging" / name
        folder = outer / "files"
        folder.mkdir(parents=True)
        try:
            with lock_file(outer / LOCK, str(outer)):
                yield folder
        except OSError as error:
            if error.errno in NO_SPACE:
                raise StoreFull(
                    f"the store {self.url} has no space left ({os.strerror(error.errno)}) while "
                    f"{error.filename or folder} was written; nothing unfinished was published: "
                    "free some space, or name another store with --store, and run again; finished "
                    "parts are not computed again"
                ) from error
            raise
        finally:
            shutil.rmtree(outer, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the staging folders of killed processes. Only commands that write call this."""
        for folder in (self.local_root / "staging").glob("*"):
            if is_abandoned(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self, folder: Path, manifest: Manifest, known: Mapping[Inode, PartFile] | None = None
    ) -> Artifact:
        """Make a staged folder an artifact: rename it, or upload it with the manifest last.

        Args:
            folder: Staged folder with the data files.
            manifest: Manifest of these files.
            known: Files that are hard links to files of parts. An object store copies those on
                its own side, so they are not uploaded again.
        """
        manifest.check_conservation()
        artifact = self.artifact(manifest.kind, manifest.digest)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        if not self.has(artifact):
            self._move(folder, artifact.root, MANIFEST, known or {})
        return artifact

    def plan_file(self, key: str) -> UPath:
        """Return the address of the list of a job's parts."""
        return self.root / "plans" / f"{key}.json"

    def write_whole(self, target: UPath, data: bytes) -> None:
        """Write a file so that a reader sees all of it or nothing."""
        if not self.is_local:
            target.write_bytes(data)
            return
        place = Path(target.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, data)

    def part_folder(self, key: str) -> UPath:
        """Return the address of the part with this key, which need not exist."""
        return self.root / "parts" / key[:2] / key

    def has_part(self, key: str) -> bool:
        """Return whether the part is finished."""
        return exists(self.part_folder(key) / PART)

    def publish_part(self, key: str, folder: Path) -> None:
        """Keep a finished part under its key, with the digests of its files."""
        files = [f.model_dump() for f in list_files(folder)]
        (folder / PART).write_bytes(canonical({"key": key, "files": files}))
        if not self.has_part(key):
            self._move(folder, self.part_folder(key), PART, {})

    def fetch_part(self, key: str) -> Path | None:
        """Return a local folder with the files of a finished part.

        Returns:
            The folder; None if the part is damaged. A damaged part is removed from the store.
        """
        folder = self.part_folder(key)
        if self.is_local:
            local = Path(folder.path)
            if _is_intact(local):
                return local
        else:
            local = cache_folder() / "parts" / key
            for _ in range(2):  # a damaged copy in the cache is downloaded once more
                if not (local / PART).exists():
                    self._download(folder, local)
                if _is_intact(local):
                    return local
                shutil.rmtree(local)
        log.warning("part %s is damaged; it is removed and computed again", key)
        self.forget_part(key)
        return None

    def forget_part(self, key: str) -> None:
        """Remove a finished part, so that it is computed again."""
        folder = self.part_folder(key)
        if not self.is_local:
            shutil.rmtree(cache_folder() / "parts" / key, ignore_errors=True)
            if (folder / PART).exists():
                folder.fs.rm_file((folder / PART).path)
            return
        shutil.rmtree(folder.path, ignore_errors=True)

    def _move(
        self, folder: Path, target: UPath, last: str, known: Mapping[Inode, PartFile]
    ) -> None:
        """Publish a local folder at ``target``.

        Args:
            folder: Local folder on the file system of a local store.
            target: Address in the store.
            last: File that exists in a complete folder only; it is uploaded last.
            known: See ``publish``.
        """
        if self.is_local:
            move_folder(folder, Path(target.path), lambda path: (path / last).exists())
            return
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        for name in sorted(names, key=lambda n: (n == last, n)):
            status = (folder / name).stat()
            same = known.get((status.st_dev, status.st_ino))
            if same is None or not self._copy_in_store(same, target / name, status.st_size):
                upload_file(folder / name, target / name)

    def _copy_in_store(self, file: PartFile, target: UPath, size: int) -> bool:
        """Let the object store copy a part's file; returns False if it did not."""
        source = self.part_folder(file.key) / file.path
        try:
            if source.stat().st_size != size:
                return False
            source.fs.cp_file(source.path, target.path)
        except (OSError, NotImplementedError) as error:  # missing, or not allowed
            log.info("%s was not copied (%s); it is uploaded", source, error)
            return False
        return True

    def _download(self, remote: UPath, target: Path) -> None:
        """Copy a finished part from an object store to a local folder in one step.

        Only the files in its note are copied: an upload that was killed may have left others.
        """
        note = read_file(remote / PART)
        with atomic_folder(target, lambda folder: (folder / PART).exists()) as copy:
            for file in _listed_files(note) or ():
                (copy / file.path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (copy / file.path).write_bytes(read_file(remote / file.path))
                except FileNotFoundError:  # the caller finds that the part is damaged
                    log.warning("%s is missing", remote / file.path)
            (copy / PART).write_bytes(note)


def open_store(url: str | Path, write: bool = True) -> Store:
    """Open a store.

    Args:
        url: Address as a user writes it: a folder or ``s3://bucket/prefix``.
        write: Create its folders and check that it can be written. If False, nothing is written,
            and the store must exist.

    Raises:
        StoreNotWritable: The store cannot be written.
        NoStore: The store does not exist and ``write`` is False.
    """
    store = Store(store_address(url))
    if not write:
        _require_store(store)
        return store
    probe = store.root / ARTIFACTS / f".writable.{uuid.uuid4().hex[:8]}"
    try:
        if store.is_local:
            probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"geofm")
        probe.fs.rm_file(probe.path)  # one object: some gateways refuse bulk deletion
        (store.local_root / "staging").mkdir(parents=True, exist_ok=True)
    except _write_errors(store) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreNotWritable(
            f"the store {store.url} cannot be written ({reason}); give a folder "
            "you may write to, or s3://bucket/prefix, with --store or GEOFM_STORE"
        ) from error
    return store


def _write_errors(store: Store) -> tuple[type[Exception], ...]:
    """Return the errors of a store that cannot be written."""
    if store.is_local:
        return (OSError,)
    from botocore.exceptions import BotoCoreError  # loads slowly

    return OSError, BotoCoreError


def _require_store(store: Store) -> None:
    """Raise NoStore if a local folder is not a store; a remote store may hold nothing yet."""
    if not store.is_local or (store.root / ARTIFACTS).is_dir():
        return
    reason = "it has no folder artifacts" if store.root.is_dir() else "there is no such folder"
    raise NoStore(
        f"{store.url} is not a store: {reason}; name the store with --store or GEOFM_STORE, or "
        "create one with `geofm run` or `geofm demo`"
    )
