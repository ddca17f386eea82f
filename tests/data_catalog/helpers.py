"""A tiny chain of stages: numbers, their squares in parts, and a sum."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from data_catalog.stage import Job, Part, Sealed, Stage, link, no_parts, no_work
from data_catalog.store import Store

#: The store of a catalogue whose artifacts a test never opens.
NO_STORE = Store("/no/store")


class Settings(BaseModel):
    count: int = 6
    lose: int = 0


def list_numbers(job: Job, parts: list[Path], out: Path) -> Sealed:
    numbers = list(range(job.settings.count))
    (out / "numbers.json").write_text(json.dumps(numbers))
    return Sealed({"rows_in": len(numbers), "rows_out": len(numbers)})


def plan_squares(job: Job) -> list[Part]:
    return [job.part({"n": n}, covers=n) for n in job.inputs["items"].json("numbers.json")]


def square(job: Job, part: Part, out: Path) -> None:
    n = part.payload["n"]
    if (job.store.local_root / "stop-at").exists() and n == int(
        (job.store.local_root / "stop-at").read_text()
    ):
        raise InterruptedError("killed here")
    (out / "square.txt").write_text(str(n * n))
    log = job.store.local_root / "computed.log"
    with log.open("a") as file:
        file.write(f"{n}\n")


def gather(job: Job, parts: list[Path], out: Path) -> Sealed:
    for number, folder in enumerate(parts):
        link(folder / "square.txt", out / f"{number:03d}.txt")
    lost = job.settings.lose
    return Sealed({"rows_in": len(parts), "rows_out": len(parts) - lost}, metrics={"speed": 1.0})


NUMBERS = Stage("search", "1", "items", (), ("numpy",), no_parts, no_work, list_numbers)
SQUARES = Stage("cut", "1", "chips", ("items",), ("numpy",), plan_squares, square, gather)


def computed(store_root: Path) -> list[int]:
    log = store_root / "computed.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []
