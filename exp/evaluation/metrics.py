"""Per-image counts -> the D (data set), I (image), C (class) and worst-case scores. Counts first, scores once.

The definitions are those of "Revisiting Evaluation Metrics for Semantic Segmentation" (Wang et al., NeurIPS 2023,
arXiv 2310.19252) as RankSEG-RMA (Wang & Dai, NeurIPS 2025) uses them. Per image and class, over the pixels that are
not ignored: IoU = TP/(TP+FP+FN), Dice = 2TP/(2TP+FP+FN), Acc = TP/(TP+FN). Scores are in percent.

Where images are the slices of cases (volumes), I, C and the worst-case scores are taken within each case as if it were
a data set of its own, then averaged over the cases; over the folds of a cross-validation, average_folds() averages
what remains. D stays that of the counts summed over all slices; 3D scores the counts summed within a case.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SCORES = ("Acc", "IoU", "Dice")
WORST_PERCENTS = (5, 10)
QUANTILE_PERCENTS = tuple(range(10, 101, 10))


@dataclass(frozen=True)
class EvalResult:
    """One rule's (N, 3, C) int64 TP, FP, FN per image and class, the images in the data set's order.

    cases: the case of each image where images are slices of volumes; None where every image stands alone.
    """

    rule: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    counts: np.ndarray
    cases: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        assert self.counts.shape == (len(self.names), 3, len(self.classes)), self.counts.shape
        assert self.cases is None or len(self.cases) == len(self.names), len(self.cases)


def count(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) predictions in 0..C-1 and labels in 0..C-1 or 255 -> (3, C) int64 TP, FP, FN, by a joint histogram."""
    joint = label.to(torch.int32).mul_(num_classes).add_(pred.to(torch.int32))  # half the memory traffic of int64
    histogram = torch.bincount(joint.flatten(), minlength=num_classes**2)[: num_classes**2]  # label 255 lands behind
    histogram = histogram.view(num_classes, num_classes)
    tp = histogram.diagonal()
    return torch.stack([tp, histogram.sum(0) - tp, histogram.sum(1) - tp])


def class_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(..., 3, C) TP, FP, FN -> Acc, IoU and Dice, each (..., C) in percent; NaN where the denominator is 0."""
    tp, fp, fn = (counts[..., i, :].astype(np.float64) for i in range(3))
    with np.errstate(invalid="ignore"):
        return {"Acc": 100 * tp / (tp + fn), "IoU": 100 * tp / (tp + fp + fn), "Dice": 200 * tp / (2 * tp + fp + fn)}


def active_classes(counts: np.ndarray) -> np.ndarray:
    """(N, 3, C) -> (N, C) bool: the class is in the image's label; with two classes: in its label or prediction."""
    tp, fp, fn = (counts[:, i] for i in range(3))
    return (tp + fn + fp if counts.shape[-1] == 2 else tp + fn) > 0


