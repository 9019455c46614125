"""`rankseg_levelset` against its model, worked out in float64 without levels, and its interface."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import rankseg_rma as module
from rankseg_rma import rankseg_levelset, rankseg_rma
from tests.rules.test_rankseg_rma import CountThreads, peak_bytes, smooth_map, softmax_map


def expected_score(p: list[float], chosen: tuple[int, ...], metric: str) -> float:
    """The exact expectation for the set `chosen` where the class is {j : p_j > u}, u uniform: a sum over the p_j."""
    total, below = 0.0, 0.0
    for u in sorted(set(p)):
        here = {j for j, value in enumerate(p) if value >= u}  # for every u from the value before up to this one
        both = len(here & set(chosen))
        score = 2 * both / (len(here) + len(chosen)) if metric == "dice" else both / len(here | set(chosen))
        total, below = total + (u - below) * score, u
    return total


@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_a_mask_is_the_best_of_all_sets(metric):
    """Of all 2^8 of them, in 60 maps; a set that is worse is so by less than levels round."""
    generator = torch.Generator().manual_seed(0)
    found_empty = 0
    for trial in range(60):
        p = torch.rand(8, generator=generator).pow(1 + trial % 4)
        values = p.tolist()
        sets = [c for n in range(9) for c in itertools.combinations(range(8), n)]
        scores = {c: expected_score(values, c, metric) if c else 1 - max(values) for c in sets}
        mask = rankseg_levelset(p[None, None], metric, allow_overlap=True, pruning_prob=0)[0, 0]
        chosen = tuple(mask.nonzero()[:, 0].tolist())
        found_empty += not chosen
        assert scores[chosen] > max(scores.values()) - 0.005
    assert 0 < found_empty < 60


def presence_by_enumeration(high: list[float]) -> list[float]:
    """P(class in the image), over all 2^C sets of classes: each number of them equally likely, then each set of it."""
    total, there = 0.0, [0.0] * len(high)
    for chosen in itertools.product((False, True), repeat=len(high)):
        evidence = math.prod(m if c else 1 - m for m, c in zip(high, chosen))
        weight = evidence / ((len(high) + 1) * math.comb(len(high), sum(chosen)))
        total += weight
        there = [t + weight * c for t, c in zip(there, chosen)]
    return [t / total for t in there]


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("batch", "masked"), [(3, True), (3, False), (None, True)])
@pytest.mark.parametrize("shape", [(7, 96, 128), (2, 60, 77), (5, 12, 48, 32)])
def test_options_on_a_gpu(gpu: torch.device, shape, batch: int | None, masked: bool, overlap: bool, metric: str):
    """batch: None for one map without its dimension."""
    maps = smooth_map(batch or 1, shape[0], math.prod(shape[1:-1]), shape[-1]).reshape(-1, *shape)
    valid = torch.rand(len(maps), *shape[1:], generator=torch.Generator().manual_seed(0)) < 0.8
    if batch is None:
        maps, valid = maps[0], valid[0]
    options = {"opt_metric": metric, "allow_overlap": overlap, "in_batch": batch is not None}
    expected = rankseg_levelset(maps, valid=valid if masked else None, **options)
    got = rankseg_levelset(maps.to(gpu), valid=valid.to(gpu) if masked else None, **options)
    assert got.device.type == gpu.type
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got.cpu() != expected).double().mean() <= 1e-3


@pytest.mark.parametrize(
    "high",
    [[0.9], [0.3, 0.8], [0.999] * 9 + [0.3, 0.1], [0.99, 0.7] + [0.001] * 8, [0.9, 0.6, 0.5, 0.4, 0.2, 0.15, 0.02]],
)
def test_presence_is_that_of_all_sets_of_classes(high):
    got = module._presence(torch.tensor(high, dtype=torch.float64))
    assert got.tolist() == pytest.approx(presence_by_enumeration(high), abs=2e-4)


def test_presence_depends_on_how_many_classes_are_there():
    """The same largest probability says more where nearly all classes are in the image; where few are, its square."""
    many, few = ([0.999] * n + [0.4] + [0.001] * (19 - n) for n in (16, 2))
    assert 0.4 * module._level_weights(torch.tensor(many))[16] > 0.7
    assert 0.4 * module._level_weights(torch.tensor(few))[2] == pytest.approx(0.4**2)
    of_2004 = torch.tensor([0.999] * 3 + [0.2] + [1e-4] * 2000, dtype=torch.float64)
    assert module._presence(of_2004)[3] < 0.001  # a narrow posterior


def reference(prob: Tensor, metric: str, pruning_prob: float = 0.1) -> tuple[Tensor, Tensor]:
    """(C, d) -> (d,) labels and (C, d) gains, from the distinct probabilities themselves."""
    p = prob.double()
    high = p.amax(1)
    names = (high > pruning_prob).nonzero()[:, 0]
    present = torch.tensor(presence_by_enumeration(high.tolist()), dtype=torch.float64)
    q = p[names] * (torch.maximum(high.square(), present) / high)[names, None]
    q = q / q.sum(0)
    gains = []
    for row in q:
        u, count = row.unique(return_counts=True)  # ascending
        du = u.diff(prepend=u.new_zeros(1))
        size = count.flip(0).cumsum(0).flip(0).double()  # pixels above every u between the value before and this one
        both, union = torch.minimum(size[:, None], size), torch.maximum(size[:, None], size)
        score = both / union if metric == "iou" else 2 * both / (size[:, None] + size)
        n = size[(score * du).sum(1).argmax()]
        at, both = torch.searchsorted(u, row), size.clamp_max(n)
        mean, share = (size * du).sum() / u[-1], 1 - module.LEVEL_TOGETHER
        root = (row * (1 - row)).sqrt()
        ratio = torch.where(row > 0, root / row, 0.0)
        chosen = row >= row.sort(descending=True).values[n.long() - 1]
        if metric == "iou":
            inside = (both * du).sum() / u[-1]
            whole = n + (1 - share) * (size - both) + share * (mean - inside)
            won, lost = (du / whole).cumsum(0), du * both / whole**2
            grown = lost.sum() - (1 - share) * lost.cumsum(0) - share * u / u[-1] * lost.sum()
            levels = (won - grown)[at]
            size = n + row[~chosen].sum() + ratio * root[~chosen].sum()
            lost = (row / size**2)[chosen]
            factor = row / size - (1 - row) * lost.sum() + root * (lost * ratio[chosen]).sum()
        else:
            whole = n + (1 - share) * size + share * mean
            levels = ((2 * du / whole).cumsum(0) - (2 * du * both / whole**2).sum())[at]
            size = n + row.sum() + ratio * root.sum()
            factor = 2 * (row / size - (row / size**2)[chosen].sum())
        gains.append((levels + factor) / 2)
    present = q.amax(1)
    gain = torch.stack(gains) / (1 + present.sum() - present)[:, None]
    return names[gain.argmax(0)], gain


def score_with_some_apart(p: Tensor, chosen: Tensor, metric: str) -> float:
    """The expected score of a set where a share of the class's other pixels is averaged over u, from its definition."""
    u = p.unique()  # ascending
    du = u.diff(prepend=u.new_zeros(1))
    here = p >= u[:, None]  # for every u from the value before up to this one
    size, both = here.sum(1).double(), (here & chosen).sum(1).double()
    others = size - both if metric == "iou" else size
    whole = chosen.sum() + module.LEVEL_TOGETHER * others + (1 - module.LEVEL_TOGETHER) * (others * du).sum() / u[-1]
    return ((1 if metric == "iou" else 2) * both / whole * du).sum().item()


