"""From a pool and its graph to decisions: identical, duplicate, selection, kept.

The leader rule runs over all pairs, whatever the evidence. A chip that is dropped for another
names a chip that *stays* as its witness: so a duplicate whose leader falls to the budget is dropped
for the budget as well, unless another chip that stays is within the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.curation.choose import choose
from geofm.curation.edges import Edges, nearest_kept
from geofm.curation.graph import Graph
from geofm.curation.leader import Leaders, choose_leaders
from geofm.curation.pool import Pool
from geofm.curation.space import Floats, Indices, nearest
from geofm.settings import CurateSettings

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """Decisions by chip of the pool (``rows``), and flags by node."""

    rows: pd.DataFrame
    leaders: Flags
    kept: Flags
    largest_group: int
    strata: tuple[str, ...]


def decide(pool: Pool, graph: Graph, settings: CurateSettings, seed: int) -> Outcome:
    """Apply the rules after the gates.

    Args:
        pool: the chips; each gets a row, in the pool's order.
        graph: what is alike among its candidates.
        settings: budget and how it is filled.
        seed: of whatever the choice leaves to chance.

    Raises:
        UsageError: when the budget is larger than the pool.
        CheckError: when the leader rule does not hold.
    """
    every = join([one.edges for one in graph.evidence])
    leaders = choose_leaders(graph.order, every, graph.hidden, graph.dense)
    chosen = choose(
        pool.table.iloc[graph.nodes], graph.space, np.flatnonzero(leaders.kept), settings, seed
    )
    kept = np.zeros(len(graph.nodes), dtype=np.bool_)
    kept[chosen.rows] = True
    leader = np.where(leaders.kept, np.arange(len(kept)), leaders.witness)
    groups = np.bincount(leader[graph.node_of[graph.node_of >= 0]], minlength=1)
    witnesses = _witnesses(graph, leaders, kept)
    return Outcome(
        rows=_write(pool, graph, kept, leaders, leader, witnesses, groups, settings),
        leaders=leaders.kept,
        kept=kept,
        largest_group=int(groups.max()),
        strata=chosen.strata,
    )


def join(edges: list[Edges]) -> Edges:
    """All edges in one list; a pair may be in it twice."""
    return Edges(
        np.concatenate([one.left for one in edges]),
        np.concatenate([one.right for one in edges]),
        np.concatenate([one.similarity for one in edges]),
    )


@dataclass(frozen=True)
class _Witnesses:
    """By node that goes: the kept node that it is most like, and how similar it is.

    ``evidence`` is the number of the evidence, −1 where that node is just the most similar.
    """

    row: Indices
    similarity: Floats
    evidence: Indices


def _witnesses(graph: Graph, leaders: Leaders, kept: Flags) -> _Witnesses:
    count = len(kept)
    found = _Witnesses(
        np.full(count, -1, dtype=np.int64), np.full(count, np.nan), np.full(count, -1, np.int64)
    )
    for number, one in enumerate(graph.evidence):
        gone, other, edge = nearest_kept(kept, one.edges)
        new = found.row[gone] < 0
        gone, other, edge = gone[new], other[new], edge[new]
        found.row[gone], found.similarity[gone] = other, one.edges.similarity[edge]
        found.evidence[gone] = number
    far = np.flatnonzero(~kept & (found.row < 0)).astype(np.int64)
    if len(far):
        rows, exact = nearest(graph.space, far, np.flatnonzero(kept).astype(np.int64), 1)
        found.row[far], found.similarity[far] = rows[:, 0], exact[:, 0]
        # pairs of dense cells are not among the edges
        near = exact[:, 0] >= np.maximum(graph.least[far], graph.least[rows[:, 0]])
        found.evidence[far[near]] = 0
    return found


def _write(
    pool: Pool, graph: Graph, kept: Flags, leaders: Leaders, leader: Indices,
    witnesses: _Witnesses, groups: Indices, settings: CurateSettings,
) -> pd.DataFrame:  # fmt: skip
    """One row per chip, in words."""
    ids, columns = pool.ids, ["decision", "rule", "reason", "witness_id", "similarity", "cluster"]
    names = [ids[row] for row in graph.nodes]
    given = pool.table[["rule", "reason", "witness_id", "similarity"]].itertuples(index=False)

    def fallen(node: int, copy: bool) -> tuple[str, str, str, float]:
        """Rule, reason, witness and similarity of a chip whose node does not stay."""
        other, by = int(witnesses.row[node]), int(witnesses.evidence[node])
        witness, similarity = names[other], float(witnesses.similarity[node])
        if by >= 0:
            one, least = graph.evidence[by], max(graph.least[node], graph.least[other])
            reason = one.sentence.format(similarity=similarity, witness=witness, least=least)
            return one.rule, reason, witness, similarity
        why = "not chosen"
        if copy or not leaders.kept[node]:
            why = f"a duplicate of {names[leader[node]]}, which was not chosen,"
        reason = (
            f"{why} within curate.budget {settings.budget:g}; the most similar kept chip is "
            f"{witness} ({similarity:.4f})"
        )
        return "selection", reason, witness, similarity

    found: list[tuple[Any, ...]] = []
    for row, pooled in enumerate(given):
        node = int(graph.node_of[row])
        if node < 0:  # a gate, or an evaluation set
            found.append(("drop", *pooled, ""))
            continue
        name, copy = names[node], int(graph.nodes[node]) != row
        cluster = names[leader[node]]
        if not kept[node]:
            found.append(("drop", *fallen(node, copy), cluster))
        elif not copy:
            others = int(groups[node]) - 1
            reason = f"kept for itself and {others} like it" if others else "kept"
            found.append(("keep", "kept", reason, "", np.nan, cluster))
        elif pooled.rule == "identical" and pooled.witness_id == name:
            reason = f"its pixels are those of {name}, which is kept"
            found.append(("drop", "identical", reason, name, 1.0, cluster))
        else:
            reason = f"its embedding is that of {name}, which is kept"
            found.append(("drop", "near_duplicate", reason, name, 1.0, cluster))
    frame = pd.DataFrame(found, columns=columns)
    frame.insert(0, "chip_id", ids)
    return frame
