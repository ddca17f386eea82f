"""Stage ``curate``: one decision per usable chip, with its rule, reason, scores and witness.

There are no parts; ``seal`` does everything, in this order:

1. Load the pool. Gates, evaluation sets and identical pixels have been applied (``pool/pool.py``).
2. Build the graph of duplicates: chips with equal vectors are one node, and each dedup method
   gives edges between nodes                                   (``dedup/methods.py``).
3. Apply the leader rule to the edges of all methods           (``dedup/leader.py``).
4. Fill the budget from the leaders                            (``methods.py``, ``strata.py``).
5. Find the witness of each dropped chip, a kept chip.
6. Write the decisions, the survivors by stratum, and the measures of the selection
                                                               (``rarity.py``, ``metrics.py``).

A chip that is dropped as a duplicate has a kept chip as its witness. The two chips have equal
pixels or equal vectors, or they are a pair that a dedup method has stored: in ``pairs``, in
``alike``, or in ``dense_pairs.parquet`` of the decisions. Every other chip that is dropped here was
not chosen within the budget (rule ``selection``): a leader, or a duplicate whose leader was not
chosen and that forms no pair with a kept chip. Such a chip has no witness; ``nearest_id`` is the
most similar kept chip. The location of a chip affects the budget only (strata, ``per-tile``), never
whether the chip is a duplicate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.config.recipe import CurateSettings
from geofm.dedup.buckets import thresholds_of
from geofm.dedup.edges import Edges, concat_edges, empty_edges, nearest_kept, sort_edges
from geofm.dedup.join import dense_pair_search
from geofm.dedup.leader import (
    DensePairSearch,
    Leaders,
    best_dense_pairs,
    choose_leaders,
    total_order,
)
from geofm.dedup.methods import METHODS, DedupMethod
from geofm.dedup.pairs import read_pair_search, read_pairs
from geofm.embeddings.clusters import cluster
from geofm.embeddings.neighbours import most_similar
from geofm.embeddings.store import open_vectors, rows_of
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.pool.pool import Pool, load_pool
from geofm.selection.methods import Candidates, Method, select
from geofm.selection.metrics import compare_selections
from geofm.selection.rarity import soft_scores
from geofm.selection.strata import (
    budget_count,
    count_survivors,
    divide_into_strata,
    ground_region,
    meteorological_season,
)
from geofm.types import Floats, Indices

Mask = NDArray[np.bool_]

#: Columns of the pool that the decisions repeat.
COPIED = ("quality", "entropy", "gradient", "valid", "cloud", "saturated", "constant", "band_means")
#: Largest pool for which the selection is compared with balanced k-means as well, which takes
#: longer than the selection itself.
COMPARED_UP_TO = 20_000
#: Average number of chips per cluster, where clusters are strata.
CLUSTER_CHIPS = 200


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Decide which chips of the pool are kept, and write the tables of the decisions.

    The tables are ``decisions.parquet``; ``dense_pairs.parquet`` (pairs of dense cells between a
    dropped chip and its witness); ``survival.parquet`` (chips left after each step, by stratum);
    and ``measures.parquet`` (the selection compared with a random selection and, in a pool of up to
    20,000 nodes, with balanced k-means).
    """
    settings: CurateSettings = job.settings
    pool = load_pool(job.inputs)
    thresholds = thresholds_of(settings, job.inputs["calibration"])
    collections = pool.table["collection"].astype(str)
    least = np.array([thresholds[name] for name in collections], dtype=np.float64)
    graph = build_graph(job.inputs, pool, least)
    decisions = apply_curation_rules(pool, graph, settings, job.seed)

    node_chips = pool.table.iloc[graph.nodes]
    nodes = np.arange(len(graph.nodes), dtype=np.int64)
    moments = spectral_moments(node_chips)
    table = decisions.table
    for column in COPIED:
        table[column] = pool.table[column]
    scores = soft_scores(graph.space, nodes, moments, seed=job.seed).set_axis(graph.nodes)
    table[scores.columns] = scores.reindex(table.index)
    write_table(table, folder / "decisions.parquet")
    write_table(decisions.dense_pairs, folder / "dense_pairs.parquet")
    survival = _survival(pool, graph.nodes, decisions.leaders, decisions.kept)
    write_table(survival, folder / "survival.parquet")
    candidates = Candidates(graph.space, nodes, node_chips["chip_id"].astype(str).tolist())
    kept = np.flatnonzero(decisions.kept).astype(np.int64)
    others: tuple[Method, ...] = ("random",)
    if len(nodes) <= COMPARED_UP_TO:
        others = ("random", "balanced-kmeans")
    measures = compare_selections(candidates, kept, moments, job.seed, others)
    write_table(measures, folder / "measures.parquet")

    dropped = Counter(table.loc[table["decision"] == "drop", "rule"])
    pairs = job.inputs["pairs"].manifest.facts
    return Sealed(
        counts={
            "rows_in": len(table),
            "rows_out": len(kept),
            "leaders": int(decisions.leaders.sum()),
        },
        dropped={str(rule): int(count) for rule, count in dropped.items()},
        facts={
            "budget": settings.budget,
            "method": settings.method,
            "strata": list(decisions.strata),
            "largest_group": decisions.largest_group,
            "measures": _measures_as_json(measures),
            "decontamination": job.inputs["pool"].manifest.facts["decontamination"],
            "thresholds": thresholds,
            **{name: pairs[name] for name in ("threshold", "threshold_from", "certificate")},
        },
    )