def score_of_a_factor(p: Tensor, chosen: Tensor, metric: str) -> float:
    """The expected score of a set where two pixels have the covariance sqrt(v_i v_j), of mean sizes.

    Given that pixel j is in the class, pixel i is with probability p_i + sqrt(v_i v_j) / p_j.
    """
    root = (p * (1 - p)).sqrt()
    others = ~chosen if metric == "iou" else torch.ones_like(chosen)
    size = chosen.sum() + p[others].sum() + root / p * root[others].sum()
    return ((1 if metric == "iou" else 2) * p / size)[chosen].sum().item()


@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("law", ["levels", "factor"])
def test_gains_are_the_growth_of_the_score_by_one_pixel(metric, law):
    p = torch.rand(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64).square()
    level = (p.float() + module.LEVEL_FLOOR).view(torch.int32).bitwise_right_shift(module.LEVEL_SHIFT).long()
    level -= module.LEVEL_FIRST
    sizes, N, du = module._levels(level.bincount(minlength=module.LEVELS)[None])
    best = module._best_level(sizes, N, du, metric)[0][:, None]
    if law == "levels":
        gain, score = module._gains_of_levels(sizes, N, du, best, metric)[0], score_with_some_apart
    else:
        gain, score = module._gains_of_a_factor(sizes, du, best, metric)[0], score_of_a_factor
    chosen = level >= best[0]
    base = score(p, chosen, metric)
    for pixel in (~chosen).nonzero()[::150, 0].tolist() + [(~chosen).double().mul(p).argmax().item()]:
        grown = chosen.clone()
        grown[pixel] = True
        growth = score(p, grown, metric) - base
        assert growth == pytest.approx(gain[level[pixel]].item(), rel=0.03, abs=0.01 * gain.max().item())


