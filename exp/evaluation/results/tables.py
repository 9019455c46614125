"""Results as the tables that a program prints: scores, comparisons of rules, calibration."""

from collections.abc import Mapping, Sequence

import numpy as np

from exp.config.families import METRIC_TABLE
from exp.evaluation.calibration import calibration_scores, calibration_unit
from exp.evaluation.comparison import LEVEL, LOSING_POINTS, Comparison
from exp.evaluation.metrics import EvalResult

MAIN_COLUMNS = ("Acc", *(f"m{score}{over}" for score in ("Acc", "IoU", "Dice") for over in "DIC"))
WORST_ENDINGS = ("I5", "I10", "IQ", "C5", "C10", "CQ", "3D")  # of the score by which rules are compared
LEGEND = {  # what the endings of the columns mean
    "D": "data set: counts summed over the images, then the mean over the classes (of two the foreground alone)",
    "I": "images: the mean over the classes of each image (of two the foreground alone), then over the images",
    "C": "classes: the mean over the images of each class, then over the classes",
    "5, 10": "worst cases: the mean over the lowest 5 or 10 % of the images (C: of each class's images)",
    "Q": "the mean of that over the lowest 10, 20, ..., 100 %",
    "3D": "volumes: counts summed over the slices, each volume then scored as an image",
}
LOSING_HEADER = " / ".join(f"> {points}" for points in LOSING_POINTS) + " points"


def format_results(
    results: Sequence[EvalResult],
    metric: str,
    comparisons: Sequence[Comparison] = (),
    calibration: np.ndarray | None = None,
) -> str:
    """Results -> tables of scores in percent, a line per rule, the comparisons, and the calibration of the network.

    The second table has the worst cases (and, with cases, the 3D scores) of the score by which rules are compared.
    """
    scores = [result.scores() for result in results]
    further = [f"m{METRIC_TABLE[name]}" for name in results[0].metrics]
    blocks = [format_scores([result.rule for result in results], scores, [metric.removesuffix("I")], further)]
    if comparisons:
        blocks.append(format_comparisons(comparisons, metric))
    if calibration is not None:
        errors = calibration_scores(calibration, results[0].cases)
        rows = (f"{name} {value:.2f} {calibration_unit(name)}" for name, value in errors.items())
        blocks.append(f"calibration errors (ECE: of the top label, SCE: of every class): {', '.join(rows)}")
    return "\n".join(blocks)


def format_scores(
    rules: Sequence[str],
    scores: Sequence[Mapping[str, float]],
    families: Sequence[str],
    further: Sequence[str] = (),
) -> str:
    """Rules and their scores -> the main table, then the worst cases (and 3D) of each of `families`: mIoU, mDice.

    further: scores such as mBIoU for the main table. Below stands what the endings of the names mean.
    """
    tables = ["scores in percent; Acc: of all pixels"]
    tables += [format_columns(rules, scores, (*MAIN_COLUMNS, *(f"{name}{over}" for name in further for over in "DIC")))]
    for family in (*families, *further):
        columns = [f"{family}{end}" for end in WORST_ENDINGS if f"{family}{end}" in scores[0]]
        tables.append(format_columns(rules, scores, columns))
    endings = [end for end in LEGEND if end != "3D" or "mIoU3D" in scores[0]]
    tables += [f"  {end:<5} {LEGEND[end]}" for end in endings]
    return "\n".join(tables)


def format_columns(rows: Sequence[str], scores: Sequence[Mapping[str, float]], columns: Sequence[str]) -> str:
    """Names of rows and the scores of each -> a table of `columns`."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>9}" for name in columns)]
    for row, values in zip(rows, scores, strict=True):
        lines.append(f"{row:<{width}}" + "".join(f"{values[name]:9.2f}" for name in columns))
    return "\n".join(lines)


def format_comparisons(comparisons: Sequence[Comparison], metric: str) -> str:
    """A line per comparison below what the figures are, and which rule has the highest score by `metric`."""
    holm = ", after Holm over the rules" if len({c.rule for c in comparisons}) > 1 else ""
    header = f"differences in points [{LEVEL:.0%} bootstrap intervals]; p: Wilcoxon's signed-rank test{holm}"
    return "\n".join([header, *map(format_comparison, comparisons), format_best(comparisons, metric)])


def format_comparison(comparison: Comparison) -> str:
    """One line: mean difference with its interval, units better and worse, and the test."""
    c = comparison
    if c.difference is None:
        return f"{c.rule} against {c.base}: {c.metric} is defined on no {c.unit}"
    text = f"{c.rule} against {c.base}: {c.metric} {c.difference:+.2f}"
    if c.interval is not None:
        text += f" [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"
    if c.wins is None:
        return text
    p_text = "p < 0.0001" if c.p_holm < 0.0001 else f"p = {c.p_holm:.2g}"
    text += f", better on {c.wins} of {c.num_units} {c.unit}s, worse on {c.losses}, {p_text}"
    return f"{text}; {c.unit}s that lose {LOSING_HEADER}: {format_losing(c)}"


def format_best(comparisons: Sequence[Comparison], metric: str) -> str:
    """Which rule has the highest score."""
    differences = {c.rule: c.difference for c in comparisons if c.metric == metric and c.difference is not None}
    best = max(differences, key=differences.__getitem__, default=None)
    if best is None or differences[best] <= 0:
        return f"highest {metric}: {comparisons[0].base}"
    return f"highest {metric}: {best}, {differences[best]:.2f} points above {comparisons[0].base}"


def format_losing(comparison: Comparison) -> str:
    """'mIoUI 20.2 / 4.0 %, mDiceI 17.9 / 3.1 %': the shares of units that lose so many points."""
    shares = comparison.losing or {}
    return ", ".join(f"{name} {' / '.join(f'{v:.1f}' for v in values.values())} %" for name, values in shares.items())
