"""RankSEG-RMA beyond one image: thresholds for a case, for a data set, or from a file, by histograms without labels.

The objective of a pool of pixels (all slices of a case, all images of a data set), where class c gets n_c pixels that
hold the mass s_c of its probability and mu_c is all of its mass in the pool, is the sum over the classes of

    Dice  f_c = 2 s_c / (n_c + mu_c + 1)        IoU  f_c = s_c / (n_c + mu_c - s_c)

One class alone. Nothing in the derivation of the rule says that the pixels come from one image: the best set is
{p > t_c} with t_c = max over prefixes of s / (n + mu + k), k = 1 for Dice and 0 for IoU. A histogram of p is enough.

Classes that exclude each other. Every pixel goes to exactly one class, so the sets of the classes alone, which overlap
and leave pixels out, must give way. To first order around their optimum (n_c, s_c), a pixel of probability p adds

    df_c = (df_c/ds) p + df_c/dn:   Dice  2 (p - t_c) / (n_c + mu_c + 1)
                                    IoU   (n_c + mu_c) (p - t_c) / (n_c + mu_c - s_c)^2

for 2 s / (n + mu + 1)^2 = 2 t / (n + mu + 1) and s / (n + mu - s)^2 = (n + mu) t / (n + mu - s)^2. The linearised sum
is maximal where every pixel takes the class of its largest gain w_c (p_c - t_c): the gain is positive exactly in
{p_c > t_c}, a contested pixel takes the set that gains most, a pixel in no set the class that loses least. A pixel is a
tiny part of a pool, so first order is exact but for what the conflicts move n_c and s_c. The optimal partition itself
is a fixed point of the same equations with its own n_c and s_c (the parametric form of a sum of ratios, Jong 2012); a
further round would need a further pass. On CamVid a second round moved the objective from 0.64575 to 0.64584, a
fourth to 0.64585 (measured). Two classes: the foreground's threshold alone, as the paper does.

Counts and masses are whole numbers (masses in units of 2^-30), so a pool is the same whatever the order of the images
and the number of processes. Bins are 2^-14 wide; the exact threshold is above t by 2^-14 m / (n + mu + k) at most, m
the pixels in its own bin: 1e-7 and less on real maps (`resolution` in a thresholds file).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exp.files.text import read_json
from exp.runtime.errors import InputError

BITS, UNIT_BITS = 14, 30  # of a bin's number; of a probability as a whole number
BINS = 2**BITS
PIECE = 2**20  # pixels histogrammed at a time: their sum stays a whole number in float64, and temporaries small
DECIDED = 2**20  # elements decided at a time
MAX_OBJECT = 10_000_000  # bytes of a thresholds file; one of 1,000 classes has 0.2 MB
COPIES = 32  # of a histogram on a GPU: most pixels are in few bins, and would wait for each other


@dataclass
class Pool:
    """Histogram of each class's probabilities: (C, BINS) int64 pixels and masses, (C,) int64 maxima, in 2^-30."""

    pixels: Tensor
    masses: Tensor
    highest: Tensor

    def __add__(self, other: "Pool") -> "Pool":
        highest = torch.maximum(self.highest, other.highest)
        return Pool(self.pixels + other.pixels, self.masses + other.masses, highest)

    def cpu(self) -> "Pool":
        return Pool(self.pixels.cpu(), self.masses.cpu(), self.highest.cpu())


def pool_of(prob: Tensor) -> Pool:
    """(1, C, H, W) float32 probabilities -> their Pool, on the same device; a GPU is not waited for."""
    shape = (prob.shape[1], BINS)
    pool = Pool(*(torch.zeros(s, dtype=torch.int64, device=prob.device) for s in (shape, shape, shape[:1])))
    for c, plane in enumerate(prob[0]):
        for piece in plane.reshape(-1).split(PIECE):
            whole = piece.mul(2.0**UNIT_BITS).round_().long()
            pool.highest[c] = torch.maximum(pool.highest[c], whole.amax())
            if prob.device.type == "cpu" and pool.highest[c] < 2 ** (
                UNIT_BITS - BITS
            ):  # all in the lowest bin: quicker
                pool.pixels[c, 0] += len(whole)
                pool.masses[c, 0] += whole.sum()
                continue
            bins = (whole >> (UNIT_BITS - BITS)).clamp_(0, BINS - 1)  # NaN becomes any number; inference tells it
            pool.pixels[c] += histogram(bins, BINS)
            pool.masses[c] += histogram(bins, BINS, whole)
    return pool


