from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from geofm.embeddings.encoders import load_encoder
from geofm.pretraining.objective import (
    build_pretrainer,
    distillation_loss,
    reconstruction_loss,
)
from geofm.pretraining.optimiser import build_optimiser, set_learning_rate
from geofm.pretraining.student import backbone_arguments, derived_seed
from geofm.pretraining.teacher import load_teacher, make_teacher, teacher_features
from tests.geofm.pretraining.conftest import SWIN, tiny_settings


def _batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 4, 32, 32, generator=generator)
    scores = torch.rand(4, 16, generator=generator)
    mask = scores >= scores.sort(dim=1).values[:, 6:7]  # 10 of 16 hidden
    return images, mask.reshape(4, 4, 4)


class PlainSimMIM(nn.Module):
    """Masked image modelling, implemented again without geofm's modules."""

    def __init__(self, settings, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = timm.create_model(settings.student, **backbone_arguments(settings, 4))
        token = torch.empty(1, 1, 1, 24)
        generator = torch.Generator().manual_seed(derived_seed(seed, "mask token"))
        self.token = nn.Parameter(nn.init.trunc_normal_(token, std=0.02, generator=generator))
        torch.manual_seed(derived_seed(seed, "decoder"))
        self.decode = nn.Conv2d(192, 16 * 16 * 4, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        fine = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
        tokens = self.net.patch_embed(x)
        tokens = torch.where(fine[..., None], self.token, tokens)
        z = self.net.norm(self.net.layers(tokens)).permute(0, 3, 1, 2)
        rebuilt = nn.functional.pixel_shuffle(self.decode(z), 16)
        pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).float()
        return (
            (nn.functional.l1_loss(x, rebuilt, reduction="none") * pixels).sum()
            / (pixels.sum() + 1e-5)
            / 4
        )


def _named_alike(plain: PlainSimMIM) -> dict[str, torch.Tensor]:
    renamed = {"token": "student.mask_token"}
    state = {}
    for name, value in plain.named_parameters():
        ours = renamed.get(name, name)
        ours = ours.replace("net.", "student.backbone.", 1) if ours.startswith("net.") else ours
        state[ours.replace("decode.", "decoder.pixels.")] = value
    return state


def test_alpha_0_is_plain_masked_modelling_bit_for_bit_over_several_steps() -> None:
    settings = tiny_settings(alpha=0)
    ours, plain = build_pretrainer(settings, 4, 5, None), PlainSimMIM(settings, 5)
    assert ours.projector is None
    mine = build_optimiser(ours, settings)
    theirs = _named_alike(plain)
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    flat = [n for n, p in theirs.items() if p.ndim == 1 or "relative" in n or "mask_token" in n]
    adam = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.items() if n not in flat], "weight_decay": 0.05},
            {"params": [p for n, p in theirs.items() if n in flat], "weight_decay": 0.0},
        ],
        lr=1e-3,
        fused=True,
    )
    for step in range(5):
        images, mask = _batch(step)
        set_learning_rate(mine, 1e-3)
        a, b = ours(images, mask, None).loss, plain(images, mask)
        assert torch.equal(a, b), step
        for loss, optimiser, module in ((a, mine, ours), (b, adam, plain)):
            optimiser.zero_grad()
            loss.backward()
            ordered = dict(ours.named_parameters()) if module is ours else theirs
            names = list(dict(ours.named_parameters()))
            nn.utils.clip_grad_norm_([ordered[n] for n in names], 5.0)
            optimiser.step()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_the_whole_loss_is_that_of_the_paper_written_down_again() -> None:
    """Compute Eq. 2 to 4 on a fixed input from timm's networks and plain sums."""
    settings = tiny_settings(alpha=0.7, mim_weight=1.3)
    encoder = load_encoder("random:swin_tiny_patch4_window7_224", seed=0, size_px=224)
    teacher = make_teacher(encoder, 3, 224)
    module = build_pretrainer(settings, 4, 5, teacher.width)
    images, mask = _batch()
    rgb = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    found = module(images, mask, teacher_features(teacher, rgb))

    plain = PlainSimMIM(settings, 5)
    merged: list[torch.Tensor] = []
    plain.net.layers[3].downsample.register_forward_hook(lambda *seen: merged.append(seen[2]))
    encoder.model.layers[3].downsample.register_forward_hook(lambda *seen: merged.append(seen[2]))
    with torch.no_grad():
        masked = float(plain(images, mask))
        larger = nn.functional.interpolate(rgb, (224, 224), mode="bilinear", align_corners=True)
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (encoder.mean, encoder.std))
        encoder.model.forward_features((larger - mean) / std)
    student, taught = (tokens.double().mean(dim=(1, 2)) for tokens in merged)
    assert student.shape == (4, 192)
    assert taught.shape == (4, 768)
    assert isinstance(module.projector, nn.Linear)
    weight, bias = module.projector.weight.double(), module.projector.bias.double()
    projected = student @ weight.T + bias
    cosine = (projected * taught).sum(1) / projected.norm(dim=1) / taught.norm(dim=1)
    expected = 1.3 * masked - 0.7 * float(cosine.mean().detach())
    assert float(found.loss) == pytest.approx(expected, abs=1e-6)


def test_a_projector_changes_nothing_else_at_the_start() -> None:
    without = build_pretrainer(tiny_settings(alpha=0), 4, 5, None)
    with_one = build_pretrainer(tiny_settings(alpha=1), 4, 5, 64)
    assert with_one.projector is not None
    states = without.state_dict(), with_one.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert torch.equal(without(*_batch(), None).loss, with_one(*_batch(), torch.rand(4, 64)).mim)


