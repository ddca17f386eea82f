"""Downstream tasks: folders of labelled images, cut to size and split the same way every time.

A task is a folder with one sub-folder per class. It may say more about itself in ``task.json``::

    {"name": "crops", "classes": ["maize", "wheat"], "bands": ["red", "green", "blue", "nir"],
     "scale": [0.0001, 0.0001, 0.0001, 0.0001], "gsd_m": 10,
     "groups": {"maize/a.tif": "field 7"}, "split": {"maize/a.tif": "train"}}

Images of one group (a scene, a field) stay on one side of the split: neighbours in space are near
copies of each other, and a probe that has seen one scores too well on the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_catalog.errors import UsageError
from data_catalog.hashing import digest_of, sha256_file

#: The task that the planet draws, in the settings.
PLANET = "planet"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
Side = Literal["train", "test"]


class TaskError(UsageError):
    """A task folder that cannot be used as it is."""


class TaskCard(BaseModel):
    """``task.json``; every field may be left out. Other fields are kept but not used."""

    model_config = ConfigDict(extra="allow")

    name: str = ""
    classes: list[str] = []
    bands: list[str] = []
    scale: list[float] | float | None = None
    gsd_m: float | None = None
    groups: dict[str, str] = {}
    split: dict[str, Side] = {}


@dataclass(frozen=True)
class LabelledImage:
    """One image: ``id`` is ``class/file name``, ``label`` the position of its class."""

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
        TaskError: the folder is missing, ``task.json`` is malformed, there are fewer than two
            classes, or a class has fewer than two images.
    """
    if not folder.is_dir():
        raise TaskError(
            f"evaluate.tasks: there is no folder {folder}; give a folder with one sub-folder of "
            "images per class, or `planet`"
        )
    card = _card(folder)
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
        files = _images(folder, name)
        if len(files) < 2:
            raise TaskError(
                f"evaluate.tasks: class {name!r} of {folder} has {len(files)} image(s); give it "
                f"at least two ({', '.join(SUFFIXES)}) or remove the class"
            )
        images += [LabelledImage(f"{name}/{p.name}", p, label) for p in files]
    ordered = tuple(sorted(images, key=lambda image: image.id))
    return Task(card.name or folder.resolve().name, folder, tuple(classes), ordered, card)


def open_folders(names: Sequence[str]) -> list[Task]:
    """Open the task folders that settings name, the planet's left out.

    Raises:
        TaskError: as ``open_task``, or nothing is named.
    """
    if not names:
        raise TaskError("evaluate.tasks is empty; name a folder, or `planet`")
    return [open_task(Path(name).expanduser()) for name in names if name != PLANET]


def _card(folder: Path) -> TaskCard:
    path = folder / "task.json"
    if not path.exists():
        return TaskCard()
    try:
        return TaskCard.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError) as error:
        raise TaskError(
            f"evaluate.tasks: {path} is not a task card ({str(error).splitlines()[0]}); it is a "
            'JSON object such as {"name": "...", "bands": ["red", "green", "blue"]}'
        ) from error


def _images(folder: Path, name: str) -> list[Path]:
    inside = folder / name
    if Path(name).name != name:  # task.json may have come with the data, and must stay inside it
        raise TaskError(
            f"evaluate.tasks: class {name!r} in task.json of {folder} is no plain folder name; "
            "list the sub-folders by their names"
        )
    if not inside.is_dir():
        return []
    return sorted(p for p in inside.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def task_digest(task: Task, images: Iterable[LabelledImage]) -> str:
    """Content identity of a task: its card and the SHA-256 of each image used."""
    files = [(image.id, sha256_file(image.path)) for image in images]
    return digest_of({"card": task.card.model_dump(mode="json"), "files": files})


def seeded_order(ids: Iterable[str], seed: int, use: str) -> list[str]:
    """Ids in an order that depends on each id and the seed, not on which others are there."""
    return sorted(ids, key=lambda i: (digest_of([use, seed, i]), i))


def cap_images(task: Task, most: int, seed: int) -> tuple[LabelledImage, ...]:
    """At most ``most`` images, balanced by class: a small class is used up first.

    Raises:
        TaskError: the limit leaves fewer than two images per class.
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
    """How many to take of each so that the takes are as equal as the sizes allow.

    What does not divide evenly goes to the first of those that have more.
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        hungry = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = max(left // len(hungry), 1)
        for i in hungry:
            take = min(each, sizes[i] - shares[i], left)
            shares[i] += take
            left -= take
    return shares


def split_images(
    task: Task, images: Sequence[LabelledImage], test_share: float, seed: int
) -> list[Side]:
    """The side of each image, as many of every class in the test part as ``test_share`` asks.

    The card's own ``split`` is used where it has one. Otherwise groups (single images where the
    card has none) are taken in the order of a seeded hash, and one goes to the test part when
    that brings the classes nearer to their shares.

    Raises:
        TaskError: the card's split leaves out an image, or a class lacks one of the sides.
    """
    sides = _given(task, images) if task.card.split else _drawn(task, images, test_share, seed)
    for label, name in enumerate(task.classes):
        present = {side for side, image in zip(sides, images, strict=True) if image.label == label}
        if len(present) < 2:
            raise TaskError(
                f"evaluate.tasks: class {name!r} of task {task.name} has no image in the "
                f"{'test' if present == {'train'} else 'train'} part; give it more images or "
                "groups, raise evaluate.max_images, or correct `split` in task.json"
            )
    return sides


def _given(task: Task, images: Sequence[LabelledImage]) -> list[Side]:
    missing = [image.id for image in images if image.id not in task.card.split]
    if missing:
        raise TaskError(
            f"evaluate.tasks: `split` in task.json of {task.name} lacks {len(missing)} image(s), "
            f"first {missing[0]!r}; give train or test for each, or remove `split`"
        )
    return [task.card.split[image.id] for image in images]


def _drawn(task: Task, images: Sequence[LabelledImage], test_share: float, seed: int) -> list[Side]:
    members: dict[str, list[LabelledImage]] = {}
    for image in images:
        members.setdefault(task.card.groups.get(image.id, image.id), []).append(image)
    totals = [sum(image.label == label for image in images) for label in range(len(task.classes))]
    wanted = [min(max(round(test_share * n), 1), n - 1) for n in totals]
    taken = [0] * len(totals)
    test: set[str] = set()
    for group in seeded_order(members, seed, "split"):
        adds = [0] * len(totals)
        for image in members[group]:
            adds[image.label] += 1
        before = sum(abs(t - w) for t, w in zip(taken, wanted, strict=True))
        after = sum(abs(t + a - w) for t, a, w in zip(taken, adds, wanted, strict=True))
        if after < before:
            test.add(group)
            taken = [t + a for t, a in zip(taken, adds, strict=True)]
    return [
        "test" if task.card.groups.get(image.id, image.id) in test else "train" for image in images
    ]