# Step 2: the graph of duplicates.


@dataclass(frozen=True)
class Evidence:
    """What one dedup method has found.

    Attributes:
        method: the method.
        edges: its edges between nodes.
        of_copies: its pairs of a chip that does not represent its node with the representative of
            another node; None for a method that compares vectors, whose pairs hold for all chips
            of a node.
    """

    method: DedupMethod
    edges: Edges
    of_copies: CopyPairs | None


@dataclass(frozen=True)
class CopyPairs:
    """Pairs of a row of the pool and a node, each of shape (pairs,)."""

    row: Indices
    node: Indices
    similarity: Floats


@dataclass(frozen=True)
class DuplicateGraph:
    """Nodes and edges of the candidates.

    Candidates with equal vectors are one node; the best of them represents it. A node is numbered
    by its position in ``nodes``.

    Attributes:
        nodes: row of the pool of each node's representative, ascending, shape (nodes,).
        node_of: node of each row of the pool, shape (rows,); -1 for rows that failed a gate or are
            in an evaluation set.
        order: nodes, best first.
        space: space of the nodes' embeddings.
        least: calibrated threshold of each node, shape (nodes,). A pair must reach the larger
            threshold of its two nodes.
        evidence: edges of each dedup method, in the order of ``METHODS``.
        dense_search: finds the pairs of dense cells, which no table lists; None without such cells.
        dense_nodes: nodes in dense cells; None without such cells.
    """

    nodes: Indices
    node_of: Indices
    order: Indices
    space: EmbeddingSpace
    least: Floats
    evidence: Sequence[Evidence]
    dense_search: DensePairSearch | None
    dense_nodes: Indices | None


