"""Probabilities -> labels that maximise the expected per-image Dice or IoU (RankSEG-RMA): use it where argmax stood.

One self-contained file that needs torch alone. Sources: Wang & Dai, "RankSEG-RMA", NeurIPS 2025, arXiv 2510.15362;
Dai & Li, "RankSEG", JMLR 24 (2023).

The rule per class and image, with mu the sum of its probabilities p and a set S of n pixels that hold the mass s:

    Dice  2 s / (n + mu + 1)        IoU  s / (n + mu - s)

Both are ratios of sums over pixels, so the best set of all is a threshold set {p > t} at the fixed point
t = s / (n + mu + k), k = 1 for Dice and 0 for IoU. Iterating t climbs to it in a few passes (Dinkelbach's method):
nothing is sorted. Two strategies share that mathematics: `_solve_streamed` walks over cache-sized pieces and skips
what it can (large maps on a CPU); `_solve_batched` runs all classes at once without asking the device anything it
could do without (accelerators, small maps).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096  # pixels summed in working precision; block sums are added in float64, in one fixed order
SAMPLE = 2048  # pixels of the strided sample that starts the iteration on large maps
TINY = 2**13  # inputs of up to that many elements are sorted on a CPU
ROW = 2**10  # ... if a class has no more than that many of them
SMALL = 2**20  # inputs of up to that many elements are solved in one piece
TILE = 2**19  # pixels the CPU strategy works on at a time at most: 2 MB in float32
PASSES_PER_CHECK = 6  # passes an accelerator makes between two looks at convergence
PIECES = 32  # temporaries hold about a 32nd of the input's elements each
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Rule:
    """The keyword arguments of `rankseg_rma` that say how sets become labels."""

    metric: str
    method: str
    unassigned: str | int
    contested: str
    pruning_prob: float

    @property
    def offset(self) -> float:
        """k in t = s / (n + mu + k)."""
        return 1.0 if self.metric == "dice" else 0.0


@torch.no_grad()
def rankseg_rma(
    prob,
    opt_metric: str = "dice",
    allow_overlap: bool = False,
    in_batch: bool = True,
    return_tau: bool = False,
    to_nonoverlap_method: str = "rma_score",
    unassigned: str | int = "max_score",
    pruning_prob: float = 0.1,
    valid=None,
    *,
    contested: str = "holders",
    binary_threshold: bool = True,
):
    """(B, C, *spatial) probabilities -> (B, *spatial) int64 labels, what argmax(1) returns but for another aim.

    prob: float16, bfloat16, float32 or float64 in [0, 1], torch (any device and strides) or numpy, which is then
        returned too; (C, *spatial) with `in_batch=False`, which drops B from every result. Half precision is compared
        and summed in float32. The map is never modified and no gradient is recorded; the result depends neither on
        the number of threads nor on the memory layout.
    opt_metric: "dice" or "iou", the metric whose expectation every class's set of pixels maximises.
    allow_overlap: return these sets, (B, C, *spatial) bool, instead of labels; the only choice for one class.
    return_tau: return also the (B, C) int64 sizes of the sets.
    to_nonoverlap_method: the score by which classes compete for a pixel: "rma_score", the growth of the objective if
        the class got the pixel; "prob", its probability; "weight_prob", that over 1 + the pixels the class has alone.
    unassigned: pixels in no set get the unpruned class of the largest score ("max_score"; of all classes where an
        image has none), class 0 ("first", the paper's code), or the given int.
    pruning_prob: a class whose largest probability in an image does not exceed it gets no set there.
    valid: bool (B, *spatial); a pixel outside it counts in no sum and is in no set.
    contested: the classes that may win a pixel of several sets: its "holders", or "all" as in the paper's code, where
        a pruned class has score 0.
    binary_threshold: label two classes by the set of the second one alone, as the paper does; False treats them as
        any other number of classes.

    Raises ValueError or TypeError for a wrong rank, dtype, shape or name, an empty dimension, NaN, infinity and values
    outside [0, 1] (four units in the last place above 1 pass as the rounding of a softmax).

    How much RMA loses: in the exact expected Dice (RankDice, Poisson-binomial distribution), against the best of all
    sets, over 24 random maps for each number of pixels d, from confident to flat and with rare foreground:

        d        4        10       25       50       100      400
        mean     2.6e-3   4.8e-4   4.0e-4   9.0e-5   2.5e-5   3.4e-6
        worst    4.1e-2   6.0e-3   5.2e-3   1.4e-3   3.8e-4   4.6e-5

    It is at most 2 (n + mu + 1) / (n + mu)^2 for the n pixels of the best set: the approximation replaces 1 / (1 + n +
    G) by its value at the mean of G, a sum of independent indicators, whose variance is at most its mean.
    """
    rule = _check_options(opt_metric, to_nonoverlap_method, unassigned, contested, pruning_prob)
    as_numpy = _is_numpy(prob)
    prob, valid = _check_prob(prob, in_batch), _check_valid(valid, in_batch)
    if not in_batch:
        prob = prob.unsqueeze(0)
        valid = None if valid is None else valid.unsqueeze(0)
    batch, classes, *spatial = prob.shape
    if valid is not None and valid.shape != (batch, *spatial):
        expected = (batch, *spatial) if in_batch else tuple(spatial)
        got = tuple(valid.shape if in_batch else valid.shape[1:])
        raise ValueError(f"valid must have the shape {expected} of prob without its classes, got {got}")
    if classes == 1 and not allow_overlap:
        raise ValueError(
            "one class leaves no labels to choose from: expected two channels (background, foreground) or "
            "allow_overlap=True, which gives its mask"
        )
    binary = classes == 2 and binary_threshold and not allow_overlap
    if _on_cpu(prob) and prob.numel() > SMALL:
        out, tau = _solve_streamed(prob, valid, rule, allow_overlap, binary, return_tau)
    elif _on_cpu(prob):
        out, tau = _solve_small(prob, valid, rule, allow_overlap, binary, return_tau)
    else:
        out, tau = _solve_batched(prob, valid, rule, allow_overlap, binary)
    out = out.reshape(batch, classes, *spatial) if allow_overlap else out.reshape(batch, *spatial)
    if not in_batch:
        out, tau = out[0], tau[0] if return_tau else None
    if as_numpy:
        out, tau = out.numpy(), tau.numpy() if return_tau else None
    return (out, tau) if return_tau else out


# ---------------------------------------------------------------------------------------------------- checks


def _check_options(opt_metric, to_nonoverlap_method, unassigned, contested, pruning_prob) -> _Rule:
    """Keyword arguments -> the rule they describe, or an error that names the choices."""
    choices = {
        "opt_metric": (opt_metric, ("dice", "iou")),
        "to_nonoverlap_method": (to_nonoverlap_method, ("rma_score", "weight_prob", "prob")),
        "contested": (contested, ("holders", "all")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if isinstance(unassigned, bool) or not isinstance(unassigned, (str, int)):
        raise TypeError(f"unassigned must be 'max_score', 'first' or an int label, got {unassigned!r}")
    if isinstance(unassigned, str) and unassigned not in ("max_score", "first"):
        raise ValueError(f"unassigned must be 'max_score', 'first' or an int label, got {unassigned!r}")
    if isinstance(unassigned, int) and not -(2**63) <= unassigned < 2**63:
        raise ValueError(f"unassigned must fit in int64, got {unassigned}")
    if isinstance(pruning_prob, bool) or not isinstance(pruning_prob, (int, float)):
        raise TypeError(f"pruning_prob must be a number in [0, 1], got {pruning_prob!r}")
    if not 0 <= pruning_prob <= 1:
        raise ValueError(f"pruning_prob must lie in [0, 1], got {pruning_prob}")
    label = 0 if unassigned == "first" else unassigned
    return _Rule(opt_metric, to_nonoverlap_method, label, contested, float(pruning_prob))


def _is_numpy(x) -> bool:
    return "numpy" in sys.modules and isinstance(x, sys.modules["numpy"].ndarray)


def _to_tensor(x, name: str) -> Tensor:
    """A tensor, or a numpy array seen as one (negative strides are copied) -> tensor."""
    if isinstance(x, Tensor):
        return x
    if not _is_numpy(x):
        raise TypeError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {type(x).__name__}")
    if any(stride < 0 for stride in x.strides):
        x = x.copy()
    with warnings.catch_warnings():  # torch warns of read-only arrays; nothing here writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(x)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} is a numpy array of dtype {x.dtype} that torch cannot read") from error


def _check_prob(prob, in_batch: bool) -> Tensor:
    """Whatever the caller gave -> a tensor of the right rank, dtype and size."""
    prob = _to_tensor(prob, "prob")
    layout = "(B, C, *spatial)" if in_batch else "(C, *spatial) (in_batch=False)"
    if prob.dtype not in DTYPES:
        raise TypeError(f"prob must be float16, bfloat16, float32 or float64, got {prob.dtype}")
    if prob.layout != torch.strided:
        raise TypeError(f"prob must be a dense tensor, got layout {prob.layout}")
    if prob.dim() < (3 if in_batch else 2):
        raise ValueError(f"prob must be {layout} with at least one spatial dimension, got shape {tuple(prob.shape)}")
    if 0 in prob.shape:
        raise ValueError(f"prob must be {layout} without empty dimensions, got shape {tuple(prob.shape)}")
    return prob.detach()


def _check_valid(valid, in_batch: bool) -> Tensor | None:
    if valid is None:
        return None
    valid = _to_tensor(valid, "valid")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    return valid


def _check_range(low: float, high: float, dtype: torch.dtype) -> None:
    """Smallest and largest value of the map -> an error unless both are probabilities.

    Softmax rounds: up to four units in the last place above one are let through.
    """
    if not (low >= 0.0 and high <= 1.0 + 4 * torch.finfo(dtype).eps):  # false for NaN too
        raise ValueError(f"prob must hold finite probabilities in [0, 1], got values from {low} to {high}")


# --------------------------------------------------------------------------------------------- mathematics


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _wide(device: torch.device) -> torch.dtype:
    """The precision sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _working(dtype: torch.dtype) -> torch.dtype:
    """The precision a map is compared and summed in: its own, or float32 for half precision."""
    return dtype if dtype == torch.float64 else torch.float32


def _limit(rule: _Rule, prob: Tensor) -> Tensor:
    """pruning_prob in the precision of the map: a class whose maximum equals it there is pruned."""
    return torch.full((), rule.pruning_prob, dtype=prob.dtype, device=prob.device).to(_wide(prob.device))


def _block_sum(x: Tensor) -> Tensor:
    """(..., d) with unit stride along d -> (...) float64 sums over d, the same bits for any number of threads.

    Blocks are summed in the precision of x, and their sums in float64, again by blocks.
    """
    while True:
        blocks, rest = divmod(x.shape[-1], BLOCK)
        if not blocks:
            return x.sum(-1).to(_wide(x.device))
        sums = x[..., : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)).sum(-1)
        if rest:
            sums = torch.cat([sums, x[..., blocks * BLOCK :].sum(-1, keepdim=True)], -1)
        x = sums.to(_wide(x.device))


