"""From a pool that passed the gates to decisions: identical, near duplicate, selection, kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.canonical import digest_of
from geofm.curation import audit
from geofm.curation.duplicates import (
    Edges,
    collapse_identical,
    find_edges,
    first_true,
    neighbour_lists,
)
from geofm.curation.leader import Leaders, choose_leaders, total_order
from geofm.curation.selection import Candidates, select
from geofm.curation.space import Floats, Indices, Space, make_space, nearest
from geofm.curation.strata import budget_count, divide, ground_region
from geofm.settings import CurateSettings


@dataclass(frozen=True)
class Pool:
    """Chips that passed the gates, sorted by id, and their embeddings [n, d] (float16)."""

    chips: pd.DataFrame
    vectors: NDArray[np.float16]


@dataclass(frozen=True)
class Outcome:
    """A decision per chip of the pool (``rows``), and what the manifest says about them all."""

    rows: pd.DataFrame
    space: Space
    leaders: int
    largest_group: int
    certificate: dict[str, Any]
    measures: dict[str, Any]


def decide(pool: Pool, settings: CurateSettings, seed: int) -> Outcome:
    """Apply the rules after the gates to a pool.

    Raises:
        UsageError: when the budget is larger than the pool, or the threshold far too low.
        CheckError: when the audit finds a missed pair, or the leader rule does not hold.
    """
    chips = pool.chips.reset_index(drop=True)
    ids = chips["chip_id"].astype(str).tolist()
    order = total_order(chips["quality"].to_numpy(np.float64), ids)
    stands_for = collapse_identical(_contents(chips), order)
    distinct = np.unique(stands_for)
    place = np.full(len(ids), -1, dtype=np.int64)
    place[distinct] = np.arange(len(distinct))

    # from here on, rows are those of the distinct chips
    space = make_space(pool.vectors[distinct])
    edges = find_edges(space, settings.threshold)
    certificate = audit.audit_edges(space, edges, settings.threshold, seed)
    audit.require_complete(certificate)
    leaders = choose_leaders(place[order[np.isin(order, distinct)]], edges)
    kept = _select(chips.iloc[distinct], space, leaders, settings, seed)
    witness, similarity, near = _witnesses(space, edges, kept)

    leader = np.where(leaders.kept, np.arange(len(distinct)), leaders.witness)
    mine = place[stands_for]
    groups = np.bincount(leader[mine]) if len(ids) else np.zeros(1, dtype=np.int64)
    rows = _Rows(
        ids, distinct, stands_for, mine, kept, near, leaders, leader, witness, similarity, groups
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


def _contents(chips: pd.DataFrame) -> list[str]:
    """What makes two chips the same: pixels, and what their numbers mean."""
    columns = (chips[name].tolist() for name in ("pixel_sha256", "bands", "scale"))
    return [
        digest_of([str(pixels), [str(band) for band in bands], [float(value) for value in scale]])
        for pixels, bands, scale in zip(*columns, strict=True)
    ]


def _select(
    chips: pd.DataFrame, space: Space, leaders: Leaders, settings: CurateSettings, seed: int
) -> NDArray[np.bool_]:
    """Which of the distinct chips stay: all leaders, or as many of them as the budget says."""
    rows = np.flatnonzero(leaders.kept).astype(np.int64)
    count = budget_count(settings.budget, len(rows))
    if count < len(rows):
        some = chips.iloc[rows]
        regions = [
            ground_region(str(crs), list(transform))
            for crs, transform in zip(some["crs"], some["transform"], strict=True)
        ]
        collections = some["collection"].astype(str).tolist()
        strata, _ = divide({"collection": collections, "region": regions}, count)
        pool = Candidates(space, rows, some["chip_id"].astype(str).tolist(), tiles=regions)
        rows = select(pool, settings.method, count, strata, seed=seed).rows
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
    """Results by chip of the pool (ids, stands_for, mine) and by distinct chip (the others)."""

    ids: list[str]
    distinct: Indices
    stands_for: Indices
    mine: Indices
    kept: NDArray[np.bool_]
    near: NDArray[np.bool_]
    leaders: Leaders
    leader: Indices
    witness: Indices
    similarity: Floats
    groups: Indices


def _write(rows: _Rows, settings: CurateSettings) -> pd.DataFrame:
    """One row per chip of the pool, in words."""
    names = [rows.ids[row] for row in rows.distinct]
    found = []
    for number, chip_id in enumerate(rows.ids):
        mine = int(rows.mine[number])
        copy = int(rows.stands_for[number]) != number
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
