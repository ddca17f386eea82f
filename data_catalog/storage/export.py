"""A sealed artifact as a folder elsewhere: every file found as sealed, and there in one step."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, UsageError
from data_catalog.manifest import MANIFEST
from data_catalog.progress import tick
from data_catalog.provenance.verify import verify_artifact


class TargetExists(UsageError):
    """There is something where the copy should go."""


@contextmanager
def copied(
    artifact: Artifact, folder: Path, hard_links: bool = False, rewritten: Collection[str] = ()
) -> Iterator[Path]:
    """Copy an artifact's files and its manifest; the block may add to the copy before it appears.

    Args:
        artifact: what is copied.
        folder: where; must not exist.
        hard_links: link the files of a local store instead of copying them. They are then the
            very files of the store: do not change them in place.
        rewritten: files that the block writes anew; never linked.

    Yields:
        The folder under a name of its own; it takes its place when the block ends without error.

    Raises:
        TargetExists: the folder is there already.
        CheckError: a file is not as sealed.
    """
    if folder.exists():
        raise TargetExists(f"{folder} is there already: name another folder with --out")
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        problems = verify_artifact(artifact)
        if problems:
            raise CheckError("\n  ".join([f"{artifact.digest[:12]} is not exported:", *problems]))
        names = [*(entry.path for entry in artifact.manifest.files), MANIFEST]
        for number, name in enumerate(names):
            target = beside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if hard_links and artifact.is_local and name not in rewritten:
                os.link(artifact.local(name), target)
            else:
                shutil.copyfile(artifact.local(name), target)
            tick("export", number + 1, len(names), name)
        yield beside
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