def build_graph(inputs: dict[str, Artifact], pool: Pool, least: Floats) -> DuplicateGraph:
    """Build the graph of a pool.

    Args:
        inputs: artifacts ``embeddings``, ``buckets``, and one for each dedup method, by kind.
        pool: chips of the pool; its candidates become nodes.
        least: calibrated threshold of each row of the pool, shape (rows,).
    """
    row_of = pd.Index(pool.table["chip_id"].astype(str))
    best_first = _candidates_in_order(pool)
    same_vector = _first_with_vector(inputs, row_of)
    representative = _representatives(pool, row_of, best_first, same_vector)
    nodes = np.unique(representative[pool.candidates])
    node_at = np.full(len(row_of) + 1, -1, dtype=np.int64)
    node_at[nodes] = np.arange(len(nodes))
    node_of = node_at[representative]  # a row without representative (-1) reads the last element

    search = read_pair_search(inputs)
    vectors = open_vectors(inputs["embeddings"])
    ids = pool.ids
    rows = rows_of(inputs["embeddings"], [ids[row] for row in nodes])
    space = EmbeddingSpace(np.asarray(vectors[rows]), search.partition.centre)
    node_least = least[nodes]
    evidence = []
    for method in METHODS:
        pairs = RowPairs(*read_pairs(inputs[method.stage].local(method.table), row_of))
        edges = _edges_between_nodes(pairs, node_of, None if method.compares_vectors else nodes)
        if method.compares_vectors:
            edges = at_larger_threshold(edges, node_least)
        of_copies = None if method.compares_vectors else _pairs_of_copies(pairs, node_of, nodes)
        evidence.append(Evidence(method, edges, of_copies))
    dense_search, dense_nodes = None, None
    if search.dense:
        search_rows, dense_rows = dense_pair_search(
            EmbeddingSpace(vectors, search.partition.centre),
            search.partition,
            search.cells,
            search.dense,
            search.threshold,
        )
        # Of equal vectors, the search compared only the first row. It represents the node here.
        searched = rows_of(inputs["embeddings"], [ids[row] for row in same_vector[nodes]])
        dense_search = _by_node(search_rows, searched, node_least)
        dense_nodes = np.flatnonzero(np.isin(searched, dense_rows)).astype(np.int64)
    order = node_at[best_first]
    return DuplicateGraph(
        nodes=nodes,
        node_of=node_of,
        order=order[order >= 0],
        space=space,
        least=node_least,
        evidence=evidence,
        dense_search=dense_search,
        dense_nodes=dense_nodes,
    )


def _candidates_in_order(pool: Pool) -> Indices:
    """List the candidates' rows by quality, best first, then by id."""
    chips = pool.table.iloc[pool.candidates]
    quality, ids = chips["quality"].to_numpy(np.float64), chips["chip_id"].astype(str).tolist()
    return pool.candidates[total_order(quality, ids)]


def _first_with_vector(inputs: dict[str, Artifact], row_of: pd.Index) -> Indices:
    """Find the first row with the same vector as each row, shape (rows,).

    The search compared only this row.
    """
    first = np.arange(len(row_of))
    identical = inputs["pairs"].table("identical.parquet")
    first[_rows_of_chips(row_of, identical["chip_id"])] = _rows_of_chips(
        row_of, identical["same_as"]
    )
    return first


def _representatives(
    pool: Pool, row_of: pd.Index, best_first: Indices, same_vector: Indices
) -> Indices:
    """Find the row that represents each row's node, shape (rows,); -1 for rows without a node.

    The best candidate represents all candidates with the same vector. A chip that was dropped for
    identical pixels belongs to the node of its witness.
    """
    candidates, rows = pool.candidates, len(row_of)
    rank = np.full(rows, rows)
    rank[best_first] = np.arange(len(best_first))
    best_rank = np.full(rows, rows)
    np.minimum.at(best_rank, same_vector[candidates], rank[candidates])
    representative = np.full(rows, -1, dtype=np.int64)
    representative[candidates] = best_first[best_rank[same_vector[candidates]]]
    copies = np.flatnonzero(pool.table["rule"] == "identical")
    witnesses = _rows_of_chips(row_of, pool.table["witness_id"].iloc[copies])
    representative[copies] = representative[witnesses]
    return representative


def _rows_of_chips(row_of: pd.Index, chip_ids: pd.Series) -> Indices:
    """Find the row of each chip in the pool, shape (chips,)."""
    return row_of.get_indexer(pd.Index(chip_ids)).astype(np.int64)


class RowPairs(NamedTuple):
    """Pairs of rows of the pool, each of shape (pairs,); -1 for a chip that is not in the pool."""

    left: Indices
    right: Indices
    similarity: Floats


