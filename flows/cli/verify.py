"""The work of ``geofm verify``: hashes, indexes and shards, and samples that are cut again."""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.provenance.cross_check import check_rows
from data_catalog.provenance.findings import Findings
from data_catalog.provenance.verify import (
    check_artifact,
    check_chain,
    recorded_manifest,
    sealed_ancestor,
    sealed_input,
    sealed_manifest,
)
from data_catalog.storage.reach import OutOfReach
from flows.cli.console import out, print_json, progress_bars
from flows.settings import open_place

if TYPE_CHECKING:  # rasterio loads only when something is cut
    from geofm.chips.recut import Recut


@dataclass(frozen=True)
class Verification:
    """What was found about an artifact.

    Attributes:
        reference: The artifact as it was named.
        seed: Seed that chose the samples that were cut again.
        problems: What is damaged or contradicts the manifests.
        unread: What could not be read.
        samples: Samples that were cut again.
        asked: Number of samples that were to be cut again.
        deep: Whether everything that it was made from was checked, too.
    """

    reference: str
    artifact: Artifact
    seed: int
    problems: list[str]
    unread: list[str]
    samples: list[Recut]
    asked: int
    deep: bool

    @property
    def away(self) -> list[Recut]:
        """Samples whose source did not answer."""
        return [sample for sample in self.samples if sample.problem and not sample.changed]

    @property
    def identical(self) -> int:
        """Number of samples that were cut again with identical pixels."""
        return sum(sample.is_same for sample in self.samples)

    def check(self) -> None:
        """Raise an error unless everything is as sealed.

        Raises:
            CheckError: something is damaged or contradicts the manifests.
            OutOfReach: something could not be read.
            RunError: a sample could not be cut again.
        """
        lost = self.asked and not self.samples
        skipped = ["no sample was cut again, because of this"] if lost else []
        if self.problems:
            head = f"{len(self.problems)} problems in {self.reference}:"
            raise CheckError("\n  ".join([head, *self.problems, *self.unread, *skipped]))
        if self.unread:
            head = f"{self.reference} could not be read in full, so it is not verified:"
            raise OutOfReach("\n  ".join([head, *self.unread, *skipped]))
        if away := self.away:
            raise RunError(
                f"all bytes are as sealed, but {len(away)} of {len(self.samples)} samples could "
                f"not be cut again ({away[0].problem}); try again when the source answers"
            )

    def headline(self) -> str:
        """Return one line about an artifact in which nothing is wrong."""
        chain = ", whole chain" if self.deep else ""
        cut = f", {len(self.samples)} samples (--seed {self.seed}) cut again with identical pixels"
        files = len(self.artifact.manifest.files)
        return f"{self.reference}: {files} files as sealed{chain}{cut if self.samples else ''}"

    def markdown(self) -> str:
        """Return the result as Markdown for the Prefect UI."""
        rows = [
            ("digest", f"`{self.artifact.digest}`"),
            ("checked", "everything it was made from" if self.deep else "its own files"),
            ("problems", str(len(self.problems))),
            ("not read", str(len(self.unread))),
            ("samples cut again", f"{len(self.samples)}, seed {self.seed}"),
            ("identical pixels", str(self.identical)),
        ]
        lines = ["| what | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
        return "\n".join([*lines, *(f"- {text}" for text in [*self.problems, *self.unread])])


def verify(
    catalogue: Catalogue, reference: str, deep: bool, recut: int, seed: int | None
) -> Verification:
    """Verify an artifact.

    Args:
        catalogue: catalogue that records it.
        reference: the artifact.
        deep: verify everything that it was made from, too.
        recut: number of samples to cut again.
        seed: seed that chooses these samples; None draws one.
    """
    artifact = catalogue.resolve(reference)
    seed = secrets.randbelow(2**32) if seed is None else seed
    findings = _check(catalogue, artifact, deep)
    samples = _recut_if_intact(artifact, recut, seed, findings) if recut else []
    problems = findings.problems + [text for sample in samples for text in sample.differences()]
    return Verification(reference, artifact, seed, problems, findings.unread, samples, recut, deep)


def print_verification(
    ref: str, deep: bool, recut: int, seed: int | None, store: str, catalog: str, json_: bool
) -> None:
    """Verify an artifact and print the result; the arguments are those of ``verify``.

    Raises:
        CheckError, OutOfReach, RunError: as ``Verification.check``.
    """
    catalogue = open_place(store, catalog, write=False).catalogue
    with progress_bars():
        found = verify(catalogue, ref, deep, recut, seed)
    if json_:
        print_json(
            {
                "digest": found.artifact.digest,
                "problems": found.problems,
                "unread": found.unread,
                "recut": len(found.samples),
                "recut_identical": found.identical,
                "recut_away": len(found.away),
                "recut_seed": found.seed if recut else None,
            }
        )
    found.check()
    if not json_:
        out.print(found.headline())


def _check(catalogue: Catalogue, artifact: Artifact, deep: bool) -> Findings:
    """Check an artifact, with its chain if ``deep``; of a dataset also the index and shards."""
    recorded = recorded_manifest(catalogue, artifact.digest)
    findings = check_chain(catalogue, artifact) if deep else check_artifact(artifact, recorded)
    sealed = sealed_manifest(artifact, recorded)
    if sealed is None:
        return findings
    if not deep:
        findings.add(check_rows(catalogue, artifact, sealed))
    if sealed.kind == "dataset":
        from geofm.shards.check import check_index, verify_shards

        try:
            if findings.problems:
                findings.add(Findings(verify_shards(artifact, sealed)))
            else:
                findings.add(Findings(check_index(artifact)))
        except OutOfReach as error:
            findings.unread.append(str(error))
    return findings


def _recut_if_intact(artifact: Artifact, count: int, seed: int, findings: Findings) -> list[Recut]:
    """Cut samples again if nothing is damaged or unread; else add the reason to ``findings``."""
    from geofm.shards.check import check_index

    if findings.problems or findings.unread:
        return []
    try:
        dataset = sealed_ancestor(artifact, "dataset")
        chips = sealed_input(dataset, dataset.manifest, "chips")
        findings.add(check_artifact(chips, suffix=".parquet"))
        items = sealed_input(chips, chips.manifest, "items")
        findings.add(check_artifact(items, suffix=".parquet"))
        if dataset.digest != artifact.digest:
            findings.add(check_artifact(dataset, suffix=".parquet"))
        if not (findings.problems or findings.unread):
            findings.add(Findings(check_index(dataset)))
        if not (findings.problems or findings.unread):
            return _recut(dataset, chips, items, count, seed)
    except (CheckError, OutOfReach) as error:
        findings.add_error(error)
    return []


def _recut(
    dataset: Artifact, chips: Artifact, items: Artifact, count: int, seed: int
) -> list[Recut]:
    """Cut ``count`` samples of a dataset again, and compare them with its shards as well."""
    from geofm.chips.recut import recut
    from geofm.planet.catalog.serving import serving_source
    from geofm.shards.check import packed_pixels

    ids = sorted(dataset.table("index.parquet", ["chip_id"])["chip_id"])
    if not ids:
        raise UsageError(f"{dataset.digest[:12]} holds no samples to cut again")
    chosen = random.Random(seed).sample(ids, min(count, len(ids)))
    packed = packed_pixels(dataset, chosen)
    stac = items.manifest.settings.get("stac")
    if not isinstance(stac, str):
        raise CheckError(f"the manifest of items {items.digest[:12]} names no settings.stac")
    with serving_source(stac):
        samples = recut(chips, items, chosen)
        return [replace(sample, packed=packed[sample.chip_id]) for sample in samples]