def _round_down(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Thresholds in float64 -> the largest values of `dtype` not above them, so that p > t decides the same."""
    low = t.to(dtype)
    return torch.where(low > t, torch.nextafter(low, torch.zeros_like(low)), low)


def _measure(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(..., d) contiguous rows and (...) thresholds -> size n and mass s of {p > t}, in float64."""
    cut = _round_down(t, x.dtype).unsqueeze(-1)
    inside = torch.gt(x, cut, out=torch.empty_like(x))  # 0.0 or 1.0: on a CPU far faster to write and sum than bool
    return _block_sum(inside), _block_sum(inside.mul_(x))


def _ratio(n: Tensor, s: Tensor, mu: Tensor, offset: float) -> Tensor:
    """The next threshold; 0 for a class without any mass."""
    return s / (n + mu + offset).clamp_min(1e-30)


def _start(rows: Tensor, valid: Tensor | None, high: Tensor, offset: float) -> Tensor:
    """(..., d) rows with (...) maxima -> (...) first thresholds, on large maps from a strided sample of the pixels."""
    t = 0.8 * high / (1 + high)  # no fixed point exceeds high / (1 + high)
    stride = rows.shape[-1] // SAMPLE | 1  # odd, or the sample would fall on few columns of the image
    if stride < 16:
        return t
    x = rows[..., ::stride].to(_working(rows.dtype))
    x = x.contiguous() if valid is None else x * valid[..., ::stride]
    mu = _block_sum(x)
    for _ in range(3):
        step = _ratio(*_measure(x, t), mu, offset / stride)
        t = torch.where(step > 0, step, t)
    return t


def _gain(p: Tensor, n: Tensor, s: Tensor, mu: Tensor, rule: _Rule) -> Tensor:
    """(B, C, K) probabilities and (B, C, 1) statistics of the uncontested sets -> (B, C, K) scores.

    The growth of the objective if the pixel joined, in a form that does not subtract two nearly equal ratios.
    """
    if rule.method == "prob":
        return p
    if rule.method == "weight_prob":
        return p / (1 + n)
    if rule.metric == "dice":
        size = n + mu + 1
        return (p - s / size) * (2 / (size + 1))
    size = n + mu - s
    ratio = torch.where(size > 0, s / size, 0.0)  # 0 / 0, the empty set of an impossible class, is 0
    return (p - ratio * (1 - p)) / (size + (1 - p)).clamp_min(1e-30)


def _pick(p: Tensor, own: Tensor, kept: Tensor, names: Tensor, stats: tuple[Tensor, ...], rule: _Rule) -> Tensor:
    """(B, C, K) probabilities and membership, (B, C) unpruned classes, (C,) labels, (n, s, mu) -> (B, K) labels."""
    score = _gain(p, *(value.unsqueeze(-1) for value in stats), rule)
    count = own.sum(1, keepdim=True)
    kept = kept.unsqueeze(-1)
    eligible = own
    if rule.contested == "all":
        score = torch.where(kept, score, 0.0)
        eligible = eligible | (count > 1)
    if rule.unassigned == "max_score":
        eligible = eligible | ((count == 0) & kept)
    label = names[score.masked_fill(~eligible, -torch.inf).max(1).indices]  # the first of equals; faster than argmax
    if rule.unassigned != "max_score":
        label = label.masked_fill(count.squeeze(1) == 0, rule.unassigned)
    return label


def _assign(pieces: Sequence, look_up: Callable, sets: tuple[Tensor, ...], kept: Tensor, names: Tensor, rule: _Rule):
    """Pieces of pixels and their (B, C, K) probabilities and membership, (B, C) n, s, mu -> pieces with (B, K) labels.

    One round takes the contested pixels out of n and s, a second one gives the labels.
    """
    n, s, mu = sets
    shared_n, shared_s = torch.zeros_like(n), torch.zeros_like(n, dtype=torch.int64)
    for piece in pieces:
        p, own = look_up(piece)
        shared = own & (own.sum(1, keepdim=True) > 1)
        shared_n += shared.sum(-1)
        # In multiples of 2^-32, whose sum has no rounding and therefore does not depend on the pieces.
        shared_s += (p.masked_fill(~shared, 0.0) * 2.0**32).round().to(torch.int64).sum(-1)
    n = n - shared_n
    s = torch.where(n > 0, (s - shared_s.to(s.dtype) / 2.0**32).clamp_min(0.0), 0.0)
    kept = kept | ~kept.any(1, keepdim=True)  # an image whose classes are all pruned still gets its labels
    for piece in pieces:
        if len(pieces) > 1:
            p, own = look_up(piece)
        yield piece, _pick(p, own, kept, names, (n, s, mu), rule)


# ------------------------------------------------------------------------------------- all classes at once


def _solve_small(prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, want_tau: bool):
    """As `_solve_batched` on a CPU, where it pays to look at the maxima first and leave the pruned classes out."""
    if binary and valid is None and not want_tau and prob.numel() <= TINY:
        return _tiny_foreground(prob, rule), None
    high = prob.flatten(2).amax(-1)
    _check_range(prob.amin().item(), high.amax().item(), prob.dtype)
    kept = high > _limit(rule, prob)
    if rule.contested == "all" or valid is not None or not kept.any(1).all():  # pruned classes may win a pixel
        return _solve_batched(prob, valid, rule, masks, binary)
    kept = kept.any(0)
    if binary and not want_tau:
        kept = torch.tensor([False, True])
    names = kept.nonzero().squeeze(1)
    part, sizes = _solve_batched(prob[:, names], valid, rule, masks or binary, False, names)
    tau = None
    if want_tau:
        tau = torch.zeros(prob.shape[:2], dtype=torch.int64)
        tau[:, names] = sizes
    if not (masks or binary):
        return part, tau
    out = torch.zeros(*prob.shape[:2], part.shape[-1], dtype=torch.bool)
    out[:, names] = part
    return (out[:, 1].long() if binary else out), tau


def _solve_batched(
    prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, names: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, C, *spatial), (C,) labels -> (B, d) labels or (B, C, d) masks, and the (B, C) sizes of the sets."""
    flat = prob.reshape(*prob.shape[:2], -1)
    valid = None if valid is None else valid.reshape(prob.shape[0], 1, -1)
    pieces = 1 if prob.numel() <= SMALL else PIECES
    if _on_cpu(prob) and prob.numel() <= TINY and flat.shape[-1] <= ROW:
        mu, high, t, n, s = _sorted_thresholds(flat, valid, rule)
    else:
        mu, high, t, n, s = _thresholds(flat, valid, rule, pieces)
    kept = high > _limit(rule, prob)
    cut = _round_down(t, _working(prob.dtype)).masked_fill(~kept, torch.inf).unsqueeze(-1)
    n, s = n.masked_fill(~kept, 0.0), s.masked_fill(~kept, 0.0)
    shape, dtype = (flat.shape, torch.bool) if masks else (flat[:, 0].shape, torch.int64)
    out = torch.empty(shape, dtype=dtype, device=prob.device)
    step = -(-flat.shape[-1] // pieces)
    spans = [slice(a, a + step) for a in range(0, flat.shape[-1], step)]

    def look_up(span: slice) -> tuple[Tensor, Tensor]:
        p = flat[..., span].to(cut.dtype)
        own = p > cut
        return p.to(s.dtype), own if valid is None else own & valid[..., span]

    if masks or binary:
        for span in spans:
            own = look_up(span)[1]
            out[..., span] = own if masks else own[:, 1]
    else:
        names = torch.arange(flat.shape[1], device=flat.device) if names is None else names
        for span, label in _assign(spans, look_up, (n, s, mu), kept, names, rule):
            out[..., span] = label
    return out, n.to(torch.int64)


def _sorted_thresholds(flat: Tensor, valid: Tensor | None, rule: _Rule) -> list[Tensor]:
    """As `_thresholds`, by a sort: on a tiny map that is fewer calls than the passes of the iteration."""
    x = flat.to(_working(flat.dtype)).contiguous()
    if valid is not None:
        x = x.masked_fill(~valid, 0.0)
    mu, high, t = _best_prefix(x, rule)
    inside = x > _round_down(t, x.dtype).unsqueeze(-1)
    return [mu, high, t, inside.sum(-1, dtype=torch.float64), (x * inside).sum(-1, dtype=torch.float64)]


def _best_prefix(x: Tensor, rule: _Rule) -> tuple[Tensor, Tensor, Tensor]:
    """(..., d) -> (...) mass, maximum and threshold t in float64: the largest s / (n + mu + k) over sorted prefixes."""
    ordered = x.sort(-1, descending=True).values
    s = ordered.cumsum(-1, dtype=torch.float64)
    mu = s[..., -1]
    sizes = torch.arange(1.0, x.shape[-1] + 1, dtype=torch.float64) + (mu.unsqueeze(-1) + rule.offset)
    return mu, ordered[..., 0].to(torch.float64), (s / sizes).amax(-1)


def _tiny_foreground(prob: Tensor, rule: _Rule) -> Tensor:
    """(B, 2, *spatial) on a CPU -> (B, d) labels by the set of the second class, in as few calls as possible."""
    low, high = prob.aminmax()
    _check_range(low.item(), high.item(), prob.dtype)
    x = prob[:, 1].flatten(1).to(torch.float64)  # compared there, p > t needs no rounding of t
    _, high, t = _best_prefix(x, rule)
    return (x > t.masked_fill(high <= _limit(rule, prob), torch.inf).unsqueeze(-1)).long()


def _thresholds(flat: Tensor, valid: Tensor | None, rule: _Rule, pieces: int) -> list[Tensor]:
    """(B, C, d) -> (B, C) mass and maximum of each class, its threshold t, and size and mass of {p > t}.

    The host waits for the device once per PASSES_PER_CHECK passes over the whole map: as a rule once in all.
    """
    batch, classes, _ = flat.shape
    images = -(-batch // pieces)
    step = -(-classes * batch // (images * pieces))
    firsts = [(b, c) for b in range(0, batch, images) for c in range(0, classes, step)]
    spans = [(slice(b, b + images), slice(c, c + step)) for b, c in firsts]
    found = [flat.new_zeros(batch, classes, dtype=_wide(flat.device)) for _ in range(5)]
    status: list[list[float]] = []
    while not status or not all(same for _, _, same in status):
        rounds = []
        for span in spans:
            x = flat[span].to(_working(flat.dtype))
            low, high = x.amin(), x.amax()
            if valid is not None:
                x = x.masked_fill(~valid[span[0]], 0.0)
            state, same = _refine(x.contiguous(), [value[span] for value in found] if status else None, rule.offset)
            for value, new in zip(found, state):
                value[span] = new
            rounds.append(torch.stack([low, high, same.to(low.dtype)]))
        status = torch.stack(rounds).tolist()
        for low, high, _ in status:
            _check_range(low, high, flat.dtype)
    return found


def _refine(x: Tensor, state: list[Tensor] | None, offset: float) -> tuple[list[Tensor], Tensor]:
    """(b, c, d) contiguous -> (b, c) mu, maximum, t, n, s after more passes, and whether all of them have settled."""
    if state is None:
        mu, high = _block_sum(x), x.amax(-1).to(_wide(x.device))
        n, s = _measure(x, _start(x, None, high, offset))
        t = _ratio(n, s, mu, offset)
    else:
        mu, high, t, n, s = state
    for _ in range(2 if _on_cpu(x) else PASSES_PER_CHECK):
        before = n
        n, s = _measure(x, t)
        t = torch.maximum(t, _ratio(n, s, mu, offset))  # from the second pass on it climbs, but for rounding
    return [mu, high, t, n, s], (n == before).all()


# ------------------------------------------------------------------------ one class at a time, out of the cache


class _Set(NamedTuple):
    """The set {p > cut} of one class: its size, its mass, the mass of the class; cut is inf where it is pruned."""

    n: float
    s: float
    mu: float
    cut: float


class _Stream:
    """Passes over single maps of `size` pixels on a CPU, in pieces that stay in the cache.

    `budget` is the size of the whole input as a number of float32 values; a buffer takes up to a 32nd of it.
    """

    def __init__(self, size: int, budget: int, dtype: torch.dtype) -> None:
        tile = max(BLOCK, min(TILE, budget // PIECES // BLOCK * BLOCK))
        self.inside = torch.empty(min(tile, size), dtype=dtype)
        self.copy = torch.empty_like(self.inside)
        self.parts = torch.empty(2, -(-size // BLOCK), dtype=dtype)
        self.spans = [slice(a, min(a + tile, size)) for a in range(0, size, tile)]

    def tiles(self, row: Tensor, valid: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """(d,) contiguous row -> its tiles in working precision, zero outside `valid`."""
        for span in self.spans:
            x = row[span]
            if valid is not None:
                x = self.copy[: len(x)].copy_(valid[span]).mul_(x)
            elif x.dtype != self.copy.dtype:
                x = self.copy[: len(x)].copy_(x)
            yield span, x

    def _sum(self, x: Tensor, span: slice, parts: Tensor) -> None:
        """Block sums of a tile into their places; `_block_sum` would give the same."""
        blocks, first = len(x) // BLOCK, span.start // BLOCK
        if blocks:
            torch.sum(x[: blocks * BLOCK].view(blocks, BLOCK), 1, out=parts[first : first + blocks])
        if len(x) % BLOCK:
            torch.sum(x[blocks * BLOCK :], 0, out=parts[first + blocks])

    def mass(self, row: Tensor, valid: Tensor | None) -> float:
        """Sum of a class map."""
        for span, x in self.tiles(row, valid):
            self._sum(x, span, self.parts[0])
        return _block_sum(self.parts[0].to(torch.float64)).item()

    def measure(self, row: Tensor, valid: Tensor | None, cut: float) -> list[float]:
        """Size and mass of {p > cut}."""
        for span, x in self.tiles(row, valid):
            inside = torch.gt(x, cut, out=self.inside[: len(x)])
            self._sum(inside, span, self.parts[0])
            self._sum(inside.mul_(x), span, self.parts[1])
        return _block_sum(self.parts.to(torch.float64)).tolist()

    def place(self, row: Tensor, valid: Tensor | None, cut: float, target: Tensor, value: int) -> float:
        """Write {p > cut} into `target`, added with weight `value` if that is not 0 -> its size."""
        for span, x in self.tiles(row, valid):
            inside = torch.gt(x, cut, out=self.inside[: len(x)])
            self._sum(inside, span, self.parts[0])
            if value:
                target[span].add_(inside, alpha=value)
            else:
                _copy(inside, target[span])
        return _block_sum(self.parts[0].to(torch.float64)).item()

    def solve(self, row: Tensor, valid: Tensor | None, high: float, offset: float, target: Tensor, value: int) -> _Set:
        """(d,) class map with maximum `high` -> its set, which is written into `target` as `place` does."""
        mu = self.mass(row, valid)
        t = _start(row, valid, torch.tensor(high, dtype=torch.float64), offset).item()
        n, s = self.measure(row, valid, self._cut(t))
        t = s / max(n + mu + offset, 1e-30)
        n, s = self.measure(row, valid, self._cut(t))
        t = max(t, s / max(n + mu + offset, 1e-30))  # from here on it climbs, but for rounding
        cut = self._cut(t)
        while self.place(row, valid, cut, target, value) != n:
            n, s = self.measure(row, valid, cut)
            t = max(t, s / max(n + mu + offset, 1e-30))
            if self._cut(t) == cut:
                break
            if value:
                self.place(row, valid, cut, target, -value)
            cut = self._cut(t)
        return _Set(n, s, mu, cut)

    def _cut(self, t: float) -> float:
        return _round_down(torch.tensor(t, dtype=torch.float64), self.inside.dtype).item()


def _solve_streamed(prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, want_tau: bool):
    """(B, C, *spatial) -> (B, d) labels or (B, C, d) masks, and the (B, C) sizes of the sets.

    For labels, the set of class c adds C + 1 + c to a code of -(C + 1) per pixel: below 0 the pixel is then in no
    set, up to C - 1 the code is its label, and from C on it is contested.
    """
    batch, classes, size = *prob.shape[:2], prob[0, 0].numel()
    stream = _Stream(size, prob.numel() * prob.element_size() // 4, _working(prob.dtype))
    limit = _limit(rule, prob).item()
    out = torch.zeros(batch, classes, size, dtype=torch.bool) if masks else torch.zeros(batch, size, dtype=torch.int64)
    code = None if masks or binary else torch.empty(size, dtype=stream.copy.dtype)
    tau = torch.zeros(batch, classes, dtype=torch.int64)
    for b in range(batch):
        inside = None if valid is None else valid[b].reshape(-1)
        sets: dict[int, _Set] = {}
        if code is not None:
            code.fill_(-(classes + 1))
        for c, row in _rows(prob[b], prob.numel() // 8):
            high = max(_bounds(piece)[1] for piece in row.split(4 * TILE))
            if inside is not None:
                high = max(x.amax().item() for _, x in stream.tiles(row, inside))
            if high <= limit or (binary and c == 0 and not want_tau):
                continue
            target = code if code is not None else out[b, c] if masks else out[b]
            sets[c] = stream.solve(row, inside, high, rule.offset, target, 0 if code is None else classes + 1 + c)
            tau[b, c] = int(sets[c].n)
            if binary and c == 0:  # solved for its size alone
                out[b].zero_()
        if code is not None:
            index = _undecided(code, classes, out[b], stream.spans)
            if len(index):
                _settle(prob[b], inside, index, _candidates(prob[b], inside, sets, rule, stream), rule, out[b])
    return out, tau


def _rows(prob: Tensor, spare: int) -> Iterator[tuple[int, Tensor]]:
    """(C, *spatial) -> its classes c and their contiguous (d,) maps; copies take up to `spare` elements at a time."""
    size = prob[0].numel()
    group = 1 if prob[0].is_contiguous() else max(1, min(16, spare // size))
    for first in range(0, len(prob), group):
        yield from enumerate(prob[first : first + group].reshape(-1, size).contiguous(), first)


def _bounds(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value of a contiguous piece, which are checked."""
    if x.dtype in (torch.float16, torch.bfloat16) and (bits := x.view(torch.int16)).amin() >= 0:
        low, high = 0.0, bits.amax().view(x.dtype).item()  # the bits of positive numbers are ordered as they are
    else:
        low, high = x.amin().item(), x.amax().item()
    _check_range(low, high, x.dtype)
    return low, high


def _copy(x: Tensor, target: Tensor) -> None:
    """Small whole numbers kept as floats -> bool or int64; to int64 by way of int32, for both steps are vectorised."""
    target.copy_(x.to(torch.int32) if target.dtype == torch.int64 else x)


def _undecided(code: Tensor, classes: int, out: Tensor, spans: list[slice]) -> Tensor:
    """(d,) codes, which are overwritten -> their labels, written to `out`, and the pixels that have none yet."""
    found = [torch.empty(0, dtype=torch.int64)]
    for span in spans:
        piece = code[span]
        _copy(piece, out[span])
        piece.sub_((classes - 1) / 2).abs_()
        if piece.amax() > classes / 2:
            found.append(_nonzero(piece.gt_(classes / 2)) + span.start)
    return torch.cat(found)


def _nonzero(flags: Tensor) -> Tensor:
    """(d,) flags, few of them set -> their indices; eight at a time are seen to be zero."""
    mask = torch.zeros(-(-len(flags) // 8) * 8, dtype=torch.bool)
    mask[: len(flags)].copy_(flags)
    index = (mask.view(torch.int64).nonzero() * 8 + torch.arange(8)).flatten()
    return index[mask[index]]


def _candidates(prob: Tensor, valid: Tensor | None, sets: dict, rule: _Rule, stream: _Stream) -> dict[int, _Set]:
    """The classes a pixel may get, with their sets."""
    if not sets:  # all pruned: all compete
        return {c: _Set(0.0, 0.0, stream.mass(row, valid), torch.inf) for c, row in _rows(prob, 0)}
    if rule.contested == "holders" or len(sets) == len(prob):
        return sets
    first = next(c for c in range(len(prob)) if c not in sets)  # of those that score 0, only the first can win
    return dict(sorted({**sets, first: _Set(0.0, 0.0, 0.0, torch.inf)}.items()))


def _settle(prob: Tensor, valid: Tensor | None, index: Tensor, sets: dict, rule: _Rule, out: Tensor) -> None:
    """Labels of the contested and unassigned pixels `index` of a (C, *spatial) map, written to (d,) `out`."""
    n, s, mu, cuts = torch.tensor(list(sets.values()), dtype=torch.float64).t().unsqueeze(1).unbind()
    cut = cuts.to(_working(prob.dtype)).unsqueeze(-1)

    def gather(index: Tensor) -> Tensor:
        return torch.stack([prob[c].reshape(-1).index_select(0, index) for c in sets])

    gathered = gather(index) if len(index) * len(sets) <= prob.numel() // 16 else None

    def look_up(piece: slice) -> tuple[Tensor, Tensor]:
        p = (gather(index[piece]) if gathered is None else gathered[:, piece]).to(cut.dtype).unsqueeze(0)
        own = p > cut
        return p.to(torch.float64), own if valid is None else own & valid[index[piece]]

    step = max(2**13, prob.numel() * prob.element_size() // 1024) // len(sets) + 1  # about 40 bytes per element
    pieces = [slice(a, a + step) for a in range(0, len(index), step)]
    for piece, label in _assign(pieces, look_up, (n, s, mu), cuts.isfinite(), torch.tensor(list(sets)), rule):
        out[index[piece]] = label[0]
