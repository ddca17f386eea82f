"""Downstream tasks: folders of labelled images, with a reproducible subset and split.

A task is a folder with one sub-folder per class. A card, ``task.json``, may describe it::

    {"name": "crops", "classes": ["maize", "wheat"], "bands": ["red", "green", "blue", "nir"],
     "scale": [0.0001, 0.0001, 0.0001, 0.0001], "gsd_m": 10,
     "groups": {"maize/a.tif": "field 7"}, "split": {"maize/a.tif": "train"}}

Images of a group (a scene, a field) stay on one side of the split. Neighbours in space are almost
copies of each other, so a probe trained on some of a group would score too well on the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_catalog.errors import UsageError, first_line
from data_catalog.hashing import digest_of, sha256_file

#: Name of the planet's built-in task in the settings.
PLANET = "planet"
#: Seed of the split. It is not the run's seed: models trained with different seeds must have the
#: same test images, or their difference would include that of the splits.
SPLIT_SEED = 0
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SplitSide = Literal["train", "test"]


class TaskError(UsageError):
    """A task folder cannot be used."""


class TaskCard(BaseModel):
    """Content of ``task.json``. All fields are optional; unknown fields are kept but not used."""

    model_config = ConfigDict(extra="allow")

    name: str = ""
    classes: list[str] = []
    bands: list[str] = []
    scale: list[float] | float | None = None
    gsd_m: float | None = None
    groups: dict[str, str] = {}
    split: dict[str, SplitSide] = {}


@dataclass(frozen=True)
class LabelledImage:
    """An image of a task.

    Attributes:
        id: ``class/file name``.
        path: Path of the file.
        label: Number of its class, from 0.
    """

    id: str
    path: Path
    label: int


@dataclass(frozen=True)
class Task:
    """A classification task; ``images`` are sorted by id."""

    name: str
    root: Path
    classes: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    card: TaskCard


def open_task(folder: Path) -> Task:
    """Read a task folder; no image is opened.

    Raises:
        TaskError: The folder is missing, ``task.json`` is malformed, there are fewer than two
            classes, or a class has fewer than two images.
    """
    if not folder.is_dir():
        raise TaskError(
            f"evaluate.tasks: there is no folder {folder}; give a folder with one sub-folder of "
            "images per class, or `planet`"
        )
    card = _read_card(folder)
    classes = sorted(set(card.classes)) or sorted(
        p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")
    )
    if len(classes) < 2:
        raise TaskError(
            f"evaluate.tasks: {folder} has {len(classes)} class(es); put the images into at "
            "least two sub-folders, one per class"
        )
    images: list[LabelledImage] = []
    for label, name in enumerate(classes):
        files = _class_files(folder, name)
        if len(files) < 2:
            raise TaskError(
                f"evaluate.tasks: class {name!r} of {folder} has {len(files)} image(s); give it "
                f"at least two ({', '.join(SUFFIXES)}) or remove the class"
            )
        images += [LabelledImage(f"{name}/{p.name}", p, label) for p in files]
    ordered = tuple(sorted(images, key=lambda image: image.id))
    return Task(card.name or folder.resolve().name, folder, tuple(classes), ordered, card)


def open_task_folders(names: Sequence[str]) -> list[Task]:
    """Open the task folders in the settings, without the planet's built-in task.

    Raises:
        TaskError: See ``open_task``; or the settings name no task.
    """
    if not names:
        raise TaskError("evaluate.tasks is empty; name a folder, or `planet`")
    return [open_task(Path(name).expanduser()) for name in names if name != PLANET]


def _read_card(folder: Path) -> TaskCard:
    """The card of a task folder; an empty one if there is no ``task.json``."""
    path = folder / "task.json"
    if not path.exists():
        return TaskCard()
    try:
        return TaskCard.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError) as error:
        raise TaskError(
            f"evaluate.tasks: {path} is not a task card ({first_line(error)}); it is a "
            'JSON object such as {"name": "...", "bands": ["red", "green", "blue"]}'
        ) from error


def _class_files(folder: Path, name: str) -> list[Path]:
    """Image files of a class, sorted."""
    class_folder = folder / name
    # task.json may come from an untrusted source and must not name paths outside the folder.
    if Path(name).name != name:
        raise TaskError(
            f"evaluate.tasks: class {name!r} in task.json of {folder} is no plain folder name; "
            "list the sub-folders by their names"
        )
    if not class_folder.is_dir():
        return []
    return sorted(p for p in class_folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def task_digest(task: Task, images: Iterable[LabelledImage]) -> str:
    """Digest of a task's content: its card and the SHA-256 of each given image."""
    files = [(image.id, sha256_file(image.path)) for image in images]
    return digest_of({"card": task.card.model_dump(mode="json"), "files": files})


