"""What is minimised: masked reconstruction plus distillation (GFM paper, section 4, Eq. 2 to 4)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.backbone import PAPERS_POOLING, Pooling, final_width, reduction, stage_width
from geofm.pretraining.masking import spread
from geofm.pretraining.student import (
    FillingDecoder,
    PixelDecoder,
    Student,
    build_student,
    derived_seed,
)
from geofm.runtime.threads import own_random_state


class Losses(NamedTuple):
    """The loss and its two terms before weighting; a term that is switched off is None."""

    loss: Tensor
    mim: Tensor | None
    distill: Tensor | None


class Pretrainer(nn.Module):
    """Student, decoder and projector with the loss that trains them together.

    ``alpha`` = 0 is plain masked image modelling (SimMIM): there is no projector; where it has a
    schedule the loop sets it before each step. ``mim_weight`` = 0 is distillation alone: what
    comes after the distilled stage is not even computed.
    """

    def __init__(
        self,
        student: Student,
        decoder: PixelDecoder | FillingDecoder,
        projector: nn.Module | None,
        alpha: float,
        mim_weight: float,
        pooling: Pooling = PAPERS_POOLING,
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

    def forward(self, images: Tensor, mask: Tensor, taught: Tensor | None) -> Losses:
        """Losses of a batch.

        Args:
            images: [B, bands, S, S] normalised pixels: input (masked by the student) and target.
            mask: [B, g, g] bool, True where hidden.
            taught: the teacher's feature [B, C], or None without distillation.
        """
        tokens, final = self.student(images, mask, whole=self.mim_weight > 0)
        mim = distill = None
        terms = []
        if final is not None:
            mim = reconstruction_loss(self.decoder(final, mask), images, mask)
            terms.append(self.mim_weight * mim)
        if self.projector is not None and taught is not None:
            distill = distillation_loss(self.projector(self.pooling(tokens)), taught)
            terms.append(self.alpha * distill)
        return Losses(terms[0] if len(terms) == 1 else terms[0] + terms[1], mim, distill)


def reconstruction_loss(rebuilt: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over masked pixels alone, as the paper's code has it.

    Args:
        rebuilt: [B, C, S, S].
        images: [B, C, S, S], the target.
        mask: [B, g, g] bool.
    """
    hidden = spread(mask, images.shape[-1])[:, None].to(images.dtype)
    error = (images - rebuilt.to(images.dtype)).abs()
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / images.shape[1]


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Negative cosine of features [B, C], mean over the batch; the teacher gets no gradient."""
    cosine = nn.functional.cosine_similarity(student.float(), teacher.detach().float(), dim=1)
    return -cosine.mean()


def build_pretrainer(
    settings: PretrainSettings,
    bands: int,
    seed: int,
    teacher_width: int | None,
    student_weights: Weights | None = None,
) -> Pretrainer:
    """The module at step 0. Every piece is drawn from a seed of its own.

    Raises:
        BadStudent, WeightsMissing, WeightsMismatch, WeightsChanged: as ``build_student``.
    """
    student = build_student(settings, bands, seed, student_weights)
    backbone = student.backbone
    with own_random_state(derived_seed(seed, "decoder")):
        decoder = _decoder(settings, backbone, bands)
    projector = None
    if settings.alpha > 0 and teacher_width is not None:
        with own_random_state(derived_seed(seed, "projector")):
            projector = _projector(
                settings.projector, stage_width(backbone, settings.distill_stage), teacher_width
            )
    pooling = Pooling(settings.distill_pool, settings.distill_norm)
    weights = settings.alpha, settings.mim_weight
    return Pretrainer(student, decoder, projector, *weights, pooling, teacher_width or 0)


def _decoder(
    settings: PretrainSettings, backbone: nn.Module, bands: int
) -> PixelDecoder | FillingDecoder:
    width, stride = final_width(backbone), reduction(backbone)
    if settings.masking == "replace":
        return PixelDecoder(width, stride, bands)
    grid = settings.size_px // stride
    inner, depth = settings.decoder_width, settings.decoder_depth
    few = settings.activation_checkpointing
    return FillingDecoder(width, grid, stride, bands, inner, depth, few)


def _projector(kind: str, width: int, teacher_width: int) -> nn.Module:
    """The paper's one linear layer, or two with a GELU between them."""
    if kind == "linear":
        return nn.Linear(width, teacher_width)
    return nn.Sequential(
        nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
    )
