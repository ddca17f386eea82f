"""Two protocols on frozen features, and honest intervals around their accuracy.

Both see features standardised with the mean and deviation of the *train* part. Whatever is chosen
(the probe's C) is chosen inside the train part; the test part is looked at once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from geofm.types import Floats

Ints = NDArray[np.int64]

#: Inverse regularisation strengths tried, on standardised features.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 3
MAX_ITER = 1000
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Probe:
    """Predicted classes of the test part, and what was chosen on the train part."""

    predicted: Ints
    c: float
    converged: bool


@dataclass(frozen=True)
class Interval:
    """A mean over the test images with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def standardise(train: NDArray[np.floating], test: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Both parts [N, D] with the train part's mean removed and its deviation made 1.

    Dimensions without variation in the train part become 0 in both.
    """
    first, second = train.astype(np.float64), test.astype(np.float64)
    mean, deviation = first.mean(axis=0), first.std(axis=0)
    alive = deviation > 1e-6 * max(float(deviation.max(initial=0.0)), 1e-12)
    factor = np.where(alive, 1.0 / np.where(alive, deviation, 1.0), 0.0)
    return (first - mean) * factor, (second - mean) * factor


def knn_predict(
    train: NDArray[np.floating], labels: Ints, test: NDArray[np.floating], k: int
) -> Ints:
    """Classes of the test part by the ``k`` nearest train images in cosine similarity.

    A tie goes to the class whose neighbours are the more similar in sum, then to the first class.

    Args:
        train: [N, D] features.
        labels: [N] classes from 0.
        test: [M, D] features.
        k: neighbours; no more than N are used.
    """
    with threadpool_limits(1):
        a, b = standardise(train, test)
        similarity = _unit_length(b) @ _unit_length(a).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(similarity, nearest, axis=1)
    classes = int(labels.max()) + 1
    rows = np.arange(len(b))[:, None]
    votes, sums = np.zeros((len(b), classes)), np.zeros((len(b), classes))
    np.add.at(votes, (rows, labels[nearest]), 1.0)
    np.add.at(sums, (rows, labels[nearest]), near)
    most = votes == votes.max(axis=1, keepdims=True)
    return np.asarray(np.argmax(np.where(most, sums, -np.inf), axis=1), dtype=np.int64)


def _unit_length(rows: Floats) -> Floats:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norm > 0, norm, 1.0))


def linear_probe(
    train: NDArray[np.floating], labels: Ints, test: NDArray[np.floating], seed: int
) -> Probe:
    """Multinomial logistic regression (L-BFGS), its C chosen by cross-validation on ``train``.

    Of equally good C the smallest is taken. A class with fewer images than folds reduces the
    folds; with one image in a class there is nothing to validate on and C is 0.01.
    """
    with threadpool_limits(1):
        a, b = standardise(train, test)
        c = _choose_c(a, labels, seed)
        model = LogisticRegression(C=c, max_iter=MAX_ITER)
        converged = _fit(model, a, labels)
        return Probe(np.asarray(model.predict(b), dtype=np.int64), c, converged)


def _choose_c(features: Floats, labels: Ints, seed: int) -> float:
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return 1e-2
    correct = dict.fromkeys(STRENGTHS, 0)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fit, held in splitter.split(features, labels):
        # from the strongest regularisation on, each fit starts where the last one ended
        model = LogisticRegression(max_iter=MAX_ITER, warm_start=True)
        for c in STRENGTHS:
            _fit(model.set_params(C=c), features[fit], labels[fit])
            correct[c] += int((model.predict(features[held]) == labels[held]).sum())
    return max(STRENGTHS, key=lambda c: (correct[c], -c))


def _fit(model: LogisticRegression, features: Floats, labels: Ints) -> bool:
    """Fit in place; whether it converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    return bool(np.max(model.n_iter_) < MAX_ITER)


def bootstrap(values: NDArray[np.generic], resamples: int, seed: int) -> Interval:
    """Mean of per-image values with a 95 % percentile interval over resampled images.

    The same seed and number of images draw the same resamples, so differences between models
    are paired. When every image has the same value the interval has no width: it speaks of these
    images, and nothing was seen to vary.

    Args:
        values: [N], 0 or 1 for accuracy, -1, 0 or 1 for a difference of two models.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    numbers = values.astype(np.float64)
    n = len(numbers)
    rng = np.random.default_rng(seed)
    means: list[Floats] = []
    left = resamples
    while left:
        block = min(left, max(_BLOCK // n, 1))
        means.append(numbers[rng.integers(0, n, size=(block, n))].mean(axis=1))
        left -= block
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high), n)
