from __future__ import annotations

import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.progress import listen
from geofm.embeddings.encoders import WeightsMismatch, WeightsMissing, load_encoder, weights_sha256
from geofm.pretraining import step, teacher
from geofm.pretraining.checkpoint import CHECKPOINT_FILE, BadCheckpoint, CheckpointNotWritten
from geofm.pretraining.data import Corpus, open_corpus
from geofm.pretraining.loop import Diverged, Interrupted, TrainingResult, train
from geofm.pretraining.objective import build_pretrainer
from geofm.shards.reader import DamagedShard
from tests.geofm.pretraining.conftest import child_of, tiny_settings


def _train(corpus: Corpus, folder: Path, seed: int = 3, **fields: object) -> TrainingResult:
    folder.mkdir(exist_ok=True)
    return train(corpus, tiny_settings(**fields), seed, "cpu", folder, threads=1)


def _same(one: TrainingResult, two: TrainingResult) -> None:
    pd.testing.assert_frame_equal(one.history, two.history, check_exact=True)
    states = one.module.state_dict(), two.module.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """An uninterrupted run of 10 steps."""
    return _train(corpus, tmp_path_factory.mktemp("whole"))


def test_a_run_learns_and_records_every_step(whole: TrainingResult, corpus: Corpus) -> None:
    history = whole.history
    assert list(history.columns) == [
        "step",
        "epoch",
        "loss",
        "mim",
        "distill",
        "lr",
        "grad_norm",
    ]
    assert list(history["step"]) == list(range(10))
    assert list(history["epoch"]) == [0] * 5 + [1] * 5
    assert np.isfinite(history.to_numpy(dtype=float)).all()
    assert history["loss"].iloc[-3:].mean() < history["loss"].iloc[:3].mean()
    start = build_pretrainer(tiny_settings(), 4, 3, 64).state_dict()
    moved = [key for key, v in whole.module.state_dict().items() if not torch.equal(v, start[key])]
    assert len(moved) == len(start)
    assert whole.metrics["steps"] == 10
    assert whole.metrics["device"] == "cpu"
    assert whole.metrics["images_per_second"] > 0


