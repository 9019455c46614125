"""Probabilities -> labels that maximise the expected per-image Dice or IoU (RankSEG-RMA): use it where argmax stood.

One self-contained file that needs torch alone. Sources: Wang & Dai, "RankSEG-RMA", NeurIPS 2025, arXiv 2510.15362;
Dai & Li, "RankSEG", JMLR 24 (2023).

The rule per class and image, with mu the sum of its probabilities p and a set S of n pixels that hold the mass s:

    Dice  2 s / (n + mu + 1)        IoU  s / (n + mu - s)

Both are ratios of sums over pixels, so the best set of all is a threshold set {p > t} at the fixed point
t = s / (n + mu + k), k = 1 for Dice and 0 for IoU. Iterating t climbs to it in a few passes (Dinkelbach's method):
nothing is sorted. Three strategies share that mathematics: `_solve_streamed` walks over cache-sized pieces and skips
what it can, on one thread (CPU); `_solve_fused` does so in kernels of its own (CUDA, where Triton is installed, as it
is with PyTorch on Linux); `_solve_batched` runs all classes at once without asking the device anything it could do
without (other accelerators, small maps). `rankseg_levelset` is a rule of its own, with kernels of its own beside those.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import triton.language as tl

Array = TypeVar("Array", bound="Tensor | np.ndarray[Any, Any]")  # a result is of the kind that the map is of
Found = tuple[Tensor, "Tensor | None"]  # labels or masks, and sizes of sets

BLOCK = 4096  # pixels summed in working precision; block sums are added in float64, in one fixed order
SAMPLE = 2048  # pixels of the strided sample that starts the iteration on large maps
TINY = 2**13  # inputs of up to that many elements are sorted on a CPU
ROW = 2**10  # ... if a class has no more than that many of them
SMALL = 2**20  # inputs of up to that many elements are solved in one piece
LONG = 2**14  # ... on a CPU, of up to a 64th of that many if a class has so many of them
TILE = 2**17  # pixels the CPU strategy works on at a time at most: 512 KB in float32
PASSES_PER_CHECK = 6  # passes an accelerator makes between two looks at convergence
PIECES = 32  # temporaries hold about a 32nd of the input's elements each
# On a CUDA device without Triton the launches for many small pieces would take longer than all else. A temporary of the
# passes holds 2^24 elements there and one of the labels 2^22, or a 32nd of a larger input: a few 100 MB, or half of it.
CUDA_PASSES, CUDA_LABELS = 2**24, 2**22
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


@overload
def rankseg_rma(
    prob: Array,
    opt_metric: str = ...,
    allow_overlap: bool = ...,
    in_batch: bool = ...,
    return_tau: Literal[False] = ...,
    to_nonoverlap_method: str = ...,
    unassigned: str | int = ...,
    pruning_prob: float = ...,
    valid: Tensor | np.ndarray[Any, Any] | None = ...,
    *,
    contested: str = ...,
    binary_threshold: bool = ...,
) -> Array: ...
@overload
def rankseg_rma(
    prob: Array,
    opt_metric: str = ...,
    allow_overlap: bool = ...,
    in_batch: bool = ...,
    *,
    return_tau: Literal[True],
    to_nonoverlap_method: str = ...,
    unassigned: str | int = ...,
    pruning_prob: float = ...,
    valid: Tensor | np.ndarray[Any, Any] | None = ...,
    contested: str = ...,
    binary_threshold: bool = ...,
) -> tuple[Array, Array]: ...
@torch.no_grad()
def rankseg_rma(
    prob: Any,
    opt_metric: str = "dice",
    allow_overlap: bool = False,
    in_batch: bool = True,
    return_tau: bool = False,
    to_nonoverlap_method: str = "rma_score",
    unassigned: str | int = "max_score",
    pruning_prob: float = 0.1,
    valid: Any = None,
    *,
    contested: str = "holders",
    binary_threshold: bool = True,
) -> Any:
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
        a pruned class has no pixels: its growth counts as 0, and both other scores are its probability.
    binary_threshold: label two classes by the set of the second one alone, as the paper does; False treats them as
        any other number of classes.

    Raises ValueError or TypeError for a wrong rank, dtype, shape or name, an empty dimension, NaN, infinity and values
    outside [0, 1] (four units in the last place above 1 pass as the rounding of a softmax); on the CPU also for a
    (C, H, W) map without `in_batch=False`, which its sums tell from (B, C, pixels).

    How much RMA loses: in the exact expected Dice (RankDice, Poisson-binomial distribution), against the best of all
    sets, over 24 random maps for each number of pixels d, from confident to flat and with rare foreground:

        d        4        10       25       50       100      400
        mean     2.6e-3   4.8e-4   4.0e-4   9.0e-5   2.5e-5   3.4e-6
        worst    4.1e-2   6.0e-3   5.2e-3   1.4e-3   3.8e-4   4.6e-5

    It is at most 2 (n + mu + 1) / (n + mu)^2 for the n pixels of the best set: the approximation replaces 1 / (1 + n +
    G) by its value at the mean of G, a sum of independent indicators, whose variance is at most its mean.
    """
    rule = _check_options(opt_metric, to_nonoverlap_method, unassigned, contested, pruning_prob)
    as_numpy, prob, valid = _check_inputs(prob, valid, in_batch, allow_overlap)
    batch, classes, *spatial = prob.shape
    binary = classes == 2 and binary_threshold and not allow_overlap
    if _on_cpu(prob):
        large = prob.numel() > (SMALL if prob[0, 0].numel() < LONG else SMALL // 64)
        solve = _solve_streamed if large else _solve_small
        with _one_thread(), _default_device():
            out, tau = solve(prob, valid, rule, allow_overlap, binary, return_tau)
    elif (found := _try_fused(_Fused, prob, valid, rule, allow_overlap, binary, return_tau)) is not None:
        out, tau = found
    else:
        out, tau = _solve_batched(prob, valid, rule, allow_overlap, binary)
    out = out.reshape(batch, classes, *spatial) if allow_overlap else out.reshape(batch, *spatial)
    results: tuple[Any, ...] = (out, tau) if return_tau else (out,)
    if not in_batch:
        results = tuple(x[0] for x in results)
    if as_numpy:
        results = tuple(x.numpy() for x in results)
    return results if return_tau else results[0]


# ---------------------------------------------------------------------------------------------------- checks


def _check_options(
    opt_metric: str, to_nonoverlap_method: str, unassigned: str | int, contested: str, pruning_prob: float
) -> _Rule:
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


def _check_inputs(prob: Any, valid: Any, in_batch: bool, allow_overlap: bool) -> tuple[bool, Tensor, Tensor | None]:
    """What the caller gave -> whether it was numpy, (B, C, *spatial), (B, *spatial) or None."""
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
    if prob.dim() == 3 and not allow_overlap and _on_cpu(prob) and _lacks_batch(prob):
        raise ValueError(
            f"prob of shape {tuple(prob.shape)} sums to 1 over its first axis, and not over its second, that of the "
            "classes: expected in_batch=False for a single (C, H, W) map, or (B, C, pixels, 1) for a batch of such maps"
        )
    return as_numpy, prob, valid


def _lacks_batch(prob: Tensor) -> bool:
    """Whether (B, C, d) is rather an unbatched (C, H, W) map, by what some pixels sum to; maps of few pixels pass."""
    if min(prob.shape[1:]) < 8 or torch.compiler.is_compiling():
        return False

    def is_one(total: Tensor) -> bool:
        return all(abs(value - 1) < 0.02 for value in total.tolist())  # bfloat16 has 8 bits

    if is_one(prob[0, :, :1].sum(0)) or not is_one(prob[:, 0, :1].sum(0)):
        return False  # which most calls end with, after some microseconds
    rows, columns = (size // 4 for size in prob.shape[1:])
    return is_one(prob[:, ::rows, ::columns].sum(0).flatten())


def _is_numpy(x: object) -> bool:
    return "numpy" in sys.modules and isinstance(x, sys.modules["numpy"].ndarray)


def _to_tensor(x: Any, name: str) -> Tensor:
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


def _check_prob(given: Any, in_batch: bool) -> Tensor:
    """Whatever the caller gave -> a tensor of the right rank, dtype and size."""
    prob = _to_tensor(given, "prob")
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


def _check_valid(given: Any, in_batch: bool) -> Tensor | None:
    if given is None:
        return None
    valid = _to_tensor(given, "valid")
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps what the calling thread computes on a CPU to itself.

    PyTorch shares an operation of 2^15 elements or more out to its threads. Here one takes microseconds; waiting for
    the others at its end takes milliseconds where the cores are busy, and a call has hundreds. The setting is the
    calling thread's own (as OpenMP has it); a thread that uses PyTorch for the first time meanwhile inherits it.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _default_device() -> AbstractContextManager[object]:
    """Inside, a tensor that no device is named for is the CPU's, whatever the caller's default is."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _wide(device: torch.device) -> torch.dtype:
    """The precision sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _working(dtype: torch.dtype) -> torch.dtype:
    """The precision a map is compared and summed in: its own, or float32 for half precision."""
    return dtype if dtype == torch.float64 else torch.float32


def _pieces(prob: Tensor, cuda: int) -> int:
    """Number of pieces that a map is worked on in; on a CUDA device they have `cuda` elements at least."""
    if prob.numel() <= SMALL:
        return 1
    return max(1, min(PIECES, prob.numel() // cuda)) if prob.device.type == "cuda" else PIECES


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


def _stride(size: int) -> int:
    """From one pixel to the next of the sample that starts the iteration; odd, or it would fall on few columns."""
    return size // SAMPLE | 1


def _start(x: Tensor, high: Tensor, offset: float) -> Tensor:
    """(..., d) contiguous rows with (...) maxima -> (...) first thresholds, on large maps from the sample."""
    t = 0.8 * high / (1 + high)  # no fixed point exceeds high / (1 + high)
    stride = _stride(x.shape[-1])
    if stride < 16:
        return t
    x = x[..., ::stride].contiguous()
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
        return (p - s / size).mul_(2 / (size + 1))
    size = n + mu - s
    ratio = torch.where(size > 0, s / size, 0.0)  # 0 / 0, the empty set of an impossible class, is 0
    return (p - ratio * (1 - p)) / (size + (1 - p)).clamp_min(1e-30)


def _pick(
    p: Tensor, own: Tensor, kept: Tensor, names: Tensor, stats: tuple[Tensor, Tensor, Tensor], rule: _Rule
) -> Tensor:
    """(B, C, K) probabilities and membership, (B, C) unpruned classes, (C,) labels, (n, s, mu) -> (B, K) labels."""
    n, s, mu = (value.unsqueeze(-1) for value in stats)
    score = _gain(p.to(n.dtype), n, s, mu, rule)
    count = own.sum(1, keepdim=True)
    kept = kept.unsqueeze(-1).to(own.dtype)
    eligible = own  # where it is above 0; bool and `where` are several times slower on a CPU
    if rule.contested == "all":
        score = score * kept if rule.method == "rma_score" else score
        eligible = eligible + torch.gt(count, 1, out=torch.empty_like(count))
    if rule.unassigned == "max_score":
        eligible = eligible + kept * torch.eq(count, 0, out=torch.empty_like(count))
    others = torch.eq(eligible, 0, out=torch.empty_like(eligible)).to(score.dtype)
    score = torch.sub(score, others, alpha=1e37, out=others)  # ONNX graphs hold alpha in single precision
    label = names.take(_first_largest(score))
    if not isinstance(rule.unassigned, str):
        label = label.masked_fill(count.squeeze(1) == 0, rule.unassigned)
    return label


def _first_largest(score: Tensor) -> Tensor:
    """(B, C, K), which is overwritten -> (B, K) int64: as argmax(1) the first of equals, but vectorised on a CPU."""
    rank = torch.arange(score.shape[1], 0, -1, dtype=score.dtype, device=score.device).unsqueeze(1)
    largest = torch.eq(score, score.amax(1, keepdim=True), out=score)
    return score.shape[1] - largest.mul_(rank).amax(1).to(torch.int64)


def _assign(
    pieces: Sequence[slice],
    look_up: Callable[[slice], tuple[Tensor, Tensor]],
    sets: tuple[Tensor, Tensor, Tensor],
    kept: Tensor,
    names: Tensor,
    rule: _Rule,
) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of pixels and their (B, C, K) probabilities and membership, (B, C) n, s, mu -> pieces with (B, K) labels.

    Membership is 0.0 or 1.0. One round takes the contested pixels out of n and s, a second one gives the labels.
    """
    n, s, mu = sets
    shared_n, shared_s = torch.zeros_like(n), torch.zeros_like(n, dtype=torch.int64)
    for piece in pieces:
        p, own = look_up(piece)
        count = own.sum(1, keepdim=True)
        shared = own * torch.gt(count, 1, out=count)
        shared_n += shared.sum(-1)
        # In multiples of 2^-32, whose sum has no rounding and therefore does not depend on the pieces.
        shared_s += shared.mul_(p).mul_(2.0**32).round_().to(torch.int64).sum(-1)
    n = n - shared_n
    s = torch.where(n > 0, (s - shared_s.to(s.dtype) / 2.0**32).clamp_min(0.0), 0.0)
    kept = kept | ~kept.any(1, keepdim=True)  # an image whose classes are all pruned still gets its labels
    for piece in pieces:
        if len(pieces) > 1:
            p, own = look_up(piece)
        yield piece, _pick(p, own, kept, names, (n, s, mu), rule)


# ------------------------------------------------------------------------------------- all classes at once


def _solve_small(prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, want_tau: bool) -> Found:
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
    if _on_cpu(prob) and prob.numel() <= TINY and flat.shape[-1] <= ROW:
        mu, high, t, n, s = _sorted_thresholds(flat, valid, rule)
    else:
        mu, high, t, n, s = _thresholds(flat, valid, rule, _pieces(prob, CUDA_PASSES))
    kept = high > _limit(rule, prob)
    cut = _round_down(t, _working(prob.dtype)).masked_fill(~kept, torch.inf).unsqueeze(-1)
    n, s = n.masked_fill(~kept, 0.0), s.masked_fill(~kept, 0.0)
    shape, dtype = (flat.shape, torch.bool) if masks else (flat[:, 0].shape, torch.int64)
    out = torch.empty(shape, dtype=dtype, device=prob.device)
    step = -(-flat.shape[-1] // _pieces(prob, CUDA_LABELS))
    spans = [slice(a, a + step) for a in range(0, flat.shape[-1], step)]

    def look_up(span: slice) -> tuple[Tensor, Tensor]:
        p = flat[..., span].to(cut.dtype)
        own = torch.gt(p, cut, out=torch.empty_like(p))
        return p, own if valid is None else own * valid[..., span]

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
        for lowest, highest, _ in status:
            _check_range(lowest, highest, flat.dtype)
    return found


def _refine(x: Tensor, state: list[Tensor] | None, offset: float) -> tuple[list[Tensor], Tensor]:
    """(b, c, d) contiguous -> (b, c) mu, maximum, t, n, s after more passes, and whether all of them have settled."""
    if state is None:
        mu, high = _block_sum(x), x.amax(-1).to(_wide(x.device))
        n, s = _measure(x, _start(x, high, offset))
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
    """Passes over one class map at a time, on a CPU, in few and long steps: a call costs as much as 30,000 pixels."""

    def __init__(self, prob: Tensor, valid: Tensor | None, spare: Tensor) -> None:
        """A (B, C, *spatial) map, (d,) bool: the pixels that count, and (d,) or (0,) memory that may be used."""
        self.dtype, size = _working(prob.dtype), prob[0, 0].numel()
        self.valid, self.copies = valid, valid is not None or prob.dtype != self.dtype
        # A 14th of the input for a buffer, or a 28th for each of two.
        share = 28 if self.copies and not len(spare) else 14
        budget = prob.numel() * prob.element_size() // (torch.finfo(self.dtype).bits // 8 * share)
        self.step = max(1, min(TILE, size, budget) // BLOCK) * BLOCK  # pixels of a tile
        self.inside = torch.empty(self.step, dtype=self.dtype)
        self.copy = spare if len(spare) or not self.copies else torch.empty(self.step, dtype=self.dtype)
        self.cut, self.zero = torch.zeros(2, dtype=self.dtype).unbind()
        self.row, self.ready = self.inside, False  # the map of the class, and whether it is as `tiles` gives it
        self.mu, self.highs = 0.0, [0.0]  # mass of the class, and the largest value of each of its blocks

    def tiles(self, first: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """Pixels first..end-1 of the class map, tile by tile, in working precision and zero outside `valid`."""
        for a in range(first, end, self.step):
            span = slice(a, min(a + self.step, end))
            x = self.row[span]
            yield span, x if self.ready else self._read(x, span)

    def _read(self, x: Tensor, span: slice) -> Tensor:
        to = self.copy[: len(x)]
        return to.copy_(x) if self.valid is None else torch.mul(x, self.valid[span], out=to)

    def load(self, row: Tensor) -> float:
        """The (d,) map of a class, whose turn it is -> its largest value."""
        self.row, self.ready = row, not self.copies
        if self.copies and len(self.copy) >= len(row):
            self.row, self.ready = self._read(row, slice(None)), True
        self.mu, self.highs = 0.0, []
        for _, x in [(None, self.row)] if self.ready else self.tiles(0, len(row)):
            self.mu += x.sum().item()
            whole = len(x) // BLOCK * BLOCK
            self.highs += x[:whole].view(-1, BLOCK).amax(1).tolist()
            if whole < len(x):
                self.highs.append(x[whole:].amax().item())
        return max(self.highs)

    def members(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tiles, and where in them p > `cut`: 1.0 or 0.0, far faster to write and sum than bool on a CPU.

        Blocks before the first and after the last with such a pixel are left out.
        """
        cut = self.cut.item()
        first = next((k for k, high in enumerate(self.highs) if high > cut), len(self.highs))
        end = next((k for k in range(len(self.highs), first, -1) if self.highs[k - 1] > cut), first)
        for span, x in self.tiles(first * BLOCK, min(end * BLOCK, len(self.row))):
            yield span, x, torch.gt(x, self.cut, out=self.inside[: len(x)])

    def measure(self) -> tuple[float, float]:
        """Size and mass of {p > cut}."""
        n = s = 0.0
        for _, x, inside in self.members():
            n += inside.sum().item()
            s += inside.mul_(x).sum().item()
        return n, s

    def place(self, target: Tensor, code: int) -> float:
        """Write {p > cut} into `target`, added with weight `code` if that is not 0 -> its size."""
        n = 0.0
        for span, _, inside in self.members():
            n += inside.sum().item()
            if code:
                target[span].add_(inside, alpha=code)
            else:
                _copy(inside, target[span])
        return n

    def solve(self, offset: float, target: Tensor, code: int) -> _Set:
        """The set of the class, which is written into `target` as `place` does."""
        high = max(self.highs)
        # No fixed point exceeds high / (1 + high). A sample, as `_start` takes it, costs as much as the pass it saves.
        self._cut_at(0.95 * high / (1 + high))
        n, s = self.measure()
        t, settled = s / max(n + self.mu + offset, 1e-30), False
        self._cut_at(t)
        while not settled:
            n, s = self.measure()
            before, t = t, max(t, s / max(n + self.mu + offset, 1e-30))  # it climbs, but for rounding
            self._cut_at(t)
            if (t - before) * len(self.row) < 2:  # so close that as a rule no pixel lies between
                settled = self.place(target, code) == n
                if not settled and code:
                    self.place(target, -code)
                elif not settled:
                    target.zero_()
        return _Set(n, s, self.mu, self.cut.item())

    def _cut_at(self, t: float) -> None:
        """`cut` becomes what `_round_down` gives."""
        if self.cut.fill_(t).item() > t:
            torch.nextafter(self.cut, self.zero, out=self.cut)


def _solve_streamed(
    prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, want_tau: bool
) -> Found:
    """(B, C, *spatial) -> (B, d) labels or (B, C, d) masks, and the (B, C) sizes of the sets.

    For labels, a code per pixel starts as -(C + 1) - C // 2, and the set of class c adds C + 1 + c: the pixel is then
    in no set or in several where the code is farther than C / 2 from 0; else it is its label less C // 2.
    """
    batch, classes, size = *prob.shape[:2], prob[0, 0].numel()
    limit = _limit(rule, prob).item()
    out = torch.zeros(batch, classes, size, dtype=torch.bool) if masks else torch.empty(batch, size, dtype=torch.int64)
    if binary:
        out.zero_()
    tau = torch.zeros(batch, classes, dtype=torch.int64)
    for b in range(batch):
        seen = None if valid is None else valid[b].reshape(-1)
        sets: dict[int, _Set] = {}
        codes, spare = None, torch.empty(0)
        if not (masks or binary):  # in the memory of the labels, at its end: labels replace codes from the front
            spare, codes = out[b].view(_working(prob.dtype)).tensor_split([-size])
            codes.fill_(-(classes + 1) - classes // 2)
        stream = _Stream(prob, seen, spare)
        for c, row in _rows(prob[b], prob.numel() // 8):
            if _high(row) <= limit or (binary and c == 0 and not want_tau):
                continue
            if stream.load(row) <= limit:  # inside `valid`
                continue
            target = codes if codes is not None else out[b, c] if masks else out[b]
            sets[c] = stream.solve(rule.offset, target, 0 if codes is None else classes + 1 + c)
            if binary and c == 0:  # solved for its size alone
                out[b].zero_()
        sizes = {c: int(found.n) for c, found in sets.items()}
        if codes is not None:
            sets = _candidates(prob[b], sets, rule, stream)
            index = _label(codes, classes, stream.inside, out[b])
        del stream  # its buffers, too
        if want_tau:
            tau[b, list(sizes)] = torch.tensor(list(sizes.values()), dtype=torch.int64)
        if codes is not None and len(index):
            _settle(prob[b], index, sets, rule, seen, out[b])
    return out, tau


def _rows(prob: Tensor, spare: int) -> Iterator[tuple[int, Tensor]]:
    """(C, *spatial) -> its classes c and their contiguous (d,) maps; copies take up to `spare` elements at a time."""
    size = prob[0].numel()
    whole = prob[0].is_contiguous()
    group = len(prob) if whole else max(1, min(16, spare // size))
    for first in range(0, len(prob), group):
        rows = prob[first : first + group].reshape(-1, size)
        yield from enumerate(rows if whole else rows.contiguous(), first)


def _high(row: Tensor) -> float:
    """Largest value of a contiguous class map; ValueError if it holds what is no probability."""
    # The bits of positive numbers are ordered as they are; as whole numbers, those of negative ones are negative.
    lowest, highest = torch.aminmax(row.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[row.element_size()]))
    top = highest.view(row.dtype).item()
    if lowest.item() < 0 or not top <= 1.0:
        top = row.amax().item()
        _check_range(row.amin().item(), top, row.dtype)
    return top


def _copy(x: Tensor, target: Tensor) -> None:
    """Small whole numbers kept as floats -> bool or int64; to int64 by way of int32, for both steps are vectorised."""
    target.copy_(x.to(torch.int32) if target.dtype == torch.int64 else x)


def _label(codes: Tensor, classes: int, buffer: Tensor, out: Tensor) -> Tensor:
    """(d,) codes, which are overwritten -> their labels, written to `out`, and the pixels that have none yet."""
    found, numbers = [], buffer.view(torch.int32)  # by way of these to int64, for both steps are vectorised
    flags = torch.zeros(-(-len(buffer) // 8) * 8, dtype=torch.bool)
    for start, piece in zip(range(0, len(codes), len(buffer)), codes.split(len(buffer))):
        size = len(piece)
        flags[:size].copy_(torch.hardshrink(piece, classes / 2 + 0.25, out=buffer[:size]))
        flags[size:].zero_()
        found.append(_nonzero(flags) + start)
        out[start : start + size].copy_(numbers[:size].copy_(piece.add_(classes // 2)))
    return torch.cat(found)


def _nonzero(flags: Tensor) -> Tensor:
    """(8 m,) bool, few of them set -> their indices; eight at a time are seen to be zero."""
    words = flags.view(torch.int64).nonzero().squeeze(1)
    word, place = flags.view(-1, 8).index_select(0, words).nonzero().unbind(1)
    return words.take(word).mul_(8).add_(place)


def _candidates(prob: Tensor, sets: dict[int, _Set], rule: _Rule, stream: _Stream) -> dict[int, _Set]:
    """The classes a pixel may get, with their sets."""
    if not sets:  # all pruned: all compete
        for c, row in _rows(prob, 0):
            stream.load(row)
            sets[c] = _Set(0.0, 0.0, stream.mu, torch.inf)
        return sets
    if rule.contested == "holders":
        return sets
    pruned = [c for c in range(len(prob)) if c not in sets]
    if rule.method == "rma_score":
        pruned = pruned[:1]  # of those that score 0, only the first can win
    return dict(sorted({**sets, **dict.fromkeys(pruned, _Set(0.0, 0.0, 0.0, torch.inf))}.items()))


def _settle(prob: Tensor, index: Tensor, sets: dict[int, _Set], rule: _Rule, valid: Tensor | None, out: Tensor) -> None:
    """Labels of the contested and unassigned pixels `index` of a (C, *spatial) map, written to (d,) `out`."""
    n, s, mu, cuts = torch.tensor(list(sets.values()), dtype=torch.float64).t().unsqueeze(1).unbind()
    cut = cuts.to(_working(prob.dtype)).unsqueeze(-1)

    def gather(index: Tensor) -> Tensor:
        p = prob.new_empty(len(sets), len(index))
        for c, row in zip(sets, p):
            torch.index_select(prob[c].reshape(-1), 0, index, out=row)
        return p

    gathered = gather(index) if len(index) * len(sets) <= prob.numel() // 32 else None

    def look_up(piece: slice) -> tuple[Tensor, Tensor]:
        p = (gather(index[piece]) if gathered is None else gathered[:, piece]).to(cut.dtype).unsqueeze(0)
        own = torch.gt(p, cut, out=torch.empty_like(p))
        return p, own if valid is None else own * valid[index[piece]]

    step = max(2**13, prob.numel() * prob.element_size() // 400) // len(sets) + 1  # about 32 bytes per element
    pieces = [slice(a, a + step) for a in range(0, len(index), step)]
    for piece, label in _assign(pieces, look_up, (n, s, mu), cuts.isfinite(), torch.tensor(list(sets)), rule):
        out.index_copy_(0, index[piece], label[0])


# ---------------------------------------------------------------------------------------------- level sets

LEVEL_OCTAVES, LEVEL_BITS = 12, 6  # levels from 2^-12 to 1, 64 to an octave: the leading bits of a float32
LEVEL_SHIFT = 23 - LEVEL_BITS
LEVEL_FLOOR = 2.0**-LEVEL_OCTAVES  # is added to every probability, so that 0 has a level
LEVEL_FIRST = (127 - LEVEL_OCTAVES) << LEVEL_BITS
LEVELS = (LEVEL_OCTAVES << LEVEL_BITS) + 1  # the last one is that of 1
LEVEL_TOGETHER = 0.9  # share of a class's other pixels that rise and fall with a pixel; the rest is averaged over u
LEVEL_SAMPLES = 2**15  # pixels that the levels of a larger image are counted on, a regular grid of them
PRESENCE_SHARES, PRESENCE_FLOOR = 256, 1e-4  # of `_presence`: its sum's values; no class is surer than that
LEVEL_PIECE, LEVEL_PIECE_CUDA = 2**17, 2**22  # elements worked on at a time


@torch.no_grad()
def rankseg_levelset(
    prob: Array,
    opt_metric: str = "iou",
    allow_overlap: bool = False,
    in_batch: bool = True,
    *,
    pruning_prob: float = 0.1,
    valid: Tensor | np.ndarray[Any, Any] | None = None,
) -> Array:
    """(B, C, *spatial) probabilities -> (B, *spatial) int64 labels by level sets: the rule for trained networks.

    `rankseg_rma` supposes independent pixels, so a class that is spread thinly over an image is surely there for it.
    This rule supposes that the pixels of a class rise and fall together: they are {p > u}, u uniform on [0, 1]. Every
    pixel then has its own probability still, and the class is absent where u exceeds its largest one. The expected Dice
    or IoU of a class is an integral over u; a pixel gets the class whose expected score grows most by it, over the
    expected number of classes. The growth is averaged with that under one common factor of all pixels of a class
    (RankSEG-DEP without a limit to its reach). How probable a class is in the image follows from its largest
    probability and from how many of the C classes the image seems to hold. Its probabilities are scaled to that, and
    the classes of a pixel are then made to sum to 1 again. docs/rule.md derives it.

    prob, in_batch, valid: as in `rankseg_rma`, errors included.
    opt_metric: "iou" or "dice", the expectation to maximise; "iou" costs less accuracy, "dice" gains more Dice.
    allow_overlap: (B, C, *spatial) bool masks instead, each class by itself: its best level set, or nothing where
        nothing is expected to score more (an absent class scores 1 for an empty mask, else 0). With two classes the
        labels are the mask of the second one.
    pruning_prob: a class whose largest probability in an image does not exceed it takes no part there; where none
        does, those above half of the largest.

    Levels lie 0.8 to 1.6 % of p apart. For labels they are counted on a regular grid of 2^15 to 2^16 pixels of larger
    images, for masks on all pixels.
    """
    rule = _check_options(opt_metric, "rma_score", "max_score", "holders", pruning_prob)
    as_numpy, maps, within = _check_inputs(prob, valid, in_batch, allow_overlap)
    binary = maps.shape[1] == 2 and not allow_overlap
    found = None
    if not _on_cpu(maps):
        found = _try_fused(_FusedLevels, maps, within, rule, allow_overlap, binary, False)
    if found is None:
        with _one_thread() if _on_cpu(maps) else nullcontext(), _default_device():
            out = _solve_levels(maps, within, rule, allow_overlap, binary, _level_masks, _level_labels)
    else:
        out = found[0]
    out = out.view(maps.shape if allow_overlap else (len(maps), *maps.shape[2:]))
    out = out if in_batch else out[0]
    return out.numpy() if as_numpy else out  # type: ignore[return-value] # whose kind as_numpy knows


def _solve_levels(
    prob: Tensor,
    valid: Tensor | None,
    rule: _Rule,
    masks: bool,
    binary: bool,
    find_masks: Callable[..., Tensor],
    find_labels: Callable[..., None],
) -> Tensor:
    """(B, C, *spatial) -> (B, d) labels or (B, C, d) masks, image by image, by `_level_masks` and `_level_labels`."""
    size = prob[0, 0].numel()
    shape, dtype = ((*prob.shape[:2], size), torch.bool) if masks else ((len(prob), size), torch.int64)
    out = torch.empty(shape, dtype=dtype, device=prob.device)
    for i, image in enumerate(prob):
        rows = image.reshape(len(image), -1)
        inside = None if valid is None else valid[i].reshape(-1).nonzero()[:, 0]
        high = _highest(rows, inside).to(_working(rows.dtype))
        if masks:
            out[i] = find_masks(rows, inside, high, rule.metric, rule.pruning_prob)
        elif binary:
            out[i] = find_masks(rows[1:], inside, high[1:], rule.metric, rule.pruning_prob)[0]
        else:
            find_labels(rows, inside, high, rule.metric, rule.pruning_prob, out[i])
    if valid is not None and masks:
        out &= valid.flatten(1).unsqueeze(1)
    return out


def _highest(rows: Tensor, inside: Tensor | None) -> Tensor:
    """(C, d), the indices of valid pixels or None -> (C,) largest probabilities, 0 without any pixel; or ValueError."""
    if _on_cpu(rows):
        high = torch.tensor([_high(row) for row in rows], dtype=rows.dtype)
    else:
        high = rows.amax(1)
        _check_range(rows.amin().item(), high.amax().item(), rows.dtype)
    if inside is None:
        return high
    parts = inside.split(max(1, _level_piece(rows) // len(rows))) if len(inside) else ()
    return torch.stack([rows.new_zeros(len(rows)), *(rows.index_select(1, part).amax(1) for part in parts)]).amax(0)


def _level_piece(rows: Tensor) -> int:
    return LEVEL_PIECE if _on_cpu(rows) else LEVEL_PIECE_CUDA


def _grid(rows: Tensor, inside: Tensor | None, step: int, pixels: int) -> Iterable[Tensor]:
    """(C, d) -> (C, step) pieces of a regular grid of its valid pixels that has `pixels` of them or more, or all."""
    stride = max(1, (rows.shape[1] if inside is None else len(inside)) // pixels - 1) | 1  # odd: no few columns alone
    if inside is None:
        pieces: Iterable[Tensor] = rows[:, ::stride].split(step, 1)
        return pieces
    return (rows.index_select(1, part) for part in inside[::stride].split(step))


def _level_masks(rows: Tensor, inside: Tensor | None, high: Tensor, metric: str, pruning_prob: float) -> Tensor:
    """(C, d) -> (C, d) bool, each class by itself."""
    best, score = _best_level(*_levels(_level_counts(rows, inside, rows.shape[1])), metric)
    cut = _level_edges(rows)[best].to(high.dtype)
    empty = (score < 1 - high) | (high <= pruning_prob)
    return rows >= cut.masked_fill(empty, torch.inf)[:, None]


def _level_counts(rows: Tensor, inside: Tensor | None, samples: int) -> Tensor:
    """(C, d) -> (C, LEVELS) pixels of each level, on a grid of `samples` of them or more."""
    pixels = torch.zeros(len(rows) * LEVELS, dtype=torch.int64, device=rows.device)
    for part in _grid(rows, inside, max(1, _level_piece(rows) // len(rows)), samples):
        pixels += _level_places(part).flatten().bincount(minlength=len(pixels))
    return pixels.view(-1, LEVELS)


def _level_places(part: Tensor) -> Tensor:
    """(C, n) probabilities -> (C, n) int32 places in a table of (C, LEVELS)."""
    first = torch.arange(len(part), dtype=torch.int32, device=part.device)[:, None] * LEVELS - LEVEL_FIRST
    level = (part.float() + LEVEL_FLOOR).clamp_(max=1).view(torch.int32).bitwise_right_shift_(LEVEL_SHIFT)
    return level.add_(first)


def _level_labels(
    rows: Tensor, inside: Tensor | None, high: Tensor, metric: str, pruning_prob: float, out: Tensor
) -> None:
    """(C, d) -> labels, written to (d,) `out`."""
    kept = high > pruning_prob
    names = torch.where(kept.any(), kept, high > high.max() / 2).nonzero()[:, 0]
    classes = len(names)
    if classes < 2:
        out.copy_(names if classes else names.new_zeros(1))
        return
    step = max(1, _level_piece(rows) // classes)
    weight = _level_weights(high)[names][:, None]
    floor = torch.full((), LEVEL_FLOOR, device=rows.device)
    first = torch.arange(classes, dtype=torch.int32, device=rows.device)[:, None] * LEVELS - LEVEL_FIRST
    room = torch.empty(classes * step, device=rows.device)

    def look(part: Tensor) -> Tensor:
        """(C, n) probabilities -> (classes * n) places in a table of classes and levels, in `room`."""
        q = room[: classes * part.shape[1]].view(classes, -1)
        if classes == len(rows) and part.dtype == q.dtype:
            torch.mul(part, weight, out=q)
        else:
            q.copy_(part.index_select(0, names)).mul_(weight)
        torch.addcmul(floor, q, q.sum(0).clamp_min_(1e-30).reciprocal_(), out=q)
        return q.view(torch.int32).bitwise_right_shift_(LEVEL_SHIFT).add_(first).view(-1)

    pixels = torch.zeros(classes * LEVELS, dtype=torch.int64, device=rows.device)
    for part in _grid(rows, inside, step, LEVEL_SAMPLES):
        pixels += look(part).bincount(minlength=len(pixels))
    gain = _level_table(pixels.view(-1, LEVELS), metric)
    # By rank, the largest of a pixel's whole numbers is its class: one look-up of an int32, one maximum.
    order = gain.view(-1).argsort(descending=True, stable=True).flip(0)
    rank = torch.empty_like(order, dtype=torch.int32)
    rank[order] = torch.arange(len(order), dtype=torch.int32, device=rows.device)
    label_of = names[order // LEVELS]
    found = torch.empty_like(room, dtype=torch.int32)
    for part, label in zip(rows.split(step, 1), out.split(step)):
        best = torch.index_select(rank, 0, look(part), out=found[: classes * len(label)]).view(classes, -1).amax(0)
        torch.index_select(label_of, 0, best, out=label)


def _level_table(pixels: Tensor, metric: str) -> Tensor:
    """(C, LEVELS) pixels of each level -> growth of the image's expected score by one more pixel of that level."""
    sizes, N, du = _levels(pixels)
    presence = du.sum(1)
    return _level_gains(sizes, N, du, metric) / (1 + presence.sum() - presence)[:, None]


def _level_weights(high: Tensor) -> Tensor:
    """(..., C) largest probabilities m -> (..., C) float32 factors of the classes' probabilities: presence / m.

    Presence is the larger of m^2 and `_presence`: classes that the image seems to lack are no evidence against others.
    """
    m = high.to(_wide(high.device)).clamp(PRESENCE_FLOOR, 1 - PRESENCE_FLOOR)
    return (torch.maximum(m.square(), _presence(m)) / m).float()


def _presence(m: Tensor) -> Tensor:
    """(..., C) largest probabilities in (0, 1) -> (..., C) how probable each class is in the image, given all of them.

    The share pi of the C classes that are in the image is unknown and uniform on [0, 1]; given pi, each class is in it
    with that probability, and m is what one would think with pi = 1/2: the evidence is m / (1 - m). The posterior is a
    polynomial in pi; it is summed over 256 values at equal distances of arcsin(sqrt(pi)), at which it is about as wide
    everywhere, 1 / (2 sqrt(C)).
    """
    angle = (torch.arange(PRESENCE_SHARES, dtype=m.dtype, device=m.device) + 0.5) * (torch.pi / 2 / PRESENCE_SHARES)
    share, m = angle.sin().square()[:, None], m.unsqueeze(-2)
    there = share * m
    either = there + (1 - share) * (1 - m)
    weight = (either.log().sum(-1) + (2 * angle).sin().log()).softmax(-1)
    return (weight.unsqueeze(-1) * there / either).sum(-2)


def _level_edges(like: Tensor) -> Tensor:
    """(LEVELS + 1,) the probabilities at which levels begin and end, of 0 to 1."""
    bits = torch.arange(LEVEL_FIRST, LEVEL_FIRST + LEVELS + 1, dtype=torch.int32, device=like.device) << LEVEL_SHIFT
    return (bits.view(torch.float32).to(_wide(like.device)) - LEVEL_FLOOR).clamp_(0, 1)


def _levels(pixels: Tensor, edges: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(K, LEVELS) pixels of each level -> those from it on, N (from its middle on), its width du (0 past the last)."""
    above = pixels.flip(1).cumsum(1).flip(1)
    du = (_level_edges(pixels) if edges is None else edges).diff() * (above > 0)
    return above.to(du.dtype), (above - pixels / 2).clamp_min(0.5).to(du.dtype), du


def _best_level(sizes: Tensor, N: Tensor, du: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(K, LEVELS) -> (K,) the level from which on the best set's pixels lie, its expected score."""
    if metric == "iou":  # the integral of N / n above u = t, and of n / N below, for all t by two cumulative sums
        above, below = (N * du).flip(1).cumsum(1).flip(1), (du / N).cumsum(1) - du / N
        score, best = (above / sizes + sizes * below).masked_fill(du == 0, -1)[:, 1:].max(1)
        return best + 1, score
    last = ((du > 0).sum(1, keepdim=True) - 1).clamp_min(0)
    at = torch.arange(0, LEVELS, 16, device=N.device).expand(len(N), -1)
    for _ in range(2):  # every 16th level, then all around the best of these
        at = at.clamp_min(1).minimum(last)
        tried = zip(sizes.gather(1, at).unsqueeze(2), N, du)
        scores = [(2 * torch.minimum(n, m) / (n + m) * width).sum(1) for n, m, width in tried]
        score, best = torch.stack(scores).max(1, keepdim=True)
        best = at.gather(1, best)
        at = best + torch.arange(-15, 16, device=N.device)
    return best[:, 0], score[:, 0]


def _level_gains(sizes: Tensor, N: Tensor, du: Tensor, metric: str) -> Tensor:
    """(K, LEVELS) -> growth of each class's expected score by one more pixel of that level: the mean of two laws'."""
    best = _best_level(sizes, N, du, metric)[0][:, None]
    return (_gains_of_levels(sizes, N, du, best, metric) + _gains_of_a_factor(sizes, du, best, metric)) / 2


def _gains_of_levels(sizes: Tensor, N: Tensor, du: Tensor, best: Tensor, metric: str) -> Tensor:
    """As `_level_gains`, where the class is {p > u}, u uniform; some of its pixels are averaged over u."""
    n = sizes.gather(1, best)
    both, present, apart = torch.minimum(n, N), du.sum(1, keepdim=True), 1 - LEVEL_TOGETHER
    others = N - both if metric == "iou" else N  # beyond n, in the score's denominator
    whole = n + LEVEL_TOGETHER * others + apart * (others * du).sum(1, keepdim=True) / present
    won, lost = du / whole, du * both / whole**2
    won, cost, saved = won.cumsum(1) - won / 2, lost.sum(1, keepdim=True), lost.cumsum(1) - lost / 2
    if metric == "dice":
        return 2 * (won - cost)
    # the union does not grow where the pixel is in the class: its own u is below its p, of the others apart a share p
    p = du.cumsum(1) - du / 2
    return won - cost * (1 - apart * p / present) + LEVEL_TOGETHER * saved


def _gains_of_a_factor(sizes: Tensor, du: Tensor, best: Tensor, metric: str) -> Tensor:
    """As `_level_gains`, where two pixels have the covariance sqrt(v_i v_j), v = p (1 - p); sizes are their means."""
    pixels = sizes - torch.nn.functional.pad(sizes[:, 1:], (0, 1))
    p = du.cumsum(1) - du / 2
    root = (p * (1 - p)).sqrt()
    chosen = pixels * (torch.arange(LEVELS, device=du.device) >= best)
    others = pixels - chosen if metric == "iou" else pixels  # beyond n, in the score's denominator
    size = sizes.gather(1, best) + (others * p).sum(1, keepdim=True) + root / p * (others * root).sum(1, keepdim=True)
    lost = chosen * p / size**2
    cost = lost.sum(1, keepdim=True)
    if metric == "dice":
        return 2 * (p / size - cost)
    # the union does not grow where the pixel is in the class: its own share p, and what it has in common with the set's
    return p / size - (1 - p) * cost + root * (lost * root / p).sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------- as a network's last layer

TRACED_PASSES = 10  # of the iteration in a graph, where nobody looks at convergence; maps of 10^7 pixels took 6 at most


class RankSEG(torch.nn.Module):
    """A rule as the last layer of a network: (B, C, *spatial) probabilities -> (B, *spatial) int64 labels.

    rule: "rankseg_rma" or "rankseg_levelset", the function of this file that decides; **options: its keyword arguments.
    traceable: decide by a form of the rule that never looks at the values of its map: the same operations for every map
        of a shape, so that `torch.export` and `torch.onnx` can put it into a graph. It takes a tensor that is a
        probability map and checks nothing of it but its shape and dtype, and has neither `valid` nor `return_tau`.
        The iteration of `rankseg_rma` has TRACED_PASSES passes then; labels are those of the function but for pixels
        that rounding decides. It takes more time and memory, some maps of the size of the input.

    No parameters, no buffers; it can be pickled. Raises ValueError or TypeError at once for an option that the function
    does not take, and what the function raises.
    """

    def __init__(self, rule: str = "rankseg_rma", *, traceable: bool = False, **options: Any) -> None:
        super().__init__()
        functions: dict[str, Callable[..., Any]] = {"rankseg_rma": rankseg_rma, "rankseg_levelset": rankseg_levelset}
        if rule not in functions:
            raise ValueError(f"rule must be one of {tuple(functions)}, got {rule!r}")
        taken = {name: p.default for name, p in inspect.signature(functions[rule]).parameters.items()}
        del taken["prob"], taken["valid"]
        if unknown := sorted(options.keys() - taken.keys()):
            raise TypeError(f"{rule} takes the options {tuple(taken)}, got {unknown[0]!r}")
        self.rule, self.traceable, self.options = rule, traceable, options
        self._all = {**taken, **options}
        given = {"to_nonoverlap_method": "rma_score", "unassigned": "max_score", "contested": "holders", **self._all}
        self._checked = _check_options(**{name: given[name] for name in inspect.signature(_check_options).parameters})
        if traceable and self._all.get("return_tau"):
            raise ValueError("return_tau must be False with traceable=True, got True")

    def extra_repr(self) -> str:
        shown = {**self.options, **({"traceable": True} if self.traceable else {})}
        return ", ".join([self.rule, *(f"{name}={value!r}" for name, value in shown.items())])

    def forward(self, prob: Tensor, valid: Tensor | None = None) -> Any:
        if not self.traceable:
            decide: Any = rankseg_rma if self.rule == "rankseg_rma" else rankseg_levelset
            return decide(prob, valid=valid, **self.options)
        if valid is not None or not isinstance(prob, Tensor):
            raise ValueError("expected a tensor and no pixels in `valid` with traceable=True")
        return self._trace(prob)

    @torch.no_grad()
    def _trace(self, prob: Tensor) -> Tensor:
        in_batch, masks = self._all["in_batch"], self._all["allow_overlap"]
        _, prob, _ = _check_inputs(prob, None, in_batch, masks)
        binary = prob.shape[1] == 2 and not masks and self._all.get("binary_threshold", True)
        if self.rule == "rankseg_rma":
            out = _trace_rma(prob, self._checked, masks, binary)
        else:
            out = _trace_levelset(prob, self._checked, masks, binary)
        out = out.reshape(*out.shape[:-1], *prob.shape[2:])
        return out if in_batch else out[0]


def _trace_rma(prob: Tensor, rule: _Rule, masks: bool, binary: bool) -> Tensor:
    """(B, C, *spatial) -> (B, d) labels or (B, C, d) masks: as `_solve_batched`, with a fixed number of passes."""
    x = prob.flatten(2).to(_working(prob.dtype))
    mu, high = _block_sum(x), x.amax(-1).to(_wide(x.device))

    def measure(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cut = t.to(x.dtype)
        below = cut * (1 - torch.finfo(x.dtype).eps / 2)  # the number before it, for which graphs have no nextafter
        own = (x > torch.where(cut > t, below, cut).unsqueeze(-1)).to(x.dtype)
        return own, _block_sum(own), _block_sum(own * x)

    t = _ratio(*measure(0.8 * high / (1 + high))[1:], mu, rule.offset)
    for _ in range(TRACED_PASSES):
        t = torch.maximum(t, _ratio(*measure(t)[1:], mu, rule.offset))
    kept = high > _limit(rule, prob)
    own, n, s = measure(t.masked_fill(~kept, torch.inf))
    if masks or binary:
        return own.to(torch.bool) if masks else own[:, 1].to(torch.int64)
    names = torch.arange(x.shape[1], device=x.device)
    ((_, label),) = _assign([slice(None)], lambda _: (x, own), (n, s, mu), kept, names, rule)
    return label


def _trace_levelset(prob: Tensor, rule: _Rule, masks: bool, binary: bool) -> Tensor:
    """(B, C, *spatial) -> (B, d) labels or (B, C, d) masks: as `_level_masks` and `_level_labels`.

    Pruned classes stay in the tables with no weight: how many there are is a value of the map.
    """
    rows = prob.flatten(2)
    high = rows.amax(-1).to(_working(rows.dtype))
    if masks or binary:
        rows, high = (rows, high) if masks else (rows[:, 1:], high[:, 1:])
        level = _trace_level((rows.float() + LEVEL_FLOOR).clamp(max=1))
        best, score = (value.view(high.shape) for value in _best_level(*_trace_counts(level, 1), rule.metric))
        cut = _trace_edges(rows)[best].to(high.dtype)
        empty = (score < 1 - high) | (high <= rule.pruning_prob)
        own = rows >= cut.masked_fill(empty, torch.inf).unsqueeze(-1)
        return own if masks else own[:, 0].to(torch.int64)
    largest = high.amax(1, keepdim=True)
    kept = high > torch.where(largest > rule.pruning_prob, rule.pruning_prob, largest / 2)
    q = rows.float() * (_level_weights(high) * kept).unsqueeze(-1)
    level = _trace_level(LEVEL_FLOOR + q * q.sum(1, keepdim=True).clamp_min(1e-30).reciprocal())
    stride = max(1, rows.shape[2] // LEVEL_SAMPLES - 1) | 1  # as in _grid
    sizes, N, du = _trace_counts(level, stride)
    presence = du.sum(1).view(kept.shape) * kept
    rest = 1 + presence.sum(1, keepdim=True) - presence
    gain = _level_gains(sizes, N, du, rule.metric).view(*kept.shape, -1) / rest.unsqueeze(-1)
    return gain.gather(-1, level).masked_fill(~kept.unsqueeze(-1), -torch.inf).argmax(1)


def _trace_level(q: Tensor) -> Tensor:
    """float32 in [LEVEL_FLOOR, 1] -> the int64 level of each: the leading bits of the number, by exact arithmetic."""
    octave, base = torch.zeros_like(q), torch.full_like(q, LEVEL_FLOOR)
    for step in (8, 4, 2, 1):
        higher = base * 2.0**step
        octave, base = octave + step * (q >= higher).to(q.dtype), torch.where(q >= higher, higher, base)
    steps = 1 << LEVEL_BITS  # to an octave
    return (octave * steps + ((q / base - 1) * steps).floor()).to(torch.int64)


def _trace_counts(level: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, d) levels -> what `_levels` says of every stride-th pixel, (B * C, LEVELS)."""
    seen = level[:, :, ::stride]
    pixels = torch.zeros(*level.shape[:2], LEVELS, dtype=torch.int64, device=level.device)
    return _levels(pixels.scatter_add(2, seen, torch.ones_like(seen)).flatten(0, 1), _trace_edges(level))


def _trace_edges(like: Tensor) -> Tensor:
    """As `_level_edges`, a constant of the graph."""
    levels = [divmod(level, 2**LEVEL_BITS) for level in range(LEVELS + 1)]
    edges = [math.ldexp(1 + step / 2**LEVEL_BITS, octave - LEVEL_OCTAVES) for octave, step in levels]
    return torch.tensor([min(edge - LEVEL_FLOOR, 1) for edge in edges], dtype=_wide(like.device), device=like.device)


# ------------------------------------------------------------------- fused kernels (Triton, on a CUDA device)
#
# What runs, with the maps that are read; `row` is a class of an image, b * C + c, and pruned rows cost nothing after
# `_begin`:
#
#   _survey    every class                 mass, maximum and range check, in partial sums
#   _begin     4096 pixels of a class      adds these up; prunes; first threshold, from a strided sample
#   _tally     classes that have not       size and mass of {p > t}, and the smallest p in it, in partial sums
#   _advance   settled, FUSED_PASSES times adds these up; next t; settled if no pixel lies between the two thresholds
#   _claim     unpruned classes            labels of the pixels in one set; what the sets share
#   _contend   the other pixels alone      their labels, by the scores of the classes
#
# or, instead of the last two, `_mask`. The host launches all of it and then waits once, for the outcome of the range
# check and for whether every row has settled (if not, it launches more passes and the end again). Sums are in float64
# over a fixed partition of the pixels, and what is added atomically are integers: the same bits in every run.
#
# For `rankseg_levelset`, after `_survey`:
#
#   _peaks     -                           adds up the maxima; prunes
#   _weigh     -                           the classes' weights, and which compete (for labels alone)
#   _count     unpruned classes            pixels of each level, on the grid (for masks on all pixels)
#   _grow      -                           from these the growth at each level, or the threshold of a mask
#   _divide    -                           that over the expected number of classes
#   _decide    unpruned classes            labels
#
# or, instead of the last two, `_mask`; before them `_seen`, which counts the pixels of `valid`.
#
# Triton looks at every argument of every launch, which takes the host longer than the kernels run. What it compiles is
# therefore kept in `_COMPILED`, to be launched without it. All launches for a map are kept in `_PLANS` besides; for
# other maps of its kind they are repeated at once, with the addresses of the new tensors.
#
# Maps keep their strides: tiles are (group, pixels), of one class where pixels are adjacent in memory and of up to 32
# where classes are (channels-last). The kernels are compiled when a CUDA map first needs them.

FUSED = 0  # inputs of at least that many elements run on the fused kernels
FUSED_PASSES = 3  # passes launched before the host looks whether all rows have settled: as a rule the second finds it
FUSED_SAMPLE = 4096  # pixels of a class that the first threshold comes from
FUSED_CLASSES = 32  # classes of a tile at most, where classes are adjacent: 128 bytes in float32
FUSED_CHUNK = 8192  # elements that give one partial sum, and 512 pixels at least
FUSED_TILES = {  # kernel: elements of a tile, warps
    "_survey": (1024, 4),
    "_tally": (1024, 4),
    "_mask": (1024, 4),
    "_claim": (1024, 4),
    "_contend": (512, 4),
    "_count": (256, 4),
    "_decide": (512, 4),
}
FUSED_UNROLL = 4  # tiles whose loads may be under way at the same time
FUSED_PARTS = 256  # partial sums that are added up at a time
FUSED_COPIES = 32  # tables that the pixels of a class are counted in at most: many at once have the same level
FUSED_TABLES = 2**10  # ... and of all classes, if these are not more
FUSED_SPREAD = 2**14  # pixels of the image that a table is for, at least
FUSED_SPAN = 4096  # pixels of `valid` that are counted together
FUSED_LEVELS = 2**10  # room for the levels in a table
FUSED_PLANS = 4096  # compiled kernels, and kinds of maps, that are kept at most
_UNUSABLE: dict[type, Exception] = {}  # why a rule's kernels cannot be compiled here, once that has been seen
FUSED_DIRECT = True  # whether kernels are launched without Triton; False once that has failed

# Numbers of which no variants are compiled; whether 16 divides the others says how wide a load may be.
FUSED_PLAIN = (
    "chunks", "tiles", "first", "limit", "step", "undecided", "empty", "classes", "copies", "samples"
)  # fmt: skip

if not TYPE_CHECKING:
    tl = None  # triton.language, from the first CUDA map on
_KERNELS: dict[str, Callable[..., Any]] = {}
_COMPILED: dict[tuple[Any, ...], Any] = {}
_PLANS: dict[tuple[Any, ...], _Plan] = {}


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that `_load_triton` compiles; until then it is not to be called."""
    _KERNELS[function.__name__] = function
    return function


@functools.lru_cache(64)
def _limit_bits(pruning_prob: float, dtype: torch.dtype) -> int:
    """The bits of `_limit`, for kernels take floats in single precision only."""
    return int(torch.full((), pruning_prob, dtype=dtype, device="cpu").double().view(torch.int64).item())


@functools.cache
def _load_triton() -> bool:
    """Turns the marked functions into kernels -> whether Triton is there, and the C compiler that it calls."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return False
    compilers = (os.environ.get("CC"), "gcc", "cc", "clang")
    if not any(name and shutil.which(name) for name in compilers) and not os.environ.get("TRITON_INTERPRET"):
        return False
    for name, function in _KERNELS.items():
        plain = [arg for arg in FUSED_PLAIN if arg in inspect.signature(function).parameters]
        globals()[name] = triton.jit(function, do_not_specialize=plain)
    return True


@functools.cache
def _runtime() -> Any:
    """Triton's settings for launches, where this version of it launches as `_Plan` does."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return triton.knobs.runtime if (3, 6) <= version <= (3, 8) else None  # those whose launchers were tried


def _is_direct() -> bool:
    """Whether launches may be repeated without Triton: not if something asked it to be told of every launch."""
    if not FUSED_DIRECT or (runtime := _runtime()) is None:
        return False
    return not any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def _give_up() -> None:
    """No launch without Triton from here on."""
    global FUSED_DIRECT
    FUSED_DIRECT = False


def _remember(table: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: object) -> None:
    if len(table) >= FUSED_PLANS:
        table.clear()
    table[key] = value


def _variant(x: Any) -> tuple[Any, ...]:
    """All of an argument that Triton may compile for: no two values that it tells apart have the same."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _is_fused(prob: Tensor) -> bool:
    """Whether the fused kernels solve this map: on an NVIDIA device from Ampere on, if Triton is installed."""
    if prob.device.type != "cuda" or prob.numel() < FUSED or torch.version.hip is not None:
        return False
    return _is_recent(prob.device) and _load_triton()


def _try_fused(
    job: type[_Fused], prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, want_tau: bool
) -> Found | None:
    """As `_solve_fused`; None where it is not for this map, or where its kernels cannot be compiled."""
    if job in _UNUSABLE or not _is_fused(prob):
        return None
    try:
        with torch.cuda.device(prob.device):  # kernels are launched on the current device
            return _solve_fused(job, prob, valid, rule, masks, binary, want_tau)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # without Python's headers, a writable cache, or a compiler that knows the device
        _UNUSABLE[job] = error
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"{job.name} goes without its CUDA kernels, more slowly: {reason}", RuntimeWarning, stacklevel=3)
        return None


def _collapse(prob: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """(B, C, *spatial) -> the map, and sizes and strides of at most three axes that walk over its pixels in order."""
    axes: list[list[int]] = []
    for size, stride in zip(prob.shape[2:], prob.stride()[2:]):
        if axes and (size == 1 or axes[-1][1] == size * stride):
            axes[-1] = [axes[-1][0] * size, stride if size > 1 else axes[-1][1]]
        elif axes and axes[-1][0] == 1:
            axes[-1] = [size, stride]
        else:
            axes.append([size, stride])
    if len(axes) > 3:  # four axes of unrelated strides: the only maps that are copied
        return _collapse(prob.contiguous())
    sizes, strides = zip(*axes)
    return prob, list(sizes), list(strides)


class _Fused:
    """One map on its way through the kernels: where its parts lie, and the numbers that they exchange."""

    name = "rankseg_rma"

    def __init__(self, prob: Tensor, valid: Tensor | None, rule: _Rule, first: int) -> None:
        """`first`: classes below it get no set."""
        prob, sizes, strides = _collapse(prob)
        self.prob, self.rule, self.first = prob, rule, first
        self.valid = prob if valid is None else valid.reshape(-1)
        self.batch, self.classes = prob.shape[:2]
        self.size = math.prod(sizes)
        self.rows = self.batch * self.classes
        self.last = self.classes > 1 and prob.stride(1) == 1 and min(strides) > 1
        self.group = min(FUSED_CLASSES, _power(self.classes)) if self.last else 1
        self.chunk = self._chunk()
        self.chunks = -(-self.size // self.chunk)
        even = self.rows + self.rows % 2  # keeps every part aligned to 16 bytes
        parts = self.rows * self.chunks
        parts += parts % 2
        self.space = torch.empty(14 * even + 3 * parts + self.room(), dtype=torch.float64, device=prob.device)
        numbers = self.space[: 14 * even].view(14, even)
        self.bad, self.open, self.kept, self.mu, self.t, self.n, self.s, self.cut = numbers[:8].unbind()
        *counts, tau = numbers[8:].view(torch.int64).unbind()
        self.shared_n, self.shared_s, self.names, self.held, self.lead = counts
        self.tau = tau[: self.rows].view(self.batch, self.classes)
        self.parts = self.space[14 * even : 14 * even + 3 * parts].view(3, parts).unbind()
        self.rest = self.space[14 * even + 3 * parts :]
        self.launches: list[tuple[Any, ...]] = []
        self.direct = _is_direct()
        shape = [1] * (3 - len(sizes)) + sizes
        steps = [0] * (3 - len(strides)) + strides
        # What every kernel that reads the map is told of it; the strides of axes that are not there are never used.
        self.map = (self.classes, self.size, prob.stride(0), prob.stride(1), *steps, *shape[1:])
        self.kinds = {
            "AXES": len(sizes),
            "VALID": valid is not None,
            "LONG": self.size >= 2**31 - 2**20,
            "WORK": tl.float64 if prob.dtype == torch.float64 else tl.float32,
        }

    def room(self) -> int:
        """Numbers in `rest`, what the kernels exchange beyond a few numbers of each row."""
        return 0

    def _chunk(self) -> int:
        """Pixels of a partial sum: a whole number of tiles, and no more of them than a small map has."""
        tile = max(self.tile(name)["PIXELS"] for name in ("_survey", "_tally", "_mask"))
        return max(tile, min(_power(self.size), max(FUSED_CHUNK // self.group, 512)))

    def tile(self, kernel: str) -> dict[str, int]:
        """Shape of a kernel's tiles and its number of warps."""
        elements, warps = FUSED_TILES[kernel]
        return {"GROUP": self.group, "PIXELS": elements // self.group, "num_warps": warps}

    def over_chunks(self, first: int) -> tuple[int]:
        """One program for each chunk of the pixels and each group of classes from `first` on."""
        return (self.batch * -(-(self.classes - first) // self.group) * self.chunks,)

    def enqueue(self, kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
        """Without Triton if it has compiled the kernel for such arguments; what was launched is noted."""
        key = compiled = None
        if self.direct:
            key = (id(kernel), self.prob.device, *options.items(), *map(_variant, args))
            compiled = _COMPILED.get(key)
        if compiled is not None:
            given = [x.data_ptr() if isinstance(x, Tensor) else x for x in args]
            given += [0] * (len(kernel.arg_names) - len(args))
            metadata = compiled.packed_metadata
            try:
                stream = _stream(self.prob.device)
                compiled.run(grid[0], 1, 1, stream, compiled.function, metadata, None, None, None, *given)
            except Exception:  # as in `_Plan.solve`
                _give_up()
                self.direct, key, compiled = False, None, None
        if compiled is None:
            compiled = kernel[grid](*args, **options)
            if key is not None and hasattr(compiled, "packed_metadata"):
                _remember(_COMPILED, key, compiled)
        self.launches.append((kernel, compiled, grid[0], args))

    def survey(self) -> None:
        """What is launched once, however many passes it takes."""
        prob, valid = self.prob, self.valid
        self.look()
        step = -(-self.size // FUSED_SAMPLE) | 1  # odd, or the sample would fall on few columns of the image
        self.enqueue(
            _begin, (self.rows,),
            prob, valid, *self.parts, self.chunks, self.bad, self.open, self.kept, self.mu, self.t, self.n, self.s,
            self.cut, self.first, _limit_bits(self.rule.pruning_prob, prob.dtype), step, *self.map,
            OFFSET=int(self.rule.offset), SAMPLE=FUSED_SAMPLE, PARTS=FUSED_PARTS, num_warps=4, **self.kinds,
        )  # fmt: skip

    def look(self) -> None:
        """Mass, maximum and range check of every class, in partial sums."""
        self.enqueue(
            _survey, self.over_chunks(0),
            self.prob, self.valid, *self.parts, self.chunks, *self.map, CHUNK=self.chunk, UNROLL=FUSED_UNROLL,
            SLACK=4 * torch.finfo(self.prob.dtype).eps,
            BITS=tl.uint64 if self.prob.dtype == torch.float64 else tl.uint32, **self.tile("_survey"), **self.kinds,
        )  # fmt: skip

    def refine(self) -> None:
        """FUSED_PASSES passes, and what the last one makes known."""
        for turn in range(FUSED_PASSES):
            self.enqueue(
                _tally, self.over_chunks(self.first),
                self.prob, self.valid, *self.parts, self.chunks, self.open, self.cut, self.first, *self.map,
                CHUNK=self.chunk, UNROLL=FUSED_UNROLL, **self.tile("_tally"), **self.kinds,
            )  # fmt: skip
            self.enqueue(
                _advance, (self.rows,),
                *self.parts, self.chunks, self.open, self.kept, self.mu, self.t, self.n, self.s, self.cut,
                self.shared_n, self.shared_s, self.names, self.held, self.lead, self.tau, self.classes,
                OFFSET=int(self.rule.offset), PARTS=FUSED_PARTS, FINAL=turn == FUSED_PASSES - 1,
                WORK=self.kinds["WORK"], num_warps=2,
            )  # fmt: skip

    def finish(self, out: Tensor, masks: bool, binary: bool) -> None:
        """The rest, which is launched again if a row has not settled."""
        self.refine()
        first = self.first
        self.first = 1 if binary else first
        self.mask(out) if masks or binary else self.label(out)
        self.first = first

    def mask(self, out: Tensor) -> None:
        """Sets of the classes from `first` on -> `out`, contiguous."""
        self.enqueue(
            _mask, self.over_chunks(self.first),
            self.prob, self.valid, out.view(torch.uint8) if out.dtype == torch.bool else out, self.chunks, self.cut,
            self.first, *self.map, CHUNK=self.chunk, **self.tile("_mask"), **self.kinds,
        )  # fmt: skip

    def label(self, out: Tensor) -> None:
        """Labels -> `out`, contiguous; until the end, pixels without one hold a code that no label has."""
        rule, given = self.rule, self.rule.unassigned
        undecided = -1 if given != -1 else -2  # of a contested pixel; that of an unassigned one is 1 less
        empty = undecided - 1 if given == "max_score" else given
        tile = self.tile("_claim")
        tiles = -(-self.size // tile["PIXELS"])
        self.enqueue(
            _claim, (self.batch * tiles,),
            self.prob, self.valid, out, tiles, self.cut, self.names, self.held, self.shared_n, self.shared_s,
            undecided, empty, *self.map, LAST=self.last, SCORED=rule.method != "prob", **tile, **self.kinds,
        )  # fmt: skip
        tile = self.tile("_contend")
        every = self.last or (rule.contested == "all" and rule.method != "rma_score")  # pruned classes are read, too
        tiles = -(-self.size // tile["PIXELS"])
        self.enqueue(
            _contend, (self.batch * tiles,),
            self.prob, out, tiles, self.cut, self.kept, self.mu, self.n, self.s, self.names, self.held, self.lead,
            self.shared_n, self.shared_s, undecided, *self.map, EVERY=every, METHOD=rule.method,
            OFFSET=int(rule.offset), ALL=rule.contested == "all", EMPTY=given == "max_score", **tile, **self.kinds,
        )  # fmt: skip


class _FusedLevels(_Fused):
    """As `_Fused`, for `rankseg_levelset`: a table of levels for each class."""

    name = "rankseg_levelset"

    def room(self) -> int:
        self.copies = max(1, min(FUSED_COPIES, FUSED_TABLES // self.rows, self.size // FUSED_SPREAD))
        return self.rows * self.copies * FUSED_LEVELS + self.batch * -(-self.size // FUSED_SPAN)

    def survey(self) -> None:
        self.look()
        self.high, self.weight, self.presence, self.counted = self.mu, self.t, self.n, self.lead
        self.tables, self.gains = self.rest.view(torch.int64), self.rest  # these take the place of a row's first table
        self.seen = self.tables[self.rows * self.copies * FUSED_LEVELS :]
        self.levels = {"ROOM": FUSED_LEVELS, "FLOOR": LEVEL_FLOOR, "SHIFT": LEVEL_SHIFT, "LEAST": LEVEL_FIRST}
        self.exact = {"enable_fp_fusion": False}  # products are rounded, as on a CPU
        self.enqueue(
            _peaks, (self.rows,),
            *self.parts[1:], self.chunks, self.tables, self.bad, self.open, self.high, self.weight, self.cut,
            self.copies, self.rows, self.first, _limit_bits(self.rule.pruning_prob, _working(self.prob.dtype)),
            self.classes, PARTS=FUSED_PARTS, ROOM=FUSED_LEVELS, num_warps=4,
        )  # fmt: skip

    def finish(self, out: Tensor, masks: bool, binary: bool) -> None:
        masks = masks or binary
        if not masks:
            self.enqueue(
                _weigh, (self.batch,),
                self.high, self.weight, self.names, self.held, self.classes, SHARES=PRESENCE_SHARES,
                LEAST=PRESENCE_FLOOR, GROUP=8, num_warps=8,
            )  # fmt: skip
        self.count(masks)
        self.enqueue(
            _grow, (self.rows,),
            self.tables, self.gains, self.high, self.weight, self.presence, self.cut, self.counted, self.copies,
            self.rows, self.classes, UNROLL=FUSED_UNROLL, DICE=self.rule.metric == "dice", MASKS=masks,
            TOGETHER=LEVEL_TOGETHER, LEVELS=LEVELS, WORK=self.kinds["WORK"], num_warps=4, **self.levels,
        )  # fmt: skip
        if masks:
            self.kinds["VALID"] &= not binary  # labels are given to all pixels
            self.mask(out)
            return
        self.enqueue(
            _divide, (self.rows,),
            self.gains, self.weight, self.presence, self.classes, PARTS=FUSED_PARTS, ROOM=FUSED_LEVELS, num_warps=4,
        )  # fmt: skip
        tile = self.tile("_decide")
        tiles = -(-self.size // tile["PIXELS"])
        self.enqueue(
            _decide, (self.batch * tiles,),
            self.prob, out, tiles, self.gains, self.weight, self.names, self.held, *self.map, UNROLL=FUSED_UNROLL,
            EVERY=self.last, LEVELS=LEVELS, **tile, **self.levels, AXES=self.kinds["AXES"], LONG=self.kinds["LONG"],
            **self.exact,
        )  # fmt: skip

    def count(self, masks: bool) -> None:
        """Pixels of each level -> `tables`: for labels those on the grid, of their shares of a pixel; for masks all."""
        tile, chunks, step = self.tile("_count"), -(-self.size // FUSED_SPAN), 1
        if self.kinds["VALID"]:
            self.enqueue(
                _seen, (self.batch * chunks,),
                self.valid, self.seen, chunks, self.size, SPAN=FUSED_SPAN, LONG=self.kinds["LONG"], num_warps=4,
            )  # fmt: skip
        elif not masks:
            step = max(1, self.size // LEVEL_SAMPLES - 1) | 1  # as in _grid
        samples = -(-self.size // step)
        tiles = -(-samples // tile["PIXELS"])
        self.enqueue(
            _count, (self.batch * tiles,),
            self.prob, self.valid, self.tables, self.seen, tiles, chunks, self.weight, self.names, self.held,
            self.counted, self.copies, self.rows, samples, step, *self.map, UNROLL=FUSED_UNROLL,
            EVERY=self.last or masks, SAMPLES=LEVEL_SAMPLES, SPAN=FUSED_SPAN, MASKS=masks, PARTS=FUSED_PARTS,
            LEVELS=LEVELS, AXES=self.kinds["AXES"], VALID=self.kinds["VALID"], LONG=self.kinds["LONG"], **tile,
            **self.levels, **self.exact,
        )  # fmt: skip


def _power(x: int) -> int:
    """The smallest power of two that is not below x."""
    return 1 << (x - 1).bit_length()


class _Plan:
    """The launches that solved one map, to be repeated for others of the same kind."""

    def __init__(self, job: _Fused, out: Tensor, copied: bool, once: int) -> None:
        """`copied`: the map was made contiguous first; `once`: launches that come before those that may be repeated."""
        self.copied, self.once = copied, once
        self.shape, self.dtype, self.words = tuple(out.shape), out.dtype, len(job.space)
        self.batch, self.classes = job.batch, job.classes
        given = [x.data_ptr() for x in (job.prob, job.valid, out)]
        space = job.space.data_ptr()
        # Every argument is the sum of an address that is known when the map is (none is 0) and a number.
        slots: dict[tuple[int, int], int] = {}
        self.launches = []
        for kernel, compiled, grid, args in job.launches:
            at = []
            for x in args:
                if not isinstance(x, Tensor):
                    slot = (4, x)
                elif x.data_ptr() in given:
                    slot = (given.index(x.data_ptr()), 0)
                else:
                    slot = (3, x.data_ptr() - space)
                at.append(slots.setdefault(slot, len(slots)))
            # Triton's launchers skip what was known at compile time, but something must stand in its place.
            at += [slots.setdefault((4, 0), len(slots))] * (len(kernel.arg_names) - len(args))
            pick = operator.itemgetter(*at)
            self.launches.append((compiled.run, grid, compiled.function, compiled.packed_metadata, pick, compiled))
        self.slots = list(slots)

    def solve(self, prob: Tensor, valid: Tensor | None, want_tau: bool) -> Found | None:
        """As `_solve_fused`; None if a launch has failed."""
        prob = prob.contiguous() if self.copied else prob
        space = torch.empty(self.words, dtype=torch.float64, device=prob.device)
        out = torch.empty(self.shape, dtype=self.dtype, device=prob.device)
        address = prob.data_ptr()
        bases = (address, address if valid is None else valid.data_ptr(), out.data_ptr(), space.data_ptr(), 0)
        if (bases[2] | bases[3] | (address if self.copied else 0)) % 16:
            return None  # PyTorch aligns more than that, but its allocator can be replaced
        values = [bases[base] + number for base, number in self.slots]
        launches = self.launches
        while True:
            try:
                stream = _stream(prob.device)
                for run, grid, function, metadata, pick, _ in launches:
                    run(grid, 1, 1, stream, function, metadata, None, None, None, *pick(values))
            except Exception:  # a version of Triton that launches in another way; its own way finds all other reasons
                _give_up()
                return None
            if _is_settled(space, prob):
                return out, _sizes(space, self.batch, self.classes) if want_tau else None
            launches = self.launches[self.once :]


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _is_settled(space: Tensor, prob: Tensor) -> bool:
    """Whether all sets have been found, or an error if the map holds what is no probability: the host waits here."""
    rows = prob.shape[0] * prob.shape[1]
    even = rows + rows % 2
    flags = space[: 2 * even].tolist()
    if any(flags[:rows]):
        _check_range(prob.amin().item(), prob.amax().item(), prob.dtype)
    return not any(flags[even : even + rows])


def _sizes(space: Tensor, batch: int, classes: int) -> Tensor:
    """The sizes of the sets out of the numbers that the kernels exchange."""
    rows = batch * classes
    first = 13 * (rows + rows % 2)
    return space[first : first + rows].view(torch.int64).view(batch, classes).clone()


def _kind(prob: Tensor, valid: Tensor | None, *options: object) -> tuple[Any, ...]:
    """All that the launches for a map depend on, but for the addresses of tensors."""
    return (
        *options, prob.shape, prob.stride(), prob.dtype, prob.device, prob.data_ptr() % 16,
        None if valid is None else valid.data_ptr() % 16, FUSED_PASSES, FUSED_SAMPLE, FUSED_CLASSES, FUSED_CHUNK,
        FUSED_UNROLL, FUSED_PARTS, FUSED_COPIES, FUSED_SPREAD, LEVEL_SAMPLES,
        *FUSED_TILES.values(),
    )  # fmt: skip


def _solve_fused(
    kernels: type[_Fused], prob: Tensor, valid: Tensor | None, rule: _Rule, masks: bool, binary: bool, want_tau: bool
) -> Found:
    """(B, C, *spatial) on a CUDA device -> (B, d) labels or (B, C, d) masks, and the (B, C) sizes of the sets."""
    valid = None if valid is None else valid.reshape(-1)
    kind = _kind(prob, valid, kernels, rule, masks, binary, want_tau) if _is_direct() else None
    plan = _PLANS.get(kind) if kind is not None else None
    if plan is not None and (found := plan.solve(prob, valid, want_tau)) is not None:
        return found
    job = kernels(prob, valid, rule, int(binary and not want_tau))
    shape = (*prob.shape[:2], job.size) if masks else (prob.shape[0], job.size)
    out = torch.empty(shape, dtype=torch.bool if masks else torch.int64, device=prob.device)
    job.survey()
    once, settled = len(job.launches), False
    while not settled:
        del job.launches[once:]
        job.finish(out, masks, binary)
        settled = _is_settled(job.space, job.prob)
    if kind is not None and all(hasattr(compiled, "packed_metadata") for _, compiled, *_ in job.launches):
        _remember(_PLANS, kind, _Plan(job, out, job.prob is not prob, once))
    return out, job.tau.clone() if want_tau else None


@_kernel
def _distance(pixel, s0, s1, s2, n1, n2, AXES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of pixels -> their distance from the first one in memory."""
    if AXES == 1:
        distance = pixel.to(tl.int64) * s2
    elif AXES == 2:
        distance = (pixel // n2).to(tl.int64) * s1 + (pixel % n2).to(tl.int64) * s2
    else:
        plane = pixel // n2
        distance = (plane // n1).to(tl.int64) * s0 + (plane % n1).to(tl.int64) * s1 + (pixel % n2).to(tl.int64) * s2
    return distance


@_kernel
def _pixels(tile, PIXELS: tl.constexpr, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of the pixels of a tile; in 64 bits only where it takes them, for divisions are slow in those."""
    start = tile.to(tl.int64) * PIXELS if LONG else tile * PIXELS
    return start + tl.arange(0, PIXELS)


@_kernel
def _cut_at(t, WORK: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_round_down`, but the result is in float64 again; t is not negative."""
    low = t.to(WORK)
    if low.dtype == tl.float32:
        bits = low.to(tl.int32, bitcast=True)
        low = tl.where(low.to(tl.float64) > t, bits - 1, bits).to(tl.float32, bitcast=True)
    return low.to(tl.float64)


@_kernel
def _quotient(n, s, mu, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_ratio`."""
    return s / tl.maximum(n + mu + OFFSET, 1e-30)


@_kernel
def _survey(  # type: ignore[no-untyped-def]
    prob, valid, masses, highs, bads, chunks, classes, size, sb, sc, s0, s1, s2, n1, n2, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, SLACK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr,
    AXES: tl.constexpr, VALID: tl.constexpr, LONG: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Mass and maximum of a chunk inside `valid`, and whether it holds what is no probability."""
    chunk, block = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    groups = tl.cdiv(classes, GROUP)
    b, c = block // groups, block % groups * GROUP + tl.arange(0, GROUP)
    here = c < classes
    base = prob + b.to(tl.int64) * sb + c.to(tl.int64)[:, None] * sc
    mass = tl.zeros([GROUP, PIXELS], tl.float64)
    high = tl.zeros([GROUP, PIXELS], BITS)
    worst = tl.zeros([GROUP, PIXELS], BITS)
    for tile in tl.range(0, CHUNK // PIXELS, loop_unroll_factor=UNROLL):
        pixel = _pixels(chunk * (CHUNK // PIXELS) + tile, PIXELS, LONG)
        inside = pixel < size
        at = _distance(pixel, s0, s1, s2, n1, n2, AXES)
        p = tl.load(base + at[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(WORK)
        # The bits of probabilities are ordered as they are; as unsigned numbers, those of negative values and of NaN
        # are larger. One maximum of the bits therefore serves both ends; adding 0 makes -0 a 0.
        bits = (p + 0.0).to(BITS, bitcast=True)
        if VALID:
            seen = (tl.load(valid + b.to(tl.int64) * size + pixel, mask=inside, other=0) != 0)[None, :]
            worst = tl.maximum(worst, bits)
            high = tl.maximum(high, tl.where(seen, bits, tl.zeros([GROUP, PIXELS], BITS)))
            p = tl.where(seen, p, 0.0)
        else:
            high = tl.maximum(high, bits)
        mass += p.to(tl.float64)
    if not VALID:
        worst = high
    worst_p = tl.max(worst, 1).to(WORK, bitcast=True)
    good = (worst_p >= 0.0) & (worst_p - 1.0 <= SLACK)  # near 1, the difference is exact
    row = (b * classes + c).to(tl.int64) * chunks + chunk
    tl.store(masses + row, tl.sum(mass, 1), mask=here)
    tl.store(highs + row, tl.max(high, 1).to(WORK, bitcast=True).to(tl.float64), mask=here)
    tl.store(bads + row, tl.where(good, 0.0, 1.0).to(tl.float64), mask=here)


@_kernel
def _begin(  # type: ignore[no-untyped-def]
    prob, valid, masses, highs, bads, chunks, all_bad, all_open, all_kept, all_mu, all_t, all_n, all_s, all_cut, first,
    limit, step, classes, size, sb, sc, s0, s1, s2, n1, n2, OFFSET: tl.constexpr, SAMPLE: tl.constexpr,
    PARTS: tl.constexpr, AXES: tl.constexpr, VALID: tl.constexpr, LONG: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Partial sums of a row -> mass, whether it is kept, and a first threshold; `limit` is the bits of a float64."""
    row = tl.program_id(0)
    b, c = row // classes, row % classes
    mass = tl.zeros([PARTS], tl.float64)
    high = tl.zeros([PARTS], tl.float64)
    bad = tl.zeros([PARTS], tl.float64)
    for start in range(0, chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        at = row.to(tl.int64) * chunks + part
        mass += tl.load(masses + at, mask=part < chunks, other=0.0)
        high = tl.maximum(high, tl.load(highs + at, mask=part < chunks, other=0.0))
        bad = tl.maximum(bad, tl.load(bads + at, mask=part < chunks, other=0.0))
    top = tl.max(high, 0)
    bound = tl.full([], limit, tl.int64).to(tl.float64, bitcast=True)
    kept = (top > bound) & (c >= first)
    t = 0.8 * top / (1.0 + top)  # no fixed point exceeds top / (1 + top)
    cut = tl.full([], float("inf"), tl.float64)
    if kept:
        index = tl.arange(0, SAMPLE)
        pixel = index.to(tl.int64) * step if LONG else index * step
        inside = pixel < size
        base = prob + b.to(tl.int64) * sb + c.to(tl.int64) * sc
        p = tl.load(base + _distance(pixel, s0, s1, s2, n1, n2, AXES), mask=inside, other=0.0).to(tl.float64)
        if VALID:
            seen = tl.load(valid + b.to(tl.int64) * size + pixel, mask=inside, other=0)
            p = tl.where(seen != 0, p, 0.0)
        mu = tl.sum(p, 0)
        ratio = OFFSET / tl.full([], step, tl.float64)
        for _ in range(5):
            own = p > t
            n = tl.sum(own.to(tl.float64), 0)
            s = tl.sum(tl.where(own, p, 0.0), 0)
            better = s / tl.maximum(n + mu + ratio, 1e-30)
            t = tl.where(better > 0.0, better, t)
        cut = _cut_at(t, WORK)
    tl.store(all_bad + row, tl.max(bad, 0))
    tl.store(all_open + row, kept.to(tl.float64))
    tl.store(all_kept + row, kept.to(tl.float64))
    tl.store(all_mu + row, tl.sum(mass, 0))
    tl.store(all_t + row, -1.0)  # of a set that has been measured, and there is none yet
    tl.store(all_n + row, 0.0)
    tl.store(all_s + row, 0.0)
    tl.store(all_cut + row, cut)


@_kernel
def _tally(  # type: ignore[no-untyped-def]
    prob, valid, sizes, masses, nexts, chunks, all_open, all_cut, first, classes, size, sb, sc, s0, s1, s2, n1, n2,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr, AXES: tl.constexpr,
    VALID: tl.constexpr, LONG: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Size, mass and smallest member of the part of {p > cut} in a chunk, for rows that have not settled."""
    chunk, block = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    groups = tl.cdiv(classes - first, GROUP)
    b, c = block // groups, first + block % groups * GROUP + tl.arange(0, GROUP)
    row = b * classes + c
    active = tl.load(all_open + row, mask=c < classes, other=0.0) > 0.0
    if tl.max(active.to(tl.int32), 0) > 0:
        cut = tl.load(all_cut + row, mask=active, other=float("inf")).to(WORK)[:, None]
        base = prob + b.to(tl.int64) * sb + c.to(tl.int64)[:, None] * sc
        number = tl.zeros([GROUP, PIXELS], tl.int32)
        mass = tl.zeros([GROUP, PIXELS], tl.float64)
        nearest = tl.full([GROUP, PIXELS], float("inf"), WORK)
        for tile in tl.range(0, CHUNK // PIXELS, loop_unroll_factor=UNROLL):
            pixel = _pixels(chunk * (CHUNK // PIXELS) + tile, PIXELS, LONG)
            inside = pixel < size
            at = _distance(pixel, s0, s1, s2, n1, n2, AXES)
            p = tl.load(base + at[None, :], mask=active[:, None] & inside[None, :], other=0.0).to(WORK)
            own = p > cut
            if VALID:
                seen = tl.load(valid + b.to(tl.int64) * size + pixel, mask=inside, other=0)
                own = own & (seen[None, :] != 0)
            number += own.to(tl.int32)
            mass += tl.where(own, p, 0.0).to(tl.float64)
            nearest = tl.minimum(nearest, tl.where(own, p, float("inf")))
        part = row.to(tl.int64) * chunks + chunk
        tl.store(sizes + part, tl.sum(number, 1).to(tl.float64), mask=active)
        tl.store(masses + part, tl.sum(mass, 1), mask=active)
        tl.store(nexts + part, tl.min(nearest, 1).to(tl.float64), mask=active)


@_kernel
def _advance(  # type: ignore[no-untyped-def]
    sizes, masses, nexts, chunks, all_open, all_kept, all_mu, all_t, all_n, all_s, all_cut, shared_n, shared_s, names,
    held, lead, tau, classes, OFFSET: tl.constexpr, PARTS: tl.constexpr, FINAL: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Partial sums of a row -> its next threshold, and whether that gives the same set.

    In the last pass also the list of the unpruned classes of every image, which is `held` classes long, and `lead`,
    its first pruned class.
    """
    row = tl.program_id(0)
    n = tl.load(all_n + row)
    if tl.load(all_open + row) > 0.0:
        number = tl.zeros([PARTS], tl.float64)
        mass = tl.zeros([PARTS], tl.float64)
        nearest = tl.full([PARTS], float("inf"), tl.float64)
        for start in range(0, chunks, PARTS):
            part = start + tl.arange(0, PARTS)
            at = row.to(tl.int64) * chunks + part
            number += tl.load(sizes + at, mask=part < chunks, other=0.0)
            mass += tl.load(masses + at, mask=part < chunks, other=0.0)
            nearest = tl.minimum(nearest, tl.load(nexts + at, mask=part < chunks, other=float("inf")))
        n = tl.sum(number, 0)
        s = tl.sum(mass, 0)
        old = tl.load(all_cut + row)
        t = tl.maximum(tl.load(all_t + row), _quotient(n, s, tl.load(all_mu + row), OFFSET))  # climbs, but for rounding
        cut = _cut_at(t, WORK)
        settled = (cut >= old) & (cut < tl.min(nearest, 0))
        tl.store(all_open + row, tl.where(settled, 0.0, 1.0))
        tl.store(all_t + row, t)
        tl.store(all_n + row, n)
        tl.store(all_s + row, s)
        tl.store(all_cut + row, cut)
    if FINAL:
        b, c = row // classes, row % classes
        before = tl.full([], 0, tl.int32)
        total = tl.full([], 0, tl.int32)
        pruned = classes + tl.full([], 0, tl.int32)
        for start in range(0, classes, PARTS):
            other = start + tl.arange(0, PARTS)
            kept = tl.load(all_kept + b * classes + other, mask=other < classes, other=0.0) > 0.0
            before += tl.sum((kept & (other < c)).to(tl.int32), 0)
            total += tl.sum(kept.to(tl.int32), 0)
            pruned = tl.minimum(pruned, tl.min(tl.where(kept, classes, other), 0))
        if total == 0:  # an image whose classes are all pruned still gets its labels: all compete
            tl.store(names + row, c.to(tl.int64))
        elif tl.load(all_kept + row) > 0.0:
            tl.store(names + b * classes + before, c.to(tl.int64))
        if c == 0:
            tl.store(held + b, total.to(tl.int64))
            tl.store(lead + b, pruned.to(tl.int64))
        tl.store(tau + row, n.to(tl.int64))
        tl.store(shared_n + row, tl.full([], 0, tl.int64))
        tl.store(shared_s + row, tl.full([], 0, tl.int64))


@_kernel
def _mask(  # type: ignore[no-untyped-def]
    prob, valid, out, chunks, all_cut, first, classes, size, sb, sc, s0, s1, s2, n1, n2, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, PIXELS: tl.constexpr, AXES: tl.constexpr, VALID: tl.constexpr, LONG: tl.constexpr,
    WORK: tl.constexpr,
):  # fmt: skip
    """A chunk of {p > cut}, of the classes from `first` on; a pruned class is not read."""
    chunk, block = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    groups = tl.cdiv(classes - first, GROUP)
    b, c = block // groups, first + block % groups * GROUP + tl.arange(0, GROUP)
    here = c < classes
    cut = tl.load(all_cut + b * classes + c, mask=here, other=float("inf"))[:, None]
    base = prob + b.to(tl.int64) * sb + c.to(tl.int64)[:, None] * sc
    target = out + (b * (classes - first) + c - first).to(tl.int64)[:, None] * size
    for tile in range(0, CHUNK // PIXELS):
        pixel = _pixels(chunk * (CHUNK // PIXELS) + tile, PIXELS, LONG)
        inside = pixel < size
        at = _distance(pixel, s0, s1, s2, n1, n2, AXES)
        p = tl.load(base + at[None, :], mask=(cut < float("inf")) & inside[None, :], other=0.0).to(WORK)
        own = p > cut.to(WORK)
        if VALID:
            seen = tl.load(valid + b.to(tl.int64) * size + pixel, mask=inside, other=0)
            own = own & (seen[None, :] != 0)
        tl.store(target + pixel[None, :], own.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])


@_kernel
def _class_group(names, b, start, total, classes, GROUP: tl.constexpr, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """A group of the classes that compete in an image -> their numbers and which of them exist.

    Adjacent classes where they are adjacent in memory, pruned ones included; from the list `names` where not.
    """
    index = start + tl.arange(0, GROUP)
    if LAST:
        c = index
        here = index < classes
    else:
        here = index < total
        c = tl.load(names + b * classes + index, mask=here, other=0).to(tl.int32)
    return c, here


@_kernel
def _claim(  # type: ignore[no-untyped-def]
    prob, valid, out, tiles, all_cut, names, held, shared_n, shared_s, undecided, empty, classes, size, sb, sc, s0, s1,
    s2, n1, n2, LAST: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr,
    AXES: tl.constexpr, VALID: tl.constexpr, LONG: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Labels of the pixels in exactly one set, `undecided` for those in several, `empty` for those in none.

    What the sets share is added to `shared_n` and, in multiples of 2^-32, to `shared_s`: integers, in any order.
    """
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = _pixels(tile, PIXELS, LONG)
    inside = pixel < size
    seen = inside
    if VALID:
        seen = tl.load(valid + b.to(tl.int64) * size + pixel, mask=inside, other=0) != 0
    at = prob + b.to(tl.int64) * sb + _distance(pixel, s0, s1, s2, n1, n2, AXES)[None, :]
    total = tl.load(held + b).to(tl.int32)
    count = tl.zeros([PIXELS], tl.int32)
    holder = tl.zeros([PIXELS], tl.int32)
    stop = total
    if LAST:
        stop = tl.where(total > 0, classes, 0)
    for start in range(0, stop, GROUP):
        c, here = _class_group(names, b, start, total, classes, GROUP, LAST)
        cut = tl.load(all_cut + b * classes + c, mask=here, other=float("inf"))[:, None]
        readable = (cut < float("inf")) & seen[None, :]
        p = tl.load(at + c.to(tl.int64)[:, None] * sc, mask=readable, other=0.0).to(WORK)
        own = p > cut.to(WORK)
        count += tl.sum(own.to(tl.int32), 0)
        holder += tl.sum(tl.where(own, c[:, None], 0), 0)
    label = tl.where(count == 1, holder.to(tl.int64), tl.where(count == 0, empty, undecided).to(tl.int64))
    tl.store(out + b.to(tl.int64) * size + pixel, label, mask=inside)
    shared = count > 1
    if SCORED:  # noqa: SIM102 (known when it is compiled, unlike the other)
        if tl.max(shared.to(tl.int32), 0) > 0:
            for start in range(0, stop, GROUP):
                c, here = _class_group(names, b, start, total, classes, GROUP, LAST)
                row = b * classes + c
                cut = tl.load(all_cut + row, mask=here, other=float("inf"))[:, None]
                readable = (cut < float("inf")) & shared[None, :]
                p = tl.load(at + c.to(tl.int64)[:, None] * sc, mask=readable, other=0.0).to(WORK)
                own = p > cut.to(WORK)
                number = tl.sum(own.to(tl.int32), 1)
                mass = tl.where(own, p, 0.0).to(tl.float64) * 4294967296.0 + 0.5
                tl.atomic_add(shared_n + row, number.to(tl.int64), mask=number > 0, sem="relaxed")
                tl.atomic_add(shared_s + row, tl.sum(mass.to(tl.int64), 1), mask=number > 0, sem="relaxed")


@_kernel
def _growth(p, n, s, mu, METHOD: tl.constexpr, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_gain`: (group, pixels) probabilities and (group, 1) statistics -> scores."""
    if METHOD == "prob":
        score = p
    elif METHOD == "weight_prob":
        score = p / (1.0 + n)
    elif OFFSET == 1:
        size = n + mu + 1.0
        score = (p - s / size) * (2.0 / (size + 1.0))
    else:
        size = n + mu - s
        ratio = tl.where(size > 0.0, s / size, 0.0)
        score = (p - ratio * (1.0 - p)) / tl.maximum(size + (1.0 - p), 1e-30)
    return score


@_kernel
def _contend(  # type: ignore[no-untyped-def]
    prob, out, tiles, all_cut, all_kept, all_mu, all_n, all_s, names, held, lead, shared_n, shared_s, undecided,
    classes, size, sb, sc, s0, s1, s2, n1, n2, EVERY: tl.constexpr, METHOD: tl.constexpr, OFFSET: tl.constexpr,
    ALL: tl.constexpr, EMPTY: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr, AXES: tl.constexpr,
    VALID: tl.constexpr, LONG: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """The class of the largest score for the pixels that hold a code; of equal ones the first."""
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = _pixels(tile, PIXELS, LONG)
    inside = pixel < size
    label = tl.load(out + b.to(tl.int64) * size + pixel, mask=inside, other=0)
    shared = (label == undecided) & inside
    waiting = shared
    if EMPTY:
        waiting = shared | ((label == undecided - 1) & inside)
    if tl.max(waiting.to(tl.int32), 0) > 0:
        at = prob + b.to(tl.int64) * sb + _distance(pixel, s0, s1, s2, n1, n2, AXES)[None, :]
        total = tl.load(held + b).to(tl.int32)
        best = tl.full([PIXELS], float("-inf"), tl.float64)
        pick = tl.zeros([PIXELS], tl.int32)
        if ALL and METHOD == "rma_score":  # pruned classes score 0 for a contested pixel: the first stands for all
            pruned = tl.load(lead + b).to(tl.int32)
            best = tl.where(shared & (pruned < classes), 0.0, best)
            pick = tl.where(shared & (pruned < classes), pruned, pick)
        stop = tl.where(total > 0, total, classes)
        if EVERY:
            stop = classes
        for start in range(0, stop, GROUP):
            c, here = _class_group(names, b, start, stop, classes, GROUP, EVERY)
            row = b * classes + c
            open = here
            if EVERY:
                open = here & ((tl.load(all_kept + row, mask=here, other=0.0) > 0.0) | (total == 0))
                if not ALL or METHOD == "rma_score":
                    here = open
            cut = tl.load(all_cut + row, mask=here, other=float("inf"))[:, None]
            mu = tl.load(all_mu + row, mask=here, other=0.0)
            n = tl.load(all_n + row, mask=here, other=0.0)
            s = tl.load(all_s + row, mask=here, other=0.0)
            if METHOD != "prob":
                n -= tl.load(shared_n + row, mask=here, other=0).to(tl.float64)
                mass = tl.load(shared_s + row, mask=here, other=0).to(tl.float64) / 4294967296.0
                s = tl.where(n > 0.0, tl.maximum(s - mass, 0.0), 0.0)
            p = tl.load(at + c.to(tl.int64)[:, None] * sc, mask=here[:, None] & waiting[None, :], other=0.0).to(WORK)
            score = _growth(p.to(tl.float64), n[:, None], s[:, None], mu[:, None], METHOD, OFFSET)
            eligible = here[:, None] & waiting[None, :]
            if ALL:
                eligible = eligible & (open[:, None] | shared[None, :])
            else:
                eligible = eligible & ((p > cut.to(WORK)) | (shared[None, :] == 0))
            score = tl.where(eligible, score, float("-inf"))
            top = tl.max(score, 0)
            leader = tl.min(tl.where(score == top[None, :], c[:, None], classes), 0)
            better = (top > best) | ((top == best) & (leader < pick))
            best = tl.where(better, top, best)
            pick = tl.where(better, leader, pick)
        tl.store(out + b.to(tl.int64) * size + pixel, pick.to(tl.int64), mask=waiting)


@_kernel
def _largest(parts, row, chunks, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of a row's partial results, none of which is negative."""
    most = tl.zeros([PARTS], tl.float64)
    for start in range(0, chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        at = row.to(tl.int64) * chunks + part
        most = tl.maximum(most, tl.load(parts + at, mask=part < chunks, other=0.0))
    return tl.max(most, 0)


@_kernel
def _peaks(  # type: ignore[no-untyped-def]
    highs, bads, chunks, tables, all_bad, all_open, all_high, all_weight, all_cut, copies, rows, first, limit, classes,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Partial results of a row -> its maximum, the weight 1 or, if it is pruned, 0; its tables begin at 0.

    `limit` is the bits of a float64. Nothing is left open: the host need not come back.
    """
    row = tl.program_id(0)
    top = _largest(highs, row, chunks, PARTS)
    bound = tl.full([], limit, tl.int64).to(tl.float64, bitcast=True)
    kept = (top > bound) & (row % classes >= first)
    tl.store(all_bad + row, _largest(bads, row, chunks, PARTS))
    tl.store(all_open + row, 0.0)
    tl.store(all_high + row, top)
    tl.store(all_weight + row, kept.to(tl.float64))
    tl.store(all_cut + row, float("inf"))
    for copy in range(0, copies):
        at = (copy * rows + row).to(tl.int64) * ROOM + tl.arange(0, ROOM)
        tl.store(tables + at, tl.zeros([ROOM], tl.int64))


@_kernel
def _weigh(  # type: ignore[no-untyped-def]
    all_high, all_weight, names, held, classes, SHARES: tl.constexpr, LEAST: tl.constexpr, GROUP: tl.constexpr
):
    """As `_level_weights`, of an image; also the list of its unpruned classes, which is `held` classes long."""
    first = tl.program_id(0) * classes
    least = tl.full([], LEAST, tl.float64)
    most = 1.0 - least
    quarter = tl.full([], 1.5707963267948966, tl.float64)  # of a turn
    angle = (tl.arange(0, SHARES).to(tl.float64) + 0.5) * (quarter / SHARES)
    sine = tl.sin(angle)
    share = (sine * sine)[None, :]
    weight = tl.log(tl.sin(2.0 * angle))
    largest = tl.full([], 0.0, tl.float64)
    clear = tl.full([], 0, tl.int32)  # classes above pruning_prob
    for start in range(0, classes, GROUP):
        c = start + tl.arange(0, GROUP)
        high = tl.load(all_high + first + c, mask=c < classes, other=0.0)
        largest = tl.maximum(largest, tl.max(high, 0))
        kept = tl.load(all_weight + first + c, mask=c < classes, other=0.0) > 0.0
        clear += tl.sum(kept.to(tl.int32), 0)
        m = tl.minimum(tl.maximum(high, least), most)[:, None]
        either = share * m + (1.0 - share) * (1.0 - m)
        weight += tl.sum(tl.where((c < classes)[:, None], tl.log(either), 0.0), 0)
    weight = tl.exp(weight - tl.max(weight, 0))
    weight = (weight / tl.sum(weight, 0))[None, :]
    total = tl.full([], 0, tl.int32)
    for start in range(0, classes, GROUP):
        c = start + tl.arange(0, GROUP)
        high = tl.load(all_high + first + c, mask=c < classes, other=0.0)
        kept = tl.load(all_weight + first + c, mask=c < classes, other=0.0) > 0.0
        kept = (kept | ((clear == 0) & (high > largest / 2.0))) & (c < classes)
        m = tl.minimum(tl.maximum(high, least), most)
        there = share * m[:, None]
        either = there + (1.0 - share) * (1.0 - m[:, None])
        present = tl.maximum(m * m, tl.sum(weight * there / either, 1))
        tl.store(all_weight + first + c, tl.where(kept, present / m, 0.0), mask=c < classes)
        place = total + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(names + first + place, c.to(tl.int64), mask=kept)
        total += tl.sum(kept.to(tl.int32), 0)
    tl.store(held + tl.program_id(0), total.to(tl.int64))


@_kernel
def _seen(valid, parts, chunks, size, SPAN: tl.constexpr, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """The valid pixels of a chunk, counted."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    pixel = _pixels(chunk, SPAN, LONG)
    seen = tl.load(valid + b.to(tl.int64) * size + pixel, mask=pixel < size, other=0) != 0
    tl.store(parts + tl.program_id(0), tl.sum(seen.to(tl.int64), 0))


@_kernel
def _weighted(  # type: ignore[no-untyped-def]
    at, all_weight, names, b, start, stop, classes, sc, inside, GROUP: tl.constexpr, EVERY: tl.constexpr
):
    """A group of classes of an image -> their numbers, which of them are unpruned, and (group, pixels) float32 p w."""
    c, here = _class_group(names, b, start, stop, classes, GROUP, EVERY)
    weight = tl.load(all_weight + b * classes + c, mask=here, other=0.0).to(tl.float32)
    kept = weight > 0.0
    p = tl.load(at + c.to(tl.int64)[:, None] * sc, mask=kept[:, None] & inside[None, :], other=0.0)
    return c, kept, p.to(tl.float32) * weight[:, None]


@_kernel
def _scale(  # type: ignore[no-untyped-def]
    at, all_weight, names, b, stop, classes, sc, inside, UNROLL: tl.constexpr, GROUP: tl.constexpr,
    PIXELS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """(pixels,) what makes the weighted probabilities of a pixel's classes sum to 1."""
    whole = tl.zeros([PIXELS], tl.float32)
    for start in tl.range(0, stop, GROUP, loop_unroll_factor=UNROLL):
        _, _, q = _weighted(at, all_weight, names, b, start, stop, classes, sc, inside, GROUP, EVERY)
        whole += tl.sum(q, 0)
    return tl.div_rn(tl.full([PIXELS], 1.0, tl.float32), tl.maximum(whole, 1e-30))


@_kernel
def _level(  # type: ignore[no-untyped-def]
    q, scale, FLOOR: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr, LEVELS: tl.constexpr
):
    """(group, pixels) q and (pixels,) scale -> the levels of their product, within the table whatever the map holds."""
    above = tl.fma(q, tl.broadcast_to(scale[None, :], q.shape), tl.full(q.shape, FLOOR, tl.float32))  # as addcmul does
    level = (above.to(tl.int32, bitcast=True) >> SHIFT) - LEAST
    return tl.minimum(tl.maximum(level, 0), LEVELS - 1)


@_kernel
def _count(  # type: ignore[no-untyped-def]
    prob, valid, tables, parts, tiles, chunks, all_weight, names, held, counted, copies, rows, samples, step, classes,
    size, sb, sc, s0, s1, s2, n1, n2, UNROLL: tl.constexpr, EVERY: tl.constexpr, SAMPLES: tl.constexpr,
    SPAN: tl.constexpr, MASKS: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr,
    PIXELS: tl.constexpr, ROOM: tl.constexpr, FLOOR: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr,
    AXES: tl.constexpr, VALID: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Adds a tile of the grid, `samples` pixels `step` apart, to the tables, but for level 0.

    With `valid`, a tile of all pixels, of which those are added that are on the grid of the valid ones. `counted`
    becomes the number of pixels on the grid.
    """
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    index = _pixels(tile, PIXELS, LONG)
    if VALID:
        pixel = index
        own = valid + b.to(tl.int64) * size
        begin = tile.to(tl.int64) * PIXELS
        near = begin // SPAN * SPAN + tl.arange(0, SPAN)
        before = tl.sum((tl.load(own + near, mask=near < begin, other=0) != 0).to(tl.int64), 0)
        number = tl.full([], 0, tl.int64)
        for start in range(0, chunks, PARTS):
            chunk = start + tl.arange(0, PARTS)
            seen = tl.load(parts + b * chunks + chunk, mask=chunk < chunks, other=0)
            before += tl.sum(tl.where(chunk < begin // SPAN, seen, 0), 0)
            number += tl.sum(seen, 0)
        apart = tl.full([], 1, tl.int64)
        if not MASKS:
            apart = tl.maximum(number // SAMPLES - 1, 1) | 1
        inside = tl.load(own + pixel, mask=pixel < size, other=0) != 0
        place = before + tl.cumsum(inside.to(tl.int64), 0) - 1
        inside = inside & (place % apart == 0)
        number = (number + apart - 1) // apart
    else:
        pixel = index * step
        inside = index < samples
        number = tl.full([], samples, tl.int64)
    if tile == 0:
        tl.store(counted + b, number)
    at = prob + b.to(tl.int64) * sb + _distance(pixel, s0, s1, s2, n1, n2, AXES)[None, :]
    stop = classes
    if not EVERY:
        stop = tl.load(held + b).to(tl.int32)
    scale = tl.full([PIXELS], 1.0, tl.float32)
    if not MASKS:
        scale = _scale(at, all_weight, names, b, stop, classes, sc, inside, UNROLL, GROUP, PIXELS, EVERY)
    first = tl.program_id(0) % copies * rows + b * classes
    for start in tl.range(0, stop, GROUP, loop_unroll_factor=UNROLL):
        c, kept, q = _weighted(at, all_weight, names, b, start, stop, classes, sc, inside, GROUP, EVERY)
        level = _level(q, scale, FLOOR, SHIFT, LEAST, LEVELS)
        here = kept[:, None] & inside[None, :] & (level > 0)
        table = tables + (first + c).to(tl.int64)[:, None] * ROOM
        tl.atomic_add(table + level, tl.full([GROUP, PIXELS], 1, tl.int64), mask=here, sem="relaxed")


@_kernel
def _edge(level, FLOOR: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_level_edges`."""
    edge = ((level + LEAST) << SHIFT).to(tl.float32, bitcast=True).to(tl.float64) - FLOOR
    return tl.minimum(tl.maximum(edge, 0.0), 1.0)


@_kernel
def _dice_from(at, level, sizes, N, du):  # type: ignore[no-untyped-def]
    """The expected Dice of the pixels from the level `at` on."""
    n = tl.sum(tl.where(level == at, sizes, 0.0), 0)
    return tl.sum(2.0 * tl.minimum(n, N) / (n + N) * du, 0)


@_kernel
def _best_from(level, sizes, N, du, DICE: tl.constexpr, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_best_level`, of one class."""
    if DICE:
        last = tl.maximum(tl.sum((du > 0.0).to(tl.int32), 0) - 1, 0)
        middle = tl.full([], 0, tl.int32)
        score = tl.full([], -1.0, tl.float64)
        for turn in range(0, LEVELS, 16):
            at = tl.minimum(tl.maximum(turn, 1), last)
            found = _dice_from(at, level, sizes, N, du)
            middle = tl.where(found > score, at, middle)
            score = tl.maximum(found, score)
        best = middle
        score = tl.full([], -1.0, tl.float64)
        for turn in range(0, 31):
            at = tl.minimum(tl.maximum(middle - 15 + turn, 1), last)
            found = _dice_from(at, level, sizes, N, du)
            best = tl.where(found > score, at, best)
            score = tl.maximum(found, score)
    else:
        above = N * du
        below = du / N
        above = tl.sum(above, 0) - tl.cumsum(above, 0) + above
        below = tl.cumsum(below, 0) - below
        scores = above / tl.maximum(sizes, 1.0) + sizes * below
        scores = tl.where(level == 0, -2.0, tl.where(du > 0.0, scores, -1.0))
        best = tl.argmax(scores, 0)
        score = tl.max(scores, 0)
    return best, score


@_kernel
def _grow(  # type: ignore[no-untyped-def]
    tables, gains, all_high, all_weight, all_presence, all_cut, counted, copies, rows, classes, UNROLL: tl.constexpr,
    DICE: tl.constexpr, MASKS: tl.constexpr, TOGETHER: tl.constexpr, LEVELS: tl.constexpr, ROOM: tl.constexpr,
    FLOOR: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """The tables of a row -> as `_level_gains`, and its presence; or the threshold of its mask."""
    row = tl.program_id(0)
    if tl.load(all_weight + row) > 0.0:
        level = tl.arange(0, ROOM)
        count = tl.zeros([ROOM], tl.int64)
        for copy in tl.range(0, copies, loop_unroll_factor=UNROLL):
            count += tl.load(tables + (copy * rows + row).to(tl.int64) * ROOM + level)
        rest = tl.load(counted + row // classes) - tl.sum(count, 0)
        pixels = tl.where(level == 0, rest, count).to(tl.float64)
        sizes = tl.sum(pixels, 0) - tl.cumsum(pixels, 0) + pixels
        edge = _edge(level, FLOOR, SHIFT, LEAST)
        du = tl.where(sizes > 0.0, _edge(level + 1, FLOOR, SHIFT, LEAST) - edge, 0.0)
        N = tl.maximum(sizes - pixels / 2.0, 0.5)
        best, score = _best_from(level, sizes, N, du, DICE, LEVELS)
        if MASKS:
            high = tl.load(all_high + row)
            cut = tl.sum(tl.where(level == best, edge, 0.0), 0).to(WORK)
            if cut.dtype == tl.float32:  # p > the number before an edge is p >= the edge
                cut = (cut.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
            else:
                cut = (cut.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
            empty = score < (1.0 - high.to(WORK)).to(tl.float64)
            tl.store(all_cut + row, tl.where(empty, float("inf"), cut.to(tl.float64)))
        else:
            n = tl.sum(tl.where(level == best, sizes, 0.0), 0)
            present = tl.sum(du, 0)
            p = tl.cumsum(du, 0) - du / 2.0
            both = tl.minimum(n, N)
            others = N
            if not DICE:
                others = N - both
            whole = n + TOGETHER * others + (1.0 - TOGETHER) * (tl.sum(others * du, 0) / present)
            won = du / whole
            lost = du * both / (whole * whole)
            won = tl.cumsum(won, 0) - won / 2.0
            cost = tl.sum(lost, 0)
            if DICE:
                gain = 2.0 * (won - cost)
            else:
                saved = tl.cumsum(lost, 0) - lost / 2.0
                gain = won - cost * (1.0 - (1.0 - TOGETHER) * p / present) + TOGETHER * saved
            root = tl.sqrt(tl.maximum(p * (1.0 - p), 0.0))
            chosen = tl.where(level >= best, pixels, 0.0)
            others = pixels
            if not DICE:
                others = pixels - chosen
            whole = n + tl.sum(others * p, 0) + root / p * tl.sum(others * root, 0)
            lost = chosen * p / (whole * whole)
            cost = tl.sum(lost, 0)
            if DICE:
                gain += 2.0 * (p / whole - cost)
            else:
                gain += p / whole - (1.0 - p) * cost + root * tl.sum(lost * root / p, 0)
            tl.store(gains + row.to(tl.int64) * ROOM + level, gain / 2.0)
            tl.store(all_presence + row, present)


@_kernel
def _divide(gains, all_weight, all_presence, classes, PARTS: tl.constexpr, ROOM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The growth of a row over 1 + the presence of the image's other unpruned classes."""
    row = tl.program_id(0)
    if tl.load(all_weight + row) > 0.0:
        present = tl.zeros([PARTS], tl.float64)
        for start in range(0, classes, PARTS):
            c = start + tl.arange(0, PARTS)
            other = row // classes * classes + c
            kept = tl.load(all_weight + other, mask=c < classes, other=0.0) > 0.0
            present += tl.load(all_presence + other, mask=kept, other=0.0)
        expected = 1.0 + tl.sum(present, 0) - tl.load(all_presence + row)
        at = gains + row.to(tl.int64) * ROOM + tl.arange(0, ROOM)
        tl.store(at, tl.load(at) / expected)


@_kernel
def _decide(  # type: ignore[no-untyped-def]
    prob, out, tiles, gains, all_weight, names, held, classes, size, sb, sc, s0, s1, s2, n1, n2, UNROLL: tl.constexpr,
    EVERY: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr, ROOM: tl.constexpr,
    FLOOR: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr, AXES: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The class of the largest growth for a tile of pixels; of equal ones the first."""
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = _pixels(tile, PIXELS, LONG)
    inside = pixel < size
    at = prob + b.to(tl.int64) * sb + _distance(pixel, s0, s1, s2, n1, n2, AXES)[None, :]
    total = tl.load(held + b).to(tl.int32)
    stop = total
    if EVERY:
        stop = classes
    scale = _scale(at, all_weight, names, b, stop, classes, sc, inside, UNROLL, GROUP, PIXELS, EVERY)
    best = tl.full([PIXELS], float("-inf"), tl.float64)
    pick = tl.full([PIXELS], 0, tl.int32) + tl.load(names + b * classes, mask=total > 0, other=0).to(tl.int32)
    for start in tl.range(0, stop, GROUP, loop_unroll_factor=UNROLL):
        c, kept, q = _weighted(at, all_weight, names, b, start, stop, classes, sc, inside, GROUP, EVERY)
        level = _level(q, scale, FLOOR, SHIFT, LEAST, LEVELS)
        table = gains + (b * classes + c).to(tl.int64)[:, None] * ROOM
        gain = tl.load(table + level, mask=kept[:, None] & inside[None, :], other=float("-inf"))
        top = tl.max(gain, 0)
        leader = tl.min(tl.where(gain == top[None, :], c[:, None], classes), 0)
        pick = tl.where(top > best, leader, pick)
        best = tl.maximum(best, top)
    tl.store(out + b.to(tl.int64) * size + pixel, pick.to(tl.int64), mask=inside)
