"""Settings of pretraining: the objective of GFM, its student, teacher and optimisation."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from geofm.section import Section

#: What a run is called and how it is carried out, not what it computes (but for last bits): no
#: part of its identity.
EXECUTION = (
    "name", "checkpoint_steps", "spike_steps", "microbatch", "activation_checkpointing", "compile",
)  # fmt: skip


class PretrainSettings(Section):
    """The GFM objective (Mendieta et al. 2023, section 4) and its optimisation."""

    name: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9._-]{0,63})?$",
        description="Name under which the model is published (name@date); no name of a timm model. "
        "Empty: the recipe's name and `-model`.",
    )
    student: str = Field(
        "swin_base_patch4_window7_224",
        description="timm backbone to pretrain: Swin, ViT, Hiera, or any that gives feature maps. "
        "With student_init pretrained also NAME@FILE.safetensors, or a geofm model by NAME, "
        "NAME@VERSION or digest.",
    )
    student_args: dict[str, int | float | str | list[int]] = Field(
        {}, description="Extra arguments of the timm model, e.g. embed_dim, depths, window_size."
    )
    student_init: Literal["random", "pretrained"] = Field(
        "random", description="The paper starts from random weights (section 5.2)."
    )
    teacher: str = Field(
        "swin_base_patch4_window7_224.ms_in22k",
        description="Frozen teacher: any timm model, `efficientnet-lite0` (offline), "
        "NAME@FILE.safetensors, or a geofm model by NAME, NAME@VERSION or digest. It sees "
        "red, green and blue; without them the first three bands, or one band three times.",
    )
    teacher_size_px: int = Field(224, ge=32, le=1024, description="Teacher's input edge (pixels).")
    teacher_stage: int | None = Field(
        None, ge=1, le=4, description="Stage that teaches; empty: distill_stage."
    )
    statistics: Literal["dataset", "imagenet"] = Field(
        "dataset",
        description="Mean and deviation that the student's input and target are normalised by: "
        "the dataset's own per band, or ImageNet's (red, green and blue alone; the paper).",
    )
    teacher_features: Literal["live", "once"] = Field(
        "live",
        description="live: the teacher sees every crop. once: it sees every whole chip once, or "
        "not at all where curation embedded the chips with the same network.",
    )
    size_px: int = Field(192, ge=32, le=1024, description="Student's input edge (pixels).")
    masking: Literal["replace", "drop"] = Field(
        "replace",
        description="replace: a token stands for each masked patch (SimMIM, the paper). drop: "
        "masked patches are left out of the student (ViT, Hiera), which costs less than half.",
    )
    mask_patch_px: int = Field(32, ge=4, le=256, description="Edge of a masked patch (pixels).")
    mask_ratio: float = Field(0.6, gt=0, lt=1, description="Share of patches masked.")
    decoder_width: int = Field(
        256, ge=32, le=2048, multiple_of=32, description="Channels of the decoder (masking: drop)."
    )
    decoder_depth: int = Field(2, ge=1, le=16, description="Blocks of the decoder (masking: drop).")
    alpha: float = Field(
        1.0, ge=0, le=100, description="Weight of distillation; 0 is plain masked modelling."
    )
    alpha_end: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Weight of distillation at the last step, reached along half a cosine; empty: "
        "it stays as it is.",
    )
    mim_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of reconstruction; 0 is distillation only."
    )
    distill_stage: int = Field(
        3, ge=1, le=4, description="Student stage that is distilled, its merging included."
    )
    distill_pool: Literal["mean", "max"] = Field(
        "mean", description="How a stage becomes one feature; the paper takes the mean."
    )
    distill_norm: bool = Field(
        False, description="Normalise both features (layer norm without weights) before pooling."
    )
    projector: Literal["linear", "mlp"] = Field(
        "linear", description="From the student's feature to the teacher's; the paper's is linear."
    )
    epochs: int = Field(100, ge=1, le=10_000, description="Passes over the dataset.")
    warmup_epochs: float = Field(
        10.0, ge=0, description="Epochs of linear warm-up; at most all of them."
    )
    batch: int = Field(128, ge=1, le=65_536, description="Global batch size (images).")
    microbatch: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Images a process works on at once, gradients being added up; empty: its "
        "whole share of the batch.",
    )
    base_lr: float = Field(2e-4, gt=0, description="Learning rate per 512 images of batch.")
    min_lr: float = Field(1e-5, ge=0, description="Final learning rate per 512 images of batch.")
    weight_decay: float = Field(0.05, ge=0, description="AdamW decay, not on 1-D parameters.")
    clip: float = Field(5.0, gt=0, description="Gradient norm limit.")
    crop_scale: tuple[float, float] = Field((0.67, 1.0), description="Random crop area, shares.")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of a running mean of the weights, which then is the model; "
        "0: the weights themselves.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the student (mixed; its weights stay fp32)."
    )
    teacher_precision: Literal["fp32", "bf16"] | None = Field(
        None, description="Arithmetic and weights of the teacher; empty: as precision."
    )
    compile: bool = Field(
        False,
        description="Compile student and teacher (torch.compile): minutes at first, faster then.",
    )
    activation_checkpointing: bool = Field(
        False, description="Keep few activations and compute the rest twice: half the memory."
    )
    checkpoint_steps: int = Field(50, ge=1, description="Steps between checkpoints.")
    spike_steps: int = Field(
        100,
        ge=0,
        description="Stop when the loss stayed far above what it had been for so many steps; 0: "
        "never.",
    )

    def at_once(self, processes: int) -> int:
        """Images that each of so many processes works on at once."""
        share = self.batch // processes
        return min(self.microbatch or share, share)

    @model_validator(mode="after")
    def _something_to_learn(self) -> PretrainSettings:
        if self.alpha == 0 and self.mim_weight == 0:
            raise ValueError("alpha and mim_weight are both 0: nothing to learn; set one above 0")
        if self.size_px % self.mask_patch_px:
            raise ValueError(
                f"size_px {self.size_px} is no multiple of mask_patch_px {self.mask_patch_px}"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale: give two shares of the area, e.g. 0.67,1")
        if self.alpha == 0 and self.alpha_end:
            raise ValueError("alpha is 0, so alpha_end has nothing to change; set alpha above 0")
        cells = (self.size_px // self.mask_patch_px) ** 2
        if math.ceil(round(cells * self.mask_ratio, 9)) >= cells:
            raise ValueError(f"mask_ratio {self.mask_ratio} hides all {cells} patches; lower it")
        return self
