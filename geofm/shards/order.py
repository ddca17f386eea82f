"""The order of an epoch, and how far readers have come in it.

An epoch's order is a permutation that follows from (seed, epoch). Its places 0, 1, 2, ... are dealt
to the readers of all ranks like cards, so who reads how many of them plays no part, and what is
left of an epoch can be dealt again to any other number of readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import UsageError

#: Set apart the generator of an epoch's order from those of its samples.
ORDER = 0x0DE5

Numbers = NDArray[np.integer[Any]]


class BadState(UsageError):
    """A loader's state does not belong to this dataset, seed or moment."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, samples: int) -> Numbers:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch, samples, ORDER]))
    order: Numbers = np.arange(samples, dtype=np.int32 if samples < 2**31 else np.int64)
    rng.shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Left:
    """What is left of an epoch: places from ``first`` on, without those in ``done``."""

    epoch: int = 0
    first: int = 0
    done: tuple[int, ...] = ()

    def of(self, order: Numbers) -> Numbers:
        """What nobody has read of an epoch's order; a view of it where that is one piece."""
        if not self.done:
            return order[self.first :]
        read = np.zeros(len(order), dtype=np.bool_)
        read[: self.first] = True
        read[list(self.done)] = True
        return order[~read]

    def places(self, samples: int) -> Numbers:
        """Places of the epoch's order that nobody has read, ascending."""
        return self.of(np.arange(samples))


def deal(left: Numbers, rank: int, world: int) -> Numbers:
    """What one of ``world`` readers is dealt of what is left: a view."""
    return left[rank::world]


def after(left: Left, samples: int, taken: Sequence[int]) -> Left:
    """What is left after reader r has read ``taken[r]`` of the places that were dealt to it.

    Raises:
        BadState: a reader has read more than it was dealt.
    """
    places = left.places(samples)
    read = np.zeros(len(places), dtype=np.bool_)
    for rank, count in enumerate(taken):
        mine = read[rank :: len(taken)]
        if not 0 <= count <= len(mine):
            raise BadState(
                f"reader {rank} of {len(taken)} says it has read {count} samples of {len(mine)}; "
                "load the state with the dataset, split and seed that it was saved with"
            )
        mine[:count] = True
    if read.all():
        return Left(left.epoch + 1)
    first = int(places[~read][0])
    done = sorted([*left.done, *places[read].tolist()])
    return Left(left.epoch, first, tuple(place for place in done if place > first))


def merge(states: Sequence[dict[str, Any]]) -> Left:
    """What is left of an epoch by the states of all its readers, or by one that speaks for all.

    One state means that every reader has read as many samples as this one, as with training in
    lockstep. The states of all readers are exact whatever each has read.

    Raises:
        BadState: the states are not those of all readers of one epoch.
    """
    latest = min(states, key=lambda state: int(state["epoch"]))
    world, samples = int(latest["world"]), int(latest["samples"])
    left = Left(int(latest["epoch"]), int(latest["first"]), tuple(latest["done"]))
    dealt = [len(deal(left.places(samples), rank, world)) for rank in range(world)]
    if len(states) == 1:
        count = int(latest["taken"])
        return after(left, samples, [min(count, most) for most in dealt])
    if sorted(int(state["rank"]) for state in states) != list(range(world)):
        raise BadState(f"{len(states)} states were given, but {world} readers have one each")
    taken = [0] * world
    for state in states:
        same = [state[name] for name in ("first", "done")] == [left.first, list(left.done)]
        if int(state["world"]) != world or not (same or state["epoch"] != left.epoch):
            raise BadState("the states were not saved by the readers of one and the same run")
        rank, ahead = int(state["rank"]), int(state["epoch"]) - left.epoch
        if ahead > 1 or (ahead == 1 and int(state["taken"])):
            raise BadState(
                f"reader {rank} is in epoch {state['epoch']} and another in {left.epoch}: save the "
                "states when all readers have finished the same epoch or are in the same one"
            )
        taken[rank] = dealt[rank] if ahead else int(state["taken"])
    return after(left, samples, taken)