def test_only_hidden_pixels_count() -> None:
    images, mask = _batch()
    rebuilt = torch.randn_like(images)
    base = reconstruction_loss(rebuilt, images, mask)
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(images)
    shown = torch.where(hidden, images, images + torch.randn_like(images))
    assert torch.equal(reconstruction_loss(rebuilt, shown, mask), base)
    one = images.clone()
    place = hidden.nonzero()[0].tolist()
    one[tuple(place)] += 3
    assert not torch.equal(reconstruction_loss(rebuilt, one, mask), base)
    mean = (rebuilt - images).abs()[hidden].mean()
    torch.testing.assert_close(base, mean)


def test_the_gradient_of_the_rebuilt_picture_is_zero_where_it_is_shown() -> None:
    images, mask = _batch()
    rebuilt = torch.randn_like(images, requires_grad=True)
    reconstruction_loss(rebuilt, images, mask).backward()
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(images)
    assert rebuilt.grad is not None
    assert not rebuilt.grad[~hidden].any()
    assert rebuilt.grad[hidden].all()


def test_distillation_is_the_negative_mean_cosine() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = -sum(float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)) / 5
    assert float(distillation_loss(a, b)) == pytest.approx(expected, abs=1e-6)
    assert float(distillation_loss(a, a * 3)) == pytest.approx(-1, abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    module = build_pretrainer(tiny_settings(alpha=0.5, mim_weight=2), 4, 5, 64)
    found = module(*_batch(), torch.rand(4, 64))
    assert found.mim is not None
    assert found.distill is not None
    torch.testing.assert_close(found.loss, 2 * found.mim + 0.5 * found.distill)


def test_without_reconstruction_nothing_after_the_distilled_stage_learns() -> None:
    module = build_pretrainer(tiny_settings(mim_weight=0), 4, 5, 64)
    before = copy.deepcopy(module.state_dict())
    optimiser = build_optimiser(module, tiny_settings())
    module(*_batch(), torch.rand(4, 64)).loss.backward()
    set_learning_rate(optimiser, 1e-2)
    optimiser.step()
    late = ("student.backbone.layers.3.blocks", "student.backbone.norm", "decoder")
    names = [name for name, _ in module.named_parameters() if name.startswith(late)]
    assert len(names) >= 12 + 2 + 2
    for name, parameter in module.named_parameters():
        if name in names:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
    merging = module.student.backbone.get_submodule("layers.3.downsample")
    assert all(p.grad is not None and p.grad.any() for p in merging.parameters())


def test_with_reconstruction_everything_learns() -> None:
    module = build_pretrainer(tiny_settings(), 4, 5, 64)
    module(*_batch(), torch.rand(4, 64)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_a_swin_teacher_gives_the_mean_of_its_merged_stage() -> None:
    encoder = load_encoder("random:swin_tiny_patch4_window7_224", seed=0, size_px=64)
    teacher = make_teacher(encoder, 3)
    assert teacher.width == 768
    rgb = torch.rand(2, 3, 64, 64)
    seen = {}
    encoder.model.layers[3].downsample.register_forward_hook(
        lambda module, args, result: seen.__setitem__("merged", result)
    )
    taught = teacher_features(teacher, rgb)
    assert taught.shape == (2, 768)
    assert torch.equal(taught, seen["merged"].mean(dim=(1, 2)))
    assert not taught.requires_grad


@pytest.mark.parametrize(("name", "width"), [("efficientnet-lite0", 1280), ("random:test_vit", 64)])
def test_any_encoder_teaches_at_its_own_size_and_scale(name: str, width: int) -> None:
    teacher = make_teacher(load_encoder(name, size_px=64), 3, 64)
    taught = teacher_features(teacher, torch.rand(2, 3, 40, 40))
    assert (teacher.size_px, taught.shape) == (64, (2, width))
    assert torch.isfinite(taught).all()


def test_the_teachers_normalisation_is_its_own() -> None:
    encoder = load_encoder("random:test_vit", size_px=32)
    assert encoder.mean == (0.5, 0.5, 0.5)
    seen = {}
    encoder.model.patch_embed.register_forward_pre_hook(
        lambda module, args: seen.__setitem__("input", args[0])
    )
    rgb = torch.rand(1, 3, 32, 32)
    teacher_features(make_teacher(encoder, 3), rgb)
    torch.testing.assert_close(seen["input"], rgb * 2 - 1)


def test_swin_arguments_of_the_tests_give_four_stages() -> None:
    assert len(timm.create_model("swin_tiny_patch4_window7_224", **SWIN).layers) == 4


@pytest.mark.parametrize("name", ["efficientnet-lite0", "random:swin_tiny_patch4_window7_224"])
def test_a_teacher_in_bf16_says_nearly_the_same(name: str) -> None:
    rgb = torch.rand(3, 3, 64, 64)
    found = []
    for precision in ("fp32", "bf16"):
        settings = tiny_settings(teacher=name, teacher_size_px=64, teacher_precision=precision)
        teacher = load_teacher(settings, "cpu")
        with torch.autocast(
            "cpu", torch.bfloat16
        ):  # the teacher must ignore the student's precision
            found.append(teacher_features(teacher, rgb))
        assert found[-1].dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    cosine = nn.functional.cosine_similarity(found[0], found[1].float())
    assert (cosine > 0.995).all()
    assert not torch.equal(found[0], found[1].float())
