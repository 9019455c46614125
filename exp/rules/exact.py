"""The Bayes decision for the foreground's Dice or IoU of an image, exactly: probabilities -> labels.

Pixels are Bernoulli(p_j), independent. Of all sets of n pixels, the n most probable have the largest expected Dice and
IoU (Dai & Li, JMLR 2023), so the best of d + 1 prefixes is the best of all sets. With G the size of the true set (a
Poisson-binomial variable), G_j that of it without pixel j, and G_out that of its part outside the prefix,

    E Dice(n) = sum over j <= n of 2 p_j E[1 / (n + 1 + G_j)]
    E IoU(n)  = (p_1 + ... + p_n) E[1 / (n + G_out)],

and the empty prefix scores P(G = 0), for an image without foreground that stays without scores 1 (exp/evaluation/
metrics.py).
"""

import numpy as np
import torch
from torch import Tensor

TAIL = 1e-18  # of the distribution of G: less likely sizes are left out


def rankseg_exact(prob: Tensor, *, opt_metric: str) -> Tensor:
    """(B, 2, H, W) -> (B, H, W): the foreground with the largest expected Dice or IoU of each image, in float64."""
    masks = [best_set(p.double().cpu().numpy().ravel(), opt_metric) for p in prob[:, 1]]
    return torch.from_numpy(np.stack(masks)).reshape(prob[:, 1].shape).long().to(prob.device)


def best_set(p: np.ndarray, metric: str) -> np.ndarray:
    """(d,) probabilities -> (d,) bool; the smallest of the best sets."""
    order = np.argsort(-p, kind="stable")
    size = int(expected_scores(p[order], metric).argmax())
    mask = np.zeros(len(p), bool)
    mask[order[:size]] = True
    return mask


def expected_scores(p: np.ndarray, metric: str) -> np.ndarray:
    """(d,) probabilities, in descending order for the best sets -> (d + 1,) expected score of each prefix."""
    p = p.astype(np.float64)
    return expected_dice(p) if metric == "dice" else expected_iou(p)


def expected_dice(p: np.ndarray) -> np.ndarray:
    """As expected_scores."""
    pmf = add_pixels(np.ones(1), p)
    kept = np.flatnonzero(pmf > TAIL)
    low, high = max(0, kept[0] - 1), kept[-1] + 1
    window = pmf[low:high]  # P(G = low), ...
    scores = np.empty(len(p) + 1)
    scores[0] = pmf[0]
    sums, step = np.zeros(len(window)), 2048  # sums[k]: over j <= n of p_j P(G_j = low + k)
    sizes = low + np.arange(len(window)) + 1.0
    for first in range(0, len(p), step):
        part = p[first : first + step]
        terms = leave_one_out(window, part) * part[:, None]
        terms[0] += sums
        terms.cumsum(0, out=terms)
        n = first + 1.0 + np.arange(len(part))
        scores[first + 1 : first + 1 + len(part)] = 2 * (terms / (n[:, None] + sizes)).sum(1)
        sums = terms[-1]
    return scores


def expected_iou(p: np.ndarray) -> np.ndarray:
    """As expected_scores."""
    scores, mass = np.empty(len(p) + 1), p.cumsum()
    pmf, low = np.ones(1), 0  # of G_out, from the empty remainder on
    for n in range(len(p), 0, -1):
        scores[n] = mass[n - 1] * (pmf / (n + low + np.arange(len(pmf)))).sum()
        pmf = add_pixels(pmf, p[n - 1 : n])
        kept = np.flatnonzero(pmf > TAIL)
        pmf, low = pmf[kept[0] : kept[-1] + 1], low + int(kept[0])
    scores[0] = pmf[0] if low == 0 else 0.0
    return scores


def add_pixels(pmf: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Distribution of a number of pixels, (k,), and (m,) further pixels -> that of their sum, (k + m,)."""
    total = np.zeros(len(pmf) + len(p))
    total[: len(pmf)] = pmf
    for size, q in enumerate(p, len(pmf)):
        moved = total[:size] * q
        total[:size] -= moved
        total[1 : size + 1] += moved
    return total


def leave_one_out(pmf: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(k,) distribution of G and (m,) of its pixels -> (m, k) that of G without each.

    P(G = k) = (1 - p) P(G_j = k) + p P(G_j = k - 1), solved upwards for p <= 1/2 and downwards above: errors shrink.
    """
    out = np.zeros((len(pmf) + 1, len(p)))  # out[k]: P(G_j = low + k - 1), 0 at the open end of either recurrence
    rare, q = p <= 0.5, p
    for k in range(len(pmf)):
        out[k + 1, rare] = (pmf[k] - q[rare] * out[k, rare]) / (1 - q[rare])
    for k in range(len(pmf) - 1, -1, -1):
        out[k, ~rare] = (pmf[k] - (1 - q[~rare]) * out[k + 1, ~rare]) / q[~rare]
    return out[1:].T.copy()
