"""The work of ``geofm diff``, ``trace``, ``why`` and ``licences``."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from data_catalog.hashing import digest_of
from data_catalog.provenance.licences import licence_union, stated_licence
from data_catalog.provenance.lineage import (
    LineageNode,
    UnknownSample,
    ancestor,
    ancestry,
    explain_chip,
    trace_sample,
    walk_lineage,
    weights_read,
)
from data_catalog.provenance.past import last_sample_in, why_left
from flows.cli.console import out, print_json, print_table
from flows.settings import Place, open_place
from flows.versions import difference_between, print_difference


def print_diff(old: str, new: str, store: str, catalog: str, json_: bool) -> None:
    """Print what changed between two versions."""
    catalogue = open_place(store, catalog, write=False).catalogue
    difference = difference_between(catalogue, old, new)
    if json_:
        print_json(asdict(difference))
        return
    print_difference(difference)


def print_trace(ref: str, store: str, catalog: str, json_: bool) -> None:
    """Print the lineage of an artifact, or of one sample (``REF/SAMPLE``)."""
    catalogue = open_place(store, catalog, write=False).catalogue
    name, _, sample = ref.partition("/")
    artifact = catalogue.resolve(name)
    if sample:
        origin = trace_sample(catalogue, ancestor(catalogue, artifact, "dataset"), sample)
        print_json(origin) if json_ else out.print_json(data=origin)
        return
    tree = ancestry(catalogue, artifact)
    if json_:
        print_json(_as_json(tree, "", set()))
        return
    rows = []
    for node in walk_lineage(tree):
        manifest = node.artifact.manifest
        count = f"{manifest.counts.get('rows_out', 0):,}"
        digest = node.artifact.digest[:12]
        rows.append([manifest.kind, digest, count, ", ".join(_origins(node))])
    title = f"Lineage of {artifact.kind} {artifact.digest}"
    print_table(title, ["kind", "digest", "rows", "made from"], rows)


def _as_json(node: LineageNode, role: str, listed: set[str]) -> dict[str, Any]:
    """Return a lineage as JSON: each artifact in full once, then by its digest alone."""
    artifact = node.artifact
    short = {"kind": artifact.kind, "digest": artifact.digest, "role": role}
    if artifact.digest in listed:
        return short
    listed.add(artifact.digest)
    return {
        **short,
        "settings": artifact.manifest.settings,
        "counts": artifact.manifest.counts,
        "weights": weights_read(artifact),
        "parents": [_as_json(parent, name, listed) for name, parent in node.parents.items()],
    }


def _origins(node: LineageNode) -> list[str]:
    """List an artifact's inputs by role, the API of items, and published weights."""
    origins = [f"{role} {parent.artifact.digest[:12]}" for role, parent in node.parents.items()]
    if node.artifact.kind == "items":
        origins.append(str(node.artifact.manifest.settings.get("stac", "")))
    for weights in weights_read(node.artifact):
        if not weights["model"]:
            licence = stated_licence(weights["licence"])
            origins.append(f"{weights['role']} {weights['network']} (licence: {licence})")
    return origins


def print_reason(
    chip: str, within: str, picture: str, store: str, catalog: str, json_: bool
) -> None:
    """Print why a chip was kept or dropped, and draw it beside its witness."""
    place = open_place(store, catalog, write=False)
    artifact = place.catalogue.resolve(within)
    try:
        reason = explain_chip(place.catalogue, artifact, chip)
    except UnknownSample:
        reason = why_left(place.catalogue, artifact, chip) or {}
        if not reason:
            raise
        # the chip left the dataset, so its pixels are in the earlier version
        artifact = place.catalogue.get(reason["artifact"])
    else:
        if reason.get("decision") != "keep":
            reason["was_in"] = last_sample_in(place.catalogue, artifact, chip)
    reason["picture"] = _draw_pair(place, artifact, reason, picture)
    if json_:
        print_json(reason)
        return
    decision = reason.get("decision", reason.get("status"))
    out.print(f"{decision}: {reason.get('rule', reason['reason'])}")
    if reason.get("was_in"):
        left = decision == "left"
        out.print(reason["reason"] if left else f"was in {reason['was_in']}", highlight=False)
    out.print_json(data=reason)
    if reason["picture"]:
        role = chip_beside(reason)[1]
        out.print(f"the chip{f' and {role}' if role else ''}: {reason['picture']}")


def chip_beside(reason: dict[str, Any]) -> tuple[str, str]:
    """Return the id of the chip to draw beside a dropped one, and its role; empty if none."""
    if witness := str(reason.get("witness_id") or reason.get("witness") or ""):
        return witness, "its witness"
    if nearest := str(reason.get("nearest_id") or ""):
        return nearest, "the most similar kept chip"
    return "", ""


def _draw_pair(place: Place, artifact: Artifact, reason: dict[str, Any], target: str) -> str | None:
    """Draw a chip and the chip beside it; return the path of the PNG, None without pixels."""
    from geofm.reporting.pictures import side_by_side

    chips = ancestor(place.catalogue, artifact, "chips")
    png = side_by_side(
        chips, [chip for chip in (reason["chip_id"], chip_beside(reason)[0]) if chip]
    )
    if png is None:
        return None
    if target:
        try:
            Path(target).write_bytes(png)
        except OSError as error:
            raise UsageError(
                f"--picture {target} can't be written ({error.strerror}); name another file"
            ) from error
        return target
    name = f"{digest_of(reason['chip_id'])[:16]}.png"
    try:
        file = place.store.scratch(f"why-{reason['artifact'][:16]}") / name
        file.write_bytes(png)
    except OSError:  # the store is read-only
        file = Path(tempfile.mkdtemp(prefix="geofm-why-")) / name
        file.write_bytes(png)
    return str(file)


def print_licences(ref: str, store: str, catalog: str, json_: bool) -> None:
    """Print the licences in an artifact's lineage."""
    catalogue = open_place(store, catalog, write=False).catalogue
    licences = licence_union(catalogue, catalogue.resolve(ref))
    if json_:
        print_json({"licences": licences})
        return
    rows = []
    for row in licences:
        source = f"dataset {row['dataset'][:12]}" if row["dataset"] else f"weights {row['weights']}"
        counts = [str(row["samples"] or ""), str(row["items"] or "")]
        rows.append([row["licence"], row["collection"], *counts, source])
    columns = ["licence", "collection", "samples", "items", "brought by"]
    print_table("Licences", columns, rows)