def _edges_between_nodes(pairs: RowPairs, node_of: Indices, nodes: Indices | None) -> Edges:
    """Convert pairs of rows to edges between nodes.

    Args:
        pairs: pairs of rows of the pool.
        node_of: node of each row, shape (rows,).
        nodes: row of each node's representative; only pairs of two representatives are used. None:
            all pairs are used.
    """
    if not len(pairs.left):
        return empty_edges()
    a, b = node_of[pairs.left], node_of[pairs.right]
    used = (a >= 0) & (b >= 0) & (a != b)
    if nodes is not None:
        used &= (nodes[a] == pairs.left) & (nodes[b] == pairs.right)
    return sort_edges(a[used], b[used], pairs.similarity[used])


def _pairs_of_copies(pairs: RowPairs, node_of: Indices, nodes: Indices) -> CopyPairs:
    """List the pairs of a chip that does not represent its node with another node's representative.

    Args:
        pairs: pairs of rows of the pool.
        node_of: node of each row, shape (rows,).
        nodes: row of each node's representative.
    """
    row = np.concatenate([pairs.left, pairs.right])
    other = np.concatenate([pairs.right, pairs.left])
    similarity = np.tile(pairs.similarity, 2)
    own, node = node_of[row], node_of[other]
    used = (own >= 0) & (node >= 0) & (own != node)
    used[used] = (nodes[own[used]] != row[used]) & (nodes[node[used]] == other[used])
    return CopyPairs(row[used], node[used], similarity[used])


def at_larger_threshold(edges: Edges, least: Floats) -> Edges:
    """Keep the edges that reach the larger threshold of their two nodes."""
    return edges.select(edges.similarity >= np.maximum(least[edges.left], least[edges.right]))


def _by_node(search: DensePairSearch, searched: Indices, least: Floats) -> DensePairSearch:
    """Turn a search by row of the embeddings into a search by node.

    Args:
        search: search by row.
        searched: row of the embeddings that the search compared for each node, shape (nodes,).
        least: threshold of each node, shape (nodes,).
    """
    node = np.full(int(searched.max(initial=0)) + 1, -1, dtype=np.int64)
    node[searched] = np.arange(len(searched))

    def search_nodes(left: Indices, right: Indices) -> Edges:
        edges = search(np.sort(searched[left]), np.sort(searched[right]))
        by_node = sort_edges(node[edges.left], node[edges.right], edges.similarity)
        return at_larger_threshold(by_node, least)

    return search_nodes


# Steps 3 to 5: leader rule, budget, witnesses.


@dataclass(frozen=True)
class Decisions:
    """Result of the curation rules.

    Attributes:
        table: one row per chip of the pool, in its order.
        dense_pairs: pairs (left, right, similarity) of dense cells between a dropped chip and its
            witness. The artifact ``pairs`` has the pairs of other cells.
        leaders: whether the leader rule keeps each node, shape (nodes,).
        kept: whether the leader rule and the budget keep each node, shape (nodes,).
        largest_group: number of chips of the largest group of duplicates.
        strata: columns by which the budget was divided.
    """

    table: pd.DataFrame
    dense_pairs: pd.DataFrame
    leaders: Mask
    kept: Mask
    largest_group: int
    strata: tuple[str, ...]


def apply_curation_rules(
    pool: Pool, graph: DuplicateGraph, settings: CurateSettings, seed: int
) -> Decisions:
    """Apply the leader rule and the budget, and describe the decision on each chip.

    Args:
        pool: chips of the pool.
        graph: duplicates among its candidates.
        settings: budget, and how it is filled.
        seed: seed of the selection.

    Raises:
        UsageError: The budget is larger than the pool.
        CheckError: The result of the leader rule lacks one of its two properties (a defect).
    """
    edges = concat_edges([evidence.edges for evidence in graph.evidence])
    leaders = choose_leaders(graph.order, edges, graph.dense_search, graph.dense_nodes)
    leader_nodes = np.flatnonzero(leaders.kept)
    chips = pool.table.iloc[graph.nodes]
    selected, strata = fill_budget(chips, graph.space, leader_nodes, settings, seed)
    kept = np.zeros(len(graph.nodes), dtype=np.bool_)
    kept[selected] = True
    leader = np.where(leaders.kept, np.arange(len(kept)), leaders.witness)
    group_sizes = np.bincount(leader[graph.node_of[graph.node_of >= 0]], minlength=1)
    witnesses = find_witnesses(graph, kept)
    table = _describe_decisions(
        pool, graph, kept, leaders, leader, witnesses, group_sizes, settings
    )
    return Decisions(
        table=table,
        dense_pairs=_dense_witness_pairs(pool, graph, witnesses),
        leaders=leaders.kept,
        kept=kept,
        largest_group=int(group_sizes.max()),
        strata=strata,
    )


