"""Where things come from: the chain of digests, walked from weights back to source assets."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, UnknownReference
from data_catalog.database.item_states import STAND_INS
from data_catalog.errors import UsageError
from data_catalog.tables import records


class UnknownSample(UsageError):
    """A sample, chip or item that the artifact does not hold."""


@dataclass(frozen=True)
class Node:
    """An artifact in a lineage, and what it was made from, by role.

    A lineage is a graph: two nodes may have one parent. Each artifact is one node.
    """

    artifact: Artifact
    parents: dict[str, Node] = field(default_factory=dict)


#: Roles of inputs that are weights: a model's lineage goes through them, a chip's does not.
WEIGHTS = ("encoder", "teacher", "student")
#: Weights whose training data went into a model; an encoder only decides what is selected.
LEARNED_FROM = ("teacher", "student")


def ancestry(catalogue: Catalogue, artifact: Artifact) -> Node:
    """Everything an artifact was made from, as the catalogue has it; each artifact is read once."""
    root = Node(artifact)
    nodes, queue = {artifact.digest: root}, deque([root])
    while queue:
        node = queue.popleft()
        for role, digest in catalogue.parents(node.artifact.digest).items():
            if digest not in nodes:
                nodes[digest] = Node(catalogue.get(digest))
                queue.append(nodes[digest])
            node.parents[role] = nodes[digest]
    return root


def walk(node: Node, through_weights: bool = True) -> Iterator[Node]:
    """A lineage's nodes, each artifact once, nearest first.

    Args:
        node: where it begins.
        through_weights: whether models are followed that were read as encoder, teacher or student.
    """
    seen, queue = {node.artifact.digest}, deque([node])
    while queue:
        current = queue.popleft()
        yield current
        for role, parent in current.parents.items():
            followed = through_weights or role not in WEIGHTS
            if followed and parent.artifact.digest not in seen:
                seen.add(parent.artifact.digest)
                queue.append(parent)


def ancestor(catalogue: Catalogue, artifact: Artifact, kind: str) -> Artifact:
    """The nearest artifact of this kind in a lineage, the artifact itself included.

    Raises:
        UnknownReference: the lineage has none.
    """
    for node in walk(ancestry(catalogue, artifact), through_weights=False):
        if catalogue.kind(node.artifact.digest) == kind:
            return node.artifact
    mine = catalogue.kind(artifact.digest)
    raise UnknownReference(
        f"{mine} {artifact.digest[:12]} has no {kind} in its lineage; name a later stage"
    )


def _rows(frame: pd.DataFrame, column: str, value: str) -> list[dict[str, Any]]:
    return records(pd.DataFrame(frame[frame[column] == value]))


def _row(frame: pd.DataFrame, column: str, value: str, what: str) -> dict[str, Any]:
    found = _rows(frame, column, value)
    if not found:
        raise UnknownSample(f"no {what} {value!r}; `geofm list` and `geofm show` say what there is")
    return found[0]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A table row as JSON: geometries as WKT, arrays as lists."""
    plain: dict[str, Any] = {}
    for name, value in row.items():
        if hasattr(value, "wkt"):
            plain[name] = value.wkt
        elif hasattr(value, "tolist"):
            plain[name] = value.tolist()
        else:
            plain[name] = None if isinstance(value, float) and math.isnan(value) else value
    return plain


def trace_sample(catalogue: Catalogue, dataset: Artifact, key: str) -> dict[str, Any]:
    """One sample's whole provenance: shard, chip and window, scene, assets, settings, digests.

    Args:
        catalogue: the record that knows the dataset's inputs.
        dataset: an artifact of kind ``dataset``.
        key: the sample's key (its chip id).

    Raises:
        UnknownSample: the dataset holds no such sample.
    """
    inputs = {role: catalogue.get(d) for role, d in dataset.manifest.inputs.items()}
    sample = _row(dataset.table("index.parquet"), "key", key, "sample")
    chips = inputs["chips"]
    chip = _row(chips.table("chips.parquet"), "chip_id", sample["chip_id"], "chip")
    item = _item(inputs["items"], chips, chip["item_sha256"])
    used = _rows(chips.table("assets.parquet"), "item_id", chip["item_id"])
    assets = [a for a in used if a["collection"] == chip["collection"]]
    decision = _row(
        inputs["decisions"].table("decisions.parquet"), "chip_id", sample["chip_id"], "decision"
    )
    item_json = json.loads(item.pop("item_json"))
    window = {name: chip[name] for name in ("row", "col", "width", "height", "crs", "transform")}
    return {
        "sample": _plain(sample),
        "dataset": dataset.digest,
        "chip": _plain(chip),
        "window": _plain(window),
        "decision": _plain(decision),
        "item": _plain(item),
        "item_properties": item_json.get("properties", {}),
        "assets": [_plain(asset) for asset in assets],
        "licence": chip.get("licence") or item["licence"],
        "settings": {role: a.manifest.settings for role, a in inputs.items()},
        "artifacts": {role: a.digest for role, a in inputs.items()},
    }


