"""From predictions to a table of scores, and to differences that are paired image by image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.hashing import digest_of
from geofm.evaluation.probes import bootstrap

METRIC = "accuracy"
#: Row by row, in this order: teacher first.
_RANK = {"teacher": 0, "random": 1, "model": 2}


def task_seed(seed: int, task: str) -> int:
    """Seed of a task's resampling: the same for all models, so that differences are paired."""
    return int(digest_of([seed, task])[:8], 16)


def score_rows(
    predictions: pd.DataFrame, labels: Mapping[str, str], resamples: int, seed: int
) -> pd.DataFrame:
    """Accuracy with its 95 % interval per task, model, feature and protocol.

    Args:
        predictions: model, task, image_id, feature, protocol, truth, predicted.
        labels: model -> what it is, in words.
        resamples: bootstrap resamples.
        seed: the run's.

    Returns:
        Columns model, label, feature, task, protocol, metric, value, ci_low, ci_high, n, seed;
        accuracy as a share, the teacher's rows first in every task.
    """
    rows: list[dict[str, Any]] = []
    tasks = list(dict.fromkeys(predictions["task"]))
    for (task, model, feature, protocol), group in predictions.groupby(
        ["task", "model", "feature", "protocol"], sort=False
    ):
        found = bootstrap(_correct(group), resamples, task_seed(seed, str(task)))
        rows.append(
            {
                "model": model,
                "label": labels[str(model)],
                "feature": feature,
                "task": task,
                "protocol": protocol,
                "metric": METRIC,
                "value": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                "n": found.n,
                "seed": seed,
            }
        )
    rows.sort(key=lambda r: (tasks.index(r["task"]), _RANK[r["model"]], r["feature"]))
    return pd.DataFrame(rows)


def differences(predictions: pd.DataFrame, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Model minus random and model minus teacher, on the same test images.

    A feature of the model is set against the same feature of the random student, and against the
    teacher's only one. ``certain`` says that the 95 % interval leaves out zero.
    """
    found = []
    wanted = predictions[predictions["model"] == "model"]
    for (task, feature, protocol), group in wanted.groupby(
        ["task", "feature", "protocol"], sort=False
    ):
        for against in ("random", "teacher"):
            other = predictions[
                (predictions["model"] == against)
                & (predictions["task"] == task)
                & (predictions["protocol"] == protocol)
                & (predictions["feature"] == (feature if against == "random" else "final"))
            ]
            delta = _paired(group, other)
            if not len(delta):
                continue
            result = bootstrap(delta, resamples, task_seed(seed, str(task)))
            found.append(
                {
                    "task": task,
                    "feature": feature,
                    "protocol": protocol,
                    "against": against,
                    "value": result.value,
                    "ci_low": result.low,
                    "ci_high": result.high,
                    "n": result.n,
                    "certain": result.low > 0 or result.high < 0,
                }
            )
    return found


def _correct(rows: pd.DataFrame) -> NDArray[np.int64]:
    return np.asarray(rows["truth"].to_numpy() == rows["predicted"].to_numpy(), dtype=np.int64)


def _paired(ours: pd.DataFrame, theirs: pd.DataFrame) -> NDArray[np.int64]:
    """Correct minus correct on the images that both predicted, -1, 0 or 1 each."""
    a = pd.Series(_correct(ours), index=ours["image_id"].to_numpy())
    b = pd.Series(_correct(theirs), index=theirs["image_id"].to_numpy())
    both = a.index.intersection(b.index, sort=False)
    return np.asarray(a[both].to_numpy() - b[both].to_numpy(), dtype=np.int64)
