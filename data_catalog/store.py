"""Where artifacts live: published in one atomic step, never changed afterwards.

Layout below the store's address (a local folder or anything fsspec knows, e.g. ``s3://...``)::

    artifacts/<kind>/<digest>/    sealed artifacts
    parts/<2 hex>/<key>/          finished parts: what a killed run does not compute again
    plans/<key>.json              the list of a job's parts
    work/<key>/                   a job's own scratch (checkpoints); always local
    staging/                      what is being written; always local
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

from botocore.exceptions import BotoCoreError
from upath import UPath

from data_catalog.artifact import Artifact, cache_folder
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.hashing import canonical, digest_of, sha256_file
from data_catalog.manifest import KIND, MANIFEST, FileEntry, Manifest
from data_catalog.storage.address import store_address
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
    """The disk, a quota or a limit on the size of files leaves no space to write."""


#: A file on this machine, whatever its names: device and number.
Inode = tuple[int, int]


class PartFile(NamedTuple):
    """A file of a finished part: key of the part, path in its folder, SHA-256 (hex)."""

    key: str
    path: str
    sha256: str


def list_files(folder: Path, known: Mapping[Inode, PartFile] | None = None) -> list[FileEntry]:
    """Every file below a folder with digest and size, sorted by path.

    ``known`` has files that were hashed a moment ago under another name.
    """
    found = []
    for place, _, names in os.walk(folder):  # many times as fast as ``rglob``
        for path in (Path(place, name) for name in names):
            about = path.stat()
            same = (known or {}).get((about.st_dev, about.st_ino))
            digest = same.sha256 if same else sha256_file(path)
            name = path.relative_to(folder).as_posix()
            found.append(FileEntry(path=name, sha256=digest, size=about.st_size))
    return sorted(found, key=lambda entry: Path(entry.path))


def linked(folders: Iterable[Path]) -> dict[Inode, PartFile]:
    """The files of whole parts (folders named by key), by what a hard link shares with them."""
    found = {}
    for folder in folders:
        for entry in json.loads((folder / PART).read_bytes())["files"]:
            about = (folder / entry["path"]).stat()
            file = PartFile(folder.name, str(entry["path"]), str(entry["sha256"]))
            found[about.st_dev, about.st_ino] = file
    return found


def _noted(note: bytes) -> list[FileEntry] | None:
    """The files that a part's note lists; None where the note is damaged."""
    try:
        return [FileEntry.model_validate(entry) for entry in json.loads(note)["files"]]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _is_whole(place: Path) -> bool:
    """Whether a part's local folder has the files of its note, and no others.

    Raises:
        OutOfReach: A file cannot be read; whether it is whole is not known.
    """
    path = UPath(place)
    try:
        noted = _noted(read_file(path / PART))
        found = reach(path, lambda: [f for f in list_files(place) if f.path != PART])
    except (OSError, ValueError):  # a folder in the place of a file, a name that none can have
        return False
    return noted == found


