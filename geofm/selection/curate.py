"""Stage ``curate``: one decision per candidate chip, each with its rule, scores and witness.

Near duplicates go by the leader rule, then the budget is filled. That two chips show the same
place is no reason for anything; only what they look like counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.config.recipe import CurateSettings
from geofm.dedup.buckets import thresholds_of
from geofm.dedup.edges import Edges, nearest_kept
from geofm.dedup.leader import Leaders, best_hidden, choose_leaders
from geofm.embeddings.vectors import nearest
from geofm.pool.pool import Pool, load_pool
from geofm.selection.budget import choose, measured, scored, survivors
from geofm.selection.evidence import Graph, load_graph
from geofm.types import Floats, Indices

# From a pool and its graph to decisions: identical, duplicate, selection, kept.
# The leader rule runs over all pairs, whatever the evidence. A chip that is dropped as a duplicate
# names a kept chip as its witness, and the two are a pair that was compared by rule and is stored:
# in ``pairs``, in ``alike``, or in ``dense_pairs.parquet`` of the decisions. Every other chip that
# is dropped here lost to the budget (rule ``selection``), also a leader that happens to be similar
# to a kept chip, and a duplicate whose leader was not chosen. It has no witness; ``nearest_id`` is
# the kept chip that it is most similar to.

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """Decisions by chip of the pool, and flags by node.

    Attributes:
        rows: one decision for each chip.
        dense_pairs: pairs (left, right, similarity) of dense cells that name a witness; those of
            other cells are in the artifact ``pairs``.
        leaders: nodes that the leader rule keeps.
        kept: nodes that the budget keeps as well.
        largest_group: number of chips that the largest group of duplicates has.
        strata: columns by which the budget was divided.
    """

    rows: pd.DataFrame
    dense_pairs: pd.DataFrame
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
    witnesses = _find_witnesses(graph, kept)
    return Outcome(
        rows=_write(pool, graph, kept, leaders, leader, witnesses, groups, settings),
        dense_pairs=_dense_pairs(pool, graph, witnesses),
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
    """The kept node that each dropped node is most like.

    Attributes:
        row: the kept node, shape (nodes,); -1 for nodes that are kept.
        similarity: cosine, or likeness of pixels, shape (nodes,).
        evidence: number of the evidence that made the two a pair, shape (nodes,); -1 if they are
            no pair and the kept node is merely the most similar.
        dense: whether the pair is one of a dense cell, shape (nodes,).
    """

    row: Indices
    similarity: Floats
    evidence: Indices
    dense: Flags


def _find_witnesses(graph: Graph, kept: Flags) -> _Witnesses:
    """Find the witness of each dropped node: by its pairs, else the most similar kept node.

    A similarity above the threshold does not make a pair: embeddings of monotone chips are all
    similar and are not compared.
    """
    count = len(kept)
    found = _Witnesses(
        np.full(count, -1, dtype=np.int64),
        np.full(count, np.nan),
        np.full(count, -1, dtype=np.int64),
        np.zeros(count, dtype=np.bool_),
    )
    pairs = [(number, evidence.edges, False) for number, evidence in enumerate(graph.evidence)]
    if graph.hidden is not None and graph.dense is not None:
        pairs.append((0, best_hidden(kept, graph.hidden, graph.dense), True))
    for number, edges, dense in pairs:
        gone, other, edge = nearest_kept(kept, edges)
        new = found.row[gone] < 0
        gone, other, edge = gone[new], other[new], edge[new]
        found.row[gone], found.similarity[gone] = other, edges.similarity[edge]
        found.evidence[gone], found.dense[gone] = number, dense
    far = np.flatnonzero(~kept & (found.row < 0)).astype(np.int64)
    if len(far):
        rows, exact = nearest(graph.space, far, np.flatnonzero(kept).astype(np.int64), 1)
        found.row[far], found.similarity[far] = rows[:, 0], exact[:, 0]
    return found


def _dense_pairs(pool: Pool, graph: Graph, witnesses: _Witnesses) -> pd.DataFrame:
    """List the witness pairs of dense cells by chip id, the lower id left, sorted."""
    ids = np.array(pool.ids, dtype=object)[graph.nodes]
    gone = np.flatnonzero(witnesses.dense)
    pairs = [sorted(pair) for pair in zip(ids[gone], ids[witnesses.row[gone]], strict=True)]
    table = pd.DataFrame(pairs, columns=["left", "right"], dtype=str)
    table["similarity"] = witnesses.similarity[gone]
    return table.sort_values(["left", "right"], ignore_index=True)


def _write(
    pool: Pool, graph: Graph, kept: Flags, leaders: Leaders, leader: Indices,
    witnesses: _Witnesses, groups: Indices, settings: CurateSettings,
) -> pd.DataFrame:  # fmt: skip
    """One row per chip, in words."""
    ids = pool.ids
    columns = [
        "decision", "rule", "reason", "witness_id", "similarity", "nearest_id", "cluster",
    ]  # fmt: skip
    names = [ids[row] for row in graph.nodes]
    given = pool.table[["rule", "reason", "witness_id", "similarity"]].itertuples(index=False)

    def fallen(node: int, copy: bool) -> tuple[str, str, str, float, str]:
        """Rule, reason, witness, similarity and nearest kept chip where the node is not kept."""
        other, by = int(witnesses.row[node]), int(witnesses.evidence[node])
        witness, similarity = names[other], float(witnesses.similarity[node])
        if by >= 0:
            one, least = graph.evidence[by], max(graph.least[node], graph.least[other])
            reason = one.sentence.format(similarity=similarity, witness=witness, least=least)
            return one.rule, reason, witness, similarity, ""
        why = "not chosen"
        if copy or not leaders.kept[node]:
            why = f"a duplicate of {names[leader[node]]}, which was not chosen,"
        reason = (
            f"{why} within curate.budget {settings.budget:g}; the most similar kept chip is "
            f"{witness} ({similarity:.4f})"
        )
        return "selection", reason, "", similarity, witness

    found: list[tuple[Any, ...]] = []
    for row, pooled in enumerate(given):
        node = int(graph.node_of[row])
        if node < 0:  # a gate, or an evaluation set
            found.append(("drop", *pooled, "", ""))
            continue
        name, copy = names[node], int(graph.nodes[node]) != row
        cluster = names[leader[node]]
        if not kept[node]:
            found.append(("drop", *fallen(node, copy), cluster))
        elif not copy:
            others = int(groups[node]) - 1
            reason = f"kept for itself and {others} like it" if others else "kept"
            found.append(("keep", "kept", reason, "", np.nan, "", cluster))
        elif pooled.rule == "identical" and pooled.witness_id == name:
            reason = f"its pixels are those of {name}, which is kept"
            found.append(("drop", "identical", reason, name, 1.0, "", cluster))
        else:
            reason = f"its embedding is that of {name}, which is kept"
            found.append(("drop", "near_duplicate", reason, name, 1.0, "", cluster))
    frame = pd.DataFrame(found, columns=columns)
    frame.insert(0, "chip_id", ids)
    return frame


COPIED = ("quality", "entropy", "gradient", "valid", "cloud", "saturated", "constant", "band_means")


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Decide.

    Writes ``decisions.parquet``; ``dense_pairs.parquet`` (the pairs of dense cells that name a
    witness); ``survival.parquet`` (who was left, by stratum); ``measures.parquet`` (the choice
    beside others).
    """
    settings: CurateSettings = job.settings
    pool = load_pool(job.inputs)
    pairs = job.inputs["pairs"].manifest.facts
    thresholds = thresholds_of(settings, job.inputs["calibration"])
    collections = pool.table["collection"].astype(str)
    least = np.array([thresholds[name] for name in collections], dtype=np.float64)
    graph = load_graph(job.inputs, pool, least)
    outcome = decide(pool, graph, settings, job.seed)
    decisions = outcome.rows
    for column in COPIED:
        decisions[column] = pool.table[column]
    chips = pool.table.iloc[graph.nodes]
    scores = scored(chips, graph.space, job.seed).set_axis(graph.nodes)
    decisions[scores.columns] = scores.reindex(decisions.index)
    write_table(decisions, folder / "decisions.parquet")
    write_table(outcome.dense_pairs, folder / "dense_pairs.parquet")
    survival = survivors(pool, graph.nodes, outcome.leaders, outcome.kept)
    write_table(survival, folder / "survival.parquet")
    kept = np.flatnonzero(outcome.kept).astype(np.int64)
    measures = measured(chips, graph.space, kept, job.seed)
    write_table(measures, folder / "measures.parquet")

    dropped = Counter(decisions.loc[decisions["decision"] == "drop", "rule"])
    return Sealed(
        counts={
            "rows_in": len(decisions),
            "rows_out": len(kept),
            "leaders": int(outcome.leaders.sum()),
        },
        dropped={str(rule): int(count) for rule, count in dropped.items()},
        facts={
            "budget": settings.budget,
            "method": settings.method,
            "strata": list(outcome.strata),
            "largest_group": outcome.largest_group,
            "measures": measures_by_choice(measures),
            "decontamination": job.inputs["pool"].manifest.facts["decontamination"],
            "thresholds": thresholds,
            **{name: pairs[name] for name in ("threshold", "threshold_from", "certificate")},
        },
    )


def measures_by_choice(measures: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The table of measures as JSON; what could not be measured is null."""
    return {
        str(row.pop("choice")): {
            str(name): None if pd.isna(value) else value for name, value in row.items()
        }
        for row in measures.to_dict("records")
    }


INPUTS = (
    "chips", "descriptors", "embeddings", "pool", "calibration", "buckets", "pairs", "alike",
)  # fmt: skip

STAGE = Stage(
    name="curate",
    version="3",
    kind="decisions",
    inputs=INPUTS,
    software=("faiss-cpu", "numpy", "scipy"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    seeded=True,
    fields=("threshold", "budget", "method", "rarity", "strata", "stratum_share", "equal_strata"),
)