class Selected(NamedTuple):
    """Selected rows of a space, and the columns that define the strata."""

    rows: Indices
    strata: tuple[str, ...]


def fill_budget(
    chips: pd.DataFrame,
    space: EmbeddingSpace,
    rows: Indices,
    settings: CurateSettings,
    seed: int,
) -> Selected:
    """Select the rows that fill the budget; all rows if there is no budget.

    Args:
        chips: chips of the space, by row.
        space: space in which chips are compared.
        rows: rows to select from, ascending.
        settings: budget, method, strata.
        seed: seed of the selection.

    Raises:
        UsageError: The budget is larger than the pool.
    """
    count = budget_count(settings.budget, len(rows))
    if count >= len(rows):
        return Selected(rows, ())
    candidates = chips.iloc[rows]
    labels = stratum_labels(candidates)
    if "cluster" in settings.strata:
        clusters, _, _ = cluster(space, rows, max(1, len(rows) // CLUSTER_CHIPS), seed)
        labels["cluster"] = [str(number) for number in clusters]
    strata, used = divide_into_strata({name: labels[name] for name in settings.strata}, count)
    selection = select(
        Candidates(
            space=space,
            rows=rows,
            chip_ids=candidates["chip_id"].astype(str).tolist(),
            entropy=candidates["entropy"].to_numpy(np.float64),
            tiles=labels["region"],
        ),
        settings.method,
        count,
        strata if len(strata) else None,
        min_share=settings.stratum_share,
        equal=settings.equal_strata,
        rarity=settings.rarity,
        seed=seed,
    )
    return Selected(selection.rows, used)


@dataclass(frozen=True)
class _Witnesses:
    """A kept node for each dropped node: its witness, or the most similar kept node.

    Attributes:
        row: the kept node, shape (nodes,); -1 for nodes that are kept.
        similarity: cosine, or similarity of pixels, shape (nodes,); NaN for nodes that are kept.
        evidence: position in ``DuplicateGraph.evidence`` of the edges with this pair, shape
            (nodes,); -1 if the two nodes are not a pair.
        dense: whether the pair is in a dense cell, shape (nodes,).
    """

    row: Indices
    similarity: Floats
    evidence: Indices
    dense: Mask


def find_witnesses(graph: DuplicateGraph, kept: Mask) -> _Witnesses:
    """Find the witness of each dropped node, or the most similar kept node if it has none.

    The witness is the most similar kept node among the pairs of the first dedup method that has
    such a pair. Two nodes above the threshold are not always a pair: the embeddings of monotone
    chips are all similar, so the search does not compare them.
    """
    count = len(kept)
    witnesses = _Witnesses(
        row=np.full(count, -1, dtype=np.int64),
        similarity=np.full(count, np.nan),
        evidence=np.full(count, -1, dtype=np.int64),
        dense=np.zeros(count, dtype=np.bool_),
    )
    sources = [(number, evidence.edges, False) for number, evidence in enumerate(graph.evidence)]
    if graph.dense_search is not None and graph.dense_nodes is not None:
        by_vectors = next(n for n, e in enumerate(graph.evidence) if e.method.compares_vectors)
        dense_pairs = best_dense_pairs(kept, graph.dense_search, graph.dense_nodes)
        sources.append((by_vectors, dense_pairs, True))
    for number, edges, dense in sources:
        dropped, other, edge = nearest_kept(kept, edges)
        first = witnesses.row[dropped] < 0
        dropped, other, edge = dropped[first], other[first], edge[first]
        witnesses.row[dropped], witnesses.similarity[dropped] = other, edges.similarity[edge]
        witnesses.evidence[dropped], witnesses.dense[dropped] = number, dense
    unpaired = np.flatnonzero(~kept & (witnesses.row < 0)).astype(np.int64)
    if len(unpaired):
        kept_nodes = np.flatnonzero(kept).astype(np.int64)
        nearest = most_similar(graph.space, unpaired, kept_nodes)
        witnesses.row[unpaired], witnesses.similarity[unpaired] = nearest
    return witnesses


def _dense_witness_pairs(pool: Pool, graph: DuplicateGraph, witnesses: _Witnesses) -> pd.DataFrame:
    """List the dense-cell pairs of dropped chip and witness by id, sorted; the lower id is left."""
    ids = np.array(pool.ids, dtype=object)[graph.nodes]
    dropped = np.flatnonzero(witnesses.dense)
    pairs = [sorted(pair) for pair in zip(ids[dropped], ids[witnesses.row[dropped]], strict=True)]
    table = pd.DataFrame(pairs, columns=["left", "right"], dtype=str)
    table["similarity"] = witnesses.similarity[dropped]
    return table.sort_values(["left", "right"], ignore_index=True)


# Step 6: the tables.


class _Decision(NamedTuple):
    """Columns of ``decisions.parquet`` after the chip's id."""

    decision: str
    rule: str
    reason: str
    witness_id: str
    similarity: float
    nearest_id: str
    cluster: str


def _describe_decisions(
    pool: Pool,
    graph: DuplicateGraph,
    kept: Mask,
    leaders: Leaders,
    leader: Indices,
    witnesses: _Witnesses,
    group_sizes: Indices,
    settings: CurateSettings,
) -> pd.DataFrame:
    """Make the table of decisions: one row per chip of the pool.

    Args:
        pool: chips of the pool.
        graph: duplicates among its candidates.
        kept: whether each node is kept, shape (nodes,).
        leaders: result of the leader rule.
        leader: leader of each node's group, shape (nodes,).
        witnesses: witness of each dropped node.
        group_sizes: number of chips of each leader's group, shape (nodes,).
        settings: settings with the budget, which the reason names.
    """
    ids = pool.ids
    names = [ids[row] for row in graph.nodes]
    by_pixels = _best_pairs_of_copies(graph, kept)
    row_of = pd.Series(np.arange(len(ids)), index=ids)

    def dropped(row: int, node: int, is_copy: bool, same_pixels_as: str) -> _Decision:
        """Make the decision on a chip of a node that is not kept."""
        other, number = int(witnesses.row[node]), int(witnesses.evidence[node])
        similarity = float(witnesses.similarity[node])
        if is_copy and number >= 0 and not graph.evidence[number].method.compares_vectors:
            # equal vectors do not make equal pixels: the pair must be one of this chip
            pixels = int(row_of[same_pixels_as]) if same_pixels_as else row
            if pixels != int(graph.nodes[node]):
                number, other, similarity = by_pixels.get(pixels, (-1, other, np.nan))
        if np.isnan(similarity):
            similarity = float(graph.space.similarity(np.array([node]), np.array([other]))[0])
        witness, group = names[other], names[leader[node]]
        if number >= 0:
            method = graph.evidence[number].method
            least = max(graph.least[node], graph.least[other])
            reason = method.reason.format(similarity=similarity, witness=witness, least=least)
            return _Decision("drop", method.rule, reason, witness, similarity, "", group)
        if settings.budget is None:
            why = f"its embedding is that of {names[node]}, which is dropped"
        else:
            why = f"not chosen within curate.budget {settings.budget:g}"
            if is_copy or not leaders.kept[node]:
                why = f"a duplicate of {group}, which was {why}"
        reason = f"{why}; the most similar kept chip is {witness} ({similarity:.4f})"
        return _Decision("drop", "selection", reason, "", similarity, witness, group)

    decisions: list[_Decision] = []
    pooled_columns = ["rule", "reason", "witness_id", "similarity"]
    for row, pooled in enumerate(pool.table[pooled_columns].itertuples(index=False)):
        node = int(graph.node_of[row])
        if node < 0:  # dropped by a gate or an evaluation set
            rule, reason, witness, similarity = pooled
            decisions.append(_Decision("drop", rule, reason, witness, similarity, "", ""))
            continue
        name, group, is_copy = names[node], names[leader[node]], int(graph.nodes[node]) != row
        if not kept[node]:
            copied = str(pooled.witness_id) if pooled.rule == "identical" else ""
            decisions.append(dropped(row, node, is_copy, copied))
        elif not is_copy:
            others = int(group_sizes[node]) - 1
            reason = f"kept for itself and {others} like it" if others else "kept"
            decisions.append(_Decision("keep", "kept", reason, "", np.nan, "", group))
        elif pooled.rule == "identical" and pooled.witness_id == name:
            reason = f"its pixels are those of {name}, which is kept"
            decisions.append(_Decision("drop", "identical", reason, name, 1.0, "", group))
        else:
            reason = f"its embedding is that of {name}, which is kept"
            decisions.append(_Decision("drop", "near_duplicate", reason, name, 1.0, "", group))
    table = pd.DataFrame(decisions, columns=list(_Decision._fields))
    table.insert(0, "chip_id", ids)
    return table


def _best_pairs_of_copies(graph: DuplicateGraph, kept: Mask) -> dict[int, tuple[int, int, float]]:
    """Find the kept node that each copy is most similar to, by the pairs of the copy itself.

    Returns:
        Number of the evidence, node and similarity, by row of the pool; the first method that has
        a pair counts, and ties go to the lower node.
    """
    best: dict[int, tuple[int, int, float]] = {}
    for number, evidence in enumerate(graph.evidence):
        pairs = evidence.of_copies
        if pairs is None:
            continue
        order = np.lexsort((pairs.node, -pairs.similarity))
        for at in order[kept[pairs.node[order]]]:
            found = number, int(pairs.node[at]), float(pairs.similarity[at])
            best.setdefault(int(pairs.row[at]), found)
    return best


def _survival(pool: Pool, nodes: Indices, leaders: Mask, kept: Mask) -> pd.DataFrame:
    """Count the chips of each collection, region and season that were left after each step."""
    steps = {"passed": pool.table["rule"].isin(["", "identical"]).to_numpy()}
    for name, selected in (("distinct", leaders), ("kept", kept)):
        steps[name] = np.zeros(len(pool.table), dtype=np.bool_)
        steps[name][nodes[selected]] = True
    return count_survivors(stratum_labels(pool.table), steps)


def stratum_labels(chips: pd.DataFrame) -> dict[str, list[str]]:
    """Return the strata columns (collection, region, season) with the label of each chip."""
    return {
        "collection": chips["collection"].astype(str).tolist(),
        "region": [
            ground_region(str(crs), list(transform))
            for crs, transform in zip(chips["crs"], chips["transform"], strict=True)
        ],
        "season": [meteorological_season(time) for time in chips["datetime"]],
    }


def spectral_moments(chips: pd.DataFrame) -> list[list[float]]:
    """Return the mean and the standard deviation of each band of each chip."""
    columns = zip(chips["band_means"], chips["band_stds"], strict=True)
    return [[*means, *deviations] for means, deviations in columns]


def _measures_as_json(measures: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Convert the table of measures to JSON; a missing value is null."""
    return {
        str(row.pop("choice")): {
            str(name): None if pd.isna(value) else value for name, value in row.items()
        }
        for row in measures.to_dict("records")
    }


STAGE = Stage(
    name="curate",
    version="3",
    kind="decisions",
    inputs=(
        *("chips", "descriptors", "embeddings", "pool", "calibration", "buckets"),
        *(method.stage for method in METHODS),
    ),
    software=("faiss-cpu", "numpy", "scipy"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    seeded=True,
    fields=("threshold", "budget", "method", "rarity", "strata", "stratum_share", "equal_strata"),
)
