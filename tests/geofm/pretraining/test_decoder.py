from __future__ import annotations

import pytest
import torch

from geofm.pretraining.loop import train
from geofm.pretraining.masking import visible_positions
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.student import PixelDecoder, TransformerDecoder
from tests.geofm.pretraining.conftest import tiny_settings

DROPPING = {
    "vit": {"student": "test_vit", "student_args": {}, "size_px": 64, "mask_patch_px": 16},
    "hiera": {
        "student": "hiera_tiny_224",
        "student_args": {"embed_dim": 16, "stages": [1, 1, 1, 1]},
        "size_px": 128,
        "mask_patch_px": 32,
    },
}


def test_each_pixel_comes_from_its_own_position() -> None:
    decoder = PixelDecoder(5, 4, 3)
    final = torch.randn(1, 2, 2, 5)
    base = decoder(final, torch.zeros(1, 2, 2, dtype=torch.bool))
    assert base.shape == (1, 3, 8, 8)
    final[0, 1, 0] += 1
    moved = (decoder(final, torch.zeros(1, 2, 2, dtype=torch.bool)) != base).any(dim=1)[0]
    assert moved[4:, :4].all()
    assert not moved[:4].any()
    assert not moved[4:, 4:].any()


def test_visible_tokens_go_back_to_their_places() -> None:
    torch.manual_seed(0)
    decoder = TransformerDecoder(5, 4, 2, 3, 32, 1)
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    seen = torch.randn(2, 8, 5)
    put: list[torch.Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda module, args: put.append(args[0]))
    assert decoder(seen, mask).shape == (2, 3, 8, 8)
    tokens = (put[0] - decoder.positions.flatten(0, 1)).reshape(2, 4, 4, 32)
    fine = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for number in range(2):
        torch.testing.assert_close(tokens[number][~fine[number]], decoder.enter(seen[number]))
        hidden = tokens[number][fine[number]]
        torch.testing.assert_close(hidden, decoder.hidden.expand_as(hidden))


def test_shown_places_are_those_of_the_mask_in_order() -> None:
    mask = torch.tensor([[[True, False, True], [False, False, True], [True, True, True]]])
    assert visible_positions(mask, 3).tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("name", DROPPING)
def test_hidden_pixels_do_not_reach_a_student_that_drops_them(name: str) -> None:
    settings = tiny_settings(**DROPPING[name], masking="drop", alpha=0)
    module = build_pretrainer(settings, 4, 0, None).eval()
    grid, edge = settings.size_px // settings.mask_patch_px, settings.mask_patch_px
    images = torch.randn(1, 4, settings.size_px, settings.size_px)
    mask = torch.zeros(1, grid * grid, dtype=torch.bool)
    mask[:, module.student.visible_patches :] = True
    mask = mask.reshape(1, grid, grid)
    changed = images.clone()
    changed[..., -edge:, -edge:] += 1  # the last patch is hidden
    assert mask[0, -1, -1]
    for a, b in zip(module.student(images, mask), module.student(changed, mask), strict=True):
        assert torch.equal(a, b)
    changed[..., :edge, :edge] += 1
    assert not torch.equal(module.student(images, mask)[1], module.student(changed, mask)[1])


@pytest.mark.parametrize("name", DROPPING)
def test_a_student_that_drops_tokens_learns(name: str, corpus, tmp_path) -> None:
    fields = {**DROPPING[name], "masking": "drop", "decoder_width": 32, "decoder_depth": 1}
    settings = tiny_settings(**fields, base_lr=0.05)
    trained = train(corpus, settings, 3, "cpu", tmp_path, threads=1)
    assert trained.history["loss"].iloc[-3:].mean() < trained.history["loss"].iloc[0]
    assert trained.module.student.mask_token is None
    (tmp_path / "few").mkdir()
    few = settings.model_copy(update={"activation_checkpointing": True})
    again = train(corpus, few, 3, "cpu", tmp_path / "few", threads=1)
    assert again.history.equals(trained.history)
    grads = build_pretrainer(settings, 4, 3, 64)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, grads.student.visible_patches :] = True
    edge = settings.size_px
    images = torch.randn(2, 4, edge, edge)
    grads(images, mask.reshape(2, 4, 4), torch.randn(2, 64)).loss.backward()
    missing = [n for n, p in grads.named_parameters() if p.grad is None]
    assert missing == []
