"""Compare the paper's published code with geofm, from equal weights on equal batches, step by step.

The script needs a checkout of github.com/mmendiet/GFM (commit 4dd248e was used), which is not part
of geofm. The published student, decoder, projector and teacher get geofm's weights under their own
names. Each side has its own AdamW with its own parameter groups. Images are smooth random fields,
trained with a warm-up. Rows: the loss of each side at every step; the last columns are images per
second and, on a GPU, the peak memory of each side alone. The published apex mixed precision is left
out: both sides run in float32.

    python benchmarks/published_code.py --repo ../GFM                           a small Swin, CPU
    python benchmarks/published_code.py --repo ../GFM --swin-b --device cuda --batch 64
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import sys
import time
import types
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import scipy.interpolate  # noqa: F401  the published code imports a name of it
import timm.layers
import torch
from torch import Tensor, nn

from geofm.config.recipe_book import load_recipe
from geofm.embeddings.encoders import load_encoder
from geofm.pretraining.objective import Pretrainer, build_pretrainer
from geofm.pretraining.optimiser import build_optimiser, set_learning_rate
from geofm.pretraining.teacher import Teacher, make_teacher, teacher_features

RESULTS = Path(__file__).parent / "results" / "published_code.csv"
SMALL = {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
PEAK_LR, WARMUP = 2e-4, 20


def main() -> None:
    """Run both sides in turn at every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repo", type=Path, required=True, help="checkout of the published code")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--swin-b", action="store_true", help="the paper's size")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes: dict[str, Any] = SWIN_B if options.swin_b else SMALL
    ours, teacher = build_ours(sizes)
    theirs = build_theirs(options.repo, sizes, ours, teacher)
    ours.to(options.device)
    theirs.to(options.device)
    teacher.encoder.model.to(options.device)
    sides = {
        "published": Side(theirs, groups_of(theirs), lambda x, rgb, mask: theirs(x, fine(mask))),
        "ours": Side(
            ours, None, lambda x, rgb, mask: ours(x, mask, teacher_features(teacher, rgb)).loss
        ),
    }
    rows = []
    for step in range(options.steps):
        batch = pictures(step, options.batch, teacher, options.device)
        losses = {name: side.step(step, *batch) for name, side in sides.items()}
        rows.append({"step": step, **losses, "difference": losses["ours"] - losses["published"]})
        if step % 20 == 0:
            print(rows[-1], file=sys.stderr, flush=True)
    write(options, rows, sides)


class Side:
    """A module with its optimiser, its time and its memory."""

    def __init__(self, module: Any, groups: Any, loss: Any) -> None:
        self.module, self.loss, self.seconds, self.peak = module, loss, 0.0, 0
        if groups is None:
            self.optimiser = build_optimiser(module, load_recipe("gfm-swin-b").pretrain)
        else:
            self.optimiser = torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.999), eps=1e-8)
        self.learning = [p for p in module.parameters() if p.requires_grad]

    def step(self, step: int, images: Tensor, rgb: Tensor, mask: Tensor) -> float:
        """Take a step; return the loss before the update."""
        gpu = images.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        set_learning_rate(self.optimiser, PEAK_LR * min(1.0, (step + 1) / WARMUP))
        loss = self.loss(images, rgb, mask)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learning, 5.0)
        self.optimiser.step()
        value = loss.item()
        if step:  # the first step warms up
            self.seconds += time.perf_counter() - started
        if gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return value


def build_ours(sizes: dict[str, Any]) -> tuple[Pretrainer, Teacher]:
    """Build student and teacher of ``gfm-swin-b`` in this size, untrained."""
    arguments = {**sizes, "window_size": 6}
    settings = load_recipe("gfm-swin-b").pretrain.model_copy(update={"student_args": arguments})
    module = build_pretrainer(settings, 3, 0, sizes["embed_dim"] * 8).train()
    encoder = load_encoder("random:swin_base_patch4_window7_224", seed=1, size_px=224)
    torch.manual_seed(1)
    frozen = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **sizes)
    encoder = replace(encoder, model=frozen.eval().requires_grad_(False))
    return module, make_teacher(encoder, 3, 224)


