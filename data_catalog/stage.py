"""Stages and jobs: a stage is a pure function from artifacts and settings to one artifact.

Large stages are divided into parts. The key of a part depends on the stage, its version, its
settings and the rows that the part covers. A run after a kill, a run with other workers and the
run of the next night therefore find the finished parts.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_catalog.artifact import Artifact
from data_catalog.database.item_states import ItemState, Key, VersionKey
from data_catalog.errors import RunError
from data_catalog.hashing import digest_of
from data_catalog.store import Store


class NotExclusive(RunError):
    """A stage uses its job's scratch folder without being exclusive."""


@dataclass(frozen=True)
class Part:
    """A share of a stage's work.

    Attributes:
        key: Cache key.
        payload: Input of ``work`` as small JSON.
        rows: Number of rows that it covers, for progress; 0 if it is not known.
    """

    key: str
    payload: dict[str, Any]
    rows: int = 0


@dataclass(frozen=True)
class Sealed:
    """The report of a stage when it seals.

    Attributes:
        counts: Numbers of rows, at least ``rows_in`` and ``rows_out``.
        dropped: Numbers of dropped rows, by reason.
        facts: Results for the manifest.
        deterministic: Whether the same inputs, settings and seed give the same bytes.
        metrics: Times and rates for the run record; they are not in the manifest.
    """

    counts: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    deterministic: bool = True
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A stage with its inputs and settings; it can be pickled.

    ``device``, ``how``, ``catalogue`` and ``previous`` change where and how fast the job runs but
    not its result, so they are not part of the key.

    Attributes:
        how: Number of workers and the like, as JSON.
        catalogue: Address of the catalogue; it may hold a password.
        previous: Last artifact of the same job (live stages), or of a job with the same settings
            (stages that ``follow``). It may save work, and shows which rows are gone.
        fields: Names of the settings that the stage depends on; None for all of its section.
        reads: Content identity of the files in the settings (``Stage.reads``, ``Stage.resolve``).
        attempt: Id of this run of the job. A failure noted by another attempt does not count.
        postponed: Item versions (collection, id, sha256) that this attempt does not try to read,
            with reason and detail of their last failure.
    """

    stage: str
    version: str
    seeded: bool
    store: Store
    inputs: dict[str, Artifact]
    settings: Any
    seed: int = 0
    device: str = "auto"
    how: dict[str, Any] = field(default_factory=dict)
    catalogue: str = field(default="", repr=False)
    previous: Artifact | None = None
    fields: tuple[str, ...] | None = None
    reads: Any = None
    exclusive: bool = False
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    postponed: dict[VersionKey, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Stage, version, settings and, if the stage is seeded, seed: the content of a key."""
        section: BaseModel = self.settings
        identity = {
            "stage": self.stage,
            "version": self.version,
            "settings": section.model_dump(
                mode="json", include=None if self.fields is None else set(self.fields)
            ),
        }
        if self.reads is not None:
            identity["reads"] = self.reads
        return {**identity, "seed": self.seed} if self.seeded else identity

    @cached_property
    def key(self) -> str:
        """Cache key of the whole job."""
        inputs = {role: artifact.digest for role, artifact in self.inputs.items()}
        return digest_of({**self.identity, "inputs": inputs})

    @cached_property
    def record(self) -> str:
        """Name of the record of items: the settings of the stage and of its inputs."""
        inputs = {role: artifact.manifest.settings for role, artifact in self.inputs.items()}
        return digest_of([self.stage, self.identity["settings"], inputs])

    def part(
        self,
        payload: dict[str, Any],
        covers: Any,
        fields: Sequence[str] | None = None,
        rows: int = 0,
    ) -> Part:
        """Make a part. Its key depends on the stage's identity and on the rows it covers.

        Args:
            payload: Input of ``work`` as JSON; it does not change the key.
            covers: Content identity of the rows, as JSON (digests, ids).
            fields: Names of the settings that the part depends on; None for all.
            rows: Number of rows, for progress; it does not change the key.
        """
        key = digest_of({**self.identity_by(fields), "covers": covers})
        return Part(key, payload, rows)

    def identity_by(self, fields: Sequence[str] | None) -> dict[str, Any]:
        """Return the identity with some of the settings only."""
        if fields is None:
            return self.identity
        settings = {name: self.identity["settings"][name] for name in fields}
        return {**self.identity, "settings": settings}

    @property
    def scratch(self) -> Path:
        """Local folder of this job that is kept between its runs.

        Raises:
            NotExclusive: The stage is not declared as exclusive.
        """
        if not self.exclusive:
            raise NotExclusive(
                f"stage {self.stage} keeps state between runs: set Stage.exclusive, so that two "
                "processes do not use the folder at once"
            )
        return self.store.scratch(self.key)


