from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data_catalog.run import make_job, plan_parts, run_stage, seal, work_parts
from data_catalog.store import open_store
from geofm.config.recipe import EmbedSettings
from geofm.embeddings import embed
from geofm.embeddings.embed import one_torch_thread
from geofm.embeddings.encoders import Encoder, encode, fuse_for_cpu, load_encoder, normalise
from geofm.embeddings.images import prepare_chip
from geofm.raster.radiometry import to_rgb
from geofm.raster.resample import resize_images
from geofm.runtime import parts
from tests.geofm.dedup.synthetic import Chip, make_chips, texture

SETTINGS = EmbedSettings(size_px=32, batch=4)


def _chips() -> list[Chip]:
    chips = [Chip(texture(n)) for n in range(11)]
    chips[3].status = "dropped"
    chips.append(Chip(texture(20, size=48, dtype="uint8"), bands=["red", "green", "blue"]))
    return chips


def test_vectors_are_the_encoders_and_only_of_usable_chips(store, catalogue):
    chips = _chips()
    art = make_chips(store, chips)
    found = run_stage(embed.STAGE, store, catalogue, {"chips": art}, SETTINGS)
    ids = found.table("ids.parquet")["chip_id"].tolist()
    assert ids == [c.chip_id(n) for n, c in enumerate(chips) if c.status == "ok"]
    vectors = np.load(found.local("embeddings.npy"))
    assert vectors.shape == (11, 1280)
    assert vectors.dtype == np.float16

    encoder = load_encoder("efficientnet-lite0", size_px=32)
    rgb = to_rgb(chips[5].pixels, chips[5].bands, [chips[5].scale] * 3)
    alone = encode(encoder, torch.from_numpy(rgb).unsqueeze(0)).numpy()[0]
    np.testing.assert_allclose(vectors[ids.index(chips[5].chip_id(5))], alone, atol=2e-3)

    facts = found.manifest.facts
    assert facts["weights_sha256"] == encoder.weights_sha256
    assert (facts["encoder"], facts["dim"]) == ("efficientnet-lite0", 1280)
    assert found.manifest.counts == {"rows_in": 11, "rows_out": 11}
    assert found.manifest.deterministic


@pytest.mark.parametrize("workers", [1, 2])
def test_digest_is_the_same_for_any_workers_order_and_after_a_kill(tmp_path: Path, workers):
    digests = set()
    for run in ("plain", "mapped"):
        store = open_store(tmp_path / run)
        job = make_job(embed.STAGE, store, {"chips": make_chips(store, _chips(), 4)}, SETTINGS)
        planned = plan_parts(embed.STAGE, job)
        assert len(planned) == 3
        if run == "mapped":
            work_parts(embed.STAGE, job, planned[2:])  # what a killed run had finished
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda p: work_parts(embed.STAGE, job, [p]), planned[::-1]))  # noqa: B023
        else:
            work_parts(embed.STAGE, job, planned)
        digests.add(seal(embed.STAGE, job, planned)[0].digest)
    assert len(digests) == 1


def test_a_refresh_embeds_only_new_tars(store):
    chips = _chips()
    before = make_job(embed.STAGE, store, {"chips": make_chips(store, chips[:8], 4)}, SETTINGS)
    after = make_job(embed.STAGE, store, {"chips": make_chips(store, chips, 4)}, SETTINGS)
    old = plan_parts(embed.STAGE, before)
    new = plan_parts(embed.STAGE, after)
    assert [p.key for p in new[:2]] == [p.key for p in old]
    work_parts(embed.STAGE, before, old)
    assert work_parts(embed.STAGE, after, new) == 1


def test_a_large_tar_is_several_parts_with_the_same_result(store, catalogue, monkeypatch):
    """So that all cores work on one new scene."""
    art = make_chips(store, _chips(), 12)
    whole = make_job(embed.STAGE, store, {"chips": art}, SETTINGS)
    monkeypatch.setattr(parts, "PART_CHIPS", 4)
    split = make_job(embed.STAGE, store, {"chips": art}, SETTINGS)
    many = plan_parts(embed.STAGE, split)
    assert [part.rows for part in many] == [4, 4, 3]
    assert work_parts(embed.STAGE, split, many) == 3
    digest = seal(embed.STAGE, split, many)[0].digest
    monkeypatch.undo()
    (one,) = plan_parts(embed.STAGE, whole)
    assert one.rows == 11
    assert work_parts(embed.STAGE, whole, [one]) == 1
    assert seal(embed.STAGE, whole, [one])[0].digest == digest


def test_no_usable_chip_gives_an_empty_matrix(store, catalogue):
    art = make_chips(store, [Chip(texture(0), status="dropped")])
    found = run_stage(embed.STAGE, store, catalogue, {"chips": art}, SETTINGS)
    assert np.load(found.local("embeddings.npy")).shape == (0, 1280)


def test_fusing_folds_every_batch_norm_and_keeps_the_features():
    encoder = load_encoder("efficientnet-lite0", size_px=64)
    fused = fuse_for_cpu(encoder)
    assert not [m for m in fused.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in encoder.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encode(fused, images), encode(encoder, images), atol=1e-4, rtol=0)
    assert fused.weights_sha256 == encoder.weights_sha256


def test_a_network_that_fusing_would_change_is_left_alone():
    class Crossed(torch.nn.Module):
        """The batch norm registered after the convolution is applied before it."""

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3)
            self.norm = torch.nn.BatchNorm2d(3)
            self.norm.running_var.fill_(9.0)

        def forward(self, x):
            return self.conv(self.norm(x)).mean(dim=(2, 3))

    model = Crossed().eval()
    encoder = Encoder("crossed", model, (0.5,) * 3, (0.5,) * 3, 3, "", 16, True)
    assert fuse_for_cpu(encoder) is encoder


@pytest.mark.parametrize("edge", [16, 32, 40, 64])
@pytest.mark.parametrize(
    ("dtype", "scale", "most"),
    [("uint8", 1.0, 255), ("uint16", 1e-4, 5000), ("uint16", 7.5e-6, 65535), ("int16", 1e-4, 5000)],
)
def test_a_picture_is_what_the_encoder_would_make_of_rgb(edge, dtype, scale, most):
    draw = np.random.default_rng(edge)
    pixels = draw.integers(0, most + 1, (4, edge, edge)).astype(dtype)
    bands = ["nir", "blue", "green", "red"]
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.5, 0.9)
    encoder = Encoder("none", torch.nn.Identity(), mean, std, 3, "", 32, True)
    rgb = torch.from_numpy(to_rgb(pixels, bands, [scale] * 4))
    assert dtype == "uint8" or (rgb == 1).any()  # clipped before it is resized
    wanted = normalise(encoder, resize_images(rgb.unsqueeze(0), 32))[0]
    found = prepare_chip(pixels, bands, [scale] * 4, encoder, 32)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


def test_torch_threads_are_restored():
    before = torch.get_num_threads()
    with one_torch_thread(), one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
