"""Per-image counts -> the D (data set), I (image), C (class) and worst-case scores. Counts first, scores once.

The definitions are those of "Revisiting Evaluation Metrics for Semantic Segmentation" (Wang et al., NeurIPS 2023,
arXiv 2310.19252) as RankSEG-RMA (Wang & Dai, NeurIPS 2025) uses them. Per image and class, over the pixels that are
not ignored: IoU = TP/(TP+FP+FN), Dice = 2TP/(2TP+FP+FN), Acc = TP/(TP+FN). Scores are in percent.

Where images are the slices of cases (volumes), I, C and the worst-case scores are taken within each case as if it were
a data set of its own, then averaged over the cases; over the folds of a cross-validation, average_folds() averages
what remains. D stays that of the counts summed over all slices; 3D scores the counts summed within a case.

A further metric is a function in METRICS: two whole numbers per image and class, part and whole. Its score is 100
part / whole, and goes through the same reductions under its name in exp/config/evaluation.py.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from exp.config.data import IGNORE_INDEX
from exp.config.families import METRIC_TABLE
from exp.rules.pooled import histogram

SCORES = ("Acc", "IoU", "Dice")
COUNTS = ("tp", "fp", "fn")
BOUNDARY_SHARE = 0.02  # of the image's diagonal: the width of a boundary (Cheng et al., CVPR 2021)
WORST_PERCENTS = (5, 10)
QUANTILE_PERCENTS = tuple(range(10, 101, 10))


@dataclass(frozen=True)
class EvalResult:
    """One rule's (N, K, C) int64 counts per image and class, the images in the data set's order.

    Rows of K: TP, FP, FN, then part and whole of each of `metrics`. cases: the case of each image where images are
    slices of volumes; None where every image stands alone. confusion: (C, C) int64 pixels of all images, by class of
    the label (rows) and class decided (columns); None where only the counts were kept.
    """

    rule: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    counts: np.ndarray
    cases: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    confusion: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = (len(self.names), len(count_names(self.metrics)), len(self.classes))
        assert self.counts.shape == shape, self.counts.shape

    def scores(self) -> dict[str, float]:
        return compute_scores(self.counts, self.cases, self.metrics)


def count_names(metrics: Sequence[str]) -> tuple[str, ...]:
    """The rows of a result's counts."""
    return (*COUNTS, *(f"{metric}.{end}" for metric in metrics for end in ("part", "whole")))


def build_results(
    rules: Sequence[str],
    names: Sequence[str],
    classes: Sequence[str],
    table: np.ndarray,
    cases: Sequence[str | None],
    metrics: Sequence[str] = (),
    confusion: np.ndarray | None = None,
) -> tuple[EvalResult, ...]:
    """(N, R, K, C) counts of N images under R rules -> a result per rule; cases: of the images, or None each.

    confusion: (R, C, C), summed over the images.
    """
    grouped = None if cases[0] is None else tuple(cases)
    matrices = [None] * len(rules) if confusion is None else confusion
    return tuple(
        EvalResult(rule, tuple(names), tuple(classes), table[:, i], grouped, tuple(metrics), matrix)
        for i, (rule, matrix) in enumerate(zip(rules, matrices, strict=True))
    )


def count_rules(
    preds: Sequence[Tensor],
    label: Tensor,
    num_classes: int,
    metrics: Sequence[str] = (),
    confusion: Tensor | None = None,
) -> Tensor:
    """R predictions of an image and its label, (H, W) -> (R, K, C) int64, the rows of count_names().

    confusion: (R, C, C) int64, to which the image's confusion matrices are added.
    """
    rows = []
    for i, pred in enumerate(preds):
        matrix = count_confusion(pred, label, num_classes)
        if confusion is not None:
            confusion[i] += matrix
        rows.append(torch.cat([sum_confusion(matrix), *(METRICS[name](pred, label, num_classes) for name in metrics)]))
    return torch.stack(rows)


