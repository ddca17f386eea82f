"""The difference of two models: settings, inputs, weights and software, from their manifests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.provenance.diff import Difference, compare, read_version

#: Facts of a model that are compared.
FACTS = ("student", "student_init", "teacher", "parameters", "samples", "bands", "loss")


@dataclass(frozen=True)
class ModelDifference:
    """The difference from an old model to a new one; each value is a pair of old and new.

    Attributes:
        settings: Fields of the section ``pretrain``.
        inputs: Digests of the dataset, and of geofm models that were teacher or student.
        weights: Digests of the files of weights by role.
        facts: Facts of the manifest (``FACTS``).
        software: Versions of packages.
        seed: Seed of the training; None if it is the same.
        dataset: Difference of the datasets; None if it is the same dataset.
    """

    settings: dict[str, tuple[Any, Any]]
    inputs: dict[str, tuple[Any, Any]]
    weights: dict[str, tuple[Any, Any]]
    facts: dict[str, tuple[Any, Any]]
    software: dict[str, tuple[Any, Any]]
    seed: tuple[int, int] | None
    dataset: Difference | None

    def summary(self) -> dict[str, Any]:
        """Return the difference as JSON, that of the datasets in numbers."""
        changes = {
            name: {key: list(pair) for key, pair in getattr(self, name).items()}
            for name in ("settings", "inputs", "weights", "facts")
        }
        dataset = self.dataset.summary() if self.dataset else None
        return {**changes, "seed": list(self.seed) if self.seed else None, "dataset": dataset}

    def headline(self) -> str:
        """Return one line for people: ``dataset +12 −3; settings: epochs, seed``."""
        changes = [f"dataset {self.dataset.headline()}"] if self.dataset else []
        for name in ("settings", "weights", "software"):
            if pairs := getattr(self, name):
                changes.append(f"{name}: {', '.join(pairs)}")
        return "; ".join(changes) or "trained again, with nothing else changed"


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
    """Return the names whose values differ, with both values."""
    names = sorted(old.keys() | new.keys())
    return {
        name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    }