@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("shape", [(1, 5, 40, 50), (1, 11, 40, 30), (1, 3, 9, 12, 10)])
def test_labels_maximise_the_gain(metric, shape):
    """Levels may turn a pixel whose two best gains are all but equal, and few of those."""
    coarse = torch.randn(
        *shape[:2], 5, 5, *([5] if len(shape) == 5 else []), generator=torch.Generator().manual_seed(1)
    )
    mode = "trilinear" if len(shape) == 5 else "bilinear"
    prob = torch.nn.functional.interpolate(4 * coarse, shape[2:], mode=mode).softmax(1)
    label, gain = reference(prob[0].flatten(1), metric)
    got = rankseg_levelset(prob, metric)[0].flatten()
    assert (got != prob[0].flatten(1).max(0).indices).sum() > 5  # not argmax
    assert (got != label).double().mean() < 0.02
    names = (prob[0].flatten(1).amax(1) > 0.1).nonzero()[:, 0]
    lost = gain.max(0).values - gain.gather(0, torch.searchsorted(names, got)[None])[0]
    assert lost.max() < 0.05 * gain.abs().max()
    assert lost.mean() < 1e-4 * gain.abs().max()


def test_a_large_image_is_counted_on_a_grid(monkeypatch):
    prob = smooth_map(1, 6, 400, 500)
    assert prob[0, 0].numel() > 4 * module.LEVEL_SAMPLES
    on_a_grid = rankseg_levelset(prob)
    monkeypatch.setattr(module, "LEVEL_SAMPLES", 2**30)
    on_all_pixels = rankseg_levelset(prob)
    assert 0 < (on_a_grid != on_all_pixels).double().mean() < 0.002


def test_a_class_that_is_hardly_there_takes_nothing():
    """0.15 on a whole object: RankSEG-RMA is sure of 15 % of it, and lets it win pixels of the class that is there."""
    prob = torch.zeros(1, 12, 40, 40)
    prob[:, 0] = 1.0
    prob[0, :3, 10:30, 10:30] = torch.tensor([0.05, 0.8, 0.15])[:, None, None]
    prob[0, :3, 10:30, 10:13] = torch.tensor([0.45, 0.4, 0.15])[:, None, None]
    prob[0, :3, 25:30, 15:30] = torch.tensor([0.25, 0.6, 0.15])[:, None, None]
    assert (rankseg_rma(prob, contested="all") == 2).any() or (rankseg_rma(prob) == 2).any()
    label = rankseg_levelset(prob)[0]
    assert not (label == 2).any()
    assert (label[10:30, 13:30] == 1).all()


@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_extremes(metric):
    certain = torch.nn.functional.one_hot(torch.randint(4, (2, 30, 20)), 4).movedim(-1, 1).float()
    assert torch.equal(rankseg_levelset(certain, metric), certain.argmax(1))
    assert torch.equal(rankseg_levelset(certain, metric, allow_overlap=True), certain.bool())
    assert not rankseg_levelset(torch.full((1, 4, 9, 9), 0.25), metric).any()  # equal gains: the first class
    flat = torch.full((1, 25, 9, 9), 0.03)  # all pruned
    flat[:, 7] = 0.05
    assert (rankseg_levelset(flat, metric) == 7).all()
    assert not rankseg_levelset(torch.zeros(1, 3, 5, 5), metric).any()
    flat[:, 7] = 0.1  # not above pruning_prob either
    assert (rankseg_levelset(flat, metric) == 7).all()
    faint = torch.full((1, 12, 40, 40), 0.08)  # pruned, however near to the others
    faint[:, 4, :20], faint[:, 5, 20:] = 0.13, 0.14
    assert set(rankseg_levelset(faint, metric).unique().tolist()) <= {4, 5}
    one = torch.full((1, 3, 5, 5), 0.01)
    one[:, 2] = 0.98
    assert (rankseg_levelset(one, metric) == 2).all()
    none = torch.zeros(1, 5, 5, dtype=torch.bool)
    assert not rankseg_levelset(softmax_map(1, 3, 5, 5), metric, allow_overlap=True, valid=none).any()
    assert rankseg_levelset(softmax_map(1, 3, 5, 5), metric, valid=none).shape == (1, 5, 5)