def _item(items: Artifact, chips: Artifact, sha256: str) -> dict[str, Any]:
    """The row of an item by its digest (ids repeat between collections).

    A stand-in that the search does not list any more has its row in the chips artifact.
    """
    found = _rows(items.table("items.parquet"), "item_sha256", sha256)
    if not found and any(entry.path == STAND_INS for entry in chips.manifest.files):
        found = _rows(chips.table(STAND_INS), "item_sha256", sha256)
    if not found:
        raise UnknownSample(f"no item {sha256} in {items.digest[:12]}")
    return found[0]


def why(catalogue: Catalogue, artifact: Artifact, chip_id: str) -> dict[str, Any]:
    """The decision on one candidate chip, with its witness.

    A chip that never reached curation (overlap, nodata, quarantine) is explained by the cut.

    Raises:
        UnknownSample: no candidate has this id.
    """
    decisions = ancestor(catalogue, artifact, "decisions")
    found = _rows(decisions.table("decisions.parquet"), "chip_id", chip_id)
    if found:
        return {"stage": "curate", "artifact": decisions.digest, **_plain(found[0])}
    chips = ancestor(catalogue, decisions, "chips")
    chip = _plain(_row(chips.table("chips.parquet"), "chip_id", chip_id, "candidate chip"))
    return {"stage": "cut", "artifact": chips.digest, **chip}


def licence_union(catalogue: Catalogue, artifact: Artifact) -> list[dict[str, Any]]:
    """Every licence in the lineage, with what brings it.

    One row for each licence and collection of each dataset, those of models that were read as
    encoder, teacher or student included; and one row for each teacher's and initial student's
    weights that are published elsewhere. ``dataset`` and ``weights`` say which.
    """
    rows: list[dict[str, Any]] = []
    own = ancestor(catalogue, artifact, "dataset")
    nodes = [node.artifact for node in walk(ancestry(catalogue, artifact))]
    datasets = [a for a in nodes if catalogue.kind(a.digest) == "dataset"]
    for dataset in sorted(datasets, key=lambda a: a.digest != own.digest):
        samples = dataset.table("samples.parquet", ["licence", "collection", "item_id"])
        groups = samples.groupby(["licence", "collection"], sort=True, dropna=False)
        rows += [
            {"licence": str(licence), "collection": str(collection), "samples": len(found),
             "items": int(found["item_id"].nunique()), "dataset": dataset.digest, "weights": ""}
            for (licence, collection), found in groups
        ]  # fmt: skip
    for made in nodes:
        for row in weights_read(made):
            terms = row["licence"] or "not stated"
            read = row["role"] in LEARNED_FROM and not row["model"]
            known = {(r["licence"], r["weights"]) for r in rows}
            if read and (terms, row["network"]) not in known:
                rows.append(
                    {"licence": terms, "collection": "", "samples": 0, "items": 0,
                     "dataset": "", "weights": row["network"]}
                )  # fmt: skip
    return rows


def weights_read(artifact: Artifact) -> list[dict[str, str]]:
    """The weights that an artifact's stage read: role, network, sha256, licence, model."""
    manifest = artifact.manifest
    found = manifest.facts.get("weights", {})
    return [
        {
            "role": str(role),
            "network": str(weights["network"]),
            "sha256": str(weights["sha256"]),
            "licence": str(weights["licence"]),
            "model": manifest.inputs.get(role, ""),
        }
        for role, weights in found.items()
        if weights["origin"] != "random"
    ]
