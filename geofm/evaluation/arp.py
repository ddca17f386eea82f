"""Average Relative Performance (ARP), the summary figure of the GFM paper.

The relative gain over the reference is averaged over *data sets*. A data set with two metrics
(BigEarthNet at 10 % and 1 %, SpaceNet2's PSNR and SSIM) counts once. On the paper's Table 9 this
gives 3.31, 2.16 and 1.41. OSCD contributes 62 % of the 3.31 with its 10 test pairs, so always show
ARP with and without OSCD.

Source: GFM paper (Mendieta et al. 2023), Eq. 1 and Tables 3 to 7 and 9.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from data_catalog.errors import UsageError

#: Data sets and their metrics, as the paper averages them.
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

#: The ablation of the objective (Table 9).
PAPER_TABLE_9 = {
    "GFM": _row(59.82, 71.24, 99.0, 86.3, 80.7, 90.7, 75.3, 22.599, 0.638),
    "distillation only": _row(59.58, 71.86, 98.8, 86.1, 80.2, 90.2, 72.6, 22.069, 0.608),
    "MIM only": _row(57.3, 67.65, 98.8, 86.5, 80.0, 90.5, 74.0, 22.509, 0.631),
}


def average_relative_performance(
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    datasets: Mapping[str, Collection[str]] = PAPER_DATASETS,
    without: Collection[str] = (),
) -> float:
    """Compute ARP in percent.

    Args:
        scores: Score of the model by metric; more is better.
        reference: Score of the reference model by metric.
        datasets: Metrics by data set.
        without: Data sets to leave out, e.g. ``("OSCD",)``.

    Raises:
        UsageError: A metric is missing, or no data set remains.
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
        dataset_gains = [relative_gain(scores[m], reference[m]) for m in metrics]
        gains.append(sum(dataset_gains) / len(dataset_gains))
    if not gains:
        raise UsageError("ARP of no data set: leave at least one in")
    return sum(gains) / len(gains)


def relative_gain(score: float, reference: float) -> float:
    """Gain of a score over the reference, in percent.

    Raises:
        UsageError: The reference is zero or negative, so there is no relative gain.
    """
    if reference <= 0:
        raise UsageError(
            f"the reference score {reference} is not positive: use metrics where more is better "
            "and the reference is above 0"
        )
    return 100.0 * (score / reference - 1.0)
