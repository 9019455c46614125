"""RankSEG-DEP: probabilities -> labels for the per-image Dice or IoU, the pixels of a class being dependent.

Source: Wang & Dai, "On the Relaxation of Conditional Independence Assumption for Image Segmentation", NeurIPS 2026.

The labels of two pixels i, j of a class have the covariance sqrt(v_i v_j) K(r), v = p (1 - p) and K(r) =
exp(-r^2 / (2 theta^2)), r their distance in pixels. Were pixel j of the class, the class would have the expected size

    mu_j = q + sqrt(v_j) / p_j (K * sqrt(v))_j,    q the sum of p,

and a set S of n pixels has, with the size replaced by its mean, the expected Dice 2 F(S), F(S) = sum over S of
p_j / (n + mu_j). For a given n the best set is the n pixels of the largest p_j / (n + mu_j): a level set.

No sort finds n. With the number n in the denominators set free and a price lambda for its being the set's size, F is
stationary where S = {p_j / (n + mu_j) > lambda}, n = |S| and lambda = sum over S of p_j / (n + mu_j)^2, which is what
one more in all denominators costs. Iterating from a level set of p settles in a few rounds; the best set seen is kept.
Where a map is one tile, single pixels then join or leave for as long as F grows. Against all n the F found is lower by
2e-7 of itself on average and 1e-4 at most (1,500 maps of 4 to 576 pixels, theta 1 to 300).

IoU. The expected IoU is, with the same step, F(S) = sum over S of p_j / (n + e_j), e_j being the expected size of what
the class has outside S, given j: the sum of p there + sqrt(v_j) / p_j (K * sqrt(v) there)_j. A pixel k outside adds

    p_k / (n + e_k) - (1 - p_k) L + sqrt(v_k) (K * (w sqrt(v) / p in S))_k, w_j = p_j / (n + e_j)^2, L = sum over S of w

the first term exactly, the others to first order. A set that holds the pixels with a positive sum, and no others, is a
fixed point; it is no level set. The iteration starts from {p > half of the largest p}, and the best set seen is kept.

K is a product over the axes. Where theta allows, its sums are taken over cells of theta / CELLS pixels a side and
interpolated between the cells' centres: mu_j is then within 1e-3 of itself. On maps of up to EXACT pixels, and where a
cell would be a pixel, they are exact.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The rule that this one mirrors: how inputs are read and checked is one thing.
from rankseg_rma import (
    _check_inputs,
    _check_options,
    _check_range,
    _default_device,
    _on_cpu,
    _one_thread,
    _wide,
    _working,
)

CELLS = 32  # cells of the grid per theta
EXACT = 2**14  # pixels of a map whose sums are exact for every theta
CPU_TILE, OTHER_TILE = 2**15, 2**24  # pixels worked on at a time: on a CPU they stay in the cache
ROUNDS = 20
TINY = 1e-30
ASSIGNMENTS = ("sets", "first_order")
Tile = tuple[slice, slice]  # rows and columns of an (n, rest) plane


@dataclass(frozen=True)
class _Options:
    """The keywords of `rankseg_dep` that the solution of an image needs."""

    metric: str
    theta: float
    pruning_prob: float
    unassigned: str | int
    contested: str
    assignment: str


@torch.no_grad()
def rankseg_dep(
    prob,
    opt_metric: str = "dice",
    theta: float = 300.0,
    allow_overlap: bool = False,
    in_batch: bool = True,
    return_tau: bool = False,
    unassigned: str | int = "max_score",
    pruning_prob: float = 0.5,
    valid=None,
    *,
    contested: str = "all",
    assignment: str = "sets",
    binary_threshold: bool = True,
):
    """(B, C, *spatial) probabilities -> (B, *spatial) int64 labels, as `rankseg_rma` and with its keywords.

    opt_metric: "dice" as published, or "iou", this project's derivation.
    theta: reach of the dependence, in pixels (voxels, however thick), of every spatial axis alike.
    pruning_prob: a class whose largest probability in an image does not exceed it gets no set there.
    assignment: how sets become labels. "sets", as published: a pixel in one set gets its class; a pixel in several sets
        the class of the largest growth p_j / (n + 1 + mu_j) - sum over i of p_i / ((n + mu_i) (n + 1 + mu_i)), i in the
        n pixels that the class has alone; a pixel in no set what `unassigned` says, by the same growth. "first_order":
        every pixel gets the unpruned class of the largest p_j / (n + mu_j) - lambda, n and lambda of the class's whole
        set; `unassigned` and `contested` then say nothing. For IoU both take the growth to first order, of the file's
        first lines.
    contested: as in `rankseg_rma`; here "all" stands for the unpruned classes, and is the default, as published.
    The others, the types and the errors are those of `rankseg_rma`.
    On a CPU one thread does it all.
    """
    _check_options(opt_metric, "rma_score", unassigned, contested, pruning_prob)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise TypeError(f"theta must be a number of pixels above 0, got {theta!r}")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be a number of pixels above 0, got {theta}")
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment must be one of {ASSIGNMENTS}, got {assignment!r}")
    label = 0 if unassigned == "first" else unassigned
    options = _Options(opt_metric, theta, pruning_prob, label, contested, assignment)
    as_numpy, prob, valid = _check_inputs(prob, valid, in_batch, allow_overlap)
    batch, classes, *spatial = prob.shape
    binary = classes == 2 and binary_threshold and not allow_overlap
    shape, dtype = ((batch, classes, *spatial), torch.bool) if allow_overlap else ((batch, *spatial), torch.int64)
    out = torch.empty(shape, dtype=dtype, device=prob.device)
    tau = torch.zeros(batch, classes, dtype=torch.int64, device=prob.device)
    with _one_thread() if _on_cpu(prob) else nullcontext(), _default_device():
        for b in range(batch):
            image = _Image(prob[b], None if valid is None else valid[b], options)
            target = out[b].view(*out[b].shape[: -len(spatial)], spatial[0], -1)
            if allow_overlap:
                image.write_sets(target)
            elif binary:
                image.write_foreground(target)
            else:
                image.write_labels(target)
            if return_tau:
                tau[b] = torch.tensor(image.sizes())
    if not in_batch:
        out, tau = out[0], tau[0]
    if as_numpy:
        out, tau = out.numpy(), tau.numpy()
    return (out, tau) if return_tau else out


def expected_sizes(prob: Tensor, theta: float, step: int | None = None) -> Tensor:
    """(*spatial) probabilities of one class -> mu_j, (*spatial) float32 or float64; huge where p is 0.

    step: pixels along a cell's side in place of the rule's own choice; 1 is exact.
    """
    plane = _plane(prob)
    grid = _Grid(prob.shape, theta, prob.device, _working(prob.dtype), step)
    found = _Class(plane, None, grid)
    mu = torch.empty(plane.shape, dtype=_working(prob.dtype), device=prob.device)
    for tile in grid.tiles:
        mu[tile] = found.read(tile)[1]
    return mu.view(prob.shape)


def _plane(x: Tensor) -> Tensor:
    """(n, *rest) -> (n, product of rest), a view if there is one."""
    return x.reshape(len(x), -1)


class _Grid:
    """The cells of a map's axes, and the tiles of its (n, rest) planes that are worked on at a time."""

    def __init__(
        self, shape: torch.Size, theta: float, device: torch.device, dtype: torch.dtype, step: int | None = None
    ) -> None:
        if step is None:
            step = 1 if math.prod(shape) <= EXACT else max(1, int(theta / CELLS))
        self.shape, self.theta, self.step = shape, theta, step
        self.wide, self.dtype, self.device = _wide(device), dtype, device
        rows, columns = shape[0], math.prod(shape[1:])
        most = CPU_TILE if device.type == "cpu" else OTHER_TILE
        wide = min(columns, most)
        tall = max(1, most // wide)
        self.tiles = [
            (slice(top, min(top + tall, rows)), slice(left, min(left + wide, columns)))
            for top in range(0, rows, tall)
            for left in range(0, columns, wide)
        ]
        self.centres, self.sums, spread = self._axis(rows)
        self.others = [self._along(length) for length in shape[1:]]
        self.left = spread.ne(0).int().argmax(1)  # of the two cells that a row lies between
        self.right = (self.left + 1).clamp_max(len(self.centres) - 1)
        weight = spread.gather(1, self.right[:, None]) * (self.right > self.left)[:, None]
        self.weight = weight.to(dtype)

    def _axis(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cells,) centres, (cells, length) sums over cells, (length, cells) linear interpolation between centres."""
        at = torch.arange(length, dtype=self.wide, device=self.device)
        cell = torch.arange(length, device=self.device) // self.step
        sums = torch.nn.functional.one_hot(cell).to(self.wide).T.contiguous()
        centres = (sums @ at) / sums.sum(1)
        if len(centres) == 1:
            return centres, sums, torch.ones(length, 1, dtype=self.wide, device=self.device)
        left = (torch.searchsorted(centres, at) - 1).clamp(0, len(centres) - 2)
        share = (at - centres[left]) / (centres[left + 1] - centres[left])  # extrapolated beyond the outer centres
        spread = torch.zeros(length, len(centres), dtype=self.wide, device=self.device)
        spread.scatter_(1, left[:, None], (1 - share)[:, None]).scatter_(1, left[:, None] + 1, share[:, None])
        return centres, sums, spread

    def _along(self, length: int) -> tuple[Tensor, ...]:
        """The matrices from an axis's values to the kernel's sums at each of its pixels, to be multiplied in turn."""
        centres, sums, spread = self._axis(length)
        kernel = self._kernel(centres)
        return (kernel,) if self.step == 1 else (sums.T, kernel @ spread.T)

    def _kernel(self, centres: Tensor) -> Tensor:
        return torch.exp(-((centres[:, None] - centres) ** 2) / (2 * self.theta**2))

    def field(self, values: Iterable[Tensor]) -> Tensor:
        """A plane's tiles -> (cells, rest) sums under the kernel at the first axis's centres and every column."""
        x = torch.zeros(len(self.centres), math.prod(self.shape[1:]), dtype=self.wide, device=self.device)
        for (rows, columns), value in zip(self.tiles, values):
            cells = slice(rows.start // self.step, (rows.stop - 1) // self.step + 1)
            x[cells, columns] += self.sums[cells, rows] @ value.to(self.wide)
        x = x.view(len(x), *self.shape[1:])
        for axis, matrices in enumerate(self.others, 1):
            x = x.movedim(axis, -1)
            for matrix in matrices:
                x = x @ matrix
            x = x.movedim(-1, axis)
        return (self._kernel(self.centres) @ x.reshape(len(x), -1)).to(self.dtype)

    def at(self, field: Tensor, tile: Tile) -> Tensor:
        """A field's values at the pixels of a tile."""
        rows, columns = tile
        if self.step == 1:
            return field[tile].clone()
        first, last = (field[:, columns].index_select(0, cell[rows]) for cell in (self.left, self.right))
        return first.lerp_(last, self.weight[rows])


class _Class:
    """One class of an image: (n, rest) probabilities, their sum, and the field of the sizes mu_j."""

    def __init__(self, plane: Tensor, valid: Tensor | None, grid: _Grid) -> None:
        self.plane, self.grid = plane, grid
        self.masks = [None if valid is None else valid[tile] for tile in grid.tiles]
        every = [1.0 if mask is None else mask for mask in self.masks]
        self.mass = sum((p * mask).sum().item() for p, mask in zip(self.tiles(), every))
        self.field = grid.field(_ratio(p).mul_(p).mul_(mask) for p, mask in zip(self.tiles(), every))

    def probabilities(self, tile: Tile) -> Tensor:
        return self.plane[tile].to(self.grid.dtype).contiguous()

    def tiles(self) -> Iterator[Tensor]:
        """The probabilities, tile by tile."""
        return map(self.probabilities, self.grid.tiles)

    def read(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The tile's p and mu."""
        p = self.probabilities(tile)
        return p, _ratio(p).mul_(self.grid.at(self.field, tile)).add_(self.mass)

    def above(self, scores: Iterable[Tensor], price: float) -> list[Tensor]:
        """Tiles of scores -> 1.0 at valid pixels whose score is larger than the price, 0.0 at the others.

        On a CPU these are far faster to write and sum than bool.
        """
        own = [torch.gt(score, price, out=torch.empty_like(score)) for score in scores]
        return [part if mask is None else part.mul_(mask) for part, mask in zip(own, self.masks)]

    def as_plane(self, own: list[Tensor]) -> Tensor:
        """A set's tiles -> (n, rest) bool."""
        plane = torch.empty_like(self.plane, dtype=torch.bool)
        for tile, part in zip(self.grid.tiles, own):
            plane[tile] = part
        return plane


def _ratio(p: Tensor) -> Tensor:
    """sqrt(v) / p."""
    return (1 - p).clamp_min_(0).div_(p.clamp_min(TINY)).sqrt_()


class _DiceGain(NamedTuple):
    """What pixels add to a class: p / (size + mu) - price."""

    found: _Class
    size: float
    price: float

    def at(self, tile: Tile) -> Tensor:
        p, mu = self.found.read(tile)
        return p.div(mu.add_(self.size)).sub_(self.price)


class _IoUGain(NamedTuple):
    """As _DiceGain, for IoU: p / (n + e) - (1 - p) price + sqrt(v) inner, with n + e = base + sqrt(v) / p outer."""

    found: _Class
    base: float
    outer: Tensor
    price: float
    inner: Tensor

    def at(self, tile: Tile) -> Tensor:
        p, grid = self.found.probabilities(tile), self.found.grid
        ratio = _ratio(p)
        whole = grid.at(self.outer, tile).mul_(ratio).add_(self.base).clamp_min_(TINY)
        return grid.at(self.inner, tile).mul_(ratio.mul_(p)).add_(p / whole).sub_((1 - p) * self.price)


class _Set(NamedTuple):
    """The pixels of one class's set as an (n, rest) bool plane, their number, and what one more would add."""

    own: Tensor
    size: float
    more: _DiceGain | _IoUGain


def _best_dice_set(found: _Class, high: float) -> _Set:
    """The iteration of the file's first lines, from {p > 0.8 high / (1 + high)}, high being the largest p."""
    tiles = list(map(found.read, found.grid.tiles))
    own = found.above((p for p, _ in tiles), 0.8 * high / (1 + high))
    best_value, sizes = -1.0, [-1.0, -1.0]
    for _ in range(ROUNDS):
        size, value, price = _measure(tiles, own)
        if value > best_value:
            best_value, best = value, (own, size, price)
        if sizes[-2:] == [size, size]:  # the same denominators twice and as many pixels: the same set
            break
        sizes.append(size)
        own = found.above((p / (mu + size) for p, mu in tiles), price)
    own, size, price = best
    if len(tiles) == 1:
        own = [_one_by_one(*tiles[0], own[0], found.masks[0])]
        size, _, price = _measure(tiles, own)
    return _Set(found.as_plane(own), size, _DiceGain(found, size, price))


def _measure(tiles: list[tuple[Tensor, Tensor]], own: list[Tensor]) -> tuple[float, float, float]:
    """Tiles of p and mu, and of a set, 1.0 or 0.0 -> its n, F and price."""
    size, value, price = sum(part.sum().item() for part in own), 0.0, 0.0
    for (p, mu), part in zip(tiles, own):
        whole = mu + size
        score = p.div(whole).mul_(part)
        value += score.sum().item()
        price += score.div_(whole).sum().item()
    return size, value, price


def _one_by_one(p: Tensor, mu: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
    """A set, 1.0 or 0.0 -> that which the best pixel has joined or left for as long as F grows by it.

    The price is a derivative, and in a set of few pixels one more is not a little more.
    """
    value = _measure([(p, mu)], [own])[1]
    for _ in range(ROUNDS):
        size, tried = own.sum(), []
        out = own == 0 if mask is None else (own == 0) & mask
        first = (p / (mu + (size + 1))).masked_fill(~out, -1).argmax()
        last = (p / (mu + (size - 1))).masked_fill(own == 0, math.inf).argmin()
        for pixel, member in ((first, out.flatten()[first]), (last, 0)):
            changed = own.clone()
            changed.view(-1)[pixel] = member
            tried.append((_measure([(p, mu)], [changed])[1], changed))
        best = max(tried, key=lambda one: one[0])
        if best[0] <= value:
            break
        value, own = best
    return own


def _best_iou_set(found: _Class, high: float) -> _Set:
    """The fixed point of {what one more would add > 0}, from {p > high / 2}; the best set seen."""
    own, best_value, worse = found.above(found.tiles(), high / 2), -1.0, 0
    for _ in range(ROUNDS):
        value, more = _linearise(found, own)
        worse += 1
        if value > best_value:
            best_value, best, worse = value, (own, more), 0
        following = found.above(map(more.at, found.grid.tiles), 0.0)
        if worse == 2 or all(torch.equal(one, other) for one, other in zip(own, following)):
            break
        own = following
    own, more = best
    return _Set(found.as_plane(own), sum(part.sum().item() for part in own), more)


def _linearise(found: _Class, own: list[Tensor]) -> tuple[float, _IoUGain]:
    """Tiles of a set, 1.0 or 0.0 -> its F of IoU, and what one more pixel would add to it."""
    grid = found.grid
    out = [1 - part if mask is None else (1 - part).mul_(mask) for part, mask in zip(own, found.masks)]
    base = sum((part.sum() + (p * rest).sum()).item() for p, part, rest in zip(found.tiles(), own, out))
    outer = grid.field(_ratio(p).mul_(p).mul_(rest) for p, rest in zip(found.tiles(), out))
    value, price, weights = 0.0, 0.0, []
    for tile, p, part in zip(grid.tiles, found.tiles(), own):
        ratio = _ratio(p)
        whole = grid.at(outer, tile).mul_(ratio).add_(base).clamp_min_(TINY)
        score = p.div(whole).mul_(part)
        value += score.sum().item()
        weight = score.div_(whole)
        price += weight.sum().item()
        weights.append(weight.mul_(ratio))
    return value, _IoUGain(found, base, outer, price, grid.field(weights))


class _Running:
    """The class of the largest score so far, pixel by pixel; of equal ones the first."""

    def __init__(self) -> None:
        self.score: Tensor | float = -math.inf
        self.label: Tensor | int = 0

    def offer(self, c: int, score: Tensor) -> None:
        better = score > self.score
        self.label = torch.where(better, c, self.label)
        self.score = torch.where(better, score, self.score)


class _Image:
    """One image: its classes' maxima, and the sets of those that are not pruned, computed where asked for."""

    def __init__(self, prob: Tensor, valid: Tensor | None, options: _Options) -> None:
        self.prob, self.options = prob, options
        self.grid = _Grid(prob.shape[1:], options.theta, prob.device, _working(prob.dtype))
        self.valid = None if valid is None else _plane(valid)
        self.high = self._maxima()
        limit = torch.tensor(options.pruning_prob, dtype=prob.dtype).item()
        self.kept = [c for c, high in enumerate(self.high) if high > limit]
        self.sets: dict[int, _Set] = {}

    def _maxima(self) -> list[float]:
        """The largest probability of every class among the valid pixels; ValueError for what is no probability."""
        highs = []
        for values in self.prob:
            plane, high = _plane(values), 0.0
            for tile in self.grid.tiles:
                least, most = (x.item() for x in plane[tile].aminmax())
                _check_range(least, most, plane.dtype)
                high = max(high, most if self.valid is None else (plane[tile] * self.valid[tile]).amax().item())
            highs.append(high)
        return highs

    def _class(self, c: int) -> _Class:
        return _Class(_plane(self.prob[c]), self.valid, self.grid)

    def _set(self, c: int) -> _Set:
        """The set of a class that is not pruned."""
        if c not in self.sets:
            solve = _best_dice_set if self.options.metric == "dice" else _best_iou_set
            self.sets[c] = solve(self._class(c), self.high[c])
        return self.sets[c]

    def sizes(self) -> list[int]:
        """Number of pixels in every class's set."""
        return [int(self._set(c).size) if c in self.kept else 0 for c in range(len(self.prob))]

    def write_sets(self, out: Tensor) -> None:
        """-> (C, n, rest) bool."""
        out.zero_()
        for c in self.kept:
            out[c] = self._set(c).own

    def write_foreground(self, out: Tensor) -> None:
        """-> (n, rest) labels, 1 in the set of class 1."""
        out.zero_()
        if 1 in self.kept:
            out.copy_(self._set(1).own)

    def write_labels(self, out: Tensor) -> None:
        """-> (n, rest) labels."""
        if self.options.assignment == "first_order":
            self._write_first_order(out)
        else:
            self._write_by_sets(out)

    def _write_first_order(self, out: Tensor) -> None:
        gains = {c: self._set(c).more for c in self.kept} or self._of_empty_sets()
        for tile in self.grid.tiles:
            best = _Running()
            for c, gain in gains.items():
                best.offer(c, gain.at(tile))
            out[tile] = best.label

    def _write_by_sets(self, out: Tensor) -> None:
        holders = torch.zeros_like(out, dtype=torch.int16)  # number of sets that a pixel is in
        for c in self.kept:
            for tile in self.grid.tiles:
                holders[tile] += self._set(c).own[tile]
        gains = {c: self._alone(c, holders) for c in self.kept} or self._of_empty_sets()
        for tile in self.grid.tiles:
            number, holder, anyone = holders[tile], _Running(), _Running()
            for c, gain in gains.items():
                growth = gain.at(tile)
                anyone.offer(c, growth)
                if c in self.kept:
                    holder.offer(c, growth.masked_fill(~self._set(c).own[tile], -math.inf))
            contested = holder.label
            if self.options.contested == "all" and self.kept:
                contested = torch.where(number > 1, anyone.label, contested)
            unassigned = self.options.unassigned
            out[tile] = torch.where(number > 0, contested, anyone.label if unassigned == "max_score" else unassigned)

    def _of_empty_sets(self) -> dict[int, _DiceGain | _IoUGain]:
        """What the first pixel would add to every class: all compete where all are pruned."""
        nothing = [torch.zeros_like(_plane(self.prob[0])[tile], dtype=self.grid.dtype) for tile in self.grid.tiles]
        return {c: self._growth(self._class(c), nothing) for c in range(len(self.prob))}

    def _alone(self, c: int, holders: Tensor) -> _DiceGain | _IoUGain:
        """What one more pixel would add to those that a class alone holds."""
        own, found = self._set(c).own, self._set(c).more.found
        return self._growth(found, [(own[t] & (holders[t] == 1)).to(self.grid.dtype) for t in self.grid.tiles])

    def _growth(self, found: _Class, own: list[Tensor]) -> _DiceGain | _IoUGain:
        """Tiles of a set, 1.0 or 0.0 -> what one more pixel would add to it; for IoU to first order."""
        if self.options.metric == "iou":
            return _linearise(found, own)[1]
        size, loss = sum(part.sum().item() for part in own), 0.0
        for tile, part in zip(self.grid.tiles, own):
            p, mu = found.read(tile)
            whole = mu.add_(size)
            loss += p.mul(part).div_(whole).div_(whole + 1).sum().item()
        return _DiceGain(found, size + 1, loss)
