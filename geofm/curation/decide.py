"""From a pool and its pairs to decisions: identical, duplicate, selection, kept.

The leader rule runs over all pairs, whatever the evidence. A chip that is dropped for another
names a chip that *stays* as its witness: so a duplicate whose leader falls to the budget is dropped
for the budget as well, unless another chip that stays is within the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.curation.choose import choose
from geofm.curation.duplicates import Edges, first_true, neighbour_lists
from geofm.curation.leader import Leaders, choose_leaders
from geofm.curation.pool import Pool
from geofm.curation.space import Floats, Indices, Space, nearest
from geofm.settings import CurateSettings


@dataclass(frozen=True)
class Evidence:
    """Pairs of distinct rows that are duplicates by one kind of evidence.

    ``rule`` is the rule a chip is dropped by; ``sentence`` says why, with the fields
    ``similarity`` and ``witness``.
    """

    rule: str
    sentence: str
    edges: Edges


@dataclass(frozen=True)
class Outcome:
    """Decisions by chip that passed the gates (``rows``), and flags by distinct chip."""

    rows: pd.DataFrame
    leaders: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    largest_group: int
    strata: tuple[str, ...]


def decide(
    pool: Pool, space: Space, evidence: Sequence[Evidence], settings: CurateSettings, seed: int
) -> Outcome:
    """Apply the rules after the gates.

    Args:
        pool: the chips; those that passed get a row each, in the pool's order.
        space: of the pool's distinct chips; its rows are meant by the edges.
        evidence: the first that a kept neighbour is found by gives rule and witness.
        settings: budget and how it is filled.
        seed: of whatever the choice leaves to chance.

    Raises:
        UsageError: when the budget is larger than the pool.
        CheckError: when the leader rule does not hold.
    """
    distinct = pool.distinct
    place = np.full(len(pool.table), -1, dtype=np.int64)
    place[distinct] = np.arange(len(distinct))
    order = place[pool.order[pool.stands_for[pool.order] == pool.order]]
    leaders = choose_leaders(order, join([one.edges for one in evidence]))
    rows = np.flatnonzero(leaders.kept).astype(np.int64)
    chosen = choose(pool.table.iloc[distinct], space, rows, settings, seed)
    kept = np.zeros(len(space), dtype=np.bool_)
    kept[chosen.rows] = True
    witnesses = _witnesses(space, evidence, kept)
    leader = np.where(leaders.kept, np.arange(len(distinct)), leaders.witness)
    mine = place[pool.stands_for[np.sort(pool.order)]]
    groups = np.bincount(leader[mine], minlength=1)
    return Outcome(
        rows=_write(pool, mine, kept, leaders, leader, witnesses, groups, evidence, settings),
        leaders=leaders.kept,
        kept=kept,
        largest_group=int(groups.max()),
        strata=chosen.strata,
    )


def join(edges: Sequence[Edges]) -> Edges:
    """All edges in one list; a pair may be in it twice."""
    return Edges(
        np.concatenate([one.left for one in edges]),
        np.concatenate([one.right for one in edges]),
        np.concatenate([one.similarity for one in edges]),
    )


@dataclass(frozen=True)
class _Witnesses:
    """By distinct row that goes: the kept row that it is most like, and how similar it is.

    ``evidence`` is the number of the evidence, −1 where that row is just the most similar.
    """

    row: Indices
    similarity: Floats
    evidence: Indices


def _witnesses(space: Space, evidence: Sequence[Evidence], kept: NDArray[np.bool_]) -> _Witnesses:
    found = _Witnesses(
        np.full(len(space), -1, dtype=np.int64),
        np.full(len(space), np.nan),
        np.full(len(space), -1, dtype=np.int64),
    )
    for number, one in enumerate(evidence):
        start, target, value = neighbour_lists(one.edges, len(space))
        at = first_true(start, kept[target])
        near = ~kept & (found.row < 0) & (at >= 0)
        found.row[near], found.similarity[near] = target[at[near]], value[at[near]]
        found.evidence[near] = number
    far = np.flatnonzero(~kept & (found.row < 0)).astype(np.int64)
    if len(far):
        rows, exact = nearest(space, far, np.flatnonzero(kept).astype(np.int64), 1)
        found.row[far], found.similarity[far] = rows[:, 0], exact[:, 0]
    return found


def _write(
    pool: Pool, mine: Indices, kept: NDArray[np.bool_], leaders: Leaders, leader: Indices,
    witnesses: _Witnesses, groups: Indices, evidence: Sequence[Evidence],
    settings: CurateSettings,
) -> pd.DataFrame:  # fmt: skip
    """One row per chip that passed the gates, in words. ``mine`` is each one's distinct row."""
    ids = pool.ids
    names = [ids[row] for row in pool.distinct]
    found = []
    for row, own in zip(np.sort(pool.order), mine, strict=True):
        copy = pool.stands_for[row] != row
        by = int(witnesses.evidence[own])
        witness = "" if kept[own] else names[witnesses.row[own]]
        similarity = float(witnesses.similarity[own])
        decision = "drop"
        if kept[own] and copy:
            rule, witness, similarity = "identical", names[own], 1.0
            reason = f"its pixels are those of {witness}, which is kept"
        elif kept[own]:
            decision, rule = "keep", "kept"
            others = int(groups[own]) - 1
            reason = f"kept for itself and {others} like it" if others else "kept"
        elif by >= 0:
            rule = evidence[by].rule
            reason = evidence[by].sentence.format(similarity=similarity, witness=witness)
        else:
            rule = "selection"
            why = "not chosen"
            if copy or not leaders.kept[own]:
                why = f"a duplicate of {names[leader[own]]}, which was not chosen,"
            reason = (
                f"{why} within curate.budget {settings.budget:g}; the most similar kept chip is "
                f"{witness} ({similarity:.4f})"
            )
        found.append((ids[row], decision, rule, reason, witness, similarity, names[leader[own]]))
    columns = ["chip_id", "decision", "rule", "reason", "witness_id", "similarity", "cluster"]
    return pd.DataFrame(found, columns=columns)