def test_the_teacher_is_untouched_by_training(whole: TrainingResult) -> None:
    assert whole.teacher is not None
    encoder = whole.teacher.encoder
    assert weights_sha256(encoder.model.state_dict()) == encoder.weights_sha256
    assert encoder.weights_sha256 == load_encoder("random:test_vit", size_px=32).weights_sha256
    assert all(p.grad is None and not p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # the process's earlier random state must not matter
    _same(whole, _train(corpus, tmp_path / "again"))
    other = _train(corpus, tmp_path / "other", seed=4)
    assert not np.array_equal(other.history["loss"], whole.history["loss"])


def test_the_callers_torch_is_left_as_it_was(corpus: Corpus, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    _train(corpus, tmp_path / "run", epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_alpha_0_neither_loads_nor_runs_a_teacher(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    monkeypatch.setattr(step, "teacher_features", lambda *_: pytest.fail("a teacher was asked"))
    alone = _train(corpus, tmp_path / "alone", alpha=0)
    assert alone.teacher is None
    assert alone.module.projector is None
    assert alone.history["distill"].isna().all()
    assert np.array_equal(alone.history["loss"], alone.history["mim"])


def test_before_the_first_step_masked_modelling_is_the_same_with_a_teacher(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    alone = _train(corpus, tmp_path / "alone", alpha=0)
    assert alone.history["mim"].iloc[0] == whole.history["mim"].iloc[0]
    assert alone.history["mim"].iloc[-1] != whole.history["mim"].iloc[-1]


def test_distillation_alone_leaves_the_late_layers_as_they_began(
    corpus: Corpus, tmp_path: Path
) -> None:
    trained = _train(corpus, tmp_path / "distill", mim_weight=0)
    start = build_pretrainer(tiny_settings(mim_weight=0), 4, 3, 64).state_dict()
    late = ("student.backbone.layers.3.blocks", "student.backbone.norm", "decoder")
    for key, value in trained.module.state_dict().items():
        assert torch.equal(value, start[key]) == key.startswith(late), key
    assert trained.history["mim"].isna().all()


@pytest.mark.long
def test_bf16_runs_and_stays_near_fp32(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    half = _train(corpus, tmp_path / "half", precision="bf16")
    assert not np.array_equal(half.history["loss"], whole.history["loss"])
    np.testing.assert_allclose(half.history["loss"], whole.history["loss"], atol=0.05)
    assert all(v.dtype == torch.float32 for v in half.module.state_dict().values())


def test_a_vit_student_learns(corpus: Corpus, tmp_path: Path) -> None:
    vit = {"student": "test_vit", "student_args": {}, "size_px": 64, "mask_patch_px": 16}
    trained = _train(corpus, tmp_path / "vit", **vit)
    assert trained.history["loss"].iloc[-3:].mean() < trained.history["loss"].iloc[0]


class _Stopped(Exception):
    """Raised instead of a crash."""


@pytest.mark.long
@pytest.mark.parametrize("crash", [1, 4, 9])
def test_a_run_that_crashed_ends_with_the_same_bits(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path, crash: int
) -> None:
    def stop(what: str, done: int, total: int, note: str) -> None:
        if done == crash:
            raise _Stopped

    with listen(stop), pytest.raises(_Stopped):
        _train(corpus, tmp_path / "run")
    steps = []
    with listen(lambda what, done, total, note: steps.append(done)):
        resumed = _train(corpus, tmp_path / "run")
    # after the last checkpoint: one is written every 3 steps, before the step is reported
    assert steps[0] == crash // 3 * 3 + 1
    _same(whole, resumed)


@pytest.mark.long
def test_random_layers_resume_exactly_too(corpus: Corpus, tmp_path: Path) -> None:
    arguments = {**tiny_settings().student_args, "drop_path_rate": 0.5}
    straight = _train(corpus, tmp_path / "straight", student_args=arguments)

    def stop(what: str, done: int, total: int, note: str) -> None:
        if done == 5:
            raise _Stopped

    with listen(stop), pytest.raises(_Stopped):
        _train(corpus, tmp_path / "run", student_args=arguments)
    _same(straight, _train(corpus, tmp_path / "run", student_args=arguments))


CHILD = """
import sys, torch
from pathlib import Path
from data_catalog.artifact import Artifact
from data_catalog.progress import listen
from geofm.pretraining.data import open_corpus
from geofm.pretraining.loop import train
from tests.geofm.pretraining.conftest import tiny_settings

url, folder = sys.argv[1:]
with listen(lambda what, done, total, note: print(done, flush=True)):
    train(open_corpus(Artifact(url)), tiny_settings(), 3, "cpu", Path(folder), threads=1)
"""


@pytest.mark.long
def test_sigkill_at_a_random_moment_costs_no_bit(
    whole: TrainingResult, dataset: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    step = random.randint(2, 8)
    with child_of(CHILD, dataset, folder) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= step:
                time.sleep(random.random() * 0.02)
                child.kill()
                break
        child.wait()
        assert child.returncode == -signal.SIGKILL
    _same(whole, _train(open_corpus(dataset), folder))


@pytest.mark.long
def test_sigterm_keeps_the_state_and_says_how_to_go_on(
    whole: TrainingResult, dataset: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with child_of(CHILD, dataset, folder) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "1"
        child.terminate()
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1  # an uncaught Python error
    assert "Interrupted: stopped after step" in errors
    assert "start the same run again" in errors
    kept = torch.load(folder / CHECKPOINT_FILE, weights_only=True)
    assert 1 <= kept["step"] < 10
    assert issubclass(Interrupted, RunError)
    _same(whole, _train(open_corpus(dataset), folder))


def test_a_finished_run_is_not_trained_again(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    first = _train(corpus, tmp_path / "run")
    steps: list[int] = []
    with listen(lambda what, done, total, note: steps.append(done)):
        again = _train(corpus, tmp_path / "run")
    assert steps == []
    _same(first, again)


def test_a_damaged_checkpoint_names_the_file_to_delete(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half a file")
    with pytest.raises(BadCheckpoint, match=rf"{CHECKPOINT_FILE}.*delete it"):
        _train(corpus, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_with_a_remedy(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Diverged, match=r"step \d+ of 10 .*lower pretrain\.base_lr"):
        _train(corpus, tmp_path / "at once", base_lr=1e38, warmup_epochs=0)
    assert list((tmp_path / "at once").iterdir()) == []

    def spoil(what: str, done: int, total: int, note: str) -> None:
        if done == 4:  # the checkpoint of step 3 exists
            monkeypatch.setattr(
                step, "crop_and_resize", lambda images, *rest: images[..., :32, :32] * 1e38
            )

    with listen(spoil), pytest.raises(Diverged, match=r"step 4 of 10"):
        _train(corpus, tmp_path / "later")
    kept = torch.load(tmp_path / "later" / CHECKPOINT_FILE, weights_only=True)
    assert kept["step"] == 3
    assert all(v.isfinite().all() for v in kept["module"].values())


def test_progress_tells_loss_speed_and_time_left(corpus: Corpus, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int, str]] = []
    with listen(lambda *tick: heard.append(tick)):
        _train(corpus, tmp_path, epochs=1)
    assert [done for _, done, _, _ in heard] == [1, 2, 3, 4, 5]
    what, _, total, note = heard[-1]
    assert (what, total) == ("pretrain", 5)
    for word in ("loss ", "images/s", "MFU ", "waiting for data", "s left"):
        assert word in note


def test_a_batch_in_pieces_learns_the_same(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    pieces = _train(corpus, tmp_path / "pieces", microbatch=2)
    for column in ("loss", "mim", "distill", "grad_norm"):
        np.testing.assert_allclose(pieces.history[column], whole.history[column], atol=1e-5)


def test_activation_checkpointing_changes_no_bit(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    _same(whole, _train(corpus, tmp_path / "few", activation_checkpointing=True))


def test_the_running_mean_is_the_model_and_resumes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    run = step.TrainingStep.run

    def watched(self: step.TrainingStep, number: int, batch: object) -> torch.Tensor:
        values = run(self, number, batch)  # type: ignore[arg-type]
        seen.append(self.module.student.mask_token.detach().clone())  # type: ignore[union-attr]
        return values

    monkeypatch.setattr(step.TrainingStep, "run", watched)
    settings = tiny_settings(ema=0.8)
    mean = build_pretrainer(settings, 4, 3, 64).student.mask_token
    decays = [min(0.8, (1 + number) / (10 + number)) for number in range(10)]
    averaged = _train(corpus, tmp_path / "mean", ema=0.8)
    assert mean is not None
    assert len(seen) == 10
    for decay, weights in zip(decays, seen, strict=True):
        mean = decay * mean + (1 - decay) * weights
    torch.testing.assert_close(averaged.module.student.mask_token.detach(), mean.detach())

    def stop(what: str, done: int, total: int, note: str) -> None:
        if done == 5:
            raise _Stopped

    with listen(stop), pytest.raises(_Stopped):
        _train(corpus, tmp_path / "run", ema=0.8)
    _same(averaged, _train(corpus, tmp_path / "run", ema=0.8))


def test_alpha_follows_its_schedule(corpus: Corpus, tmp_path: Path) -> None:
    trained = _train(corpus, tmp_path / "run", alpha=2.0, alpha_end=0.5)
    history = trained.history
    alphas = (history["loss"] - history["mim"]) / history["distill"]
    expected = 0.5 + 1.5 * (1 + np.cos(np.pi * np.arange(10) / 9)) / 2
    np.testing.assert_allclose(alphas, expected, atol=1e-4)


@pytest.mark.long
def test_compiled_it_learns_the_same(corpus: Corpus, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: torch.compile translates for the CPU with one")
    vit = {"student": "test_vit", "student_args": {"depth": 1}, "mask_patch_px": 16, "epochs": 1}
    runs = [
        _train(corpus, tmp_path / str(compiled), **vit, alpha=0, compile=compiled)
        for compiled in (False, True)
    ]
    np.testing.assert_allclose(runs[1].history["loss"], runs[0].history["loss"], atol=1e-4)
    assert runs[1].module.state_dict().keys() == runs[0].module.state_dict().keys()


def test_a_compiler_that_fails_is_named_with_the_setting(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/bin/false",))
    torch.compiler.reset()
    arguments = {"depth": 1, "embed_dim": 32}  # no other test has these kernels
    vit = {"student": "test_vit", "student_args": arguments, "mask_patch_px": 16, "epochs": 1}
    with pytest.raises(step.NotCompiled, match=r"test_vit .*pretrain\.compile=false"):
        _train(corpus, tmp_path / "run", **vit, alpha=0, compile=True)


def test_the_checkpoint_of_another_recipe_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    _train(corpus, tmp_path, epochs=1)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    for other in ({"epochs": 2}, {"epochs": 1, "alpha": 0.5}):
        with pytest.raises(BadCheckpoint, match=r"other settings or another seed.*delete it"):
            _train(corpus, tmp_path, **other)
    with pytest.raises(BadCheckpoint):
        _train(corpus, tmp_path, epochs=1, seed=4)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before
    # settings of how the run is carried out are not part of its identity
    _train(corpus, tmp_path, epochs=1, checkpoint_steps=7, microbatch=2, compile=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    whole: TrainingResult, corpus: Corpus, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def fill(what: str, done: int, total: int, note: str) -> None:
        if done == 4:  # the checkpoint of step 3 exists
            size = (folder / CHECKPOINT_FILE).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with listen(fill), pytest.raises(CheckpointNotWritten, match=r"step 6 .*Make room"):
            _train(corpus, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert torch.load(folder / CHECKPOINT_FILE, weights_only=True)["step"] == 3
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT_FILE]
    _same(whole, _train(corpus, folder))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_too_little_memory_says_what_needs_less(
    whole: TrainingResult,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    real = step.crop_and_resize

    def hungry(images: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        if int((tmp_path / CHECKPOINT_FILE).exists()):
            if device == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            torch.empty(2**60)
        return real(images, *weights)

    with monkeypatch.context() as patch:
        patch.setattr(step, "crop_and_resize", hungry)
        with pytest.raises(step.OutOfMemory, match=r"step 3: no memory.*pretrain\.microbatch"):
            _train(corpus, tmp_path)
    assert torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)["step"] == 3
    _same(whole, _train(corpus, tmp_path))


def test_features_that_are_known_beforehand_need_no_teacher(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "teacher_features", lambda *_: pytest.fail("a teacher was asked"))
    taught = np.random.default_rng(0).normal(size=(len(corpus), 64)).astype(np.float32)
    trained = train(corpus, tiny_settings(), 3, "cpu", tmp_path, threads=1, cached_features=taught)
    assert trained.metrics["teacher_seconds"] == 0
    assert trained.history["distill"].iloc[-3:].mean() < trained.history["distill"].iloc[0]


def test_a_shard_damaged_on_the_way_costs_no_checkpoint(
    whole: TrainingResult, dataset: Artifact, tmp_path: Path
) -> None:
    copied = tmp_path / "dataset"
    shutil.copytree(dataset.url, copied)
    shard = next((copied / "shards").glob("*.tar"))
    sound = shard.read_bytes()

    def damage(what: str, done: int, total: int, note: str) -> None:
        if done == 5:
            shard.write_bytes(bytes(len(sound)))

    with listen(damage), pytest.raises(DamagedShard, match="restore the shard"):
        _train(open_corpus(Artifact(str(copied))), tmp_path / "run")
    kept = torch.load(tmp_path / "run" / CHECKPOINT_FILE, weights_only=True)["step"]
    assert kept in (3, 6)
    shard.write_bytes(sound)
    _same(whole, _train(open_corpus(Artifact(str(copied))), tmp_path / "run"))


def test_a_teacher_that_cannot_be_had_is_named_before_the_first_step(
    corpus: Corpus, tmp_path: Path
) -> None:
    save_file({"other.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, error, words in (
        ("test_vit@/nowhere.safetensors", WeightsMissing, "there is no file of weights"),
        (f"test_vit@{tmp_path}/other.safetensors", WeightsMismatch, "give the weights of this"),
    ):
        with pytest.raises(error, match=words):
            _train(corpus, tmp_path / "run", teacher=name)
        assert list((tmp_path / "run").iterdir()) == []
