"""The work of ``geofm verify``: hashes, indexes and shards, and samples that are cut again."""

from __future__ import annotations

import random
import secrets
from dataclasses import replace
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


def print_verification(
    ref: str, deep: bool, recut: int, seed: int | None, store: str, catalog: str, json_: bool
) -> None:
    """Verify an artifact and print the result.

    Args:
        ref: the artifact.
        deep: verify everything that it was made from, too.
        recut: number of samples to cut again.
        seed: seed that chooses these samples; None draws one.
        store: store address, or empty.
        catalog: catalogue address, or empty.
        json_: print one JSON object instead of a line.

    Raises:
        CheckError: something is damaged or contradicts the manifests.
        OutOfReach: something could not be read.
        RunError: a sample could not be cut again.
    """
    catalogue = open_place(store, catalog, write=False).catalogue
    artifact = catalogue.resolve(ref)
    seed = secrets.randbelow(2**32) if seed is None else seed
    with progress_bars():
        findings = _check(catalogue, artifact, deep)
        samples = _recut_if_intact(artifact, recut, seed, findings) if recut else []
    identical = [sample for sample in samples if sample.is_same]
    unread = [sample for sample in samples if sample.problem and not sample.changed]
    problems = findings.problems + [text for sample in samples for text in sample.differences()]
    skipped = ["no sample was cut again, because of this"] if recut and not samples else []
    if json_:
        print_json(
            {
                "digest": artifact.digest,
                "problems": problems,
                "unread": findings.unread,
                "recut": len(samples),
                "recut_identical": len(identical),
                "recut_away": len(unread),
                "recut_seed": seed if recut else None,
            }
        )
    if problems:
        lines = [f"{len(problems)} problems in {ref}:", *problems, *findings.unread, *skipped]
        raise CheckError("\n  ".join(lines))
    if findings.unread:
        head = f"{ref} could not be read in full, so it is not verified:"
        raise OutOfReach("\n  ".join([head, *findings.unread, *skipped]))
    if unread:
        raise RunError(
            f"all bytes are as sealed, but {len(unread)} of {len(samples)} samples could not be "
            f"cut again ({unread[0].problem}); try again when the source answers"
        )
    if json_:
        return
    chain = ", whole chain" if deep else ""
    cut = f", {len(samples)} samples (--seed {seed}) cut again with identical pixels"
    files = len(artifact.manifest.files)
    out.print(f"{ref}: {files} files as sealed{chain}{cut if samples else ''}")


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
