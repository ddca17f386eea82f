"""Read the vectors of an embeddings artifact."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from geofm.types import Indices


def open_vectors(embeddings: Artifact) -> NDArray[np.float16]:
    """Map the embeddings, shape (n, d), from their file.

    Raises:
        RunError: The file has another type or shape.
    """
    vectors = np.load(embeddings.local("embeddings.npy"), mmap_mode="r", allow_pickle=False)
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise RunError(
            f"embeddings {embeddings.digest[:12]} are {vectors.dtype} {vectors.shape}, not "
            "float16 [chips, width]; run the embed stage again"
        )
    stored: NDArray[np.float16] = vectors
    return stored


def vector_ids(embeddings: Artifact) -> pd.Index:
    """Read the chip id of each row."""
    return pd.Index(embeddings.table("ids.parquet")["chip_id"].astype(str))


def rows_of(embeddings: Artifact, chip_ids: list[str]) -> Indices:
    """Find the rows of some chips.

    Raises:
        RunError: A chip has no embedding.
    """
    rows = vector_ids(embeddings).get_indexer(pd.Index(chip_ids)).astype(np.int64)
    if (rows < 0).any():
        raise RunError(
            f"embeddings {embeddings.digest[:12]} are not of these chips: "
            f"{int((rows < 0).sum())} of {len(chip_ids)} have no vector; embed these chips"
        )
    return rows


def load_vectors(embeddings: Artifact, chip_ids: list[str]) -> NDArray[np.float16]:
    """Read the embeddings of some chips, shape (n, d), in the order of ``chip_ids``.

    Raises:
        RunError: A chip has no embedding.
    """
    return np.asarray(open_vectors(embeddings)[rows_of(embeddings, chip_ids)])
