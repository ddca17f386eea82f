from __future__ import annotations

import pytest
import timm
import torch

from data_catalog.errors import UsageError
from geofm.pretraining.backbone import (
    MaskedInput,
    NoSuchStage,
    Pooling,
    final_width,
    forward_stages,
    output_stride,
    stage_width,
    token_mean,
)
from tests.geofm.pretraining.conftest import SWIN


def test_the_distilled_stage_is_1024_wide_on_6_by_6_tokens_for_swin_b() -> None:
    model = timm.create_model(
        "swin_base_patch4_window7_224",
        pretrained=False,
        num_classes=0,
        img_size=192,
        window_size=6,
    ).eval()
    with torch.no_grad():
        tapped, final = forward_stages(model, torch.rand(1, 3, 192, 192), 3)
    assert tapped.shape == (1, 6, 6, 1024)
    assert final is not None
    assert final.shape == (1, 6, 6, 1024)
    assert stage_width(model, 3) == 1024


def test_the_distilled_stage_is_768_wide_for_swin_t() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0)
    with torch.no_grad():
        tapped, _ = forward_stages(model, torch.rand(1, 3, 224, 224), 3)
    assert tapped.shape == (1, 7, 7, 768)
    assert token_mean(tapped).shape == (1, 768)
    assert stage_width(model, 3) == final_width(model) == 768
    assert output_stride(model) == 32


def test_the_distilled_stage_ends_after_the_merging_and_before_the_next_blocks() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    images = torch.rand(2, 4, 32, 32)
    seen: dict[str, torch.Tensor] = {}
    for number in range(4):
        model.layers[number].blocks[0].register_forward_pre_hook(
            lambda module, args, n=number: seen.__setitem__(f"into blocks {n + 1}", args[0])
        )
    with torch.no_grad():
        whole = model.forward_features(images)
        for stage in (1, 2, 3):
            tapped, final = forward_stages(model, images, stage)
            assert torch.equal(tapped, seen[f"into blocks {stage + 1}"])
            assert final is not None
            assert torch.equal(final, whole)
        last, final = forward_stages(model, images, 4)
        assert final is not None
        assert torch.equal(model.norm(last), final)


def test_stopping_after_the_stage_gives_the_same_and_runs_nothing_more() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    images = torch.rand(1, 4, 32, 32)
    model.layers[3].blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("stage 4 ran"))
    tapped, final = forward_stages(model, images, 3, with_final=False)
    assert final is None
    assert tapped.shape == (1, 2, 2, stage_width(model, 3))


def test_a_vit_counts_quarters_of_its_depth() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=4, embed_dim=24, num_heads=2
    ).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        blocks = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        for stage in (1, 2, 3, 4):
            tapped, final = forward_stages(model, images, stage)
            torch.testing.assert_close(tapped.flatten(1, 2), blocks[stage - 1])
            assert final is not None
            torch.testing.assert_close(final.flatten(1, 2), model.forward_features(images)[:, 1:])


def test_swin_v2_is_walked_the_same_way() -> None:
    model = timm.create_model(
        "swinv2_tiny_window8_256",
        num_classes=0,
        img_size=64,
        embed_dim=24,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        window_size=2,
    ).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tapped, final = forward_stages(model, images, 3)
        assert tapped.shape == (1, 2, 2, 192)
        assert final is not None
        assert torch.equal(final, model.forward_features(images))


def test_a_stage_too_many_is_refused() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        **{**SWIN, "depths": [1, 1], "num_heads": [1, 2]},
    )
    with pytest.raises(NoSuchStage, match="at most 2") as caught:
        stage_width(model, 3)
    assert isinstance(caught.value, UsageError)


HIERA = {"img_size": 64, "in_chans": 4, "num_classes": 0, "embed_dim": 16, "stages": (1, 1, 2, 1)}


