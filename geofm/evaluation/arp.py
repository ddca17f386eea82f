"""Average Relative Performance, the one number of the GFM paper (Mendieta et al. 2023, Eq. 1).

The gain over the reference is averaged over *data sets*, so a data set with two metrics
(BigEarthNet at 10 % and 1 %, SpaceNet2's PSNR and SSIM) counts once. On the paper's Table 9 that
gives 3.31, 2.16 and 1.41; 62 % of the 3.31 is OSCD with its 10 test pairs, so a figure with OSCD
is always to be shown beside the one without.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from data_catalog.errors import UsageError

#: Data set -> its metrics, as the paper averages them.
PAPER_DATASETS: dict[str, tuple[str, ...]] = {
    "OSCD": ("oscd_f1",),
    "DSIFN": ("dsifn_f1",),
    "UC Merced": ("ucm",),
    "BigEarthNet": ("ben_10", "ben_1"),
    "WHU Aerial": ("whu",),
    "Vaihingen": ("vaihingen",),
    "SpaceNet2": ("sn2_psnr", "sn2_ssim"),
}

_METRICS = tuple(metric for metrics in PAPER_DATASETS.values() for metric in metrics)


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_METRICS, values, strict=True))


#: The reference: Swin-B with ImageNet-22k weights (Tables 3 to 7).
PAPER_REFERENCE = _row(52.35, 69.62, 99.0, 85.7, 79.5, 90.4, 74.7, 21.655, 0.612)

#: Table 9, the ablation of the objective.
PAPER_TABLE_9 = {
    "GFM": _row(59.82, 71.24, 99.0, 86.3, 80.7, 90.7, 75.3, 22.599, 0.638),
    "distillation only": _row(59.58, 71.86, 98.8, 86.1, 80.2, 90.2, 72.6, 22.069, 0.608),
    "MIM only": _row(57.3, 67.65, 98.8, 86.5, 80.0, 90.5, 74.0, 22.509, 0.631),
}


def relative_gain(score: float, reference: float) -> float:
    """Gain of a score over the reference's, in percent.

    Raises:
        UsageError: the reference is zero or negative, so that no relative gain exists.
    """
    if reference <= 0:
        raise UsageError(
            f"the reference score {reference} is not positive: use metrics where more is better "
            "and the reference is above 0"
        )
    return 100.0 * (score / reference - 1.0)


def average_relative_performance(
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    datasets: Mapping[str, Collection[str]] = PAPER_DATASETS,
    without: Collection[str] = (),
) -> float:
    """ARP in percent: mean over data sets of the mean relative gain over a data set's metrics.

    Args:
        scores: metric -> score of the model, more is better.
        reference: metric -> score of the reference model.
        datasets: data set -> its metrics.
        without: data sets left out, e.g. ``("OSCD",)``.

    Raises:
        UsageError: a metric is missing, or no data set is left.
    """
    gains = []
    for name, metrics in datasets.items():
        if name in without:
            continue
        missing = [m for m in metrics if m not in scores or m not in reference]
        if missing or not metrics:
            raise UsageError(
                f"ARP needs every metric of {name}: {missing or 'none is listed'}; "
                "add the scores or leave the data set out with `without`"
            )
        inside = [relative_gain(scores[m], reference[m]) for m in metrics]
        gains.append(sum(inside) / len(inside))
    if not gains:
        raise UsageError("ARP of no data set: leave at least one in")
    return sum(gains) / len(gains)
