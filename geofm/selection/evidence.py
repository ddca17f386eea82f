"""What is known to be alike among the candidates: one graph of nodes and pairs.

Candidates with equal vectors are one node, which the best of them stands for; pairs by embedding
and by pixels are edges between nodes, each kind with its rule and sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_catalog.artifact import Artifact
from geofm.dedup.edges import Edges, no_edges, sort_edges
from geofm.dedup.join import hidden_pairs
from geofm.dedup.leader import Hidden, total_order
from geofm.dedup.pairs import read_pairs
from geofm.embeddings.store import open_vectors, rows_of
from geofm.embeddings.vectors import Space
from geofm.pool.pool import Pool
from geofm.types import Floats, Indices


@dataclass(frozen=True)
class Evidence:
    """Pairs of nodes that are duplicates by one kind of evidence.

    ``rule`` is the rule a chip falls by; ``sentence`` says why, with the fields ``similarity``,
    ``witness`` and ``least`` (the threshold).
    """

    rule: str
    sentence: str
    edges: Edges


@dataclass(frozen=True)
class Graph:
    """Nodes and pairs.

    Attributes:
        nodes: rows of the pool, ascending; all else counts by position in it.
        node_of: for each row of the pool its node; −1 for rows that fail a gate or are in an
            evaluation set.
        order: nodes, best first.
        space: of the nodes' embeddings.
        least: cosine from which each node's chip has duplicates; a pair has the larger of two.
        evidence: embeddings first, then pixels.
        hidden: asks for pairs of dense cells (see ``leader``), of which ``dense`` are the nodes.
    """

    nodes: Indices
    node_of: Indices
    order: Indices
    space: Space
    least: Floats
    evidence: Sequence[Evidence]
    hidden: Hidden | None
    dense: Indices | None


def load_graph(inputs: dict[str, Artifact], pool: Pool, least: Floats) -> Graph:
    """The graph of a pool, from the artifacts ``embeddings``, ``buckets``, ``pairs``, ``alike``.

    Args:
        inputs: the artifacts by kind.
        pool: its candidates become nodes.
        least: threshold of each row of the pool.
    """
    candidates = pool.candidates
    row_of = pd.Index(pool.table["chip_id"].astype(str))
    mine = pool.table.iloc[candidates]
    best_first = candidates[
        total_order(mine["quality"].to_numpy(np.float64), mine["chip_id"].astype(str).tolist())
    ]
    # candidates with one vector: those of `pairs` that are the same as another
    group = np.arange(len(row_of))
    same = inputs["pairs"].table("identical.parquet")
    group[_at(row_of, same["chip_id"])] = _at(row_of, same["same_as"])
    rank = np.full(len(row_of), len(row_of))
    rank[best_first] = np.arange(len(best_first))
    best = np.full(len(row_of), len(row_of))
    np.minimum.at(best, group[candidates], rank[candidates])
    stands = np.full(len(row_of), -1, dtype=np.int64)
    stands[candidates] = best_first[best[group[candidates]]]
    copies = np.flatnonzero(pool.table["rule"] == "identical")
    stands[copies] = stands[_at(row_of, pool.table["witness_id"].iloc[copies])]
    nodes = np.unique(stands[candidates])
    place = np.full(len(row_of) + 1, -1, dtype=np.int64)
    place[nodes] = np.arange(len(nodes))
    node_of = place[stands]  # stands is −1 for rows that are out, and so is the last of place

    found = read_pairs(inputs)
    vectors = open_vectors(inputs["embeddings"])
    ids = pool.ids
    at = rows_of(inputs["embeddings"], [ids[row] for row in nodes])
    space = Space(np.asarray(vectors[at]), found.frame.centre)
    tau = least[nodes]
    order = place[best_first]
    by_embedding = _between(found.table, row_of, node_of)
    by_pixels = _between(inputs["alike"].table("alike.parquet"), row_of, node_of, nodes)
    hidden, dense = None, None
    if len(found.dense):
        ask, members = hidden_pairs(
            Space(vectors, found.frame.centre), found.frame, found.cells, found.dense,
            found.threshold,
        )  # fmt: skip
        # a node's vector is that of the row which was searched for it
        searched = rows_of(inputs["embeddings"], [ids[row] for row in group[nodes]])
        hidden = _by_node(ask, searched, tau)
        dense = np.flatnonzero(np.isin(searched, members)).astype(np.int64)
    sentence = (
        "cosine similarity {similarity:.4f} to {witness}, which is kept; chips are duplicates "
        "from {least:.4g}"
    )
    evidence = [
        Evidence("near_duplicate", sentence, above(by_embedding, tau)),
        Evidence(
            "pixel_duplicate",
            "shows what {witness} shows, which is kept (likeness of pixels {similarity:.4f})",
            by_pixels,
        ),
    ]
    return Graph(nodes, node_of, order[order >= 0], space, tau, evidence, hidden, dense)


def above(edges: Edges, least: Floats) -> Edges:
    """The edges that reach the larger threshold of their two nodes."""
    near = edges.similarity >= np.maximum(least[edges.left], least[edges.right])
    return Edges(edges.left[near], edges.right[near], edges.similarity[near])


def _at(row_of: pd.Index, chip_ids: pd.Series) -> Indices:
    """Rows of the pool of some chips."""
    return row_of.get_indexer(pd.Index(chip_ids)).astype(np.int64)


def _between(
    table: pd.DataFrame, row_of: pd.Index, node_of: Indices, nodes: Indices | None = None
) -> Edges:
    """Pairs of chip ids as edges between nodes; with ``nodes``, of chips that stand for theirs.

    A chip that another stands for falls with or for that one, whatever it looks like.
    """
    if not len(table):
        return no_edges()
    left, right = _at(row_of, table["left"]), _at(row_of, table["right"])
    a, b = node_of[left], node_of[right]
    real = (a >= 0) & (b >= 0) & (a != b)
    if nodes is not None:
        real &= (nodes[a] == left) & (nodes[b] == right)
    return sort_edges(a[real], b[real], table["similarity"].to_numpy(np.float64)[real])


def _by_node(ask: Hidden, searched: Indices, least: Floats) -> Hidden:
    """The same question by node instead of by row of the embeddings."""
    node = np.full(int(searched.max(initial=0)) + 1, -1, dtype=np.int64)
    node[searched] = np.arange(len(searched))

    def hidden(left: Indices, right: Indices) -> Edges:
        found = ask(np.sort(searched[left]), np.sort(searched[right]))
        return above(sort_edges(node[found.left], node[found.right], found.similarity), least)

    return hidden
