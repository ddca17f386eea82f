"""The choice to a budget as a recipe asks for it: strata by name, quotas, who survived."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.config.recipe import CurateSettings
from geofm.embeddings.clusters import cluster
from geofm.embeddings.vectors import Space
from geofm.pool.pool import Pool
from geofm.selection.methods import Candidates, select
from geofm.selection.metrics import compare
from geofm.selection.rarity import soft_scores
from geofm.selection.strata import (
    budget_count,
    divide,
    ground_region,
    meteorological_season,
    survival,
)
from geofm.types import Indices

#: Chips per cluster on average, where clusters are strata.
CLUSTERS_OF = 200


@dataclass(frozen=True)
class Chosen:
    """Rows of the space that stay, and the names of the columns that the strata were made by."""

    rows: Indices
    strata: tuple[str, ...]


def labels(chips: pd.DataFrame) -> dict[str, list[str]]:
    """Collection, ground region and season of each chip, by name."""
    return {
        "collection": chips["collection"].astype(str).tolist(),
        "region": [
            ground_region(str(crs), list(transform))
            for crs, transform in zip(chips["crs"], chips["transform"], strict=True)
        ],
        "season": [meteorological_season(time) for time in chips["datetime"]],
    }


def choose(
    chips: pd.DataFrame, space: Space, rows: Indices, settings: CurateSettings, seed: int
) -> Chosen:
    """As many of ``rows`` as the budget says, all if it says nothing.

    Raises:
        UsageError: when the budget is larger than the pool.
    """
    count = budget_count(settings.budget, len(rows))
    if count >= len(rows):
        return Chosen(rows, ())
    columns = labels(chips.iloc[rows])
    if "cluster" in settings.strata:
        of, _, _ = cluster(space, rows, max(1, len(rows) // CLUSTERS_OF), seed)
        columns["cluster"] = [str(number) for number in of]
    strata, used = divide({name: columns[name] for name in settings.strata}, count)
    some = chips.iloc[rows]
    candidates = Candidates(
        space=space,
        rows=rows,
        chip_ids=some["chip_id"].astype(str).tolist(),
        entropy=some["entropy"].to_numpy(np.float64),
        tiles=columns["region"],
    )
    choice = select(
        candidates,
        settings.method,
        count,
        strata if len(strata) else None,
        min_share=settings.stratum_share,
        equal=settings.equal_strata,
        rarity=settings.rarity,
        seed=seed,
    )
    return Chosen(choice.rows, used)


def survivors(
    pool: Pool, rows: Indices, leaders: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> pd.DataFrame:
    """How many chips of each collection, region and season were left after each step.

    Args:
        pool: all usable chips.
        rows: the pool's rows that ``leaders`` and ``kept`` are of.
        leaders: not a duplicate.
        kept: stays.
    """
    steps = {"passed": pool.table["rule"].isin(["", "identical"]).to_numpy()}
    for name, flags in (("distinct", leaders), ("kept", kept)):
        steps[name] = np.zeros(len(pool.table), dtype=np.bool_)
        steps[name][rows[flags]] = True
    return survival(labels(pool.table), steps)


def moments_of(chips: pd.DataFrame) -> list[list[float]]:
    """Spectral moments of each chip: mean and standard deviation of each band."""
    columns = zip(chips["band_means"], chips["band_stds"], strict=True)
    return [[*means, *deviations] for means, deviations in columns]


def measured(chips: pd.DataFrame, space: Space, kept: Indices, seed: int) -> pd.DataFrame:
    """The choice beside a random one and balanced k-means of the same pool, with as many chips."""
    everyone = np.arange(len(space), dtype=np.int64)
    candidates = Candidates(space, everyone, chips["chip_id"].astype(str).tolist())
    return compare(candidates, kept, moments_of(chips), seed)


def scored(chips: pd.DataFrame, space: Space, seed: int) -> pd.DataFrame:
    """Soft scores of each chip of a space: novelty, density, spectral rarity."""
    everyone = np.arange(len(space), dtype=np.int64)
    return soft_scores(space, everyone, moments_of(chips), seed=seed)
