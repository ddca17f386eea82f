"""The same network, faster on a CPU: batch norms folded into convolutions, channels last.

Folding is exact in real numbers; in float32 features move by about 1e-5, which float16 storage
hides. Measured on one core at 128 px: 45 to 60 chips/s before, 170 after (EfficientNet-Lite0).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from geofm.encoders import Encoder, encode

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
    before: tuple[str, nn.Conv2d] | None = None
    for name, layer in list(module.named_children()):
        if isinstance(layer, nn.BatchNorm2d) and before is not None:
            setattr(module, before[0], fuse_conv_bn_eval(before[1], layer))
            rest = [layer.drop, layer.act] if isinstance(layer, BatchNormAct2d) else []
            setattr(module, name, nn.Sequential(*rest))
        before = (name, layer) if isinstance(layer, nn.Conv2d) else None
        _fold(layer)
