from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from geofm.pretraining.student import BadStudent, backbone_arguments, build_student
from tests.geofm.pretraining.conftest import tiny_settings


def _state(seed: int, **fields: object) -> dict[str, torch.Tensor]:
    return build_student(tiny_settings(**fields), 4, seed).backbone.state_dict()


def test_the_student_is_a_fresh_timm_model_of_its_seed() -> None:
    settings = tiny_settings()
    ours = _state(7)
    torch.manual_seed(7)
    fresh = timm.create_model(settings.student, **backbone_arguments(settings, 4)).state_dict()
    assert ours.keys() == fresh.keys()
    assert all(torch.equal(ours[key], fresh[key]) for key in ours)


def test_seeds_give_different_students_and_the_same_seed_the_same() -> None:
    one, same, other = _state(1), _state(1), _state(2)
    matrices = [key for key, value in one.items() if value.ndim > 1]
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in matrices)


def test_a_random_student_never_asks_for_pretrained_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("weights were asked for")

    monkeypatch.setattr("geofm.pretraining.student.pretrained_file", refuse)
    monkeypatch.setattr("geofm.pretraining.student.load_file", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    student = build_student(tiny_settings(), 4, 0)
    # timm's initialisation of Swin: truncated normal of 0.02, biases 0
    weight = student.backbone.state_dict()["layers.0.blocks.0.mlp.fc1.weight"]
    assert 0.015 < weight.std() < 0.025
    assert not student.backbone.state_dict()["layers.0.blocks.0.mlp.fc1.bias"].any()


def test_a_pretrained_student_takes_the_weights_of_its_file(tmp_path: Path) -> None:
    settings = tiny_settings()
    arguments = {**backbone_arguments(settings, 3), "num_classes": 5}
    model = timm.create_model(settings.student, **arguments)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    fields = {"student": f"{settings.student}@{tmp_path}/w.safetensors"}
    student = build_student(tiny_settings(**fields, student_init="pretrained"), 4, 0)
    loaded = student.backbone.state_dict()
    key = "layers.2.blocks.0.attn.qkv.weight"
    assert torch.equal(loaded[key], model.state_dict()[key])
    assert loaded["patch_embed.proj.weight"].shape[1] == 4  # RGB spread over four bands
    with pytest.raises(BadStudent, match="student_init is random"):
        build_student(tiny_settings(**fields), 4, 0)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_hidden_pixels_cannot_be_seen_and_shown_ones_can(name: str) -> None:
    vit = {"student": "vit_tiny_patch16_224", "mask_patch_px": 16}
    vit["student_args"] = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8}
    student = build_student(tiny_settings(**(vit if name == "vit" else {})), 4, 0).eval()
    edge = 16 if name == "vit" else 8
    images = torch.rand(1, 4, 32, 32)
    mask = torch.zeros(1, 32 // edge, 32 // edge, dtype=torch.bool)
    mask[0, 0, 1] = True
    hidden, shown = images.clone(), images.clone()
    hidden[:, :, :edge, edge : 2 * edge] += 1
    shown[:, :, :edge, :edge] += 1
    with torch.no_grad():
        base, changed, other = (student(x, mask)[1] for x in (images, hidden, shown))
    assert torch.equal(base, changed)
    assert not torch.allclose(base, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": "resnet18"}, "pretrain.student_args"),
        ({"student": "eva02_tiny_patch14_224", "student_args": {}, "size_px": 56}, "feature maps"),
        ({"masking": "drop"}, "pretrain.masking is drop"),
        ({"student_args": {"in_chans": 3}}, "leave out in_chans"),
        ({"student_args": {"no_such": 3}}, "pretrain.student_args"),
        ({"student_args": {"num_heads": [1]}}, "pretrain.student_args"),
        ({"size_px": 40}, "pretrain.size_px is 40, .* multiple of 16, e.g. 32"),
        ({"student_args": {"patch_size": 4}, "mask_patch_px": 2}, "mask_patch_px"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_field(
    fields: dict[str, object], message: str
) -> None:
    settings = tiny_settings().model_copy(update=fields)
    with pytest.raises(BadStudent, match=message):
        build_student(settings, 4, 0)
