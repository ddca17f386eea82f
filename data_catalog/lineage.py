"""Where things come from: the chain of digests, walked from weights back to source assets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, UnknownReference
from data_catalog.errors import UsageError
from data_catalog.tables import records


class UnknownSample(UsageError):
    """A sample, chip or item that the artifact does not hold."""


@dataclass(frozen=True)
class Node:
    """An artifact in a lineage: at which depth, in which role, made from what."""

    artifact: Artifact
    role: str
    depth: int
    parents: list[Node] = field(default_factory=list)


def ancestry(catalogue: Catalogue, artifact: Artifact, role: str = "", depth: int = 0) -> Node:
    """The tree of everything an artifact was made from."""
    inputs = catalogue.parents(artifact.digest)
    parents = [ancestry(catalogue, catalogue.get(d), r, depth + 1) for r, d in inputs.items()]
    return Node(artifact, role, depth, parents)


def walk(node: Node) -> Iterator[Node]:
    """A lineage's nodes, each artifact once, nearest first."""
    seen: set[str] = set()
    queue = [node]
    while queue:
        current = queue.pop(0)
        if current.artifact.digest not in seen:
            seen.add(current.artifact.digest)
            yield current
        queue.extend(current.parents)


def ancestor(catalogue: Catalogue, artifact: Artifact, kind: str) -> Artifact:
    """The nearest artifact of this kind in a lineage, the artifact itself included.

    Raises:
        UnknownReference: the lineage has none.
    """
    for node in walk(ancestry(catalogue, artifact)):
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
    items = inputs["items"].table("items.parquet")  # ids repeat between collections, digests don't
    item = _row(items, "item_sha256", chip["item_sha256"], "item")
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
    """Every licence in the lineage with the collections that bring it and their chip counts."""
    dataset = ancestor(catalogue, artifact, "dataset")
    samples = dataset.table("samples.parquet", ["licence", "collection", "item_id"])
    groups = samples.groupby(["licence", "collection"], sort=True, dropna=False)
    return [
        {"licence": str(licence), "collection": str(collection), "samples": len(rows),
         "items": int(rows["item_id"].nunique())}
        for (licence, collection), rows in groups
    ]  # fmt: skip
