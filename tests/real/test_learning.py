"""Parts of benchmarks/learning.py on real scenes: held-out ground stays out of training."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from geofm.evaluation.tasks import Task, open_task
from geofm.pretraining.data import open_corpus, read_unit_pixels
from geofm.shards.reader import ShardFiles


@pytest.fixture(scope="module")
def learning() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "learning.py"
    spec = importlib.util.spec_from_file_location("learning", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["learning"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def aid(shared: Path) -> Task:
    return open_task(shared / "data" / "aid_scenes")


def test_parts_are_disjoint_and_balanced(learning: ModuleType, aid: Task) -> None:
    fit, test = learning.hold_out(list(aid.images), 40, 0)
    less, validation = learning.hold_out(fit, 15, 100)
    ids = [{image.id for image in part} for part in (less, validation, test)]
    assert [len(part) for part in ids] == [1650, 450, 1200]
    assert len(set.union(*ids)) == 3300
    assert set(Counter(image.label for image in test).values()) == {40}
    assert set(Counter(image.label for image in validation).values()) == {15}


def test_the_corpus_holds_the_scenes_of_the_pretraining_part_alone(
    learning: ModuleType, aid: Task, tmp_path: Path
) -> None:
    fit, _ = learning.hold_out(list(aid.images[:110]), 104, 0)
    corpus = open_corpus(learning.pack(fit, tmp_path))
    stored = set()
    with ShardFiles(corpus.index) as files:
        for number in range(len(corpus)):
            stored.add(
                (read_unit_pixels(corpus, files, number) * 255).round().astype(np.uint8).tobytes()
            )
    scenes = [np.asarray(Image.open(image.path).convert("RGB")) for image in fit]
    assert stored == {scene.transpose(2, 0, 1).tobytes() for scene in scenes}


def test_differences_are_paired_by_scene_over_shared_seeds(learning: ModuleType) -> None:
    rows = [
        {"arm": arm, "seed": seed, "protocol": "linear", "feature": "distilled",
         "image": f"{n:03d}", "correct": n % 4 < right - (seed == 3)}
        for arm, right, seeds in (("masked", 1, (1, 2)), ("both", 3, (1, 2, 3)))
        for seed in seeds
        for n in range(200)
    ]  # fmt: skip
    shuffled = pd.DataFrame(rows).sample(frac=1, random_state=0)
    rows = {(r["feature"], r["what"]): r for r in learning.summary(shuffled)}
    both, delta = rows["distilled", "both"], rows["distilled", "both - masked"]
    assert both["value"] == pytest.approx((0.75 + 0.75 + 0.5) / 3, abs=1e-4)
    assert (both["seeds"], both["lowest_seed"]) == (3, 0.5)
    assert (delta["seeds"], delta["value"]) == (2, 0.5)
    # paired: each scene adds 0 or 1, never -1
    assert 0.42 < delta["ci_low"] < 0.5 < delta["ci_high"] < 0.58
