from __future__ import annotations

import pytest
import timm
import torch

from data_catalog.errors import UsageError
from geofm.pretraining.backbone import (
    NoSuchStage,
    final_width,
    reduction,
    stage_width,
    token_mean,
    walk,
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
        tapped, final = walk(model, torch.rand(1, 3, 192, 192), 3)
    assert tapped.shape == (1, 6, 6, 1024)
    assert final is not None
    assert final.shape == (1, 6, 6, 1024)
    assert stage_width(model, 3) == 1024


def test_the_distilled_stage_is_768_wide_for_swin_t() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0)
    with torch.no_grad():
        tapped, _ = walk(model, torch.rand(1, 3, 224, 224), 3)
    assert tapped.shape == (1, 7, 7, 768)
    assert token_mean(tapped).shape == (1, 768)
    assert stage_width(model, 3) == final_width(model) == 768
    assert reduction(model) == 32


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
            tapped, final = walk(model, images, stage)
            assert torch.equal(tapped, seen[f"into blocks {stage + 1}"])
            assert final is not None
            assert torch.equal(final, whole)
        last, final = walk(model, images, 4)
        assert final is not None
        assert torch.equal(model.norm(last), final)


def test_stopping_after_the_stage_gives_the_same_and_runs_nothing_more() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    images = torch.rand(1, 4, 32, 32)
    model.layers[3].blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("stage 4 ran"))
    tapped, final = walk(model, images, 3, whole=False)
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
            tapped, final = walk(model, images, stage)
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
        tapped, final = walk(model, images, 3)
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
