"""From a pool that passed the gates to decisions: identical, near duplicate, selection, kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.curation import audit
from geofm.curation.duplicates import Edges, find_edges, first_true, neighbour_lists
from geofm.curation.leader import Leaders, choose_leaders
from geofm.curation.pool import Pool
from geofm.curation.selection import (
    budget_count,
    ground_region,
    make_strata,
    random_choice,
    stratified,
)
from geofm.curation.space import Floats, Indices, Space, make_space, nearest
from geofm.settings import CurateSettings


@dataclass(frozen=True)
class Outcome:
    """A decision per chip of the pool (``rows``), and what the manifest says about them all."""

    rows: pd.DataFrame
    space: Space
    leaders: int
    largest_group: int
    certificate: dict[str, Any]
    measures: dict[str, Any]


def decide(
    pool: Pool, vectors: NDArray[np.float16], settings: CurateSettings, seed: int
) -> Outcome:
    """Apply the rules after the gates to a pool with its embeddings [n, d].

    ``rows`` of the outcome are those that passed the gates, in the pool's order.

    Raises:
        UsageError: when the budget is larger than the pool, or the threshold far too low.
        CheckError: when the audit finds a missed pair, or the leader rule does not hold.
    """
    passed, distinct = np.sort(pool.order), pool.distinct
    place = np.full(len(pool.table), -1, dtype=np.int64)
    place[distinct] = np.arange(len(distinct))

    # from here on, rows are those of the distinct chips
    space = make_space(vectors[distinct])
    edges = find_edges(space, settings.threshold)
    certificate = audit.audit_edges(space, edges, settings.threshold, seed)
    audit.require_complete(certificate)
    leaders = choose_leaders(place[pool.order[np.isin(pool.order, distinct)]], edges)
    kept = _select(pool.table.iloc[distinct], space, leaders, settings, seed)
    witness, similarity, near = _witnesses(space, edges, kept)

    leader = np.where(leaders.kept, np.arange(len(distinct)), leaders.witness)
    mine = place[pool.stands_for[passed]]
    groups = np.bincount(leader[mine]) if len(mine) else np.zeros(1, dtype=np.int64)
    rows = _Rows(
        pool.ids, passed, distinct, mine, kept, near, leaders, leader, witness, similarity, groups
    )
    everyone = np.arange(len(distinct))
    return Outcome(
        rows=_write(rows, settings),
        space=space,
        leaders=int(leaders.kept.sum()),
        largest_group=int(groups.max()),
        certificate=certificate,
        measures=audit.measure_kept(space, everyone, np.flatnonzero(kept), seed),
    )


def _select(
    chips: pd.DataFrame, space: Space, leaders: Leaders, settings: CurateSettings, seed: int
) -> NDArray[np.bool_]:
    """Which of the distinct chips stay: all leaders, or as many of them as the budget says."""
    rows = np.flatnonzero(leaders.kept).astype(np.int64)
    count = budget_count(settings.budget, len(rows))
    if count < len(rows):
        if settings.method == "random":
            ids = chips["chip_id"].astype(str).tolist()
            rows = random_choice(ids, rows, count, seed)
        else:
            some = chips.iloc[rows]
            regions = [
                ground_region(str(crs), list(transform))
                for crs, transform in zip(some["crs"], some["transform"], strict=True)
            ]
            strata = make_strata(some["collection"].astype(str).tolist(), regions, count)
            rows = stratified(space, rows, strata, count, settings.neighbours)
    kept = np.zeros(len(space), dtype=np.bool_)
    kept[rows] = True
    return kept


def _witnesses(
    space: Space, edges: Edges, kept: NDArray[np.bool_]
) -> tuple[Indices, Floats, NDArray[np.bool_]]:
    """The most similar kept row of every other row, how similar, and whether by an edge."""
    start, target, value = neighbour_lists(edges, len(space))
    at = first_true(start, kept[target])
    near = ~kept & (at >= 0)
    witness = np.full(len(space), -1, dtype=np.int64)
    similarity = np.full(len(space), np.nan)
    witness[near], similarity[near] = target[at[near]], value[at[near]]
    far = np.flatnonzero(~kept & ~near).astype(np.int64)
    if len(far):
        found, exact = nearest(space, far, np.flatnonzero(kept).astype(np.int64), 1)
        witness[far], similarity[far] = found[:, 0], exact[:, 0]
    return witness, similarity, near


@dataclass(frozen=True)
class _Rows:
    """Ids by chip, ``mine`` by chip that passed the gates, and the others by distinct chip."""

    ids: list[str]
    passed: Indices
    distinct: Indices
    mine: Indices
    kept: NDArray[np.bool_]
    near: NDArray[np.bool_]
    leaders: Leaders
    leader: Indices
    witness: Indices
    similarity: Floats
    groups: Indices


def _write(rows: _Rows, settings: CurateSettings) -> pd.DataFrame:
    """One row per chip that passed the gates, in words."""
    names = [rows.ids[row] for row in rows.distinct]
    found = []
    for number, row in enumerate(rows.passed):
        chip_id, mine = rows.ids[row], int(rows.mine[number])
        copy = int(rows.distinct[mine]) != int(row)
        leader = names[rows.leader[mine]]
        witness, similarity = names[rows.witness[mine]], float(rows.similarity[mine])
        decision = "drop"
        if rows.kept[mine] and copy:
            rule, witness, similarity = "identical", names[mine], 1.0
            reason = f"its pixels are those of {witness}, which is kept"
        elif rows.kept[mine]:
            decision, rule, witness, similarity = "keep", "kept", "", float("nan")
            others = int(rows.groups[mine]) - 1
            reason = f"kept for itself and {others} like it" if others else "kept"
        elif rows.near[mine]:
            rule = "near_duplicate"
            reason = (
                f"cosine similarity {similarity:.4f} to {witness}, which is kept; chips are "
                f"duplicates from {settings.threshold:g} (curate.threshold)"
            )
        else:
            rule = "selection"
            why = (
                "not chosen"
                if rows.leaders.kept[mine] and not copy
                else (f"a duplicate of {leader}, which was not chosen,")
            )
            reason = (
                f"{why} within curate.budget {settings.budget:g}; the most similar kept chip is "
                f"{witness} ({similarity:.4f})"
            )
        found.append((chip_id, decision, rule, reason, witness, similarity, leader))
    columns = ["chip_id", "decision", "rule", "reason", "witness_id", "similarity", "cluster"]
    return pd.DataFrame(found, columns=columns)
