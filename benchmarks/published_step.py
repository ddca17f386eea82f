"""The training step of the GFM paper, implemented again from its description, for comparison.

A Swin-B student at 192 px (SimMIM) and a Swin-B teacher at 224 px up to stage 3 with its patch
merging, in one module. Gradients are recorded for all of it; the teacher's feature is detached at
the end.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "swin_base_patch4_window7_224"
#: Arguments that scale student and teacher.
SIZES = ("embed_dim", "depths", "num_heads")


class Published(nn.Module):
    """Student, decoder, projector and teacher; ``forward`` returns the loss of a batch."""

    def __init__(self, student_args: dict[str, Any]) -> None:
        super().__init__()
        sizes = {name: student_args[name] for name in SIZES if name in student_args}
        self.student = timm.create_model(
            NAME, num_classes=0, img_size=192, drop_path_rate=0.0, **student_args
        )
        self.teacher = timm.create_model(NAME, num_classes=0, drop_path_rate=0.0, **sizes)
        width = self.student.num_features  # 1024 in Swin-B
        self.token = nn.Parameter(torch.zeros(1, 1, 1, width // 8))
        self.decoder = nn.Sequential(nn.Conv2d(width, 32 * 32 * 3, 1), nn.PixelShuffle(32))
        self.projector = nn.Linear(width, width)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Compute masked L1 minus the cosine of pooled stages 3; mask [B, 6, 6] of 0 and 1."""
        x = self.student.patch_embed(images)
        hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].type_as(x)
        x = x * (1 - hidden) + self.token * hidden
        for layer in self.student.layers[:3]:
            x = layer(x)
        x = self.student.layers[3].downsample(x)
        pooled = x.mean(dim=(1, 2))
        x = self.student.norm(self.student.layers[3].blocks(x))
        taught = self.teacher.patch_embed(
            functional.interpolate(images, (224, 224), mode="bilinear", align_corners=True)
        )
        for layer in self.teacher.layers[:3]:
            taught = layer(taught)
        taught = self.teacher.layers[3].downsample(taught).mean(dim=(1, 2))
        rebuilt = self.decoder(x.permute(0, 3, 1, 2))
        pixels = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
        error = (functional.l1_loss(images, rebuilt, reduction="none") * pixels).sum()
        loss = error / (pixels.sum() + 1e-5) / 3
        cosine = functional.cosine_similarity(self.projector(pooled), taught.detach(), dim=1)
        return loss - cosine.mean()
