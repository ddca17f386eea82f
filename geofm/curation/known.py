"""The pairs of a ``pairs`` artifact by the rows of whoever asks, ready for the leader rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from geofm.curation.buckets import open_vectors, read_cells, read_frame
from geofm.curation.edges import Edges, join_edges, sort_edges
from geofm.curation.join import MOST_EDGES, hidden_pairs, too_many
from geofm.curation.leader import Hidden
from geofm.curation.space import Floats, Indices, Space


@dataclass(frozen=True)
class Known:
    """Pairs by row; the centre of the similarities; what ``choose_leaders`` asks of dense cells.

    ``dense`` are the rows of dense cells, ``hidden`` finds their pairs (None without such cells).
    """

    edges: Edges
    centre: Floats
    dense: Indices
    hidden: Hidden | None


def read_pairs(
    pairs: Artifact, buckets: Artifact, embeddings: Artifact, chip_ids: Sequence[str]
) -> Known:
    """The pairs among some chips.

    Identical vectors, of which the search saw one, are pairs of each other (similarity 1) and of
    all that the one is a pair of.

    Args:
        pairs: the artifact.
        buckets: the one it was made from.
        embeddings: the ones that was made from.
        chip_ids: the chips that are asked about; rows are their positions.

    Raises:
        RunError: when the artifacts do not belong together, or a chip was not compared.
        TooManyPairs: when so many vectors are identical that their pairs cannot be written down.
    """
    inputs = pairs.manifest.inputs
    if (inputs["buckets"], inputs["embeddings"]) != (buckets.digest, embeddings.digest):
        raise RunError(f"pairs {pairs.digest[:12]} were made from other buckets or embeddings")
    every = pd.Index(embeddings.table("ids.parquet")["chip_id"].astype(str))
    place = every.get_indexer(pd.Index(list(chip_ids)))
    same = np.load(buckets.local("same.npy"))
    if (place < 0).any() or (same[place] < 0).any():
        raise RunError(
            f"some of the {len(chip_ids)} chips were not compared in pairs {pairs.digest[:12]}; "
            "run the stages buckets and pairs for these chips"
        )
    one = same[place]
    with np.load(pairs.local("rows.npz"), allow_pickle=False) as data:
        edges = Edges(data["left"], data["right"], data["similarity"])
    threshold = float(pairs.manifest.facts["threshold"])
    found = join_edges([_copies(one, threshold), expand(edges, one, one, threshold)])
    frame, cells = read_frame(buckets), read_cells(buckets)
    numbers = pairs.table("dense.parquet", ["cell"])["cell"].unique().tolist()
    if not numbers:
        return Known(found, frame.centre, np.empty(0, np.int64), None)
    space = Space(open_vectors(embeddings), frame.centre)
    ask, rows = hidden_pairs(space, frame, cells, numbers, threshold)

    def hidden(left: Indices, right: Indices) -> Edges:
        ours, theirs = np.unique(one[left]), np.unique(one[right])
        return expand(ask(ours, theirs), one, one, threshold, left, right)

    return Known(found, frame.centre, np.flatnonzero(np.isin(one, rows)), hidden)


def _copies(one: Indices, threshold: float) -> Edges:
    """All pairs of rows with one vector."""
    order = np.argsort(one, kind="stable")
    _, start, count = np.unique(one[order], return_index=True, return_counts=True)
    if int((count * (count - 1) // 2).sum()) > MOST_EDGES:
        raise too_many(threshold)
    pairs = [
        order[s : s + c][np.stack(np.triu_indices(c, 1))]
        for s, c in zip(start[count > 1], count[count > 1], strict=True)
    ]
    left, right = np.concatenate(pairs, axis=1) if pairs else np.empty((2, 0), np.int64)
    return sort_edges(left, right, np.ones(len(left)))


def expand(
    edges: Edges,
    ours: Indices,
    theirs: Indices,
    threshold: float,
    left: Indices | None = None,
    right: Indices | None = None,
) -> Edges:
    """Pairs of vectors as pairs of the rows that have them.

    Args:
        edges: pairs of vectors.
        ours: the vector of each row.
        theirs: the same for the other side.
        threshold: for the message.
        left: only pairs between these rows ...
        right: ... and these.

    Raises:
        TooManyPairs: beyond ``MOST_EDGES``.
    """
    found = []
    for a, b in ((edges.left, edges.right), (edges.right, edges.left)):
        rows = [_rows(ours, left, a), _rows(theirs, right, b)]
        counts = rows[0][1] * rows[1][1]
        if int(counts.sum()) > MOST_EDGES:
            raise too_many(threshold)
        edge = np.repeat(np.arange(len(edges)), counts)
        offset = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
        wide = rows[1][1][edge]
        i = rows[0][2][rows[0][0][edge] + offset // np.maximum(wide, 1)]
        j = rows[1][2][rows[1][0][edge] + offset % np.maximum(wide, 1)]
        found.append(sort_edges(i, j, edges.similarity[edge]))
        if left is None:
            break
    return join_edges(found)


def _rows(
    vector: Indices, among: Indices | None, wanted: Indices
) -> tuple[Indices, Indices, Indices]:
    """Rows by vector: where those of each wanted vector begin, how many, and the rows."""
    rows = np.arange(len(vector)) if among is None else among
    order = rows[np.argsort(vector[rows], kind="stable")]
    start = np.searchsorted(vector[order], wanted)
    end = np.searchsorted(vector[order], wanted, side="right")
    return start.astype(np.int64), (end - start).astype(np.int64), order