def image_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(N, 3, C) -> the scores of each image, (N,) in percent: Acc, mAccI, mIoUI, mDiceI.

    More than two classes: the mean over the image's active classes; NaN for an image without a pixel that counts.
    Two classes: the foreground's score, 100 for an image with fewer than two active classes; NaN for the accuracy
    of a foreground that is only predicted.
    """
    active, scores = active_classes(counts), class_scores(counts)
    total = counts[:, 0].sum(1) + counts[:, 2].sum(1)
    with np.errstate(invalid="ignore"):
        rows = {"Acc": 100 * counts[:, 0].sum(1) / total}
    for name in SCORES:
        if counts.shape[-1] == 2:
            rows[f"m{name}I"] = np.where(active.sum(1) < 2, 100.0, scores[name][:, 1])
        else:
            rows[f"m{name}I"] = _nanmean(np.where(active, scores[name], np.nan), axis=1)
    return rows


def case_scores(counts: np.ndarray, cases: Sequence[str]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """(N, 3, C) counts of slices and their cases -> the K cases by name, and each one's scores, (K,) in percent.

    mAccI, mIoUI, mDiceI: the mean over the case's slices; Acc, mAcc3D, mIoU3D, mDice3D: the counts summed over the
    slices, then scored as one image. NaN where nothing is defined.
    """
    names, parts = split_cases(counts, cases)
    volumes = image_scores(np.stack([part.sum(0) for part in parts]))
    slices = [image_scores(part) for part in parts]
    rows = {"Acc": volumes["Acc"]}
    for name in SCORES:
        rows[f"m{name}I"] = np.array([float(_nanmean(part[f"m{name}I"])) for part in slices])
        rows[f"m{name}3D"] = volumes[f"m{name}I"]
    return names, rows


def split_cases(counts: np.ndarray, cases: Sequence[str] | None) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """(N, 3, C) and the case of each image -> the cases in the order they come, and the (n, 3, C) of each.

    Without cases: one part, all images, without a name.
    """
    if cases is None:
        return (), [counts]
    members: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        members.setdefault(case, []).append(index)
    return tuple(members), [counts[indices] for indices in members.values()]


def compute_scores(counts: np.ndarray, cases: Sequence[str] | None = None) -> dict[str, float]:
    """(N, 3, C) int64 counts -> Acc and mAcc, mIoU, mDice in D, I and C and their worst cases, in percent.

    D: counts summed over the images per class, then the score, then the mean over classes. I: the mean over images.
    C: per class the mean over the images where it is active, then the mean over classes. With two classes D and I are
    the foreground's, C is that of both. I5, I10: the mean of the lowest max(1, floor(q% n)) image scores; C5, C10: the
    same per class, then the mean over classes; IQ, CQ: the mean over q = 10, 20, ..., 100. With cases: I, C and their
    worst cases within each case, then the mean over cases; 3D: counts summed within a case, the case then scored as
    an image. What is 0/0 (a class that is nowhere, an image without a pixel that counts) is left out; NaN if nothing
    is left.
    """
    whole = pooled_scores(counts.sum(0))
    scores = {"Acc": whole["Acc"]}
    within = [_scores_within(part) for part in split_cases(counts, cases)[1]]
    for name in SCORES:
        scores[f"m{name}D"] = whole[f"m{name}D"]
        scores |= {key: _nanmean(np.array([part[key] for part in within])) for key in within[0] if name in key}
    if cases is not None:
        volumes = case_scores(counts, cases)[1]
        scores |= {f"m{name}3D": _nanmean(volumes[f"m{name}3D"]) for name in SCORES}
    return {name: float(value) for name, value in scores.items()}


def pooled_scores(pooled: np.ndarray) -> dict[str, np.ndarray]:
    """(..., 3, C) counts summed over a data set -> Acc, mAccD, mIoUD, mDiceD, each (...): the mean over the classes.

    Two classes: the foreground's, but for Acc, that of all pixels. A class that is nowhere is left out; NaN if none is
    left.
    """
    foreground = slice(1, 2) if pooled.shape[-1] == 2 else slice(None)
    scores = {f"m{name}D": _nanmean(v[..., foreground], axis=-1) for name, v in class_scores(pooled).items()}
    right = pooled[..., 0, :].sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"Acc": 100 * right / (right + pooled[..., 2, :].sum(-1)), **scores}


def _scores_within(counts: np.ndarray) -> dict[str, float]:
    """(n, 3, C) counts of a case, or of a data set without cases -> the I and C family of every score."""
    rows, by_class = image_scores(counts), _class_reductions(counts)
    scores = {}
    for name in SCORES:
        scores |= {f"m{name}I{end}": float(v) for end, v in _reductions(rows[f"m{name}I"]).items()}
        scores |= {f"m{name}C{end}": float(_nanmean(by_class[f"{name}C{end}"])) for end in _ENDINGS}
    return scores


def per_class_scores(counts: np.ndarray, cases: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """(N, 3, C) -> AccD, AccC, AccC5, AccC10, AccCQ and those of IoU and Dice, each (C,) in percent.

    NaN for a class that is nowhere. With cases the C family is taken within each case and averaged over the cases
    that have the class.
    """
    whole = class_scores(counts.sum(0))
    within = [_class_reductions(part) for part in split_cases(counts, cases)[1]]
    by_class = {}
    for name in SCORES:
        by_class[f"{name}D"] = whole[name]
        for end in _ENDINGS:
            by_class[f"{name}C{end}"] = _nanmean(np.stack([part[f"{name}C{end}"] for part in within]), axis=0)
    return by_class


def _class_reductions(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(n, 3, C) -> IoUC, IoUC5, ... of every score, each (C,): over the images where the class is active."""
    active, scores, by_class = active_classes(counts), class_scores(counts), {}
    for name in SCORES:
        reduced = _reductions(np.where(active, scores[name], np.nan))
        by_class |= {f"{name}C{end}": values for end, values in reduced.items()}
    return by_class


_ENDINGS = ("", *(str(q) for q in WORST_PERCENTS), "Q")  # of the names: mIoUI, mIoUI5, mIoUI10, mIoUIQ


def _reductions(values: np.ndarray) -> dict[str, np.ndarray]:
    """(n, ...) scores -> their mean and worst cases over the first axis, by the ending of the name; NaN is left out."""
    low = {q: lowest_mean(values, q) for q in {*WORST_PERCENTS, *QUANTILE_PERCENTS}}
    quantiles = np.mean([low[q] for q in QUANTILE_PERCENTS], axis=0)
    return dict(zip(_ENDINGS, [_nanmean(values, axis=0), *(low[q] for q in WORST_PERCENTS), quantiles]))


def lowest_mean(values: np.ndarray, percent: int) -> np.ndarray:
    """(n, ...) -> (...) the mean of the lowest max(1, floor(percent/100 n)) along the first axis.

    n counts what is not NaN; NaN where nothing is left.
    """
    ranked = np.sort(values, axis=0)  # NaN comes last
    valid = np.isfinite(ranked).sum(0)
    num = np.maximum(1, valid * percent // 100)  # in integers: 0.07 * 100 is more than 7
    chosen = np.arange(len(ranked)).reshape(-1, *(1,) * (ranked.ndim - 1)) < np.minimum(num, valid)
    with np.errstate(invalid="ignore"):
        return np.where(chosen, ranked, 0.0).sum(0) / np.where(valid > 0, num, np.nan)


def average_folds(folds: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Scores by name of each fold (compute_scores, or a result's JSON) -> their means.

    A fold where a score is undefined (NaN or None) is left out of that score; NaN if none is left.
    """
    values = {name: np.array([math.nan if f[name] is None else f[name] for f in folds]) for name in folds[0]}
    return {name: float(_nanmean(column)) for name, column in values.items()}


def _nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)
