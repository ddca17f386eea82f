"""Task folders: errors, the limit on images, and a stable split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from geofm.evaluation.tasks import (
    LabelledImage,
    Task,
    TaskCard,
    TaskError,
    cap_images,
    fair_shares,
    open_task,
    split_images,
    task_digest,
)


def make_folder(root: Path, sizes: dict[str, int], card: dict[str, Any] | None = None) -> Path:
    for name, number in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.full((8, 8, 3), 10 * i % 255, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    if card is not None:
        (root / "task.json").write_text(json.dumps(card))
    return root


def make_task(sizes: list[int], card: TaskCard | None = None) -> Task:
    images = [
        LabelledImage(f"c{label}/{i:03}.png", Path(f"c{label}/{i:03}.png"), label)
        for label, size in enumerate(sizes)
        for i in range(size)
    ]
    names = tuple(f"c{label}" for label in range(len(sizes)))
    return Task("t", Path(), names, tuple(images), card or TaskCard())


def test_a_folder_is_read_in_the_order_of_ids(tmp_path: Path) -> None:
    task = open_task(make_folder(tmp_path / "crops", {"wheat": 3, "maize": 2}))
    assert task.name == "crops"
    assert task.classes == ("maize", "wheat")
    assert [i.id for i in task.images] == sorted(i.id for i in task.images)
    assert Counter(i.label for i in task.images) == {0: 2, 1: 3}


def test_a_missing_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no folder .*sub-folder of images per class.*planet"):
        open_task(tmp_path / "nowhere")


def test_one_class_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"1 class.*at least two sub-folders"):
        open_task(make_folder(tmp_path / "t", {"only": 4}))


def test_a_class_needs_two_images(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"class 'b'.*1 image.*at least two"):
        open_task(make_folder(tmp_path / "t", {"a": 4, "b": 1}))


def test_a_malformed_card_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "t", {"a": 2, "b": 2})
    (folder / "task.json").write_text('{"split": {"a/000.png": "validation"}}')
    with pytest.raises(TaskError, match=r"task\.json is not a task card"):
        open_task(folder)


def test_a_card_cannot_reach_outside_the_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "secret", {"x": 3})
    card = {"classes": ["a", "../secret/x"]}
    with pytest.raises(TaskError, match="no plain folder name"):
        open_task(make_folder(tmp_path / "t", {"a": 3}, card))


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), total=st.integers(0, 300))
def test_shares_are_fair_and_complete(sizes: list[int], total: int) -> None:
    shares = fair_shares(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    hungry = [s for s, size in zip(shares, sizes, strict=True) if s < size]
    assert not hungry or max(shares) - min(hungry) <= 1


def test_the_cap_is_balanced_and_stable() -> None:
    task = make_task([40, 10, 30])
    chosen = cap_images(task, 45, seed=1)
    assert Counter(i.label for i in chosen) == {0: 18, 1: 10, 2: 17}
    assert chosen == cap_images(task, 45, seed=1)
    assert chosen != cap_images(task, 45, seed=2)
    with pytest.raises(TaskError, match=r"max_images.*at least 6"):
        cap_images(task, 5, seed=0)


@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_the_split_is_stratified_disjoint_and_repeatable(
    sizes: list[int], share: float, seed: int
) -> None:
    task = make_task(sizes)
    sides = split_images(task, task.images, share, seed)
    assert sides == split_images(task, task.images, share, seed)
    for label, size in enumerate(sizes):
        mine = [s for s, i in zip(sides, task.images, strict=True) if i.label == label]
        assert mine.count("test") == min(max(round(share * size), 1), size - 1)


def test_an_image_keeps_its_side_when_others_come() -> None:
    small, large = make_task([20, 20]), make_task([22, 20])
    before, after = (
        dict(zip([i.id for i in t.images], split_images(t, t.images, 0.5, 0), strict=True))
        for t in (small, large)
    )
    assert sum(before[i] != after[i] for i in before) <= 2


def test_groups_are_never_divided() -> None:
    groups = {f"c{c}/{i:03}.png": f"scene {i // 5}" for c in range(2) for i in range(40)}
    task = make_task([40, 40], TaskCard(groups=groups))
    sides = split_images(task, task.images, 0.3, 0)
    by_group: dict[str, set[str]] = {}
    for side, image in zip(sides, task.images, strict=True):
        by_group.setdefault(groups[image.id], set()).add(side)
    assert all(len(found) == 1 for found in by_group.values())
    assert 0.2 <= sides.count("test") / 80 <= 0.4


def test_a_class_in_one_group_cannot_be_split() -> None:
    groups = {f"c1/{i:03}.png": "one scene" for i in range(10)}
    task = make_task([10, 10], TaskCard(groups=groups))
    with pytest.raises(TaskError, match=r"class 'c1'.*no image in the (test|train) part"):
        split_images(task, task.images, 0.3, 0)


def test_the_cards_own_split_is_used() -> None:
    own = {f"c{c}/{i:03}.png": ("test" if i < 2 else "train") for c in range(2) for i in range(6)}
    task = make_task([6, 6], TaskCard.model_validate({"split": own}))
    assert split_images(task, task.images, 0.9, 0) == [own[i.id] for i in task.images]
    del own["c0/003.png"]
    task = make_task([6, 6], TaskCard.model_validate({"split": own}))
    with pytest.raises(TaskError, match=r"lacks 1 image.*c0/003.png"):
        split_images(task, task.images, 0.9, 0)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "t", {"a": 2, "b": 2})
    task = open_task(folder)
    before = task_digest(task, task.images)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8) + 99).save(folder / "a" / "000.png")
    assert task_digest(task, task.images) != before
