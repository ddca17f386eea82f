"""The three networks of a score table: frozen teacher, random student, trained model.

The teacher is the first row, because a student that does not beat the network it was distilled from
has no advantage but its size. The random student is the lower bound that pretraining must exceed.
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

ModelRole = Literal["teacher", "random", "model"]
#: Order of the rows in every table.
ROLE_ORDER: tuple[ModelRole, ...] = ("teacher", "random", "model")

#: A function from images (N, bands, S, S) to features (N, D) by name.
FeatureExtractor = Callable[["torch.Tensor"], Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class EvaluatedModel:
    """A network under evaluation.

    Attributes:
        role: Row of the table.
        label: Description of the row.
        bands: Bands that the network sees.
        fill: Unit-space value of each band, used if a task lacks the band.
        size_px: Edge of the images that the network sees.
        extract: Function from unit pixels, shape (N, bands, size_px, size_px), on any device, to
            features of shape (N, D) by name: ``final``, and for students ``distilled``.
    """

    role: ModelRole
    label: str
    bands: tuple[str, ...]
    fill: tuple[float, ...]
    size_px: int
    extract: FeatureExtractor


def list_roles(model: Artifact, teacher: Weights | None = None) -> list[ModelRole]:
    """List the rows of a model's table, in order.

    A model that was trained without distillation is compared with its recipe's teacher only if the
    teacher's weights can be loaded, because its training did not need them.
    """
    if float(model.manifest.settings["alpha"]) == 0:
        try:
            load_encoder(teacher or teacher_name(model))
        except WeightsMissing as error:
            log.warning("no row for a frozen teacher: %s", error)
            return [role for role in ROLE_ORDER if role != "teacher"]
    return list(ROLE_ORDER)


def teacher_name(model: Artifact) -> str:
    """The setting ``teacher`` in the model's manifest."""
    return str(model.manifest.settings["teacher"])


def describe_role(model: Artifact, role: ModelRole) -> str:
    """Label of a row of the table."""
    if role == "teacher":
        return f"frozen teacher, {_network_name(model, 'teacher')}"
    settings = model.manifest.settings
    if role == "random":
        return f"random init, {_network_name(model, 'student')}"
    parts = []
    if float(settings["mim_weight"]) > 0:
        parts.append("masked modelling")
    if float(settings["alpha"]) > 0:
        parts.append("distillation")
    return f"this model, {' + '.join(parts)}"


def _network_name(model: Artifact, role: str) -> str:
    """Name of the teacher's or student's network; for a geofm model with its digest."""
    manifest = model.manifest
    name = str(manifest.settings[role]).partition("@")[0]
    if role in manifest.inputs:
        return f"{manifest.facts[role] or name} of model {manifest.inputs[role][:12]}"
    return name


def model_bands(model: Artifact) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Bands that a model sees, and the mean of each in unit space, which fills a missing band."""
    config = model.json("config.json")
    means = config["pretrained_cfg"]["mean"]
    return tuple(config["geofm"]["bands"]), tuple(float(mean) for mean in means)


def role_key(model: Artifact, role: ModelRole, teacher: Weights | None = None) -> list[Any]:
    """Everything that the features of a row depend on, for the key of its part.

    The teacher's key does not contain the model, so its part is reused for all of its students.
    """
    facts, settings = model.manifest.facts, model.manifest.settings
    if role == "teacher":
        bands, fill = model_bands(model)
        size = settings["teacher_size_px"]
        weights = teacher.sha256 if teacher else facts.get("teacher_weights_sha256", "")
        return [role, teacher_name(model), weights, size, [*bands], [*fill]]
    return [role, model.digest]


def load_evaluated_model(
    model: Artifact, role: ModelRole, device: str, teacher: Weights | None = None
) -> EvaluatedModel:
    """Load the network of a row onto a device.

    The random student has the seed of training, so it is the network before its first step.

    Args:
        model: An artifact of kind ``model``.
        role: Row of the table.
        device: ``cpu`` or ``cuda``.
        teacher: Resolved weights of the teacher; None: resolve the name in the manifest.
    """
    bands, fill = model_bands(model)
    label = describe_role(model, role)
    if role == "teacher":
        size = int(model.manifest.settings["teacher_size_px"])
        rgb = rgb_index(bands)
        rgb_bands, rgb_fill = tuple(bands[i] for i in rgb), tuple(fill[i] for i in rgb)
        extract = _teacher_extractor(teacher or teacher_name(model), size, device)
        return EvaluatedModel(role, label, rgb_bands, rgb_fill, size, extract)
    size = int(model.json("config.json")["pretrained_cfg"]["input_size"][-1])
    return EvaluatedModel(role, label, bands, fill, size, _student_extractor(model, role, device))


def _teacher_extractor(weights: Weights | str, size_px: int, device: str) -> FeatureExtractor:
    encoder = load_encoder(weights, size_px=size_px)
    encoder.model.to(device)

    def extract(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {"final": encode(encoder, images.to(device).clamp(0, 1))}

    return extract


def _student_extractor(model: Artifact, role: ModelRole, device: str) -> FeatureExtractor:
    from geofm.pretraining import features, load_model, random_model

    trained, config = load_model(model)
    network = trained if role == "model" else random_model(config, model.manifest.seed)
    network = network.to(device).eval()

    def extract(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            pooled: Mapping[str, torch.Tensor] = features(network, config, images.to(device))
        return pooled

    return extract
