"""The registry of dedup methods: the stages that find pairs of duplicates.

To add a dedup method:

1. Write a stage in this folder that publishes a table of pairs with the columns ``left`` and
   ``right`` (chip ids) and ``similarity``; list the stage in ``geofm/stages.py``.
2. Add an entry to ``METHODS`` below.
3. Give its rule a label in ``geofm/runtime/text.py``, for reports.

The stage ``curate`` reads the tables of all methods and applies the leader rule to their pairs. A
chip that is dropped as a duplicate names the rule of the method that found the pair.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DedupMethod:
    """A stage whose pairs are evidence that two chips are duplicates.

    Attributes:
        stage: name of the stage, which is also the kind of its artifact.
        table: file of the artifact with the pairs.
        rule: value of the column ``rule`` for a chip that is dropped by one of the pairs.
        reason: sentence for the column ``reason``; its fields are ``similarity``, ``witness`` (chip
            id) and ``least`` (calibrated threshold).
        compares_vectors: whether ``similarity`` is the cosine of the embeddings. Such a pair must
            reach the calibrated threshold, and also holds for chips with the same vectors. Other
            pairs hold for the two chips alone.
    """

    stage: str
    table: str
    rule: str
    reason: str
    compares_vectors: bool


#: All methods. If several find a pair for a dropped chip, the first names its rule and witness.
METHODS = (
    DedupMethod(
        stage="pairs",
        table="pairs.parquet",
        rule="near_duplicate",
        reason=(
            "cosine similarity {similarity:.4f} to {witness}, which is kept; chips are duplicates "
            "from {least:.4g}"
        ),
        compares_vectors=True,
    ),
    DedupMethod(
        stage="alike",
        table="alike.parquet",
        rule="pixel_duplicate",
        reason="shows what {witness} shows, which is kept (likeness of pixels {similarity:.4f})",
        compares_vectors=False,
    ),
)