def test_two_classes_take_the_mask_of_the_second():
    prob = smooth_map(3, 2, 40, 50)
    masks = rankseg_levelset(prob, allow_overlap=True)
    assert torch.equal(rankseg_levelset(prob), masks[:, 1].long())
    faint = torch.stack([torch.full((20, 20), 0.7), torch.full((20, 20), 0.3)])[None]
    assert not rankseg_levelset(faint).any()  # 0.3 for all of it, 0.7 for nothing
    assert rankseg_levelset(faint.flip(1)).all()


@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("dtype", module.DTYPES)
def test_shapes_dtypes_and_numpy(spatial, dtype):
    prob = softmax_map(2, 4, *spatial).to(dtype)
    before = prob.clone()
    labels, masks = rankseg_levelset(prob), rankseg_levelset(prob, allow_overlap=True)
    assert (labels.shape, labels.dtype) == ((2, *spatial), torch.int64)
    assert (masks.shape, masks.dtype) == (prob.shape, torch.bool)
    assert torch.equal(labels[1], rankseg_levelset(prob[1], in_batch=False))
    assert torch.equal(masks[1], rankseg_levelset(prob[1], in_batch=False, allow_overlap=True))
    assert torch.equal(prob, before)
    if dtype != torch.bfloat16:
        array = rankseg_levelset(prob.numpy())
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, labels.numpy())


@pytest.mark.parametrize("classes", [2, 5, 21])
def test_layouts_and_threads_give_identical_bits(classes):
    prob = smooth_map(2, classes, 200, 190)
    wanted = rankseg_levelset(prob)
    cropped = torch.nn.functional.pad(prob, (3, 2, 1, 4))[..., 1:-4, 3:-2]
    for same in (
        prob.to(memory_format=torch.channels_last),
        cropped,
        prob.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert not same.is_contiguous()
        assert torch.equal(rankseg_levelset(same), wanted)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(rankseg_levelset(prob), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("overlap", [False, True])
def test_pixels_that_are_not_valid_count_nowhere(overlap):
    prob = smooth_map(1, 4, 60, 50)
    valid = torch.zeros(1, 60, 50, dtype=torch.bool)
    valid[:, :40] = True
    got = rankseg_levelset(prob, allow_overlap=overlap, valid=valid)
    assert torch.equal(got[..., :40, :], rankseg_levelset(prob[:, :, :40], allow_overlap=overlap))
    assert not overlap or not got[..., 40:, :].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prob": torch.full((1, 3, 4, 4), 1.5)}, ValueError, "finite probabilities"),
        ({"prob": torch.full((1, 3, 4, 4), float("nan"))}, ValueError, "finite probabilities"),
        ({"prob": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, TypeError, "int64"),
        ({"prob": torch.zeros(1, 1, 4, 4)}, ValueError, "one class"),
        ({"opt_metric": "acc"}, ValueError, "opt_metric"),
        ({"pruning_prob": 2}, ValueError, "pruning_prob"),
        ({"valid": torch.ones(1, 3, 3, dtype=torch.bool)}, ValueError, "valid must have the shape"),
    ],
)
def test_errors_say_what_was_got_and_expected(change, error, message):
    with pytest.raises(error, match=message):
        rankseg_levelset(**{"prob": softmax_map(1, 3, 4, 4), **change})


def test_a_call_stays_on_its_thread_and_leaves_the_setting_alone():
    """On a busy machine each operation that several threads share waits for a core."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with CountThreads() as count:
            rankseg_levelset(smooth_map(1, 19, 256, 512))
        assert count.found == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("half", [False, True])
def test_memory_beyond_the_labels_does_not_grow_with_the_image(half):
    for height in (360, 1440):
        prob = smooth_map(1, 11, height, 480)
        prob = prob.half() if half else prob
        extra = peak_bytes(lambda prob=prob: rankseg_levelset(prob)) - 8 * prob[:, 0].numel()
        assert 0 < extra < 2.5e6
