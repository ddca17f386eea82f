"""Probes on frozen features (k nearest neighbours, logistic regression) and bootstrap intervals.

Both probes see features that are standardised with the mean and standard deviation of the *train*
part. The linear probe chooses its C within the train part; the test part is used once.
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

#: Values of C (inverse regularisation strength) that are tried.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 3
MAX_ITER = 1000
#: Random indices drawn at a time by the bootstrap; bounds its memory.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class ProbeResult:
    """Result of a linear probe.

    Attributes:
        predicted: Classes of the test part, shape (M,).
        c: Value of C chosen on the train part.
        converged: Whether the final fit converged.
    """

    predicted: Ints
    c: float
    converged: bool


@dataclass(frozen=True)
class Interval:
    """Mean over n test images, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def standardise(train: NDArray[np.floating], test: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Standardise features with the mean and standard deviation of the train part.

    Dimensions without variation in the train part become 0 in both parts.

    Args:
        train: Features, shape (N, D).
        test: Features, shape (M, D).
    """
    first, second = train.astype(np.float64), test.astype(np.float64)
    mean, deviation = first.mean(axis=0), first.std(axis=0)
    varies = deviation > 1e-6 * max(float(deviation.max(initial=0.0)), 1e-12)
    factor = np.where(varies, 1.0 / np.where(varies, deviation, 1.0), 0.0)
    return (first - mean) * factor, (second - mean) * factor


def knn_predict(
    train: NDArray[np.floating], labels: Ints, test: NDArray[np.floating], k: int
) -> Ints:
    """Predict classes by a vote of the k nearest train images in cosine similarity.

    A tie goes to the class whose neighbours have the larger sum of similarities, then to the class
    with the smaller number.

    Args:
        train: Features, shape (N, D).
        labels: Classes from 0, shape (N,).
        test: Features, shape (M, D).
        k: Number of neighbours; at most N are used.

    Returns:
        Predicted classes, shape (M,).
    """
    with threadpool_limits(1):
        a, b = standardise(train, test)
        similarity = _normalise_rows(b) @ _normalise_rows(a).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    nearest_similarity = np.take_along_axis(similarity, nearest, axis=1)
    classes = int(labels.max()) + 1
    rows = np.arange(len(b))[:, None]
    votes, sums = np.zeros((len(b), classes)), np.zeros((len(b), classes))
    np.add.at(votes, (rows, labels[nearest]), 1.0)
    np.add.at(sums, (rows, labels[nearest]), nearest_similarity)
    most = votes == votes.max(axis=1, keepdims=True)
    return np.asarray(np.argmax(np.where(most, sums, -np.inf), axis=1), dtype=np.int64)


def _normalise_rows(rows: Floats) -> Floats:
    """Scale rows to unit length; zero rows stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norm > 0, norm, 1.0))


def linear_probe(
    train: NDArray[np.floating], labels: Ints, test: NDArray[np.floating], seed: int
) -> ProbeResult:
    """Fit a multinomial logistic regression (L-BFGS) and predict the test part.

    C is chosen by cross-validation on the train part; of equally good values the smallest wins. A
    class with fewer images than folds reduces the number of folds. With a single image in a class
    there is no validation, and C is 0.01.

    Args:
        train: Features, shape (N, D).
        labels: Classes from 0, shape (N,).
        test: Features, shape (M, D).
        seed: Seed of the folds.
    """
    with threadpool_limits(1):
        a, b = standardise(train, test)
        c = _choose_c(a, labels, seed)
        model = LogisticRegression(C=c, max_iter=MAX_ITER)
        converged = _fit(model, a, labels)
        return ProbeResult(np.asarray(model.predict(b), dtype=np.int64), c, converged)


def _choose_c(features: Floats, labels: Ints, seed: int) -> float:
    """Choose C by cross-validation."""
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return 1e-2
    correct = dict.fromkeys(STRENGTHS, 0)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fit, held_out in splitter.split(features, labels):
        # From strong to weak regularisation, each fit starts at the previous solution.
        model = LogisticRegression(max_iter=MAX_ITER, warm_start=True)
        for c in STRENGTHS:
            _fit(model.set_params(C=c), features[fit], labels[fit])
            correct[c] += int((model.predict(features[held_out]) == labels[held_out]).sum())
    return max(STRENGTHS, key=lambda c: (correct[c], -c))


def _fit(model: LogisticRegression, features: Floats, labels: Ints) -> bool:
    """Fit a model in place; returns whether it converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    return bool(np.max(model.n_iter_) < MAX_ITER)


def bootstrap_interval(values: NDArray[np.generic], resamples: int, seed: int) -> Interval:
    """Mean of per-image values with a 95 % percentile bootstrap interval over images.

    Equal seeds and numbers of images give equal resamples, so differences between models are
    paired. If all images have the same value, the interval has width 0: it covers only these
    images.

    Args:
        values: Value per image, shape (N,): 0 or 1 for accuracy; -1, 0 or 1 for a difference.
        resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    numbers = values.astype(np.float64)
    n = len(numbers)
    rng = np.random.default_rng(seed)
    means: list[Floats] = []
    remaining = resamples
    while remaining:
        block = min(remaining, max(_BLOCK // n, 1))
        means.append(numbers[rng.integers(0, n, size=(block, n))].mean(axis=1))
        remaining -= block
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high), n)
