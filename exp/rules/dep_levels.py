"""RankSEG-DEP where the dependence has no end: the rule of `exp.rules.dep` from counted levels, in a tenth of its time.

With theta -> inf the kernel is 1, and the expected size of a class given its pixel j depends on p_j alone:

    mu_j = q + sqrt(v_j) / p_j R,    q the sum of p, R that of sqrt(v), v = p (1 - p).

So does what a pixel adds to a set. A class is then its number of pixels of every level of p (those of
`rankseg_levelset`), and every sum over pixels one over 769 levels. The sets are the fixed points of `exp.rules.dep`,
from the same first sets; labels are those of its `assignment="first_order"`: the class of the largest growth.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rankseg_rma import (
    LEVEL_SAMPLES,
    Array,
    _check_inputs,
    _check_options,
    _default_device,
    _level_counts,
    _level_piece,
    _level_places,
    _levels,
    _on_cpu,
    _one_thread,
    _solve_levels,
)

ROUNDS = 20


@torch.no_grad()
def rankseg_dep_levels(
    prob: Array,
    opt_metric: str = "iou",
    allow_overlap: bool = False,
    in_batch: bool = True,
    *,
    pruning_prob: float = 0.1,
    valid: Any = None,
) -> Any:
    """(B, C, *spatial) probabilities -> (B, *spatial) int64 labels: `rankseg_dep` with theta without end.

    prob, in_batch, valid: as in `rankseg_rma`, errors included.
    opt_metric: "iou" (this project's derivation) or "dice" (the authors').
    allow_overlap: (B, C, *spatial) bool masks, the set of each class. With two classes the labels are the second one's.
    pruning_prob: a class whose largest probability in an image does not exceed it takes no part there; where none
        does, every pixel gets the class of the largest p_j / mu_j (Dice: p_j / (1 + mu_j)).

    Levels lie 0.8 to 1.6 % of p apart. For labels they are counted on a regular grid of 2^15 to 2^16 pixels of larger
    images, which may miss an object of few pixels; for masks on all pixels. Source: Wang & Dai, NeurIPS 2026, in that
    limit; docs/rule.md.
    """
    rule = _check_options(opt_metric, "rma_score", "max_score", "all", pruning_prob)
    as_numpy, maps, within = _check_inputs(prob, valid, in_batch, allow_overlap)
    binary = maps.shape[1] == 2 and not allow_overlap
    with _one_thread() if _on_cpu(maps) else nullcontext(), _default_device():
        out = _solve_levels(maps, within, rule, allow_overlap, binary, _find_masks, _find_labels)
    out = out.view(maps.shape if allow_overlap else (len(maps), *maps.shape[2:]))
    out = out if in_batch else out[0]
    return out.numpy() if as_numpy else out


def _find_masks(rows: Tensor, inside: Tensor | None, high: Tensor, metric: str, pruning_prob: float) -> Tensor:
    """(C, d) -> (C, d) bool, the set of each class."""
    own = _growth(_level_counts(rows, inside, rows.shape[1]), high, metric)[1] & (high > pruning_prob)[:, None]
    masks = torch.empty_like(rows, dtype=torch.bool)
    step = max(1, _level_piece(rows) // len(rows))
    for part, mask in zip(rows.split(step, 1), masks.split(step, 1)):
        mask.copy_(own.take(_level_places(part).long()))
    return masks


def _find_labels(
    rows: Tensor, inside: Tensor | None, high: Tensor, metric: str, pruning_prob: float, out: Tensor
) -> None:
    """(C, d) -> labels, written to (d,) `out`."""
    names = (high > pruning_prob).nonzero()[:, 0]
    if pruned := not len(names):  # all compete, with empty sets
        names = torch.arange(len(rows), device=rows.device)
    rows = rows[names]
    growth = _growth(_level_counts(rows, inside, LEVEL_SAMPLES), high[names], metric, pruned)[0].float()
    step = max(1, _level_piece(rows) // len(names))
    for part, label in zip(rows.split(step, 1), out.split(step)):
        torch.index_select(names, 0, growth.take(_level_places(part).long()).max(0).indices, out=label)


def _growth(counts: Tensor, high: Tensor, metric: str, pruned: bool = False) -> tuple[Tensor, Tensor]:
    """(K, LEVELS) pixels -> what one more of each level adds to the best set seen, and whether those are in it."""
    du = _levels(counts)[2]
    p, pixels = du.cumsum(1) - du / 2, counts.to(du.dtype)
    root = (p * (1 - p)).sqrt()
    grow = _grow_dice if metric == "dice" else _grow_iou
    if pruned:
        growth = grow(pixels, p, root, torch.zeros_like(pixels))[1]
        return growth, growth > 0
    start = (0.8 * high / (1 + high) if metric == "dice" else high / 2).to(p.dtype)
    own = p > start[:, None]
    best_value, best, best_own = torch.full_like(p[:, :1], -1), torch.zeros_like(p), own
    for _ in range(ROUNDS):
        value, growth = grow(pixels, p, root, pixels * own)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best, best_own = torch.where(better, growth, best), torch.where(better, own, best_own)
        following = growth > 0
        if torch.equal(following, own):
            break
        own = following
    return best, best_own


def _grow_dice(pixels: Tensor, p: Tensor, root: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """A set's pixels by level -> its F (K, 1), and p / (n + mu) - price (K, LEVELS)."""
    n = own.sum(1, keepdim=True)
    whole = n + (pixels * p).sum(1, keepdim=True) + root / p * (pixels * root).sum(1, keepdim=True)
    score = p / (whole + (n == 0))
    return (own * score).sum(1, keepdim=True), score - (own * score / whole).sum(1, keepdim=True)


def _grow_iou(pixels: Tensor, p: Tensor, root: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """As `_grow_dice`: p / (n + e) - (1 - p) price + sqrt(v) inner."""
    out = pixels - own
    whole = own.sum(1, keepdim=True) + (out * p).sum(1, keepdim=True) + root / p * (out * root).sum(1, keepdim=True)
    score = p / whole
    weight = own * score / whole
    growth = score - (1 - p) * weight.sum(1, keepdim=True) + root * (weight * root / p).sum(1, keepdim=True)
    return (own * score).sum(1, keepdim=True), growth