@dataclass(frozen=True)
class Stage:
    """A stage, defined by its functions.

    The functions are at module level, so that any runner can pickle them:

    - ``plan(job)`` lists the parts, perhaps none.
    - ``work(job, part, folder)`` writes the files of one part into an empty folder.
    - ``seal(job, part_folders, folder)`` writes the files of the artifact; the part folders are in
      the order of the plan.

    Attributes:
        kind: Kind of the artifact.
        inputs: Roles of the input artifacts, which are their kinds.
        software: Packages that can change the bytes; their versions are in the manifest.
        seeded: Whether the stage draws random numbers.
        section: Section of the recipe with its settings, if it does not have the stage's name.
        fields: Settings of the section that the stage depends on, if another stage shares the
            section; None for all.
        reads: ``reads(settings)`` returns the content identity of the files in the settings, as
            JSON for the key.
        resolve: ``resolve(job)`` returns the job before it is looked up, with names in its settings
            replaced by digests. It may add inputs of other roles and set ``Job.reads``.
        live: Whether the stage reads the outside world: it runs every time.
        follows: Whether the stage may take over work from its last run with the same settings and
            seed, on any inputs (``Job.previous``).
        exclusive: Whether the stage keeps state in ``Job.scratch``: only one process at a time runs
            a job of it.
        follows_fields: Settings that must be the same in the run that is followed; None for all.
        states: ``states(job, artifact)`` returns the state of each item for the catalogue. Items
            that are waiting or out of reach are tried again by a later run of the same job.
        at_once: Number of parts that one worker computes at once, in threads; more than 1 if the
            work waits for the network.
        device: ``device(requested)`` returns the device of its work, ``cpu`` or ``cuda``; None for
            a stage that never uses a GPU.
        unit: What the rows of its parts are, in the plural.
    """

    name: str
    version: str
    kind: str
    inputs: tuple[str, ...]
    software: tuple[str, ...]
    plan: Callable[[Job], list[Part]]
    work: Callable[[Job, Part, Path], None]
    seal: Callable[[Job, list[Path], Path], Sealed]
    seeded: bool = False
    section: str = ""
    fields: tuple[str, ...] | None = None
    reads: Callable[[Any], Any] | None = None
    resolve: Callable[[Job], Job] | None = None
    live: bool = False
    follows: bool = False
    exclusive: bool = False
    follows_fields: tuple[str, ...] | None = None
    states: Callable[[Job, Artifact], dict[Key, ItemState]] | None = None
    at_once: int = 1
    device: Callable[[str], str] | None = None
    unit: str = "chips"


def prepare_part(job: Job, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of a part that ``plan`` needs before it can divide the work.

    Args:
        job: Job of the stage.
        key: Key of the part.
        make: ``make(folder)`` writes the part's files into an empty folder. It is called if the
            part does not exist.

    Raises:
        RunError: The part is damaged again after it was made again.
    """
    for _ in range(2):
        if not job.store.has_part(key):
            with job.store.staging() as folder:
                out = folder / "part"
                out.mkdir()
                make(out)
                job.store.publish_part(key, out)
        part = job.store.fetch_part(key)
        if part is not None:
            return part
    raise RunError(
        f"part {key} of stage {job.stage} was made again and is damaged again; check the disk or "
        f"object store of {job.store.url}"
    )


def no_parts(job: Job) -> list[Part]:
    """Plan a stage without parts: its whole work is in ``seal``."""
    return []


def no_work(job: Job, part: Part, folder: Path) -> None:
    """Work on a part of a stage without parts; never called."""
    raise NotImplementedError(f"stage {job.stage} has no parts")


def link(source: Path, target: Path) -> None:
    """Put a part's file into an artifact: as a hard link if possible, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