def build_theirs(repo: Path, sizes: dict[str, Any], ours: Pretrainer, teacher: Teacher) -> Any:
    """Build the published modules with our weights; the path's name freezes the teacher."""
    old = types.ModuleType("timm.models.layers")  # location of these modules in timm of 2022
    for name in ("DropPath", "to_2tuple", "trunc_normal_"):
        setattr(old, name, getattr(timm.layers, name))
    sys.modules["timm.models.layers"] = old
    models = types.ModuleType("models")  # the package without the imports of its __init__
    models.__path__ = [str(repo / "models")]
    sys.modules["models"] = models
    from models import teacher as published

    same = {"patch_size": 4, "in_chans": 3, "num_classes": 0, "qkv_bias": True,
            "drop_path_rate": 0.0, **sizes}  # fmt: skip
    student = published.SwinTransformerForSimMIM(img_size=192, window_size=6, **same)
    frozen = published.SwinTeacher(1.0, img_size=224, window_size=7, **same)
    module = published.SimMIM(student, 32, frozen)
    token: Any = ours.student.mask_token
    give(student, {**ours.student.backbone.state_dict(), "mask_token": token.data.flatten(0, 1)})
    give(frozen, teacher.encoder.model.state_dict())
    decoder: Any = ours.decoder
    module.decoder[0].load_state_dict(decoder.pixels.state_dict())
    module.projector.load_state_dict(ours.projector.state_dict())  # type: ignore[union-attr]
    frozen.requires_grad_(False)
    return module.train()


def give(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy timm's weights. Patch merging starts timm's next stage, and ends a published stage."""
    renamed = {}
    for name, value in state.items():
        found = re.match(r"layers\.(\d)\.downsample\.(.*)", name)
        moved = f"layers.{int(found[1]) - 1}.downsample.{found[2]}" if found else name
        renamed[moved] = value
    left = module.load_state_dict(renamed, strict=False)
    computed = [n for n in left.missing_keys if not n.endswith(("position_index", "attn_mask"))]
    assert not left.unexpected_keys, left
    assert not computed, computed


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return the published groups: no decay of 1-D tensors, mask token, relative positions."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    spared = ("mask_token", "relative_position_bias_table", ".bias")
    plain = [p for n, p in named if p.ndim == 1 or n.endswith(spared)]
    chosen = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def fine(mask: Tensor) -> Tensor:
    """Repeat a mask of 32 px patches for each token."""
    return mask.repeat_interleave(8, 1).repeat_interleave(8, 2).int()


def pictures(step: int, batch: int, teacher: Teacher, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Make normalised images, the same in 0 to 1, and masks of 22 of 36 patches."""
    generator = torch.Generator().manual_seed(step)
    rough = torch.rand(batch, 3, 12, 12, generator=generator)
    rgb = nn.functional.interpolate(rough, (192, 192), mode="bilinear").clamp(0, 1)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (teacher.encoder.mean, teacher.encoder.std)
    )
    mask = torch.rand(batch, 36, generator=generator).argsort(1).argsort(1) < 22
    batch_of = ((rgb - mean) / std, rgb, mask.reshape(batch, 6, 6))
    images, rgb, mask = (tensor.to(device) for tensor in batch_of)
    return images, rgb, mask


def write(options: argparse.Namespace, rows: list[dict[str, Any]], sides: dict[str, Side]) -> None:
    """Write every tenth step and the extremes as CSV."""
    worst = max(rows, key=lambda row: abs(row["difference"]))
    kept = [row for row in rows if row["step"] % 10 == 0 or row is worst or row is rows[-1]]
    about: dict[str, Any] = {
        "size": "swin-b" if options.swin_b else "small",
        "batch": options.batch,
    }
    for name, side in sides.items():
        rate = (options.steps - 1) * options.batch / max(side.seconds, 1e-9)
        about[f"{name}_images_per_s"] = round(rate, 2)
        about[f"{name}_peak_mib"] = side.peak >> 20 or ""
    about |= {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "machine": platform.machine(),
        "versions": " ".join(f"{p} {version(p)}" for p in ("geofm", "torch", "timm")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **about} for row in kept)
    print(f"{len(rows)} steps, largest difference {worst['difference']:.2e} at {worst['step']}")


if __name__ == "__main__":
    main()
