"""A stage: a pure function from sealed artifacts and settings to one sealed artifact.

Big stages split into parts. A part has a key of its own (stage, version, settings, and the
identity of what it covers), so a killed run, a run with other workers and next night's run all
find the parts that are already there.
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
    """A share of a stage's work: a key, and a small JSON payload that says what to do."""

    key: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Sealed:
    """What a stage reports when it seals. ``metrics`` (times, rates) go to the run record only."""

    counts: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    deterministic: bool = True
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One stage applied to given inputs and settings; picklable.

    ``device``, ``how`` (JSON: processes and the like) and ``catalogue`` (an address) are where
    and how fast, not what: they never enter the key.
    Nor does ``previous``, what a live stage's very same job came to last time, or what a stage
    that ``follows`` came to with the same settings: it may save work, and says what is gone since.

    Attributes:
        attempt: Id of this run of the job; a failure of another attempt is not believed.
        postponed: Item versions (collection, id, sha256) that this attempt does not ask for, with
            reason and detail of their last failure.
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
    catalogue: str = field(default="", repr=False)  # it may hold a password
    previous: Artifact | None = None
    #: The settings that the stage depends on; None for all of its section.
    fields: tuple[str, ...] | None = None
    #: Content identity of the files that its settings name (``Stage.reads``, ``Stage.resolve``).
    reads: Any = None
    exclusive: bool = False
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    postponed: dict[VersionKey, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Stage, version, settings and (where it matters) seed: what a key is made of."""
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
        self, payload: dict[str, Any], covers: Any, fields: Sequence[str] | None = None
    ) -> Part:
        """A part whose key depends on the stage's identity and on what it covers alone.

        Args:
            payload: JSON, what ``work`` needs; may change without changing the key.
            covers: JSON, the content identity of the rows it covers (digests, ids).
            fields: the settings that its content depends on; None for all.
        """
        return Part(digest_of({**self.identity_by(fields), "covers": covers}), payload)

    def identity_by(self, fields: Sequence[str] | None) -> dict[str, Any]:
        """The identity with some of the settings only."""
        if fields is None:
            return self.identity
        settings = {name: self.identity["settings"][name] for name in fields}
        return {**self.identity, "settings": settings}

    @property
    def scratch(self) -> Path:
        """Return a local folder of this job that survives kills.

        Raises:
            NotExclusive: The stage does not say that it keeps state.
        """
        if not self.exclusive:
            raise NotExclusive(
                f"stage {self.stage} keeps state between runs: set Stage.exclusive, so that two "
                "processes don't use it at once"
            )
        return self.store.scratch(self.key)


@dataclass(frozen=True)
class Stage:
    """A stage by its functions.

    ``plan(job)`` lists the parts (perhaps none); ``work(job, part, folder)`` writes one part's
    files into an empty folder; ``seal(job, part_folders, folder)`` writes the artifact's files,
    the part folders coming in the order of the plan. All three are module-level functions, so
    that any runner can carry them.
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
    #: The recipe's section with its settings, where that is not its name; and those of the
    #: section that it depends on, where another stage shares it (None: all).
    section: str = ""
    fields: tuple[str, ...] | None = None
    #: ``reads(settings)``: what is in the files that the settings name, as JSON for the key.
    reads: Callable[[Any], Any] | None = None
    #: ``resolve(job)``: the job before it is looked up, with names in its settings replaced by the
    #: digests of what they name; it may add inputs of other roles and set ``Job.reads``.
    resolve: Callable[[Job], Job] | None = None
    #: True for a stage that asks the outside world: it runs every time, its result decides.
    live: bool = False
    #: True for a stage that may take over from its last run with the same settings and seed,
    #: whatever the inputs were then (``Job.previous``).
    follows: bool = False
    #: True for a stage that keeps state in ``Job.scratch``: one process at a time runs a job of it.
    exclusive: bool = False
    #: The settings that have to be the same in that run; None: all of them.
    follows_fields: tuple[str, ...] | None = None
    #: ``states(job, artifact)``: the state of each item, for the catalogue's table of items. What
    #: is out of reach or waiting is asked again by a later run of the very same job.
    states: Callable[[Job, Artifact], dict[Key, ItemState]] | None = None
    #: Parts that one worker computes at once, in threads: several if they wait for the network.
    at_once: int = 1
    #: ``device(asked)``: where its work is done, ``cpu`` or ``cuda``; None for the processor alone.
    device: Callable[[str], str] | None = None


def prepared(job: Job, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of a part that ``plan`` needs before it can divide the work.

    Args:
        job: of the stage.
        key: of the part; ``make(folder)`` writes its files where it is not there yet.
        make: writes the part's files into an empty folder.
    """
    for _ in range(2):
        if not job.store.has_part(key):
            with job.store.staging() as folder:
                out = folder / "part"
                out.mkdir()
                make(out)
                job.store.publish_part(key, out)
        found = job.store.fetch_part(key)
        if found is not None:
            return found
    raise RunError(f"part {key} of {job.stage} is damaged again after it was made anew")


def no_parts(job: Job) -> list[Part]:
    """``plan`` of a stage that is one piece of work."""
    return []


def no_work(job: Job, part: Part, folder: Path) -> None:
    """``work`` of a stage without parts; never called."""
    raise NotImplementedError(f"stage {job.stage} has no parts")


def link(source: Path, target: Path) -> None:
    """Put a part's file into an artifact: a hard link where possible, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