def test_hiera_ends_a_stage_with_its_own_blocks() -> None:
    model = timm.create_model("hiera_tiny_224", **HIERA).eval()
    images = torch.rand(2, 4, 64, 64)
    with torch.no_grad():
        maps = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        for stage in (1, 2, 3, 4):
            tapped, final = forward_stages(model, images, stage)
            assert torch.equal(tapped, maps[stage - 1])
            assert stage_width(model, stage) == tapped.shape[-1] == 16 * 2 ** (stage - 1)
            assert final is not None
            assert torch.equal(final, model.head.norm(maps[3]))
    assert (output_stride(model), final_width(model)) == (32, 128)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "efficientnet_lite0", "davit_tiny"])
def test_any_network_with_maps_is_asked_for_one_of_them(name: str) -> None:
    model = timm.create_model(name, num_classes=0, in_chans=4).eval()
    images = torch.rand(1, 4, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(images)
        for stage in (1, 3, 4):
            tapped, final = forward_stages(model, images, stage)
            assert torch.equal(tapped, maps[stage - 1].permute(0, 2, 3, 1))
            assert tapped.shape[-1] == stage_width(model, stage)
            assert final is not None
            assert torch.equal(final, last.permute(0, 2, 3, 1))
            alone, none = forward_stages(model, images, stage, with_final=False)
            assert none is None
            assert torch.equal(alone, tapped)
    assert final.shape == (1, 2, 2, final_width(model))
    assert output_stride(model) == 32


def _mask(grid: int, shown: int) -> torch.Tensor:
    mask = torch.ones(2, grid * grid, dtype=torch.bool)
    for row, seed in zip(mask, (0, 1), strict=True):
        row[torch.randperm(grid * grid, generator=torch.Generator().manual_seed(seed))[:shown]] = 0
    return mask.reshape(2, grid, grid)


def test_a_vit_without_hidden_tokens_is_a_vit_of_the_others() -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    images, mask = torch.rand(2, 3, 64, 64), _mask(4, 6)
    with torch.no_grad():
        tapped, final = forward_stages(model, images, 4, masked=MaskedInput(mask, None, 6))
        for number in range(2):  # timm's own method, one image at a time
            x = model._pos_embed(model.patch_embed(images[number : number + 1]))
            first = model.num_prefix_tokens
            x = torch.cat([x[:, :first], x[:, first:][:, ~mask[number].flatten()]], dim=1)
            x = model.blocks(model.norm_pre(x))
            torch.testing.assert_close(tapped[number], x[0, first:])
            assert final is not None
            torch.testing.assert_close(final[number], model.norm(x)[0, first:])


def test_a_hiera_without_hidden_units_is_timms_own() -> None:
    model = timm.create_model("hiera_tiny_224", **{**HIERA, "img_size": 128}).eval()
    images, mask = torch.rand(2, 4, 128, 128), _mask(4, 6)
    with torch.no_grad():
        theirs = model.forward_features(images, mask=~mask.flatten(1))
        _, final = forward_stages(model, images, 3, masked=MaskedInput(mask, None, 6))
        assert final is not None
        assert torch.equal(final, model.head.norm(theirs))
        whole, _ = forward_stages(
            model, images, 3, masked=MaskedInput(mask, None, 6), with_final=False
        )
    assert whole.shape == (2, 6 * 4, 64)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_pooling_with_and_without_a_norm(how: str) -> None:
    tokens = torch.randn(2, 3, 3, 8) * 5 + 1
    flat = tokens.reshape(2, 9, 8)
    mean, std = flat.mean(-1, keepdim=True), flat.std(-1, keepdim=True, correction=0)
    for norm, x in ((False, flat), (True, (flat - mean) / (std**2 + 1e-5).sqrt())):
        expected = x.mean(1) if how == "mean" else x.max(1).values
        torch.testing.assert_close(Pooling(how, norm)(tokens), expected)
    assert torch.equal(Pooling()(tokens), token_mean(tokens))
