"""The GFM loss: masked reconstruction plus distillation (GFM paper, section 4, Eq. 2 to 4).

    L = mim_weight * L_MIM + alpha * L_feat

``Pretrainer`` is the module that is trained: student, decoder and projector.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.backbone import (
    PAPER_POOLING,
    Pooling,
    final_width,
    output_stride,
    stage_width,
)
from geofm.pretraining.masking import upsample_mask
from geofm.pretraining.student import (
    PixelDecoder,
    Student,
    TransformerDecoder,
    build_student,
    derived_seed,
)
from geofm.runtime.threads import own_random_state


class Losses(NamedTuple):
    """The loss and its unweighted terms; a term that is switched off is None."""

    loss: Tensor
    mim: Tensor | None
    distill: Tensor | None


class Pretrainer(nn.Module):
    """Student, decoder and projector, with the loss that trains them.

    ``alpha`` = 0 gives masked image modelling alone (SimMIM). ``mim_weight`` = 0 gives distillation
    alone; the layers after the distilled stage are then not computed and learn nothing.

    Args:
        student: The network that is pretrained.
        decoder: Module that turns the student's final map into pixels.
        projector: Map P from the student's to the teacher's channels; None without distillation.
        alpha: Weight of distillation. The training loop changes it if it has a schedule.
        mim_weight: Weight of reconstruction.
        pooling: How the tokens of the distilled stage become one feature.
        teacher_width: Channels C of the teacher's feature; 0 without distillation.
    """

    def __init__(
        self,
        student: Student,
        decoder: PixelDecoder | TransformerDecoder,
        projector: nn.Module | None,
        alpha: float,
        mim_weight: float,
        pooling: Pooling = PAPER_POOLING,
        teacher_width: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.decoder = decoder
        self.projector = projector
        self.alpha = alpha
        self.mim_weight = mim_weight
        self.pooling = pooling
        self.teacher_width = teacher_width

    def forward(self, images: Tensor, mask: Tensor, target: Tensor | None) -> Losses:
        """Compute the loss of a batch (GFM paper, Eq. 4).

        Args:
            images: Normalised pixels, shape (B, bands, S, S): the input, which the student masks,
                and the target of reconstruction.
            mask: Patch mask, bool, shape (B, g, g), True where hidden.
            target: The teacher's feature f_T, shape (B, C); None without distillation.
        """
        tokens, final = self.student(images, mask, with_final=self.mim_weight > 0)
        mim = distill = None
        terms = []
        if final is not None:
            mim = reconstruction_loss(self.decoder(final, mask), images, mask)
            terms.append(self.mim_weight * mim)
        if self.projector is not None and target is not None:
            distill = distillation_loss(self.projector(self.pooling(tokens)), target)
            terms.append(self.alpha * distill)
        return Losses(terms[0] if len(terms) == 1 else terms[0] + terms[1], mim, distill)


def reconstruction_loss(reconstruction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error L_MIM over masked pixels.

    The constant 1e-5 in the denominator is that of the paper's code.

    Args:
        reconstruction: Decoder output O, shape (B, bands, S, S).
        images: Normalised pixels G, shape (B, bands, S, S).
        mask: Patch mask, bool, shape (B, g, g), True where hidden.

    Returns:
        Scalar.

    Source: GFM paper, section 4, Eq. 2.
    """
    hidden = upsample_mask(mask, images.shape[-1])[:, None].to(images.dtype)
    error = (images - reconstruction.to(images.dtype)).abs()
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / images.shape[1]


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Negative cosine similarity L_feat, averaged over the batch.

    Args:
        student: Projected student features P(f_S), shape (B, C).
        teacher: Teacher features f_T, shape (B, C); no gradient flows into them.

    Returns:
        Scalar from -1 (same direction) to 1.

    Source: GFM paper, section 4, Eq. 3.
    """
    cosine = nn.functional.cosine_similarity(student.float(), teacher.detach().float(), dim=1)
    return -cosine.mean()


def build_pretrainer(
    settings: PretrainSettings,
    bands: int,
    seed: int,
    teacher_width: int | None,
    student_weights: Weights | None = None,
) -> Pretrainer:
    """Build the module at step 0; each part is initialised from a seed of its own.

    Args:
        settings: The recipe's section ``pretrain``.
        bands: Number of input bands.
        seed: Seed of the run.
        teacher_width: Channels C of the teacher's feature; None without distillation.
        student_weights: Resolved initial weights of the student (``student_init: pretrained``).

    Raises:
        BadStudent, WeightsMissing, WeightsMismatch, WeightsChanged: See ``build_student``.
    """
    student = build_student(settings, bands, seed, student_weights)
    backbone = student.backbone
    with own_random_state(derived_seed(seed, "decoder")):
        decoder = _build_decoder(settings, backbone, bands)
    projector = None
    if settings.alpha > 0 and teacher_width is not None:
        student_width = stage_width(backbone, settings.distill_stage)
        with own_random_state(derived_seed(seed, "projector")):
            projector = _build_projector(settings.projector, student_width, teacher_width)
    return Pretrainer(
        student,
        decoder,
        projector,
        settings.alpha,
        settings.mim_weight,
        Pooling(settings.distill_pool, settings.distill_norm),
        teacher_width or 0,
    )


def _build_decoder(
    settings: PretrainSettings, backbone: nn.Module, bands: int
) -> PixelDecoder | TransformerDecoder:
    width, stride = final_width(backbone), output_stride(backbone)
    if settings.masking == "replace":
        return PixelDecoder(width, stride, bands)
    return TransformerDecoder(
        width,
        settings.size_px // stride,
        stride,
        bands,
        inner=settings.decoder_width,
        depth=settings.decoder_depth,
        checkpointed=settings.activation_checkpointing,
    )


def _build_projector(kind: str, width: int, teacher_width: int) -> nn.Module:
    """The paper's single linear layer, or two layers with a GELU between them."""
    if kind == "linear":
        return nn.Linear(width, teacher_width)
    return nn.Sequential(
        nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
    )