def count(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) predictions in 0..C-1 and labels in 0..C-1 or 255 -> (3, C) int64 TP, FP, FN."""
    return sum_confusion(count_confusion(pred, label, num_classes))


def count_confusion(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) predictions in 0..C-1 and labels in 0..C-1 or 255 -> (C, C) int64 pixels by label (rows) and prediction.

    A joint histogram; ignored pixels are not in it.
    """
    joint = label.to(torch.int32, copy=True)  # half the memory traffic of int64
    joint.mul_(num_classes).add_(pred.to(torch.int32))
    return histogram(joint, 256 * num_classes)[: num_classes**2].view(num_classes, num_classes)  # 255 lands behind


def sum_confusion(matrix: Tensor) -> Tensor:
    """(C, C) confusion matrix -> (3, C) TP, FP, FN."""
    tp = matrix.diagonal()
    return torch.stack([tp, matrix.sum(0) - tp, matrix.sum(1) - tp])


def boundary_iou(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Boundary IoU (Cheng et al., CVPR 2021): (H, W), (H, W) -> (2, C) pixels of the intersection and of the union.

    The boundary of a class is its pixels that have, at most d rows and columns away, another class or the outside of
    the image; d is 2 % of the diagonal, as in the authors' code. Ignored pixels are in no boundary and make none.
    """
    ignored = label == IGNORE_INDEX
    pred = pred.to(torch.uint8).masked_fill(ignored, IGNORE_INDEX)
    width = max(1, round(BOUNDARY_SHARE * math.hypot(*label.shape)))
    own, other = (
        values.masked_fill(~on_boundary(values, width), num_classes).clamp(max=num_classes) for values in (label, pred)
    )
    part, *sizes = (
        histogram(v, num_classes + 1)[:-1] for v in (own.masked_fill(own != other, num_classes), own, other)
    )
    return torch.stack([part, sum(sizes) - part])


def on_boundary(label: Tensor, width: int) -> Tensor:
    """(H, W) uint8 labels, 255 ignored -> (H, W) bool: another label or the outside is at most `width` pixels away."""
    inside = label.masked_fill(label == IGNORE_INDEX, 0)
    highest, lowest = highest_near(inside, width), 255 - highest_near(255 - label, width)
    return (highest != inside) | (lowest != label)


def highest_near(values: Tensor, width: int) -> Tensor:
    """(H, W) uint8 -> (H, W): the largest value at most `width` rows and columns away; 255 outside the image.

    Along each axis windows of 2, 4, 8, ... are the larger of two of half their length.
    """
    for _ in range(2):
        window = pad(values, (width, width), value=255)
        length, wanted = 1, 2 * width + 1
        while length < wanted:
            step = min(length, wanted - length)
            window = torch.maximum(window[:, :-step], window[:, step:])
            length += step
        values = window.t().contiguous()
    return values


METRICS = {"boundary_iou": boundary_iou}


def class_scores(counts: np.ndarray, metrics: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """(..., K, C) counts -> Acc, IoU, Dice and those of `metrics`, each (..., C) in percent; NaN where it is 0/0."""
    tp, fp, fn = (counts[..., i, :].astype(np.float64) for i in range(3))
    with np.errstate(invalid="ignore"):
        scores = {"Acc": 100 * tp / (tp + fn), "IoU": 100 * tp / (tp + fp + fn), "Dice": 200 * tp / (2 * tp + fp + fn)}
        for row, metric in enumerate(metrics):
            part, whole = (counts[..., 3 + 2 * row + i, :].astype(np.float64) for i in range(2))
            scores[METRIC_TABLE[metric]] = 100 * part / whole
    return scores


def active_classes(counts: np.ndarray) -> np.ndarray:
    """(N, K, C) -> (N, C) bool: the class is in the image's label; with two classes: in its label or prediction."""
    tp, fp, fn = (counts[:, i] for i in range(3))
    return (tp + fn + fp if counts.shape[-1] == 2 else tp + fn) > 0


def image_scores(counts: np.ndarray, metrics: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """(N, K, C) -> the scores of each image, (N,) in percent: Acc, mAccI, mIoUI, mDiceI and those of `metrics`.

    More than two classes: the mean over the image's active classes; NaN for an image without a pixel that counts.
    Two classes: the foreground's score, 100 for an image with fewer than two active classes; NaN for the accuracy
    of a foreground that is only predicted.
    """
    active, scores = active_classes(counts), class_scores(counts, metrics)
    total = counts[:, 0].sum(1) + counts[:, 2].sum(1)
    with np.errstate(invalid="ignore"):
        rows = {"Acc": 100 * counts[:, 0].sum(1) / total}
    for name, values in scores.items():
        if counts.shape[-1] == 2:
            rows[f"m{name}I"] = np.where(active.sum(1) < 2, 100.0, values[:, 1])
        else:
            rows[f"m{name}I"] = _nanmean(np.where(active, values, np.nan), axis=1)
    return rows


def case_scores(
    counts: np.ndarray, cases: Sequence[str], metrics: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """(N, K, C) counts of slices and their cases -> the M cases by name, and each one's scores, (M,) in percent.

    mAccI, mIoUI, mDiceI: the mean over the case's slices; Acc, mAcc3D, mIoU3D, mDice3D: the counts summed over the
    slices, then scored as one image. NaN where nothing is defined.
    """
    names, parts = split_cases(counts, cases)
    volumes = image_scores(np.stack([part.sum(0) for part in parts]), metrics)
    slices = [image_scores(part, metrics) for part in parts]
    rows = {"Acc": volumes["Acc"]}
    for name in score_names(metrics):
        rows[f"m{name}I"] = np.array([float(_nanmean(part[f"m{name}I"])) for part in slices])
        rows[f"m{name}3D"] = volumes[f"m{name}I"]
    return names, rows


def split_cases(counts: np.ndarray, cases: Sequence[str] | None) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """(N, K, C) and the case of each image -> the cases in the order they come, and the (n, K, C) of each.

    Without cases: one part, all images, without a name.
    """
    if cases is None:
        return (), [counts]
    members: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        members.setdefault(case, []).append(index)
    return tuple(members), [counts[indices] for indices in members.values()]


def score_names(metrics: Sequence[str]) -> tuple[str, ...]:
    return (*SCORES, *(METRIC_TABLE[metric] for metric in metrics))


def compute_scores(
    counts: np.ndarray, cases: Sequence[str] | None = None, metrics: Sequence[str] = ()
) -> dict[str, float]:
    """(N, K, C) int64 counts -> Acc and mAcc, mIoU, mDice in D, I and C and their worst cases, in percent.

    D: counts summed over the images per class, then the score, then the mean over classes. I: the mean over images.
    C: per class the mean over the images where it is active, then the mean over classes. With two classes D and I are
    the foreground's, C is that of both. I5, I10: the mean of the lowest max(1, floor(q% n)) image scores; C5, C10: the
    same per class, then the mean over classes; IQ, CQ: the mean over q = 10, 20, ..., 100. With cases: I, C and their
    worst cases within each case, then the mean over cases; 3D: counts summed within a case, the case then scored as
    an image. What is 0/0 (a class that is nowhere, an image without a pixel that counts) is left out; NaN if nothing
    is left.
    """
    whole = pooled_scores(counts.sum(0), metrics)
    within = [_scores_within(part, metrics) for part in split_cases(counts, cases)[1]]
    scores = {"Acc": whole["Acc"]}
    for name in score_names(metrics):
        scores[f"m{name}D"] = whole[f"m{name}D"]
        names = [key for key in within[0] if key.startswith(f"m{name}")]
        scores |= {key: _nanmean(np.array([part[key] for part in within])) for key in names}
    if cases is not None:
        volumes = case_scores(counts, cases, metrics)[1]
        scores |= {f"m{name}3D": _nanmean(volumes[f"m{name}3D"]) for name in score_names(metrics)}
    return {name: float(value) for name, value in scores.items()}


def pooled_scores(pooled: np.ndarray, metrics: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """(..., K, C) counts summed over a data set -> Acc, mAccD, mIoUD, mDiceD, each (...): the mean over the classes.

    Two classes: the foreground's, but for Acc, that of all pixels.
    """
    foreground = slice(1, 2) if pooled.shape[-1] == 2 else slice(None)
    by_class = class_scores(pooled, metrics)
    scores = {f"m{name}D": _nanmean(values[..., foreground], axis=-1) for name, values in by_class.items()}
    right = pooled[..., 0, :].sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"Acc": 100 * right / (right + pooled[..., 2, :].sum(-1)), **scores}


def _scores_within(counts: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """(n, K, C) counts of a case, or of a data set without cases -> the I and C family of every score."""
    rows, by_class = image_scores(counts, metrics), _class_reductions(counts, metrics)
    scores = {}
    for name in score_names(metrics):
        scores |= {f"m{name}I{end}": float(v) for end, v in _reductions(rows[f"m{name}I"]).items()}
        scores |= {f"m{name}C{end}": float(_nanmean(by_class[f"{name}C{end}"])) for end in _ENDINGS}
    return scores


def per_class_scores(
    counts: np.ndarray, cases: Sequence[str] | None = None, metrics: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """(N, K, C) -> AccD, AccC, AccC5, AccC10, AccCQ and those of IoU and Dice, each (C,) in percent.

    NaN for a class that is nowhere.
    """
    whole = class_scores(counts.sum(0), metrics)
    within = [_class_reductions(part, metrics) for part in split_cases(counts, cases)[1]]
    by_class = {}
    for name, values in whole.items():
        by_class[f"{name}D"] = values
        for end in _ENDINGS:
            by_class[f"{name}C{end}"] = _nanmean(np.stack([part[f"{name}C{end}"] for part in within]), axis=0)
    return by_class


def unit_class_scores(counts: np.ndarray, cases: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """(N, K, C) -> Acc, IoU and Dice of every class in every image, (N, C) in percent; NaN where it is not active.

    With cases (M, C): the mean over the slices of the case. The mean of a column is that class's AccC, IoUC or DiceC.
    """
    parts = [
        {name: np.where(active_classes(part), values, np.nan) for name, values in class_scores(part).items()}
        for part in split_cases(counts, cases)[1]
    ]
    if cases is None:
        return parts[0]
    return {name: np.stack([_nanmean(part[name], axis=0) for part in parts]) for name in SCORES}


def _class_reductions(counts: np.ndarray, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """(n, K, C) -> IoUC, IoUC5, ... of every score, each (C,): over the images where the class is active."""
    active, by_class = active_classes(counts), {}
    for name, scores in class_scores(counts, metrics).items():
        reduced = _reductions(np.where(active, scores, np.nan))
        by_class |= {f"{name}C{end}": values for end, values in reduced.items()}
    return by_class


_ENDINGS = ("", *(str(q) for q in WORST_PERCENTS), "Q")  # of the names: mIoUI, mIoUI5, mIoUI10, mIoUIQ


def _reductions(values: np.ndarray) -> dict[str, np.ndarray]:
    """(n, ...) scores -> their mean and worst cases over the first axis, by the ending of the name; NaN is left out."""
    low = {q: lowest_mean(values, q) for q in {*WORST_PERCENTS, *QUANTILE_PERCENTS}}
    quantiles = np.mean([low[q] for q in QUANTILE_PERCENTS], axis=0)
    return dict(zip(_ENDINGS, [_nanmean(values, axis=0), *(low[q] for q in WORST_PERCENTS), quantiles]))


def lowest_mean(values: np.ndarray, percent: int) -> np.ndarray:
    """(n, ...) -> (...) the mean of the lowest max(1, floor(percent/100 n)) along the first axis, n without NaN."""
    ranked = np.sort(values, axis=0)  # NaN comes last
    valid = np.isfinite(ranked).sum(0)
    num = np.maximum(1, valid * percent // 100)  # in integers: 0.07 * 100 is more than 7
    chosen = np.arange(len(ranked)).reshape(-1, *(1,) * (ranked.ndim - 1)) < np.minimum(num, valid)
    with np.errstate(invalid="ignore"):
        return np.where(chosen, ranked, 0.0).sum(0) / np.where(valid > 0, num, np.nan)


def average_folds(folds: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Scores by name of each fold (compute_scores, or a result's JSON) -> their means, undefined ones left out."""
    values = {name: np.array([math.nan if f[name] is None else f[name] for f in folds]) for name in folds[0]}
    return {name: float(_nanmean(column)) for name, column in values.items()}


def _nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)
