"""The three things a table of scores compares: frozen teacher, random student, trained student.

The teacher is row 1 because a student that does not beat the network it was distilled from has
gained nothing but size; the random student is the floor that pretraining has to rise above.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_catalog.artifact import Artifact
from geofm.embeddings.encoders import encode, load_encoder
from geofm.embeddings.weights import Weights, WeightsMissing
from geofm.raster.radiometry import rgb_index
from geofm.runtime.native import torch

log = logging.getLogger("geofm.evaluation")

Who = Literal["teacher", "random", "model"]
#: The order of the rows in every table.
ORDER: tuple[Who, ...] = ("teacher", "random", "model")

Extract = Callable[["torch.Tensor"], Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features.

    ``extract`` maps unit pixels [N, len(bands), size_px, size_px] on any device to features
    [N, D] by name: ``final``, and ``distilled`` of students. ``fill`` (unit) stands in for a band
    that a task lacks.
    """

    who: Who
    label: str
    bands: tuple[str, ...]
    fill: tuple[float, ...]
    size_px: int
    extract: Extract


def teacher_name(model: Artifact) -> str:
    """The frozen teacher of the model's recipe, as the manifest has it."""
    return str(model.manifest.settings["teacher"])


def subjects_of(model: Artifact, teacher: Weights | None = None) -> list[Who]:
    """The rows of a model's table, in their order.

    A model that was trained without distillation is still compared with its recipe's teacher,
    but only where that teacher's weights can be had: training never needed them.
    """
    if float(model.manifest.settings["alpha"]) == 0:
        try:
            load_encoder(teacher or teacher_name(model))
        except WeightsMissing as error:
            log.warning("no row for a frozen teacher: %s", error)
            return [who for who in ORDER if who != "teacher"]
    return list(ORDER)


def describe(model: Artifact, who: Who) -> str:
    """What a row of the table is, in words."""
    if who == "teacher":
        return f"frozen teacher, {_named(model, 'teacher')}"
    settings = model.manifest.settings
    if who == "random":
        return f"random init, {_named(model, 'student')}"
    parts = []
    if float(settings["mim_weight"]) > 0:
        parts.append("masked modelling")
    if float(settings["alpha"]) > 0:
        parts.append("distillation")
    return f"this model, {' + '.join(parts)}"


def _named(model: Artifact, role: str) -> str:
    """The network of a role; of a geofm model with the first digits of its digest."""
    manifest = model.manifest
    named = str(manifest.settings[role]).partition("@")[0]
    if role in manifest.inputs:
        return f"{manifest.facts[role] or named} of model {manifest.inputs[role][:12]}"
    return named


def bands_of(model: Artifact) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The bands a model sees, and each one's mean in unit space: it stands in where one lacks."""
    config = model.json("config.json")
    means = config["pretrained_cfg"]["mean"]
    return tuple(config["geofm"]["bands"]), tuple(float(mean) for mean in means)


def covers(model: Artifact, who: Who, teacher: Weights | None = None) -> list[Any]:
    """What a subject's features depend on: the key of its part of the work.

    A teacher's rows are found again for every model that was distilled from it.
    """
    facts, settings = model.manifest.facts, model.manifest.settings
    if who == "teacher":
        bands, fill = bands_of(model)
        size = settings["teacher_size_px"]
        weights = teacher.sha256 if teacher else facts.get("teacher_weights_sha256", "")
        return [who, teacher_name(model), weights, size, [*bands], [*fill]]
    return [who, model.digest]


def load_subject(model: Artifact, who: Who, device: str, teacher: Weights | None = None) -> Subject:
    """Build a subject on a device.

    Args:
        model: an artifact of kind ``model``.
        who: the row of the table.
        device: ``cpu`` or ``cuda``.
        teacher: the teacher's weights, if they are resolved already.

    The random student starts from the seed that training started from: it is the very network
    that the model was before its first step.
    """
    bands, fill = bands_of(model)
    label = describe(model, who)
    if who == "teacher":
        size = int(model.manifest.settings["teacher_size_px"])
        rgb = rgb_index(bands)
        wanted = tuple(bands[i] for i in rgb)
        extract = _teacher(teacher or teacher_name(model), size, device)
        return Subject(who, label, wanted, tuple(fill[i] for i in rgb), size, extract)
    size = int(model.json("config.json")["pretrained_cfg"]["input_size"][-1])
    return Subject(who, label, bands, fill, size, _student(model, who, device))


def _teacher(weights: Weights | str, size_px: int, device: str) -> Extract:
    encoder = load_encoder(weights, size_px=size_px)
    encoder.model.to(device)

    def extract(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {"final": encode(encoder, images.to(device).clamp(0, 1))}

    return extract


def _student(model: Artifact, who: Who, device: str) -> Extract:
    from geofm.pretraining import features, load_model, random_model

    trained, config = load_model(model)
    network = trained if who == "model" else random_model(config, model.manifest.seed)
    network = network.to(device).eval()

    def extract(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            found: Mapping[str, torch.Tensor] = features(network, config, images.to(device))
        return found

    return extract
