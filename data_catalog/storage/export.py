"""Export: copy a sealed artifact to a folder elsewhere, verified and in one atomic step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, UsageError
from data_catalog.manifest import MANIFEST
from data_catalog.progress import tick
from data_catalog.provenance.verify import verify_artifact
from data_catalog.storage.atomic import atomic_folder


class TargetExists(UsageError):
    """The target folder of an export exists already."""


@contextmanager
def exported_copy(
    artifact: Artifact, folder: Path, hard_links: bool = False, rewritten: Collection[str] = ()
) -> Iterator[Path]:
    """Copy an artifact's files and its manifest; the block may add files to the copy.

    Args:
        artifact: Artifact to copy.
        folder: Target folder; must not exist.
        hard_links: Link the files of a local store instead of copying them. A linked file is the
            same file as in the store: do not change it in place.
        rewritten: Names of files that the block writes anew; they are never linked.

    Yields:
        The copy under a temporary name. It becomes ``folder`` if the block ends without an error.

    Raises:
        TargetExists: The target folder exists.
        CheckError: A file is not as sealed.
    """
    if folder.exists():
        raise TargetExists(f"{folder} exists already: name another folder with --out")
    problems = verify_artifact(artifact)
    if problems:
        raise CheckError("\n  ".join([f"{artifact.digest[:12]} is not exported:", *problems]))
    with atomic_folder(folder) as copy:
        names = [*(entry.path for entry in artifact.manifest.files), MANIFEST]
        for number, name in enumerate(names):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if hard_links and artifact.is_local and name not in rewritten:
                os.link(artifact.local(name), target)
            else:
                shutil.copyfile(artifact.local(name), target)
            tick("export", number + 1, len(names), name)
        yield copy