def histogram(values: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """Whole numbers in 0..size-1 -> (size,) int64: how many there are of each, or the exact sum of their weights.

    A GPU is not waited for, as torch.bincount would to learn the largest value.
    """
    values = values.flatten()
    if values.device.type == "cpu":
        return torch.bincount(values, None if weights is None else weights.double(), minlength=size).long()
    place = torch.arange(len(values), device=values.device).remainder_(COPIES).mul_(size).add_(values)
    found = torch.zeros(COPIES * size, dtype=torch.int64, device=values.device)
    found.scatter_add_(0, place, torch.ones_like(place) if weights is None else weights)
    return found.view(COPIES, size).sum(0)


@dataclass(frozen=True)
class Thresholds:
    """What a pool says of its classes: t, size n, mass s and total mass mu of each, and whether it was pruned.

    resolution: how far the exact thresholds may lie above.
    """

    opt_metric: str
    threshold: tuple[float, ...]
    size: tuple[float, ...]
    mass: tuple[float, ...]
    total: tuple[float, ...]
    kept: tuple[bool, ...]
    resolution: tuple[float, ...]

    def gain_per_unit(self) -> Tensor:
        """(C,) float64 gain of a pixel per p - t, w_c above."""
        n, s, mu = (torch.tensor(v, dtype=torch.float64) for v in (self.size, self.mass, self.total))
        if self.opt_metric == "dice":
            return 2 / (n + mu + 1)
        return (n + mu) / (n + mu - s).clamp_min(1e-30) ** 2

    def decide(self, prob: Tensor) -> Tensor:
        """(B, C, *spatial) probabilities -> (B, *spatial) int64 labels, without a copy of the map."""
        kept = torch.tensor(self.kept)
        if prob.shape[1] == 2:
            return (prob[:, 1] > self.threshold[1]).long() if self.kept[1] else torch.zeros_like(prob[:, 1]).long()
        if not kept.any():
            return prob.max(dim=1).indices
        gain = self.gain_per_unit().masked_fill(~kept, 0.0)
        gain = gain / gain.max()
        base = (-gain * torch.tensor(self.threshold, dtype=torch.float64)).masked_fill(~kept, -torch.inf)
        gain, base = (v.to(prob.device, prob.dtype, non_blocking=True)[:, None, None] for v in (gain, base))
        plane = prob.flatten(2, -2)  # rows of an image; of a volume, those of all slices
        rows = max(1, DECIDED // (plane.shape[1] * plane.shape[3]))
        labels = [torch.addcmul(base, piece, gain).max(dim=1).indices for piece in plane.split(rows, dim=2)]
        return torch.cat(labels, dim=1).view(prob[:, 0].shape)


def solve(pool: Pool, opt_metric: str, pruning_prob: float) -> Thresholds:
    """A pool -> its thresholds; a class whose largest probability is not above pruning_prob is pruned."""
    offset = 1.0 if opt_metric == "dice" else 0.0
    pixels, masses = pool.pixels.flip(1), pool.masses.flip(1)
    n, s = pixels.cumsum(1).double(), masses.cumsum(1).double() / 2**UNIT_BITS
    mu = s[:, -1:]
    ratio = s / (n + mu + offset).clamp_min(1e-30)
    t, best = ratio.max(1)
    own = (t * BINS).long().clamp_(max=BINS - 1)
    n, s = (v.gather(1, best[:, None])[:, 0] for v in (n, s))
    mu = mu[:, 0]
    crowd = pool.pixels.gather(1, own[:, None])[:, 0]
    kept = pool.highest.double() / 2**UNIT_BITS > pruning_prob
    resolution = crowd / (n + mu + offset).clamp_min(1e-30) / BINS
    return Thresholds(opt_metric, *(tuple(column.tolist()) for column in (t, n, s, mu, kept, resolution)))


@dataclass(frozen=True)
class PooledRule:
    """A rule whose thresholds are those of a pool: all slices of the image's case, or the whole data set."""

    scope: str
    opt_metric: str
    pruning_prob: float

    def key(self, case: str | None) -> tuple[str, str | None]:
        """An image's case -> the name of its pool."""
        return (self.scope, case if self.scope == "case" else None)


Pools = dict[tuple[str, str | None], Pool]  # by scope and case
RuleThresholds = Mapping[str, Mapping[str | None, Thresholds]]  # by rule, then by case (None: of the whole data set)


def gather_thresholds(
    rules: Mapping[str, Callable],
    maps: Iterable[tuple[Tensor, str | None]],
    gather: Callable[[Pools], list[Pools]] = lambda pools: [pools],
) -> RuleThresholds:
    """The first pass: (1, C, H, W) probabilities and case of each image -> the thresholds of the pooled rules.

    Without such a rule `maps` is left alone. gather: a process's pools -> those of all processes.
    """
    pooled = {name: rule for name, rule in rules.items() if isinstance(rule, PooledRule)}
    if not pooled:
        return {}
    own, total = {}, {}
    for prob, case in maps:
        pool = pool_of(prob)
        del prob  # before the next image's is computed: of large images there is room for one
        for key in {rule.key(case) for rule in pooled.values()}:
            own[key] = own[key] + pool if key in own else pool
    for pools in gather({key: pool.cpu() for key, pool in own.items()}):
        for key, pool in pools.items():
            total[key] = total[key] + pool if key in total else pool
    return {
        name: {
            case: solve(pool, rule.opt_metric, rule.pruning_prob)
            for (scope, case), pool in total.items()
            if scope == rule.scope
        }
        for name, rule in pooled.items()
    }


def thresholds_json(thresholds: Thresholds, classes: tuple[str, ...], context: Mapping[str, Any]) -> str:
    """What `load_thresholds` reads; `context` says where they come from."""
    columns = {name: getattr(thresholds, name) for name in COLUMNS}
    by_class = {c: {name: values[i] for name, values in columns.items()} for i, c in enumerate(classes)}
    content = {"opt_metric": thresholds.opt_metric, "classes": by_class, **context}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


COLUMNS = ("threshold", "size", "mass", "total", "kept", "resolution")


def load_thresholds(path: Path, num_classes: int, classes: Sequence[str] | None = None) -> Thresholds:
    """A thresholds file -> Thresholds; InputError if it is another file, or one of another number of classes.

    classes: their names, which the file's must be; None: any.
    """
    expected = "a thresholds file (results/<rule>.<split>.thresholds.json of a rule of scope: dataset)"
    try:
        content = read_json(path, expected, MAX_OBJECT)
        rows = list(content["classes"].values())
        columns = {name: tuple(row[name] for row in rows) for name in COLUMNS}
        numbers = [v for name in COLUMNS if name != "kept" for v in columns[name]]
        if content["opt_metric"] not in ("dice", "iou") or not all(type(v) is bool for v in columns["kept"]):
            raise ValueError("wrong values")
        if not all(type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in numbers):
            raise ValueError("wrong numbers")
    except InputError as error:
        raise InputError(f"predict.thresholds: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"predict.thresholds: {path}: got another file ({error!r}), expected {expected}") from None
    if len(rows) != num_classes:
        raise InputError(f"predict.thresholds: {path}: got {len(rows)} classes, expected {num_classes}")
    other = [pair for pair in zip(content["classes"], classes or ()) if pair[0] != pair[1]]
    if other:
        raise InputError(
            f"predict.thresholds: {path}: got thresholds of other classes, '{other[0][0]}' in the place of "
            f"'{other[0][1]}', expected those of this data set"
        )
    return Thresholds(content["opt_metric"], **columns)
