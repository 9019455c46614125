"""(1, C, H, W) probabilities and labels -> how far confidence is from accuracy: ECE and SCE. Counts first, scores once.

Expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017) of the top label, whose confidence is its
probability; static calibration error (Nixon et al., CVPR workshops 2019): the same of every class's probability over
all pixels, then the mean over the classes. Bins have equal widths; bin b holds the confidences in [b, b + 1)/num_bins,
the last one 1 too. Scores are in percent.

The static error of the paper's code, beside this one under names of its own (SCED_paper, SCEI_paper), is in per mille.
There a pixel is a hit of its class only if argmax decides for that, too; an image's mean is over the classes of its
label, to which ignored pixels add the last class; of two classes the foreground alone counts; an image without a
counted pixel has the error 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from exp.data.base import IGNORE_INDEX
from exp.evaluation.metrics import split_cases

PIXELS, CONFIDENCE, HITS, RIGHT = range(4)
NUM_BINS = 10
ENTROPY_STEP = 4
PIECE_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}  # probabilities taken at a time: they stay in a CPU's cache


def count_calibration(prob: Tensor, label: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """(1, C, H, W) probabilities that sum to 1, (H, W) labels in 0..C-1 or 255 -> (C + 1, 4, num_bins) float64.

    Per class, and in the last row of the top label (argmax): pixels, sum of confidences and hits by bin of the
    confidence, over the pixels that are not ignored; then, of a class, the hits that argmax decides right, and in the
    last row, in the first bin, how many pixels are ignored. Counts of several images add up. The pixels are taken in
    pieces, beside which next to no memory is needed. A GPU is not waited for.
    """
    num_classes = prob.shape[1]
    prob, label = prob[0].flatten(1), label.flatten()
    counts = torch.zeros(num_classes + 1, 4, num_bins, dtype=torch.float64, device=prob.device)
    size = max(1, PIECE_ELEMENTS[prob.device.type] // num_classes)
    count_piece = _count_piece if prob.device.type == "cpu" else _count_piece_on_gpu
    for start in range(0, len(label), size):
        piece = prob[:, start : start + size]
        if piece.stride(1) != 1:
            piece = piece.contiguous()  # sums along strides lose digits
        count_piece(piece if piece.dtype == torch.float64 else piece.float(), label[start : start + size], counts)
    return counts


def _count_piece_on_gpu(prob: Tensor, label: Tensor, counts: Tensor) -> None:
    """As _count_piece, bin by bin in sums whose sizes the CPU knows, so that it need not ask for any."""
    kept, num_bins = label != IGNORE_INDEX, counts.shape[-1]
    classes = torch.arange(len(prob), device=prob.device)[:, None]
    own, (top, best) = label == classes, prob.max(0)  # (C, P) one-hot labels
    for rows, confidence, hits in ((counts[:-1], prob, own), (counts[-1:], top[None], (best == label)[None])):
        bins = _bins(confidence, num_bins).masked_fill(~kept, num_bins)
        for b in range(num_bins):
            inside = bins == b
            for row, values in ((PIXELS, inside), (CONFIDENCE, confidence * inside), (HITS, hits & inside)):
                rows[:, row, b] += values.sum(1, dtype=torch.float64)
            if len(rows) > 1:
                rows[:, RIGHT, b] += (own & (best == classes) & inside).sum(1, dtype=torch.float64)
    counts[-1, RIGHT, 0] += (~kept).sum()


def _count_piece(prob: Tensor, label: Tensor, counts: Tensor) -> None:
    """(C, P) probabilities and (P,) labels -> added to the (C + 1, 4, num_bins) counts."""
    num_classes, num_bins = len(prob), counts.shape[-1]
    kept = label != IGNORE_INDEX
    num_kept = int(kept.sum())
    if num_kept < len(label):
        prob = prob * kept.to(prob.dtype)  # an ignored pixel adds to no sum, and to no bin but the lowest
    label = label.long()
    target = label.clamp(max=num_classes - 1)
    own, (top, best) = prob.gather(0, target[None])[0], prob.max(0)

    places, size = label * num_bins + _bins(own, num_bins), num_classes * num_bins  # label 255 lands behind
    counts[:-1, HITS] += torch.bincount(places, minlength=size)[:size].view(num_classes, num_bins)
    right = torch.bincount(places, (best == target).double(), minlength=size)[:size]
    counts[:-1, RIGHT] += right.view(num_classes, num_bins)
    counts[-1, RIGHT, 0] += len(label) - num_kept
    _count_classes(prob, num_kept, counts[:-1])
    top_bins = _bins(top, num_bins)
    state = (best == target).long() + 2 * (~kept).long()  # 0 wrong, 1 right, more: ignored
    by_state = torch.bincount(state * num_bins + top_bins, minlength=4 * num_bins).view(4, num_bins)
    counts[-1, PIXELS] += by_state[:2].sum(0)
    counts[-1, CONFIDENCE] += torch.bincount(top_bins, top.double(), minlength=num_bins)
    counts[-1, HITS] += by_state[1]


def _bins(confidence: Tensor, num_bins: int) -> Tensor:
    return (confidence * num_bins).long().clamp_(max=num_bins - 1)


def _count_classes(prob: Tensor, num_kept: int, counts: Tensor) -> None:
    """(C, P) probabilities, 0 where ignored -> pixels and confidences of every class added to (C, 4, num_bins).

    Most classes are in their lowest bin at all pixels of a piece: only the others are looked at pixel by pixel, and
    the lowest bin is what the higher ones leave.
    """
    num_classes, _, num_bins = counts.shape
    edge = 1 / num_bins
    present = (prob.amax(1) >= edge).nonzero()[:, 0]
    rows = prob.index_select(0, present)
    high = (rows >= edge).flatten().nonzero()[:, 0]
    values = rows.flatten().index_select(0, high)
    bins = present.index_select(0, high // prob.shape[1]) * num_bins + _bins(values, num_bins)
    pixels = torch.bincount(bins, minlength=num_classes * num_bins).view(num_classes, num_bins)
    mass = torch.bincount(bins, values.double(), minlength=num_classes * num_bins).view(num_classes, num_bins)
    counts[:, PIXELS] += pixels
    counts[:, CONFIDENCE] += mass
    counts[:, PIXELS, 0] += num_kept - pixels.sum(1)
    counts[:, CONFIDENCE, 0] += prob.sum(1).double() - mass.sum(1)


def calibration_scores(counts: np.ndarray, cases: Sequence[str] | None = None) -> dict[str, float]:
    """(N, C + 1, 4, num_bins) counts of the images -> ECED, ECEI, SCED, SCEI in percent, and the paper's SCE.

    D: the counts summed over the images; I: the mean over the images that have pixels (with cases: within each case,
    then over cases). With cases ECE3D: the counts summed within each case, then the mean over cases; so does the
    paper's code take the ECED of volumes. SCED_paper, SCEI_paper: in per mille, see above. NaN without a pixel.
    """
    parts = split_cases(counts, cases)[1]
    by_image = [_errors(part) for part in parts]
    whole = counts.sum(0, keepdims=True)
    ((ece_d, sce_d),) = _errors(whole)
    ece_i, sce_i = _mean_of_defined(np.array([_mean_of_defined(part) for part in by_image]))
    scores = {"ECED": ece_d, "ECEI": ece_i, "SCED": sce_d, "SCEI": sce_i}
    if cases is not None:
        scores["ECE3D"] = _mean_of_defined(np.concatenate([_errors(part.sum(0, keepdims=True)) for part in parts]))[0]
    scores["SCED_paper"] = _paper_errors(whole, of_data_set=True)[0]
    scores["SCEI_paper"] = np.mean([_paper_errors(part, of_data_set=False).mean() for part in parts])
    return {name: float(value) for name, value in scores.items()}


def calibration_unit(name: str) -> str:
    """A score of calibration_scores() -> its unit."""
    return "per mille" if name.endswith("_paper") else "%"


def _paper_errors(counts: np.ndarray, *, of_data_set: bool) -> np.ndarray:
    """(N, C + 1, 4, num_bins) -> (N,) the SCE of the paper's code in per mille; 0 without a counted pixel.

    of_data_set: the mean over all classes, not over those of the image's label.
    """
    gaps = np.abs(counts[:, :-1, RIGHT] - counts[:, :-1, CONFIDENCE]).sum(-1)  # (N, C)
    pixels, ignored = counts[:, -1, PIXELS].sum(-1), counts[:, -1, RIGHT].sum(-1)
    chosen = np.ones(gaps.shape, bool) if of_data_set else counts[:, :-1, HITS].sum(-1) > 0
    chosen[:, -1] |= ignored > 0
    if gaps.shape[1] == 2:
        chosen[:] = False, True
    return 1000 * (gaps * chosen).sum(1) / np.maximum(chosen.sum(1), 1) / np.maximum(pixels, 1)


def _errors(counts: np.ndarray) -> np.ndarray:
    """(N, C + 1, 4, num_bins) -> (N, 2) ECE and SCE in percent; NaN for an image without pixels."""
    gaps = np.abs(counts[:, :, HITS] - counts[:, :, CONFIDENCE]).sum(-1)
    pixels = counts[:, -1, PIXELS].sum(-1)
    with np.errstate(invalid="ignore"):
        return 100 * np.stack([gaps[:, -1] / pixels, gaps[:, :-1].mean(1) / pixels], 1)


def _mean_of_defined(rows: np.ndarray) -> np.ndarray:
    """(N, 2) -> (2,) the mean over the rows that are no NaN."""
    rows = rows[~np.isnan(rows).any(1)]
    return rows.mean(0) if len(rows) else np.full(2, np.nan)


def describe_bins(counts: np.ndarray) -> dict[str, list]:
    """(4, num_bins) counts of a class or the top label -> pixels, mean confidence and accuracy by bin, for JSON.

    Confidence and accuracy are None for a bin without pixels.
    """
    pixels = counts[PIXELS].astype(int).tolist()
    rows = {"pixels": pixels}
    for name, row in (("confidence", CONFIDENCE), ("accuracy", HITS)):
        rows[name] = [total / num if num else None for total, num in zip(counts[row].tolist(), pixels)]
    return rows


def mean_entropy(prob: Tensor, label: Tensor) -> Tensor:
    """(1, C, H, W) probabilities, (H, W) labels -> () mean entropy of the pixels that count, nats; NaN if none does.

    Of every fourth row and column: the mean over a sixteenth of the pixels, at a sixteenth of the cost.
    """
    prob, label = prob[0, :, ::ENTROPY_STEP, ::ENTROPY_STEP], label[::ENTROPY_STEP, ::ENTROPY_STEP]
    entropy, kept = torch.special.entr(prob).sum(0), label != IGNORE_INDEX
    if prob.device.type == "cpu":
        return entropy[kept].double().mean()
    return (entropy * kept).sum(dtype=torch.float64) / kept.sum()  # a GPU is not asked how many there are
