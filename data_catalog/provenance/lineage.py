"""Lineage: the chain of digests from an artifact back to the source assets.

ancestry        all artifacts that an artifact was made from, as a graph
ancestor        the nearest artifact of a kind
trace_sample    one sample: shard, chip and window, item, assets, licence, decision
explain_chip    the decision on one candidate chip
weights_read    the weights that a stage read
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, UnknownReference
from data_catalog.database.item_states import STAND_INS
from data_catalog.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

#: Roles of inputs that are weights: a model's lineage goes through them, a chip's does not.
WEIGHTS = ("encoder", "teacher", "student")


class UnknownSample(UsageError):
    """A sample, chip or item that the artifact does not hold."""


@dataclass(frozen=True)
class LineageNode:
    """An artifact in a lineage, its kind, and the nodes that it was made from, by role.

    A lineage is a graph: two nodes may share a parent. Each artifact is one node.
    """

    artifact: Artifact
    kind: str
    parents: dict[str, LineageNode] = field(default_factory=dict)


def ancestry(catalogue: Catalogue, artifact: Artifact) -> LineageNode:
    """Read the lineage of an artifact from the catalogue; each artifact is read once.

    Raises:
        UnknownReference: The catalogue has no row of an artifact in the lineage.
    """
    entries = catalogue.lineage([artifact.digest])
    nodes = {
        digest: LineageNode(catalogue.store.artifact(entry.kind, digest), entry.kind)
        for digest, entry in entries.items()
    }
    for digest, entry in entries.items():
        for role, parent in entry.inputs.items():
            if parent not in nodes:
                raise UnknownReference(f"no artifact {parent} in this catalogue")
            nodes[digest].parents[role] = nodes[parent]
    if artifact.digest not in nodes:
        raise UnknownReference(f"no artifact {artifact.digest} in this catalogue")
    return nodes[artifact.digest]


def walk_lineage(node: LineageNode, through_weights: bool = True) -> Iterator[LineageNode]:
    """Yield the nodes of a lineage, each artifact once, nearest first.

    Args:
        node: First node.
        through_weights: Follow models that were used as encoder, teacher or student.
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
    """Find the nearest artifact of a kind in a lineage, the artifact itself included.

    Models that were used as encoder, teacher or student are not followed.

    Raises:
        UnknownReference: The lineage has none.
    """
    root = ancestry(catalogue, artifact)
    for node in walk_lineage(root, through_weights=False):
        if node.kind == kind:
            return node.artifact
    raise UnknownReference(
        f"{root.kind} {artifact.digest[:12]} has no {kind} in its lineage; name a later stage"
    )


def trace_sample(catalogue: Catalogue, dataset: Artifact, key: str) -> dict[str, Any]:
    """Return the provenance of a sample: shard, chip, window, item, assets, settings, digests.

    Args:
        catalogue: Catalogue that records the dataset's inputs.
        dataset: Artifact of kind ``dataset``.
        key: Key of the sample (its chip id).

    Raises:
        UnknownSample: The dataset holds no such sample.
    """
    inputs = {role: catalogue.get(d) for role, d in dataset.manifest.inputs.items()}
    sample = _first_row(dataset.table("index.parquet"), "key", key, "sample")
    chips, chip_id = inputs["chips"], sample["chip_id"]
    chip = _first_row(chips.table("chips.parquet"), "chip_id", chip_id, "chip")
    item = _item_row(inputs["items"], chips, chip["item_sha256"])
    assets = [
        asset
        for asset in _rows(chips.table("assets.parquet"), "item_id", chip["item_id"])
        if asset["collection"] == chip["collection"]
    ]
    decisions = inputs["decisions"].table("decisions.parquet")
    decision = _first_row(decisions, "chip_id", chip_id, "decision")
    item_json = json.loads(item.pop("item_json"))
    window = {name: chip[name] for name in ("row", "col", "width", "height", "crs", "transform")}
    return {
        "sample": _to_json(sample),
        "dataset": dataset.digest,
        "chip": _to_json(chip),
        "window": _to_json(window),
        "decision": _to_json(decision),
        "item": _to_json(item),
        "item_properties": item_json.get("properties", {}),
        "assets": [_to_json(asset) for asset in assets],
        "licence": chip.get("licence") or item["licence"],
        "settings": {role: a.manifest.settings for role, a in inputs.items()},
        "artifacts": {role: a.digest for role, a in inputs.items()},
    }


def explain_chip(catalogue: Catalogue, artifact: Artifact, chip_id: str) -> dict[str, Any]:
    """Return the decision on a candidate chip, with its witness.

    A chip that never reached curation (overlap, nodata, quarantine) is explained by the cut.

    Raises:
        UnknownSample: No candidate has this id.
    """
    decisions = ancestor(catalogue, artifact, "decisions")
    rows = _rows(decisions.table("decisions.parquet"), "chip_id", chip_id)
    if rows:
        return {"stage": "curate", "artifact": decisions.digest, **_to_json(rows[0])}
    chips = ancestor(catalogue, decisions, "chips")
    chip = _first_row(chips.table("chips.parquet"), "chip_id", chip_id, "candidate chip")
    return {"stage": "cut", "artifact": chips.digest, **_to_json(chip)}


def _item_row(items: Artifact, chips: Artifact, sha256: str) -> dict[str, Any]:
    """Return the row of an item by its digest (ids repeat between collections).

    A stand-in that the search does not list any more has its row in the chips artifact.
    """
    rows = _rows(items.table("items.parquet"), "item_sha256", sha256)
    if not rows and any(entry.path == STAND_INS for entry in chips.manifest.files):
        rows = _rows(chips.table(STAND_INS), "item_sha256", sha256)
    if not rows:
        raise UnknownSample(f"no item {sha256} in {items.digest[:12]}")
    return rows[0]


def _first_row(frame: pd.DataFrame, column: str, value: str, what: str) -> dict[str, Any]:
    rows = _rows(frame, column, value)
    if not rows:
        raise UnknownSample(
            f"no {what} {value!r}; `geofm list` and `geofm show` list what there is"
        )
    return rows[0]


def _rows(frame: pd.DataFrame, column: str, value: str) -> list[dict[str, Any]]:
    rows = frame[frame[column] == value].to_dict("records")
    return [{str(name): cell for name, cell in row.items()} for row in rows]


def _to_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return a table row as JSON: geometries as WKT, arrays as lists."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if hasattr(value, "wkt"):
            values[name] = value.wkt
        elif hasattr(value, "tolist"):
            values[name] = value.tolist()
        else:
            values[name] = None if isinstance(value, float) and math.isnan(value) else value
    return values


def weights_read(artifact: Artifact) -> list[dict[str, str]]:
    """List the weights that an artifact's stage read: role, network, sha256, licence, model.

    ``model`` is the digest of a geofm model; it is empty for weights published elsewhere.
    """
    manifest = artifact.manifest
    return [
        {
            "role": str(role),
            "network": str(weights["network"]),
            "sha256": str(weights["sha256"]),
            "licence": str(weights["licence"]),
            "model": manifest.inputs.get(role, ""),
        }
        for role, weights in manifest.facts.get("weights", {}).items()
        if weights["origin"] != "random"
    ]
