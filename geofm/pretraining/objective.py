"""What is minimised: masked reconstruction plus distillation (GFM paper, section 4, Eq. 2 to 4)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from geofm.pretraining.backbone import final_width, reduction, stage_width, token_mean
from geofm.pretraining.masking import spread
from geofm.pretraining.student import Student, build_student, derived_seed
from geofm.settings import PretrainSettings
from geofm.threads import own_random_state


class Losses(NamedTuple):
    """The loss and its two terms before weighting; a term that is switched off is None."""

    loss: Tensor
    mim: Tensor | None
    distill: Tensor | None


class Pretrainer(nn.Module):
    """Student, decoder and projector with the loss that trains them together.

    ``alpha`` = 0 is plain masked image modelling (SimMIM): there is no projector. ``mim_weight``
    = 0 is distillation alone: what comes after the distilled stage is not even computed.
    """

    def __init__(
        self,
        student: Student,
        decoder: nn.Sequential,
        projector: nn.Module | None,
        alpha: float,
        mim_weight: float,
    ) -> None:
        super().__init__()
        self.student = student
        self.decoder = decoder
        self.projector = projector
        self.alpha = alpha
        self.mim_weight = mim_weight

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
            mim = reconstruction_loss(self.decoder(final.permute(0, 3, 1, 2)), images, mask)
            terms.append(self.mim_weight * mim)
        if self.projector is not None and taught is not None:
            distill = distillation_loss(self.projector(token_mean(tokens)), taught)
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
    settings: PretrainSettings, bands: int, seed: int, teacher_width: int | None
) -> Pretrainer:
    """The module at step 0. Every piece is drawn from a seed of its own.

    Raises:
        BadStudent: as ``build_student``.
    """
    student = build_student(settings, bands, seed)
    backbone = student.backbone
    stride = reduction(backbone)
    with own_random_state(derived_seed(seed, "decoder")):
        decoder = nn.Sequential(
            nn.Conv2d(final_width(backbone), stride * stride * bands, kernel_size=1),
            nn.PixelShuffle(stride),
        )
    projector = None
    if settings.alpha > 0 and teacher_width is not None:
        with own_random_state(derived_seed(seed, "projector")):
            projector = nn.Linear(stage_width(backbone, settings.distill_stage), teacher_width)
    return Pretrainer(student, decoder, projector, settings.alpha, settings.mim_weight)
