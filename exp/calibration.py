"""(1, C, H, W) probabilities and labels -> how far confidence is from accuracy: ECE and SCE. Counts first, scores once.

Expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017) of the top label, whose confidence is its
probability; static calibration error (Nixon et al., CVPR workshops 2019): the same of every class's probability over
all pixels, then the mean over the classes. Bins have equal widths; bin b holds the confidences in [b, b + 1)/num_bins,
the last one 1 too. Scores are in percent.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from exp.data.base import IGNORE_INDEX
from exp.metrics import split_cases

PIXELS, CONFIDENCE, HITS = range(3)
NUM_BINS = 10


def count_calibration(prob: Tensor, label: Tensor, num_bins: int = NUM_BINS) -> np.ndarray:
    """(1, C, H, W) probabilities and (H, W) labels in 0..C-1 or 255 -> (C + 1, 3, num_bins) float64.

    Per class, and in the last row of the top label: pixels, sum of confidences and hits by bin of the confidence, over
    the pixels that are not ignored. Counts of several images add up.
    """
    num_classes = prob.shape[1]
    prob, label = prob[0].flatten(1), label.flatten()
    kept = label != IGNORE_INDEX
    if not kept.all():
        prob, label = prob[:, kept], label[kept]
    counts = torch.zeros(num_classes + 1, 3, num_bins, dtype=torch.float64, device=prob.device)
    if not label.numel():
        return counts.cpu().numpy()
    own = prob.gather(0, label.long()[None])[0]
    hits = torch.bincount(label.long() * num_bins + _bins(own, num_bins), minlength=num_classes * num_bins)
    counts[:-1, HITS] = hits.view(num_classes, num_bins).double()
    _count_classes(prob, counts[:-1])
    top = prob.amax(0)
    bins = _bins(top, num_bins)
    counts[-1, PIXELS] = torch.bincount(bins, minlength=num_bins).double()
    counts[-1, CONFIDENCE] = torch.bincount(bins, top.double(), minlength=num_bins)
    counts[-1, HITS] = torch.bincount(bins[_is_top(prob, label, own, top)], minlength=num_bins).double()
    return counts.cpu().numpy()


def _bins(confidence: Tensor, num_bins: int) -> Tensor:
    return (confidence * num_bins).long().clamp_(max=num_bins - 1)


def _count_classes(prob: Tensor, counts: Tensor) -> None:
    """(C, P) probabilities -> pixels and confidences of every class into its (C, 3, num_bins) counts.

    Most pixels are in a class's lowest bin, most classes in it altogether: that bin is the rest of all others.
    """
    num_bins = counts.shape[-1]
    edge = 1 / num_bins
    largest = prob.amax(1).tolist()
    for c, confidence in enumerate(prob):
        counts[c, PIXELS, 0], counts[c, CONFIDENCE, 0] = len(confidence), _exact_sum(confidence)
        if largest[c] >= edge:
            high = confidence[confidence >= edge]
            bins = _bins(high, num_bins)
            pixels = torch.bincount(bins, minlength=num_bins).double()
            mass = torch.bincount(bins, high.double(), minlength=num_bins)
            counts[c, PIXELS, 0] -= pixels.sum()
            counts[c, CONFIDENCE, 0] -= mass.sum()
            counts[c, PIXELS] += pixels
            counts[c, CONFIDENCE] += mass


def _exact_sum(values: Tensor) -> Tensor:
    return values.double().sum()


def _is_top(prob: Tensor, label: Tensor, own: Tensor, top: Tensor) -> Tensor:
    """(P,) bool: argmax is the label. Of equal largest probabilities argmax is the first."""
    return prob.argmax(0) == label


def calibration_scores(counts: np.ndarray, cases: Sequence[str] | None = None) -> dict[str, float]:
    """(N, C + 1, 3, num_bins) counts of the images -> ECED, ECEI, SCED, SCEI in percent.

    D: the counts summed over the images; I: the mean over the images that have pixels (with cases: within each case,
    then over cases). NaN without a pixel.
    """
    by_image = [_errors(part) for part in split_cases(counts, cases)[1]]
    ((ece_d, sce_d),) = _errors(counts.sum(0, keepdims=True))
    ece_i, sce_i = _mean_of_defined(np.array([_mean_of_defined(part) for part in by_image]))
    return {"ECED": float(ece_d), "ECEI": float(ece_i), "SCED": float(sce_d), "SCEI": float(sce_i)}


def _errors(counts: np.ndarray) -> np.ndarray:
    """(N, C + 1, 3, num_bins) -> (N, 2) ECE and SCE in percent; NaN for an image without pixels."""
    gaps = np.abs(counts[:, :, HITS] - counts[:, :, CONFIDENCE]).sum(-1)
    pixels = counts[:, -1, PIXELS].sum(-1)
    with np.errstate(invalid="ignore"):
        return 100 * np.stack([gaps[:, -1] / pixels, gaps[:, :-1].mean(1) / pixels], 1)


def _mean_of_defined(rows: np.ndarray) -> np.ndarray:
    """(N, 2) -> (2,) the mean over the rows that are no NaN."""
    rows = rows[~np.isnan(rows).any(1)]
    return rows.mean(0) if len(rows) else np.full(2, np.nan)
