"""Per-image counts -> the D (data set), I (image) and C (class) scores. Counts first, scores once.

The definitions are those of "Revisiting Evaluation Metrics for Semantic Segmentation" (Wang et al., NeurIPS 2023,
arXiv 2310.19252) as RankSEG-RMA (Wang & Dai, NeurIPS 2025) uses them. Per image and class, over the pixels that are
not ignored: IoU = TP/(TP+FP+FN), Dice = 2TP/(2TP+FP+FN), Acc = TP/(TP+FN). Scores are in percent.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

SCORES = ("Acc", "IoU", "Dice")


def count(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) predictions in 0..C-1 and labels in 0..C-1 or 255 -> (3, C) int64 TP, FP, FN, by a joint histogram."""
    joint = label.long() * num_classes + pred  # label 255 lands behind the C x C part
    histogram = torch.bincount(joint.flatten(), minlength=num_classes**2)[: num_classes**2]
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


def compute_scores(counts: np.ndarray) -> dict[str, float]:
    """(N, 3, C) int64 counts -> Acc and mAcc, mIoU, mDice in D, I and C, in percent.

    D: counts summed over the images per class, then the score, then the mean over classes. I: the mean over images.
    C: per class the mean over the images where it is active, then the mean over classes. With two classes D and I are
    the foreground's, C is that of both. What is 0/0 (a class that is nowhere, an image without a pixel that counts)
    is left out; NaN if nothing is left.
    """
    pooled, rows = counts.sum(0), image_scores(counts)
    tp, _, fn = pooled
    foreground = slice(1, 2) if counts.shape[-1] == 2 else slice(None)
    by_class = per_class_scores(counts)
    scores = {"Acc": 100.0 * tp.sum() / (tp.sum() + fn.sum()) if (tp + fn).any() else float("nan")}
    for name in SCORES:
        scores[f"m{name}D"] = float(_nanmean(by_class[f"{name}D"][foreground]))
        scores[f"m{name}I"] = float(_nanmean(rows[f"m{name}I"]))
        scores[f"m{name}C"] = float(_nanmean(by_class[f"{name}C"]))
    return {name: float(value) for name, value in scores.items()}


def per_class_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(N, 3, C) -> AccD, AccC, IoUD, IoUC, DiceD, DiceC, each (C,) in percent, NaN for a class that is nowhere."""
    pooled, scores, active = class_scores(counts.sum(0)), class_scores(counts), active_classes(counts)
    by_class = {}
    for name in SCORES:
        by_class[f"{name}D"] = pooled[name]
        by_class[f"{name}C"] = _nanmean(np.where(active, scores[name], np.nan), axis=0)
    return by_class


def _nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)
