"""Tables of scores, and differences between models, from predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.hashing import digest_of
from geofm.evaluation.probes import bootstrap_interval

METRIC = "accuracy"
#: Order of the rows within a task.
_MODEL_ORDER = {"teacher": 0, "random": 1, "model": 2}


def task_seed(seed: int, task: str) -> int:
    """Seed of a task's bootstrap; the same for all models, so that differences are paired."""
    return int(digest_of([seed, task])[:8], 16)


def score_table(
    predictions: pd.DataFrame, labels: Mapping[str, str], resamples: int, seed: int
) -> pd.DataFrame:
    """Compute accuracy with its 95 % interval per task, model, feature and protocol.

    Args:
        predictions: Columns model, task, image_id, feature, protocol, truth, predicted.
        labels: Description of each model.
        resamples: Number of bootstrap resamples.
        seed: Seed of the run.

    Returns:
        Columns model, label, feature, task, protocol, metric, value, ci_low, ci_high, n, seed.
        Accuracy is a share; in every task the teacher's rows are first.
    """
    rows: list[dict[str, Any]] = []
    tasks = list(dict.fromkeys(predictions["task"]))
    for (task, model, feature, protocol), group in predictions.groupby(
        ["task", "model", "feature", "protocol"], sort=False
    ):
        interval = bootstrap_interval(_correct(group), resamples, task_seed(seed, str(task)))
        rows.append(
            {
                "model": model,
                "label": labels[str(model)],
                "feature": feature,
                "task": task,
                "protocol": protocol,
                "metric": METRIC,
                "value": interval.value,
                "ci_low": interval.low,
                "ci_high": interval.high,
                "n": interval.n,
                "seed": seed,
            }
        )
    rows.sort(key=lambda r: (tasks.index(r["task"]), _MODEL_ORDER[r["model"]], r["feature"]))
    return pd.DataFrame(rows)


def paired_differences(
    predictions: pd.DataFrame, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Compute model minus random and model minus teacher, on the same test images.

    A feature of the model is compared with the same feature of the random student, and with the
    teacher's only feature.

    Args:
        predictions: See ``score_table``.
        resamples: Number of bootstrap resamples.
        seed: Seed of the run.

    Returns:
        Rows with task, feature, protocol, against, value, ci_low, ci_high, n, and ``certain``:
        whether the 95 % interval excludes zero.
    """
    differences = []
    own = predictions[predictions["model"] == "model"]
    for (task, feature, protocol), group in own.groupby(
        ["task", "feature", "protocol"], sort=False
    ):
        for baseline in ("random", "teacher"):
            other = predictions[
                (predictions["model"] == baseline)
                & (predictions["task"] == task)
                & (predictions["protocol"] == protocol)
                & (predictions["feature"] == (feature if baseline == "random" else "final"))
            ]
            per_image = _paired_difference(group, other)
            if not len(per_image):
                continue
            interval = bootstrap_interval(per_image, resamples, task_seed(seed, str(task)))
            differences.append(
                {
                    "task": task,
                    "feature": feature,
                    "protocol": protocol,
                    "against": baseline,
                    "value": interval.value,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "n": interval.n,
                    "certain": interval.low > 0 or interval.high < 0,
                }
            )
    return differences


def _correct(rows: pd.DataFrame) -> NDArray[np.int64]:
    """1 where the prediction is right, else 0."""
    return np.asarray(rows["truth"].to_numpy() == rows["predicted"].to_numpy(), dtype=np.int64)


def _paired_difference(model: pd.DataFrame, baseline: pd.DataFrame) -> NDArray[np.int64]:
    """Correct minus correct (-1, 0 or 1) on the images that both have predicted."""
    a = pd.Series(_correct(model), index=model["image_id"].to_numpy())
    b = pd.Series(_correct(baseline), index=baseline["image_id"].to_numpy())
    common = a.index.intersection(b.index, sort=False)
    return np.asarray(a[common].to_numpy() - b[common].to_numpy(), dtype=np.int64)