@dataclass(frozen=True)
class Store:
    """A store by its address. Cheap to make and to pickle; ``open_store`` checks it once."""

    url: str

    @cached_property
    def root(self) -> UPath:
        """The store's folder."""
        return UPath(self.url)

    @property
    def is_local(self) -> bool:
        """Whether the store is on a local file system."""
        return self.root.protocol in ("", "file", "local")

    @property
    def local_root(self) -> Path:
        """Where scratch and staging live: in the store itself, or in the cache beside it."""
        if self.is_local:
            return Path(self.root.path)
        return cache_folder() / "stores" / digest_of(self.url)[:16]

    @staticmethod
    def of(artifact: Artifact) -> Store:
        """The store that an artifact is in."""
        return Store(str(artifact.root.parent.parent.parent))

    def artifact(self, kind: str, digest: str) -> Artifact:
        """The artifact with this digest, which need not exist.

        Raises:
            CheckError: The kind or the digest is no name of a folder.
        """
        if not re.fullmatch(KIND, kind) or not DIGEST.fullmatch(digest):
            raise CheckError(f"{kind!r} {digest!r} is no kind and digest of an artifact")
        return Artifact(str(self.root / ARTIFACTS / kind / digest))

    def locate(self, digest: str) -> Artifact | None:
        """The artifact with this digest, of whatever kind; None where the store has none."""
        found = (self.artifact(kind, digest) for kind in self.kinds())
        return next(filter(self.has, found), None)

    def kinds(self) -> list[str]:
        """The kinds of artifacts that there are."""
        folder = self.root / ARTIFACTS
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return sorted(name for name in names if re.fullmatch(KIND, name))

    def digests(self) -> set[str]:
        """The digests of all artifacts that there are."""
        folders = [self.root / ARTIFACTS / kind for kind in self.kinds()]
        return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}

    def has(self, artifact: Artifact) -> bool:
        """Whether the artifact is there, whole (its manifest is written last)."""
        return exists(artifact.path(MANIFEST))

    def scratch(self, key: str) -> Path:
        """Return a local folder of one job that survives kills."""
        folder = self.local_root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock_scratch(self, key: str, wait: bool = True) -> AbstractContextManager[None]:
        """Let no other process on this machine use a job's scratch folder while a block runs.

        Raises:
            Locked: Another process uses it and ``wait`` is False.
        """
        folder = self.scratch(key)
        return lock_file(folder / LOCK, f"the scratch folder {folder}", wait)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield an empty local folder for files being written; its rest is removed at the end.

        The folder lies beside a lock, which tells ``sweep`` that this process lives.
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
                    "free some space, or name another place with --store, and run again, which "
                    "goes on with the parts that are there"
                ) from error
            raise
        finally:
            shutil.rmtree(outer, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left in staging. Only commands that write call this."""
        for folder in (self.local_root / "staging").glob("*"):
            if is_abandoned(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self, folder: Path, manifest: Manifest, known: Mapping[Inode, PartFile] | None = None
    ) -> Artifact:
        """Make a staged folder an artifact: rename it, or upload it with the manifest last.

        An object store copies by itself what it has as a file of a part already (``known``).
        """
        manifest.check_conservation()
        artifact = self.artifact(manifest.kind, manifest.digest)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        if not self.has(artifact):
            self._move(folder, artifact.root, MANIFEST, known or {})
        return artifact

    def plan_file(self, key: str) -> UPath:
        """Where the list of a job's parts is kept."""
        return self.root / "plans" / f"{key}.json"

    def write_whole(self, target: UPath, data: bytes) -> None:
        """Write a file so that a reader sees all of it or nothing."""
        if not self.is_local:
            target.write_bytes(data)
            return
        place = Path(target.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
        beside.write_bytes(data)
        beside.replace(place)

    def part_folder(self, key: str) -> UPath:
        """Where the part with this key is or will be."""
        return self.root / "parts" / key[:2] / key

    def has_part(self, key: str) -> bool:
        """Whether the part is finished."""
        return exists(self.part_folder(key) / PART)

    def publish_part(self, key: str, folder: Path) -> None:
        """Keep a finished part under its key, with the digests of its files."""
        files = [f.model_dump() for f in list_files(folder)]
        (folder / PART).write_bytes(canonical({"key": key, "files": files}))
        if not self.has_part(key):
            self._move(folder, self.part_folder(key), PART, {})

    def fetch_part(self, key: str) -> Path | None:
        """A local folder with the files of a finished part; None, and it is gone, if damaged."""
        folder = self.part_folder(key)
        if self.is_local:
            place = Path(folder.path)
            if _is_whole(place):
                return place
        else:
            place = cache_folder() / "parts" / key
            for _ in range(2):  # a damaged copy in the cache is fetched once more
                if not (place / PART).exists():
                    self._download(folder, place)
                if _is_whole(place):
                    return place
                shutil.rmtree(place)
        log.warning("part %s is damaged; it is thrown away and worked on again", key)
        self.forget_part(key)
        return None

    def forget_part(self, key: str) -> None:
        """Remove a finished part, so that it is worked on again."""
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
        """Publish a local folder at ``target``; ``last`` is the file that says it is whole."""
        if self.is_local:
            place = Path(target.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.rename(place)
            except OSError:
                if not (place / last).exists():  # someone else published it first, or it failed
                    raise
            return
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        for name in sorted(names, key=lambda n: (n == last, n)):
            about = (folder / name).stat()
            same = known.get((about.st_dev, about.st_ino))
            if same is None or not self._copied(same, target / name, about.st_size):
                upload_file(folder / name, target / name)

    def _copied(self, file: PartFile, target: UPath, size: int) -> bool:
        """Whether the object store has made a copy of a part's file by itself."""
        source = self.part_folder(file.key) / file.path
        try:
            if source.stat().st_size != size:
                return False
            source.fs.cp_file(source.path, target.path)
        except (OSError, NotImplementedError) as error:  # gone, or not allowed: uploaded then
            log.info("%s was not copied (%s); it is uploaded", source, error)
            return False
        return True

    def _download(self, remote: UPath, place: Path) -> None:
        """Copy a finished part from an object store, in one step.

        Only what its note lists: an upload that died may have left other files beside it.
        """
        beside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
        note = read_file(remote / PART)
        try:
            for file in _noted(note) or ():
                (beside / file.path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (beside / file.path).write_bytes(read_file(remote / file.path))
                except FileNotFoundError:  # a damaged part, as the caller sees
                    log.warning("%s is missing", remote / file.path)
            beside.mkdir(parents=True, exist_ok=True)
            (beside / PART).write_bytes(note)
            try:
                beside.rename(place)
            except OSError:
                if not (place / PART).exists():  # another thread or process fetched it first
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def open_store(url: str | Path, write: bool = True) -> Store:
    """Open a store.

    Args:
        url: Address as a user writes it: a folder or ``s3://bucket/prefix``.
        write: Make its folders and check that it can be written. Without it nothing is written,
            and the store must exist.

    Raises:
        StoreNotWritable: With the address and the remedy.
        NoStore: There is none, and it is to be read.
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
        probe.fs.rm_file(probe.path)  # one object; some gateways refuse bulk deletion
        (store.local_root / "staging").mkdir(parents=True, exist_ok=True)
    except (OSError, BotoCoreError) as error:
        why = getattr(error, "strerror", None) or error
        raise StoreNotWritable(
            f"the store {store.url} cannot be written ({why}); give a folder "
            "you may write to, or s3://bucket/prefix, with --store or GEOFM_STORE"
        ) from error
    return store


def _require_store(store: Store) -> None:
    """Raise NoStore where a local folder is no store; a remote one may hold nothing yet."""
    if not store.is_local or (store.root / ARTIFACTS).is_dir():
        return
    what = "it has no folder artifacts" if store.root.is_dir() else "there is no such folder"
    raise NoStore(
        f"{store.url} is no store: {what}; name the store with --store or GEOFM_STORE, or make "
        "one with `geofm run` or `geofm demo`"
    )
