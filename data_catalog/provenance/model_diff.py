"""What changed between two models: settings, inputs, weights and software, by their manifests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.provenance.diff import Difference, compare, read_version

#: Facts of a model that are worth comparing.
FACTS = ("student", "student_init", "teacher", "parameters", "samples", "bands", "loss")


@dataclass(frozen=True)
class ModelDifference:
    """From one model to another; each value is a pair, from and to.

    Attributes:
        settings: fields of the section ``pretrain``.
        inputs: digests of the dataset, and of geofm models that were teacher or student.
        weights: digests of the files of weights by role.
        facts: what the stage noted of the model.
        software: versions.
        seed: of the training; None where it is the same.
        dataset: how the datasets differ; None where it is the same one.
    """

    settings: dict[str, tuple[Any, Any]]
    inputs: dict[str, tuple[Any, Any]]
    weights: dict[str, tuple[Any, Any]]
    facts: dict[str, tuple[Any, Any]]
    software: dict[str, tuple[Any, Any]]
    seed: tuple[int, int] | None
    dataset: Difference | None

    def summary(self) -> dict[str, Any]:
        """The difference as JSON, the dataset's in numbers."""
        pairs = {name: getattr(self, name) for name in ("settings", "inputs", "weights", "facts")}
        told = {
            name: {key: list(pair) for key, pair in found.items()} for name, found in pairs.items()
        }
        dataset = self.dataset.summary() if self.dataset else None
        return {**told, "seed": list(self.seed) if self.seed else None, "dataset": dataset}

    def headline(self) -> str:
        """``dataset +12 −3, 2 settings``."""
        told = [f"dataset {self.dataset.headline()}"] if self.dataset else []
        for name in ("settings", "weights", "software"):
            if found := getattr(self, name):
                told.append(f"{name}: {', '.join(found)}")
        return "; ".join(told) or "trained again, with nothing else changed"


def compare_models(catalogue: Catalogue, before: Artifact, after: Artifact) -> ModelDifference:
    """Compare two artifacts of kind ``model``."""
    old, new = before.manifest, after.manifest
    dataset = None
    if old.inputs["dataset"] != new.inputs["dataset"]:
        dataset = compare(
            *(read_version(catalogue, catalogue.get(m.inputs["dataset"])) for m in (old, new))
        )
    files = [
        {role: weights["sha256"] for role, weights in m.facts.get("weights", {}).items()}
        for m in (old, new)
    ]
    facts = [{name: m.facts.get(name) for name in FACTS} for m in (old, new)]
    return ModelDifference(
        settings=_changed(old.settings, new.settings),
        inputs=_changed(old.inputs, new.inputs),
        weights=_changed(*files),
        facts=_changed(*facts),
        software=_changed(old.software, new.software),
        seed=None if old.seed == new.seed else (old.seed, new.seed),
        dataset=dataset,
    )


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The names whose values differ, with both values."""
    names = sorted(old.keys() | new.keys())
    return {
        name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    }
