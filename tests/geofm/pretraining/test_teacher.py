"""Cached teacher features: one pass over whole chips, or curation's vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.errors import RunError
from data_catalog.run import run_stage
from data_catalog.store import Store, open_store
from geofm.config.recipe import EmbedSettings
from geofm.embeddings import embed
from geofm.embeddings.encoders import LITE0, encode
from geofm.pretraining import teacher as teacher_module
from geofm.pretraining.augment import crop_and_resize
from geofm.pretraining.data import Corpus, batch_samples, load_batch, read_unit_pixels
from geofm.pretraining.loop import train
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.teacher import (
    FeaturesMismatch,
    Teacher,
    encode_corpus,
    features_from_embeddings,
    load_teacher,
)
from geofm.raster.resample import resize_images
from geofm.shards.reader import ShardFiles
from tests.geofm.dedup.synthetic import Chip, make_chips
from tests.geofm.pretraining.conftest import BANDS, picture, tiny_settings


@dataclass
class Numbered(Chip):
    """A chip with the id of its sample in the corpus."""

    def chip_id(self, number: int) -> str:
        return f"{number:024x}"


def _teacher(name: str) -> Teacher:
    return load_teacher(tiny_settings(teacher=name), "cpu")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return _teacher(LITE0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the images of each forward pass; a pass has four images, a file eight samples."""
    seen: list[int] = []

    def counting(teacher: Teacher, rgb: torch.Tensor) -> torch.Tensor:
        seen.append(len(rgb))
        return teach(teacher, rgb)

    teach = teacher_module.teacher_features
    monkeypatch.setattr(teacher_module, "teacher_features", counting)
    monkeypatch.setattr(teacher_module, "SAMPLES_PER_FILE", 8)
    monkeypatch.setitem(teacher_module.CHIPS_PER_PASS, "cpu", 4)
    return seen


def test_each_row_is_the_feature_of_the_whole_chip(
    corpus: Corpus, teacher: Teacher, passes: list[int], tmp_path: Path
) -> None:
    found = encode_corpus(corpus, teacher, "cpu", tmp_path)
    assert found.shape == (22, 1280)
    assert found.dtype == np.float32
    assert sum(passes) == 22
    with ShardFiles(corpus.index) as files:
        for number in (0, 9, 21):
            rgb = torch.from_numpy(read_unit_pixels(corpus, files, number)[None, :3]).clamp(0, 1)
            alone = encode(teacher.encoder, resize_images(rgb, 32)).numpy()[0]
            np.testing.assert_allclose(found[number], alone, atol=1e-4)


def test_a_restart_repeats_only_what_is_missing(
    corpus: Corpus, teacher: Teacher, passes: list[int], tmp_path: Path
) -> None:
    first = encode_corpus(corpus, teacher, "cpu", tmp_path)
    passes.clear()
    assert np.array_equal(encode_corpus(corpus, teacher, "cpu", tmp_path), first)
    assert passes == []
    next(tmp_path.glob("teacher-features-*/00001.npy")).unlink()
    assert np.array_equal(encode_corpus(corpus, teacher, "cpu", tmp_path), first)
    assert passes == [4, 4]


def test_another_input_edge_is_another_set_of_features(
    corpus: Corpus, teacher: Teacher, passes: list[int], tmp_path: Path
) -> None:
    small = encode_corpus(corpus, teacher, "cpu", tmp_path)
    large = encode_corpus(corpus, replace(teacher, size_px=64), "cpu", tmp_path)
    assert sum(passes) == 44
    assert np.abs(small - large).max() > 0.01


@pytest.fixture(scope="module")
def embeddings(
    tmp_path_factory: pytest.TempPathFactory, corpus: Corpus
) -> tuple[Artifact, Artifact]:
    """Vectors of all chips of the corpus, and of all but one."""
    folder = tmp_path_factory.mktemp("embeddings")
    store = open_store(folder / "store")
    catalogue = open_catalogue(f"sqlite:///{folder}/c.db", store)
    chips = [Numbered(picture(n, 4, 40), bands=BANDS) for n in range(len(corpus))]
    return _embedded(store, catalogue, chips), _embedded(store, catalogue, chips[:-1])


def _embedded(store: Store, catalogue: Catalogue, chips: list[Numbered]) -> Artifact:
    settings = EmbedSettings(encoder=LITE0, size_px=32)
    return run_stage(embed.STAGE, store, catalogue, {"chips": make_chips(store, chips)}, settings)


def test_vectors_of_curation_are_the_teachers_features(
    corpus: Corpus, teacher: Teacher, embeddings: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    found = features_from_embeddings(corpus, teacher, embeddings[0])
    assert found.dtype == np.float32
    expected = encode_corpus(corpus, teacher, "cpu", tmp_path)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_other_vectors_are_refused_with_the_setting_to_change(
    corpus: Corpus, teacher: Teacher, embeddings: tuple[Artifact, Artifact]
) -> None:
    whole, short = embeddings
    with pytest.raises(FeaturesMismatch, match=r"pretrain\.teacher_size_px"):
        features_from_embeddings(corpus, replace(teacher, size_px=64), whole)
    random = _teacher("random:tf_efficientnet_lite0")
    with pytest.raises(FeaturesMismatch, match=r"embed\.encoder"):
        features_from_embeddings(corpus, random, whole)
    staged = _teacher("random:test_vit")
    staged = replace(
        staged, encoder=replace(staged.encoder, weights_sha256=teacher.encoder.weights_sha256)
    )
    with pytest.raises(FeaturesMismatch, match=r"pretrain\.distill_stage"):
        features_from_embeddings(corpus, staged, whole)
    with pytest.raises(RunError, match="1 of 22"):
        features_from_embeddings(corpus, teacher, short)


def test_a_student_follows_given_features_without_any_teacher(
    corpus: Corpus, tmp_path: Path
) -> None:
    rows = np.random.default_rng(5).normal(size=(len(corpus), 6)).astype(np.float32)
    # the teacher's file does not exist, so loading it would fail
    settings = tiny_settings(teacher="swin_base_patch4_window7_224@/nowhere.safetensors")
    done = train(corpus, settings, 3, "cpu", tmp_path, threads=1, cached_features=rows)
    assert done.teacher is None

    module = build_pretrainer(settings, 4, 3, 6).train()
    with ShardFiles(corpus.index) as files:
        batch = load_batch(corpus, files, settings, 3, 0)
    assert list(batch.samples) == batch_samples(corpus, 3, 0, settings.batch)[1]
    unit = crop_and_resize(batch.images, batch.windows, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (corpus.mean, corpus.std))
    tokens, _ = module.student((unit - mean) / std, batch.mask)
    feature = module.projector(tokens.mean(dim=(1, 2))).detach().numpy().astype(np.float64)
    wanted = rows[batch.samples].astype(np.float64)
    cosine = (feature * wanted).sum(axis=1)
    cosine /= np.linalg.norm(feature, axis=1) * np.linalg.norm(wanted, axis=1)
    assert done.history["distill"].iloc[0] == pytest.approx(-cosine.mean(), abs=1e-5)