def seeded_order(ids: Iterable[str], seed: int, use: str) -> list[str]:
    """Sort ids by a hash of purpose, seed and id.

    The order of two ids does not depend on the other ids, so adding images moves no others.
    """
    return sorted(ids, key=lambda i: (digest_of([use, seed, i]), i))


def cap_images(task: Task, most: int, seed: int) -> tuple[LabelledImage, ...]:
    """Select at most ``most`` images, as equally many per class as the classes allow.

    Raises:
        TaskError: The limit leaves fewer than two images per class.
    """
    if most < 2 * len(task.classes):
        raise TaskError(
            f"evaluate.max_images: {most} images for {len(task.classes)} classes of task "
            f"{task.name}; give at least {2 * len(task.classes)}"
        )
    by_class: list[list[str]] = [[] for _ in task.classes]
    for image in task.images:
        by_class[image.label].append(image.id)
    quota = fair_shares([len(ids) for ids in by_class], most)
    chosen: set[str] = set()
    for ids, number in zip(by_class, quota, strict=True):
        chosen.update(seeded_order(ids, seed, "cap")[:number])
    return tuple(image for image in task.images if image.id in chosen)


def fair_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Divide a total into shares that are as equal as the sizes allow.

    A remainder goes to the first of the classes that have more images.

    Args:
        sizes: Upper bound of each share.
        total: Sum of the shares, or more than all sizes together.
    """
    shares = [0] * len(sizes)
    remaining = min(total, sum(sizes))
    while remaining:
        unfilled = [i for i, size in enumerate(sizes) if shares[i] < size]
        equal_share = max(remaining // len(unfilled), 1)
        for i in unfilled:
            added = min(equal_share, sizes[i] - shares[i], remaining)
            shares[i] += added
            remaining -= added
    return shares


def split_images(
    task: Task, images: Sequence[LabelledImage], test_share: float, seed: int
) -> list[SplitSide]:
    """Assign each image to the train or the test part.

    A split in the card is used as it is. Otherwise groups (or single images, if the card has no
    groups) are visited in the order of a seeded hash. A group goes to the test part if that brings
    the number of test images per class nearer to ``test_share``.

    Args:
        task: The task.
        images: Images to split.
        test_share: Share of each class in the test part.
        seed: Seed of the order of the groups.

    Returns:
        The side of each image.

    Raises:
        TaskError: The card's split lacks an image, or a class is missing on a side.
    """
    if task.card.split:
        sides = _split_of_card(task, images)
    else:
        sides = _random_split(task, images, test_share, seed)
    for label, name in enumerate(task.classes):
        present = {side for side, image in zip(sides, images, strict=True) if image.label == label}
        if len(present) < 2:
            raise TaskError(
                f"evaluate.tasks: class {name!r} of task {task.name} has no image in the "
                f"{'test' if present == {'train'} else 'train'} part; give it more images or "
                "groups, raise evaluate.max_images, or correct `split` in task.json"
            )
    return sides


def _split_of_card(task: Task, images: Sequence[LabelledImage]) -> list[SplitSide]:
    """The card's own split."""
    missing = [image.id for image in images if image.id not in task.card.split]
    if missing:
        raise TaskError(
            f"evaluate.tasks: `split` in task.json of {task.name} lacks {len(missing)} image(s), "
            f"first {missing[0]!r}; give train or test for each, or remove `split`"
        )
    return [task.card.split[image.id] for image in images]


def _random_split(
    task: Task, images: Sequence[LabelledImage], test_share: float, seed: int
) -> list[SplitSide]:
    """A split that keeps groups together; see ``split_images``."""
    group_of = {image.id: task.card.groups.get(image.id, image.id) for image in images}
    members: dict[str, list[LabelledImage]] = {}
    for image in images:
        members.setdefault(group_of[image.id], []).append(image)
    totals = [sum(image.label == label for image in images) for label in range(len(task.classes))]
    targets = [min(max(round(test_share * n), 1), n - 1) for n in totals]
    counts = [0] * len(totals)
    test_groups: set[str] = set()
    for group in seeded_order(members, seed, "split"):
        with_group = counts.copy()
        for image in members[group]:
            with_group[image.label] += 1
        error = sum(abs(n - target) for n, target in zip(counts, targets, strict=True))
        new_error = sum(abs(n - target) for n, target in zip(with_group, targets, strict=True))
        if new_error < error:
            test_groups.add(group)
            counts = with_group
    return ["test" if group_of[image.id] in test_groups else "train" for image in images]
