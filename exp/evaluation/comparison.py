"""Results of several rules on the same images -> paired differences with intervals and tests.

What varies is the image or, where images are slices of cases, the case: slices of a volume are not independent. Per
unit the difference of the score between a rule and the first rule; of these differences the mean with a bias-corrected
and accelerated bootstrap interval (BCa; Efron, JASA 1987), Wilcoxon's signed-rank test, and its p-values after Holm
(1979) over the rules. The same input gives the same interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exp.evaluation.metrics import (
    COUNTS,
    EvalResult,
    case_scores,
    image_scores,
    pooled_scores,
    split_cases,
    unit_class_scores,
)

LEVEL = 0.95
NUM_RESAMPLES = 9999
NUM_POOLED_RESAMPLES = 1999  # of data-set scores: each pools the counts of all images anew
BATCH_ELEMENTS = 2**22  # resampled units held at once
ROUNDING = 9  # decimals of a percent beyond which a difference is that of floating-point sums
LOSING_POINTS = (1, 5)  # what a unit loses at least to be counted, percent points
EXACT_UNITS = 50  # up to so many units without ties the rank test is exact, beyond it is the normal approximation


@dataclass(frozen=True)
class Comparison:
    """A rule beside the first one, `base`, by one score: differences are rule - base in percent points.

    difference: None where no unit is left; interval: None for fewer than two units. p_value: Wilcoxon's, two-sided,
    on the units whose difference is not zero (1 if none is); p_holm: adjusted for the number of rules compared with
    `base`. The score of the whole data set (mIoUD) has no value a unit: its units are resampled, and it has no test
    and no wins.
    losing: by score, mIoUI and mDiceI (of a 3D score mIoU3D and mDice3D), then by points, "1" and "5": the percent of
    the units that lose more points than that.
    """

    rule: str
    base: str
    metric: str
    unit: str
    num_units: int
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None = None
    p_holm: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    losing: Mapping[str, Mapping[str, float]] | None = None


def compare_rules(results: Sequence[EvalResult], metric: str, seed: int = 0) -> list[Comparison]:
    """Results of the same images, and mAccI, mIoUI or mDiceI -> every further rule beside the first.

    By `metric`, with cases by its 3D score too, and by its score of the data set (D). Units where a score is undefined
    under either rule are left out.
    """
    if len(results) < 2:
        return []
    base, *others = results
    assert all(r.names == base.names and r.cases == base.cases for r in others), "results of other images"
    family = metric.removesuffix("I")
    comparisons = []
    for name in (metric,) if base.cases is None else (metric, f"{family}3D"):
        tested = [_compare(base, other, name, seed) for other in others]
        adjusted = holm([c.p_value for c in tested])
        comparisons += [replace(c, p_holm=p) for c, p in zip(tested, adjusted)]
    return comparisons + [compare_pooled(base, other, f"{family}D", seed) for other in others]


def _compare(base: EvalResult, other: EvalResult, metric: str, seed: int) -> Comparison:
    values = paired_differences(base, other, metric)
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    return Comparison(
        rule=other.rule,
        base=base.rule,
        metric=metric,
        unit="image" if base.cases is None else "case",
        num_units=len(values),
        difference=float(values.mean()) if len(values) else None,
        interval=mean_interval(values, seed),
        p_value=signed_rank(values),
        wins=wins,
        ties=len(values) - wins - losses,
        losses=losses,
        losing=_losing_shares(base, other, metric) if len(values) else None,
    )


def _losing_shares(base: EvalResult, other: EvalResult, metric: str) -> dict[str, dict[str, float]]:
    names = losing_names(metric)
    return {name: share_losing(paired_differences(base, other, name)) for name in names}


def losing_names(metric: str) -> tuple[str, str]:
    """A score of units -> the scores by which losing units are counted beside it."""
    ending = "3D" if metric.endswith("3D") else "I"
    return f"mIoU{ending}", f"mDice{ending}"


def share_losing(values: np.ndarray) -> dict[str, float]:
    """(n,) differences of units in percent points -> the percent of them that lose more than 1 and more than 5."""
    return {str(points): float(100 * (values < -points).mean()) for points in LOSING_POINTS}


def paired_differences(base: EvalResult, other: EvalResult, metric: str) -> np.ndarray:
    """Two results of the same images -> (n,) other - base of the per-image (per-case) score where both are defined."""
    values = unit_differences(base, other, metric)
    return values[~np.isnan(values)]


def unit_differences(base: EvalResult, other: EvalResult, metric: str) -> np.ndarray:
    """Two results of the same N images -> (N,), or with cases (K,), other - base in percent points; NaN where the score
    is undefined under either."""
    first, second = (
        image_scores(r.counts) if r.cases is None else case_scores(r.counts, r.cases)[1] for r in (base, other)
    )
    return np.round(second[metric] - first[metric], ROUNDING)


def class_differences(base: EvalResult, other: EvalResult, score: str) -> np.ndarray:
    """Two results of the same N images, and Acc, IoU or Dice -> (N, C), or with M cases (M, C), other - base of every
    class in percent points; NaN where the class is not active under either."""
    first, second = (unit_class_scores(r.counts, r.cases)[score] for r in (base, other))
    return np.round(second - first, ROUNDING)


def mean_interval(values: np.ndarray, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float] | None:
    """(n,) values -> the BCa bootstrap interval of their mean; None for n < 2, the value itself if all are equal."""
    num = len(values)
    if num < 2:
        return None
    resampled = _resample(lambda drawn: values[drawn].mean(1), num, num_resamples, num, seed)
    return bca_interval(values.mean(), resampled, (values.sum() - values) / (num - 1))


def compare_pooled(base: EvalResult, other: EvalResult, metric: str, seed: int = 0) -> Comparison:
    """Two results of the same images -> the difference of a score of the data set (mAccD, mIoUD, mDiceD or Acc), its
    interval by resampling images or cases."""
    counts = _unit_counts(base, other)
    num = len(counts)

    def difference(pooled: np.ndarray) -> np.ndarray:
        return _pooled_difference(pooled, metric)

    def differences(drawn: np.ndarray) -> np.ndarray:
        rows = np.arange(len(drawn))[:, None] * num
        weights = np.bincount((drawn + rows).ravel(), minlength=len(drawn) * num).reshape(len(drawn), num)
        return difference((weights.astype(np.float64) @ counts.reshape(num, -1)).reshape(-1, *counts.shape[1:]))

    total, interval = counts.sum(0), None
    if num > 1:
        size = num + counts[0].size
        resampled = _resample(differences, num, NUM_POOLED_RESAMPLES, size, seed)
        interval = bca_interval(difference(total), resampled, difference(total - counts))
    return Comparison(
        rule=other.rule,
        base=base.rule,
        metric=metric,
        unit="image" if base.cases is None else "case",
        num_units=num,
        difference=None if np.isnan(difference(total)) else float(difference(total)),
        interval=interval,
    )


def standard_error(base: EvalResult, other: EvalResult, metric: str) -> float | None:
    """Two results of the same images -> the standard error of the difference of a score, in percent points.

    By the jackknife over images (cases), which for the mean of a score per unit is s / sqrt(n). None below two units.
    Scores of the data set are means over the classes that are in the labels, with and without each unit.
    """
    if metric.endswith(("I", "3D")):
        values = paired_differences(base, other, metric)
        left_out = (values.sum() - values) / max(1, len(values) - 1)
    else:
        counts = _unit_counts(base, other)
        pooled = counts.sum(0) - counts
        labelled = pooled[:, :, :1] + pooled[:, :, 2:3] > 0
        left_out = _pooled_difference(np.where(labelled, pooled, 0), metric)
        left_out = left_out[~np.isnan(left_out)]
    num = len(left_out)
    return float(np.sqrt((num - 1) * left_out.var())) if num > 1 else None


def _unit_counts(base: EvalResult, other: EvalResult) -> np.ndarray:
    """Two results of the same images -> (units, 2, 3, C) counts of each image or case, as float64; those of further
    metrics, which one of the two may lack, are left out."""
    units = [
        np.stack([part.sum(0) for part in split_cases(r.counts, r.cases)[1]]) if r.cases else r.counts
        for r in (base, other)
    ]
    return np.stack([counts[:, : len(COUNTS)] for counts in units], 1).astype(np.float64)


def _pooled_difference(pooled: np.ndarray, metric: str) -> np.ndarray:
    """(..., 2, 3, C) pooled counts of two rules -> (...) the difference of their scores."""
    score = pooled_scores(pooled)[metric]
    return np.round(score[..., 1] - score[..., 0], ROUNDING)


def _resample(
    statistic: Callable[[np.ndarray], np.ndarray], num_units: int, num_resamples: int, size: int, seed: int
) -> np.ndarray:
    """(b, num_units) drawn indices -> (b,) by `statistic`, for all resamples; `size`: elements it holds for each."""
    rng, batch = np.random.default_rng(seed), max(1, BATCH_ELEMENTS // size)
    parts = []
    for start in range(0, num_resamples, batch):
        shape = (min(batch, num_resamples - start), num_units)
        parts.append(statistic(rng.integers(0, num_units, shape, dtype=np.int32)))
    return np.concatenate(parts)


def bca_interval(
    estimate: float, resampled: np.ndarray, left_out: np.ndarray, level: float = LEVEL
) -> tuple[float, float] | None:
    """Estimate, (R,) of resampled data, (n,) of the data without unit i -> the BCa interval (Efron 1987).

    NaN estimates (a score that a resample leaves undefined) are left out; None if nothing is left.
    """
    from scipy.special import ndtr, ndtri  # where it is needed only: importing it takes time

    resampled, left_out = resampled[~np.isnan(resampled)], left_out[~np.isnan(left_out)]
    if not len(resampled) or np.isnan(estimate):
        return None
    below = ((resampled < estimate).mean() + (resampled <= estimate).mean()) / 2
    bias = ndtri(np.clip(below, 1 / (len(resampled) + 1), len(resampled) / (len(resampled) + 1)))
    influence = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    spread = (influence**2).sum()
    acceleration = (influence**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(resampled, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def signed_rank(values: np.ndarray) -> float:
    """(n,) paired differences -> the two-sided p-value of Wilcoxon's test; zeros are dropped, 1 if nothing is left."""
    from scipy.stats import wilcoxon

    values = values[values != 0]
    if not len(values):
        return 1.0
    exact = len(values) <= EXACT_UNITS and len(np.unique(np.abs(values))) == len(values)
    return float(wilcoxon(values, method="exact" if exact else "approx").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values -> Holm's step-down adjusted ones, in the same order: at most 1, and in the order of the raw ones."""
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
