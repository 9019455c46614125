"""`rankseg_dep` against float64 oracles: its definition, all sizes of a set, a joint law with its covariance.

`rankseg_dep_levels` against `rankseg_dep` of a long reach, and against all sizes of a set.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, pad

from exp.rules import dep as module
from exp.rules.dep import expected_sizes, rankseg_dep
from exp.rules.dep_levels import rankseg_dep_levels
from exp.rules.exact import best_set
from exp.rules.registry import build_rule
from exp.runtime.errors import InputError
from rankseg_rma import rankseg_rma
from tests.config.test_config import compose


def kernel(shape: tuple[int, ...], theta: float) -> np.ndarray:
    """(d, d) exp(-r^2 / (2 theta^2)) of all pairs of pixels."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    return np.exp(-((at[:, None] - at[None]) ** 2).sum(-1) / (2 * theta**2))


def literal_sizes(p: np.ndarray, theta: float) -> np.ndarray:
    """(*spatial) probabilities above 0 -> (d,) mu_j by all pairs of pixels."""
    flat = p.ravel()
    root = np.sqrt(flat * (1 - flat))
    return flat.sum() + root / flat * (kernel(p.shape, theta) @ root)


def objective(p: np.ndarray, mu: np.ndarray, own: np.ndarray) -> float:
    """Half of a set's expected Dice, the size of the class replaced by its mean."""
    return (p / (own.sum() + mu))[own].sum()


def best_objective(p: np.ndarray, mu: np.ndarray) -> float:
    """Over every number n of pixels, the n of the largest p / (n + mu)."""
    sizes = np.arange(1, len(p) + 1)
    return max(np.sort(p / (n + mu))[::-1][:n].sum() for n in sizes)


def smooth_map(classes: int, shape: tuple[int, ...], scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    """(1, C, H, W) float64: regions with soft borders."""
    coarse = torch.randn(1, classes, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return interpolate(scale * coarse, shape, mode="bilinear").softmax(1)


def iou_parts(p: np.ndarray, cov: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d,) probabilities, (d, d) K, a set -> n + e_j, and what one more pixel adds to it to first order."""
    root, out = np.sqrt(p * (1 - p)), ~own
    whole = own.sum() + p[out].sum() + root / p * (cov @ (root * out))
    weight = p / whole**2 * own
    return whole, p / whole - (1 - p) * weight.sum() + root * (cov @ (weight * root / p))


def one_class(trial: int) -> tuple[torch.Tensor, float]:
    """(1, 1, H, W) float64 probabilities, smooth or noise, rare or frequent, and a theta between 1 and 300."""
    generator = torch.Generator().manual_seed(trial)
    shape = torch.randint(2, 25, (2,), generator=generator).tolist()
    theta = math.exp(5.7 * torch.rand(1, generator=generator).item())
    if trial % 3 == 2:
        return torch.rand(1, 1, *shape, dtype=torch.float64, generator=generator), theta
    coarse = torch.randn(1, 1, 5, 5, dtype=torch.float64, generator=generator)
    return torch.sigmoid((1 + trial % 4) * interpolate(3 * coarse, shape, mode="bilinear") - trial % 7), theta


@pytest.mark.parametrize("shape", [(40,), (13, 9), (4, 6, 5)])
@pytest.mark.parametrize("theta", [0.3, 2.0, 300.0])
def test_sizes_are_those_of_the_definition(shape: tuple[int, ...], theta: float):
    p = np.random.default_rng(0).uniform(0.01, 1, shape)
    expected = literal_sizes(p, theta).reshape(shape)
    np.testing.assert_allclose(expected_sizes(torch.from_numpy(p), theta).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(expected_sizes(torch.from_numpy(p).float(), theta).numpy(), expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("shape", "theta"),
    [((150, 200), 100.0), ((200, 150), 300.0), ((140, 300), 1000.0), ((12, 1500), 300.0), ((16, 40, 50), 70.0)],
)
def test_sizes_on_cells_are_within_a_thousandth(shape: tuple[int, ...], theta: float):
    generator = torch.Generator().manual_seed(1)
    coarse = 4 * torch.randn(1, 1, *[5] * len(shape), dtype=torch.float64, generator=generator)
    p = torch.sigmoid(2 * interpolate(coarse, shape, mode="trilinear" if len(shape) == 3 else "bilinear") - 3)[0, 0]
    exact, found = expected_sizes(p, theta, step=1), expected_sizes(p, theta)
    error = ((found - exact).abs() / exact).max().item()
    assert 1e-7 < error < 1e-3  # not 0: this map is large enough for cells


def test_against_every_number_of_pixels():
    """At most 1e-4 of the objective is lost, 1e-6 on average."""
    lost = []
    for trial in range(200):
        prob, theta = one_class(trial)
        own, tau = rankseg_dep(prob, theta=theta, allow_overlap=True, pruning_prob=0, return_tau=True)
        p, own = prob.numpy().ravel(), own.numpy().ravel()
        assert own.sum() == tau.item()
        mu = literal_sizes(prob[0, 0].numpy(), theta)
        lost.append(1 - objective(p, mu, own) / best_objective(p, mu))
    assert max(lost) < 1e-4
    assert np.mean(lost) < 1e-6


def joint_law(p: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(d,) marginals and (d, d) covariances -> (2^d, d) label images and their probabilities, None if there are none.

    The law exp(a.x + x.B.x) by Newton's method on its convex log-likelihood: exact, nothing is drawn.
    """
    pairs = np.triu_indices(len(p), 1)
    labels = np.array(list(itertools.product((0.0, 1.0), repeat=len(p))))
    moments = np.concatenate([labels, labels[:, pairs[0]] * labels[:, pairs[1]]], 1)
    wanted = np.concatenate([p, cov[pairs] + p[pairs[0]] * p[pairs[1]]])
    at = np.concatenate([np.log(p / (1 - p)), np.zeros(len(pairs[0]))])

    def law(at: np.ndarray) -> tuple[float, np.ndarray]:
        energy = moments @ at
        weight = np.exp(energy - energy.max())
        return np.log(weight.sum()) + energy.max() - at @ wanted, weight / weight.sum()

    for _ in range(60):
        height, weight = law(at)
        slope = weight @ moments - wanted
        if abs(slope).max() < 1e-9:
            return labels, weight
        curve = (moments.T * weight) @ moments - np.outer(weight @ moments, weight @ moments)
        step = np.linalg.solve(curve + 1e-12 * np.eye(len(curve)), slope)
        length = 1.0
        while law(at - length * step)[0] > height and length > 1e-6:
            length /= 2
        at = at - length * step
        if abs(at).max() > 100:
            return None
    return None


def test_expected_dice_under_a_law_with_that_covariance():
    """3x3 pixels, all 512 sets: within 1e-3 of the best on average, and nearer than the rules of independent pixels.

    Of most probabilities and theta no law has the covariance: where p_i and p_j are far apart, their labels cannot be
    nearly equal. Those are left out.
    """
    rng, shape = np.random.default_rng(0), (3, 3)
    regrets: dict[str, list[float]] = {"dep": [], "rma": [], "exact": []}
    for theta, spread in [(0.5, 0.5), (0.5, 1.0), (0.5, 1.5), (0.7, 0.5), (0.8, 0.3), (1.0, 0.1)] * 4:
        p = 1 / (1 + np.exp(-(1.2 * rng.normal() + spread * rng.normal(size=9))))
        cov = np.sqrt(np.outer(p * (1 - p), p * (1 - p))) * kernel(shape, theta)
        if (found := joint_law(p, cov)) is None:
            continue
        labels, weight = found
        sizes = labels.sum(1)
        prob = torch.from_numpy(p).view(1, 1, *shape)
        given = (weight @ (labels * sizes[:, None])) / p
        np.testing.assert_allclose(expected_sizes(prob[0, 0], theta).numpy().ravel(), given, rtol=1e-6)
        scores = 2 * (labels @ labels.T) / np.maximum(sizes[:, None] + sizes, 1) @ weight
        sets = {
            "dep": rankseg_dep(prob, theta=theta, allow_overlap=True, pruning_prob=0).numpy().ravel(),
            "rma": rankseg_rma(prob, allow_overlap=True, pruning_prob=0).numpy().ravel(),
            "exact": best_set(p, "dice"),
        }
        for name, own in sets.items():
            regrets[name].append(scores.max() - scores[(labels == own).all(1)].item())
    assert len(regrets["dep"]) > 12
    assert max(regrets["dep"]) < 5e-3
    assert np.mean(regrets["dep"]) < 1e-3
    assert np.mean(regrets["dep"]) < min(np.mean(regrets["rma"]), np.mean(regrets["exact"])) / 2


def test_iou_against_all_sets_and_a_law_with_that_covariance():
    """3x3 pixels: the sizes outside are those of the law, the exact expected IoU within 2e-3 of the best on average."""
    rng, shape, regrets, losses = np.random.default_rng(0), (3, 3), {"dep": [], "exact": []}, []
    for theta, spread in [(0.5, 0.5), (0.5, 1.0), (0.5, 1.5), (0.7, 0.5), (0.8, 0.3), (1.0, 0.1)] * 4:
        p = 1 / (1 + np.exp(-(1.2 * rng.normal() + spread * rng.normal(size=9))))
        near = kernel(shape, theta)
        if (found := joint_law(p, np.sqrt(np.outer(p * (1 - p), p * (1 - p))) * near)) is None:
            continue
        labels, weight = found
        some = rng.random(9) < 0.5
        outside = (weight @ (labels * labels[:, ~some].sum(1)[:, None])) / p
        np.testing.assert_allclose(iou_parts(p, near, some)[0] - some.sum(), outside, rtol=1e-6)
        prob = torch.from_numpy(p).view(1, 1, *shape)
        both, sizes = labels @ labels.T, labels.sum(1)
        scores = both / np.maximum(sizes[:, None] + sizes - both, 1) @ weight
        options = {"opt_metric": "iou", "allow_overlap": True, "pruning_prob": 0}
        sets = {
            "dep": rankseg_dep(prob, theta=theta, **options).numpy().ravel(),
            "exact": best_set(p, "iou"),
        }
        for name, own in sets.items():
            regrets[name].append(scores.max() - scores[(labels == own).all(1)].item())
        values = [(p / iou_parts(p, near, own)[0])[own].sum() for own in labels > 0]
        losses.append(1 - (p / iou_parts(p, near, sets["dep"])[0])[sets["dep"]].sum() / max(values))
    assert len(losses) > 12
    assert max(losses) < 0.05
    assert np.mean(regrets["dep"]) < 2e-3
    assert np.mean(regrets["dep"]) < np.mean(regrets["exact"]) / 2


def test_iou_sets_are_fixed_points_and_better_than_others():
    """Most maps settle: no pixel would join or leave. No set of two other rules has a much larger objective."""
    settled = 0
    for trial in range(60):
        prob, theta = one_class(trial)
        options = {"allow_overlap": True, "pruning_prob": 0}
        p, near = prob.numpy().ravel(), kernel(prob.shape[2:], theta)
        own = rankseg_dep(prob, "iou", theta, **options).numpy().ravel()
        others = [
            rankseg_rma(prob, "iou", **options).numpy().ravel(),
            rankseg_dep(prob, "dice", theta, **options).numpy().ravel(),
        ]
        value, *rest = ((p / iou_parts(p, near, one)[0])[one].sum() for one in (own, *others))
        assert value > max(rest) * (1 - 2e-2)
        settled += (iou_parts(p, near, own)[1] > 0).tolist() == own.tolist()
    assert settled > 45


@pytest.mark.parametrize("assignment", ["sets", "first_order"])
@pytest.mark.parametrize("theta", [3.0, 300.0])
def test_iou_labels_by_the_words(assignment: str, theta: float):
    for seed in range(3):
        prob = smooth_map(4, (17, 14), scale=1.5, seed=seed)
        options = {"opt_metric": "iou", "theta": theta, "pruning_prob": 0.1}
        own = rankseg_dep(prob, allow_overlap=True, **options)[0].flatten(1).numpy()
        p, near = prob[0].flatten(1).numpy(), kernel((17, 14), theta)
        single = own.sum(0) == 1
        sets = own if assignment == "first_order" else own & single
        growth = np.stack([iou_parts(p[c], near, sets[c])[1] for c in range(4)])
        expected = (
            growth.argmax(0) if assignment == "first_order" else np.where(single, own.argmax(0), growth.argmax(0))
        )
        labels = rankseg_dep(prob, assignment=assignment, **options)
        np.testing.assert_array_equal(labels.numpy().ravel(), expected)


def test_a_short_theta_is_rankseg_rma():
    """All but a pixel's dependence on itself, 1 - p_j, is gone."""
    prob = smooth_map(4, (60, 80))
    rma = rankseg_rma(prob, allow_overlap=True)
    assert (rankseg_dep(prob, theta=1e-3, allow_overlap=True, pruning_prob=0.1) != rma).float().mean() < 1e-3
    assert (rankseg_dep(prob, theta=300, allow_overlap=True, pruning_prob=0.1) != rma).float().mean() > 0.01


def literal_labels(
    prob: np.ndarray, theta: float, own: np.ndarray, contested: str, unassigned: str | int
) -> np.ndarray:
    """(C, *spatial), (C, d) sets -> (d,) labels by the words of the docstring."""
    p = prob.reshape(len(prob), -1)
    mu = np.stack([literal_sizes(values, theta) for values in prob])
    growth = np.empty_like(p)
    for c in range(len(p)):
        alone = own[c] & (own.sum(0) == 1)
        n = alone.sum()
        growth[c] = p[c] / (n + 1 + mu[c]) - (p[c] / ((n + mu[c]) * (n + 1 + mu[c])))[alone].sum()
    kept = own.any(1)
    labels = np.empty(p.shape[1], int)
    for j, holders in enumerate(own.T):
        if holders.sum() == 0:
            best = np.where(kept, growth[:, j], -np.inf).argmax()
            labels[j] = best if unassigned == "max_score" else 0 if unassigned == "first" else unassigned
        elif holders.sum() > 1 and contested == "all":
            labels[j] = np.where(kept, growth[:, j], -np.inf).argmax()
        else:
            labels[j] = np.where(holders, growth[:, j], -np.inf).argmax()
    return labels


@pytest.mark.parametrize(("contested", "unassigned"), [("holders", "max_score"), ("all", "first"), ("all", 2)])
@pytest.mark.parametrize("theta", [3.0, 300.0])
def test_labels_by_the_words(contested: str, unassigned: str | int, theta: float):
    kinds, generator = np.zeros(3, int), torch.Generator().manual_seed(0)
    for seed in range(8):
        noise = 1.5 * torch.randn(1, 5, 17, 14, dtype=torch.float64, generator=generator)
        prob = noise.softmax(1) if seed % 2 else smooth_map(5, (17, 14), scale=1.5, seed=seed)
        prob[:, 4] *= 0.4  # pruned
        own = rankseg_dep(prob, theta=theta, allow_overlap=True, pruning_prob=0.4)[0].flatten(1).numpy()
        assert not own[4].any()
        kinds += np.bincount(own.sum(0).clip(max=2), minlength=3)
        labels = rankseg_dep(prob, theta=theta, pruning_prob=0.4, contested=contested, unassigned=unassigned)
        expected = literal_labels(prob[0].numpy(), theta, own, contested, unassigned)
        np.testing.assert_array_equal(labels.numpy().ravel(), expected)
    assert kinds.min() > 20  # pixels in no set, in one, in several


def test_first_order_labels_by_the_words():
    prob, theta = smooth_map(4, (19, 16), scale=1.5), 50.0
    own = rankseg_dep(prob, theta=theta, allow_overlap=True, pruning_prob=0.1)[0].flatten(1).numpy()
    p, scores = prob[0].flatten(1).numpy(), []
    for c in range(4):
        whole = own[c].sum() + literal_sizes(prob[0, c].numpy(), theta)
        scores.append(p[c] / whole - (p[c] / whole**2)[own[c]].sum())
    labels = rankseg_dep(prob, theta=theta, pruning_prob=0.1, assignment="first_order")
    np.testing.assert_array_equal(labels.numpy().ravel(), np.argmax(scores, 0))


@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 4, 5)])
def test_shapes_and_types(spatial: tuple[int, ...]):
    prob = torch.randn(2, 4, *spatial, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    before = prob.clone()
    labels, tau = rankseg_dep(prob, theta=2.0, return_tau=True)
    masks, mask_tau = rankseg_dep(prob, theta=2.0, allow_overlap=True, return_tau=True)
    assert labels.shape == (2, *spatial)
    assert labels.dtype == torch.int64
    assert masks.shape == prob.shape
    assert masks.dtype == torch.bool
    assert torch.equal(tau, masks.flatten(2).sum(-1))
    assert torch.equal(mask_tau, tau)
    single, single_tau = rankseg_dep(prob[1], theta=2.0, in_batch=False, return_tau=True)
    assert torch.equal(single, labels[1])
    assert torch.equal(single_tau, tau[1])
    array = rankseg_dep(prob.numpy(), theta=2.0)
    assert isinstance(array, np.ndarray)
    assert (array == labels.numpy()).all()
    assert torch.equal(prob, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_float(dtype: torch.dtype):
    prob = smooth_map(5, (90, 130)).to(dtype)
    same = prob.float() if dtype != torch.float64 else prob
    assert torch.equal(rankseg_dep(prob), rankseg_dep(same))
    assert (rankseg_dep(prob) != rankseg_dep(prob.float())).float().mean() < 1e-3


def test_layout_and_threads_change_nothing(monkeypatch):
    prob = smooth_map(5, (200, 300)).float()  # two tiles
    labels = rankseg_dep(prob)
    assert torch.equal(rankseg_dep(prob.contiguous(memory_format=torch.channels_last)), labels)
    assert torch.equal(rankseg_dep(prob.transpose(2, 3).contiguous().transpose(2, 3)), labels)
    assert torch.equal(rankseg_dep(torch.cat([prob, prob.flip(3)]))[:1], labels)
    reversed_view = prob.numpy()[..., ::-1].copy()[..., ::-1]
    assert (rankseg_dep(reversed_view) == labels.numpy()).all()
    seen, check = set(), module._check_range
    monkeypatch.setattr(module, "_check_range", lambda *a: (seen.add(torch.get_num_threads()), check(*a)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(rankseg_dep(prob), labels)
        with pytest.raises(ValueError, match="finite"):
            rankseg_dep(prob * torch.nan)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == {1}
    part = prob[..., :128, :130]
    labels = rankseg_dep(part)
    monkeypatch.setattr(module, "CPU_TILE", 100)  # less than a row
    assert (rankseg_dep(part) != labels).float().mean() < 1e-3  # sums are rounded elsewhere, single pixels stay


@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("shape", [(40, 50), (150, 170)])
def test_what_is_not_valid_does_not_count(shape: tuple[int, int], metric: str):
    """A padded map has, within, the labels and sizes of the map alone."""
    prob = smooth_map(4, shape)
    padded = pad(prob, (13, 5, 2, 24), value=0.25)
    valid = pad(torch.ones(1, *shape, dtype=torch.bool), (13, 5, 2, 24))
    alone, tau = rankseg_dep(prob, opt_metric=metric, theta=60.0, return_tau=True)
    labels, padded_tau = rankseg_dep(padded, opt_metric=metric, theta=60.0, return_tau=True, valid=valid)
    differing = (labels[valid].view(1, *shape) != alone).float().mean()
    assert differing < (1e-3 if shape[0] > 100 else 1e-6)  # other cells
    assert (padded_tau - tau).abs().max() <= 2e-3 * tau.max()
    masks = rankseg_dep(padded, metric, 60.0, valid=valid, allow_overlap=True)
    assert not masks.masked_select(~valid[:, None]).any()
    counted = rankseg_dep(padded, metric, 60.0)[valid].view(1, *shape)
    assert (counted != alone).float().mean() > 3 * differing + 1e-4  # it would matter


def test_two_classes_take_the_foregrounds_set():
    prob = smooth_map(2, (30, 40))
    own = rankseg_dep(prob, allow_overlap=True)
    assert torch.equal(rankseg_dep(prob), own[:, 1].long())
    assert not torch.equal(rankseg_dep(prob, binary_threshold=False), own[:, 1].long())


def test_an_image_whose_classes_are_all_pruned_gets_labels():
    prob = smooth_map(3, (20, 30), scale=0.1)
    assert not rankseg_dep(prob, allow_overlap=True).any()
    mu = torch.stack([expected_sizes(values, 300) for values in prob[0]])[None]
    assert torch.equal(rankseg_dep(prob), (prob / (1 + mu)).argmax(1))
    assert torch.equal(rankseg_dep(prob, unassigned=2), torch.full((1, 20, 30), 2))


def test_certain_maps_stay_as_they_are():
    labels = torch.randint(0, 4, (1, 25, 31), generator=torch.Generator().manual_seed(0))
    prob = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert torch.equal(rankseg_dep(prob), labels)
    assert torch.equal(rankseg_dep(prob, assignment="first_order"), labels)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"theta": 0}, ValueError, "theta must be a number of pixels above 0, got 0"),
        ({"theta": math.nan}, ValueError, "theta must be a number of pixels above 0, got nan"),
        ({"theta": "300"}, TypeError, "theta must be a number of pixels above 0, got '300'"),
        ({"assignment": "prob"}, ValueError, "assignment must be one of"),
        ({"contested": "none"}, ValueError, "contested must be one of"),
        ({"pruning_prob": 2}, ValueError, "pruning_prob must lie in"),
        ({"valid": torch.ones(1, 3, 3, dtype=torch.bool)}, ValueError, "valid must have the shape"),
    ],
)
def test_refused(options: dict, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        rankseg_dep(torch.full((1, 3, 4, 5), 1 / 3), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_what_is_no_probability_is_refused(value: float):
    prob = torch.full((1, 3, 4, 5), 1 / 3)
    prob[0, 2, 3, 4] = value
    with pytest.raises(ValueError, match="prob must hold finite probabilities"):
        rankseg_dep(prob)


def test_one_class_has_no_labels():
    with pytest.raises(ValueError, match="one class leaves no labels"):
        rankseg_dep(torch.rand(1, 1, 4, 5))


def rule_of(*overrides: str):
    return build_rule(compose(*overrides, predict=["rankseg_dep"]).predict[0], 5)


def test_the_yaml_reaches_the_rule():
    prob = smooth_map(5, (40, 50), scale=2.0, seed=6).float()
    prob[:, :, :2] = 0.02  # in no set
    labels = rule_of()(prob)
    assert torch.equal(labels, rankseg_dep(prob))
    changes: dict = {
        "opt_metric": "iou",
        "theta": 2,
        "pruning_prob": 0.9,
        "unassigned": 3,
        "contested": "holders",
        "assignment": "first_order",
    }
    for key, value in changes.items():
        changed = rule_of(f"predict.{key}={value}")(prob)
        assert torch.equal(changed, rankseg_dep(prob, **{key: value}))
        assert not torch.equal(changed, labels), key


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("predict.theta=0", "key 'theta': got 0"),
        ("predict.scope=case", "none of the rules asked for reads the key 'scope'"),
        ("predict.assignment=prob", "assignment"),
    ],
)
def test_what_a_yaml_cannot_ask_for(override: str, words: str):
    with pytest.raises(InputError, match=words):
        rule_of(override)


def test_its_keys_stand_in_its_own_results_alone():
    """Those of the other rules read as before there were any."""
    config = compose(predict=["rankseg_rma", "rankseg_dep"])
    other, own = config.to_dict()["predict"]
    assert {"theta", "assignment"} <= own.keys()
    assert not {"theta", "assignment"} & other.keys()


ENDLESS = {"theta": 1e6, "pruning_prob": 0.1}  # on the maps below the kernel is 1


@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("shape", [(64, 64), (200, 300), (8, 24, 24)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_levels_decide_like_a_reach_without_end(metric: str, shape: tuple[int, ...], scale: float):
    """But for pixels whose growth is as large under two classes as a level is wide."""
    generator = torch.Generator().manual_seed(len(shape))
    coarse = torch.randn(1, 6, *[6] * len(shape), dtype=torch.float64, generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    prob = interpolate(scale * coarse, shape, mode=mode).softmax(1)
    labels = rankseg_dep(prob, metric, assignment="first_order", **ENDLESS)
    assert (rankseg_dep_levels(prob, metric) != labels).float().mean() < 0.01
    assert (prob.argmax(1) != labels).float().mean() > 0.01
    masks = rankseg_dep(prob, metric, allow_overlap=True, **ENDLESS)
    assert (rankseg_dep_levels(prob, metric, allow_overlap=True) != masks).float().mean() < 0.004


def test_levels_find_the_best_size():
    """To first order: a set of few pixels may lack one."""
    for trial in range(100):
        prob, _ = one_class(trial)
        p, own = prob.numpy().ravel(), rankseg_dep_levels(prob, "dice", allow_overlap=True, pruning_prob=0)
        mu = literal_sizes(prob[0, 0].numpy(), math.inf)
        least = 0.98 if own.sum() < 20 else 0.9995
        assert objective(p, mu, own.numpy().ravel()) > least * best_objective(p, mu)


@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_levels_beside_what_a_call_can_ask_for(metric: str):
    prob = smooth_map(5, (40, 50), scale=2.0, seed=6).float()
    labels = rankseg_dep_levels(prob, metric)
    assert np.array_equal(rankseg_dep_levels(prob[0].numpy(), metric, in_batch=False), labels[0].numpy())
    both = torch.cat([prob, smooth_map(5, (40, 50), seed=7).float()])
    assert torch.equal(rankseg_dep_levels(both, metric)[0], labels[0])
    valid = torch.ones(1, 40, 50, dtype=torch.bool)
    valid[:, 30:] = False
    cut = rankseg_dep_levels(prob[:, :, :30], metric)
    assert torch.equal(rankseg_dep_levels(prob, metric, valid=valid)[:, :30], cut)
    assert not torch.equal(labels[:, :30], cut)
    two = prob[:, :2] / prob[:, :2].sum(1, keepdim=True)
    masks = rankseg_dep_levels(two, metric, allow_overlap=True)
    assert torch.equal(rankseg_dep_levels(two, metric), masks[:, 1].long())
    low = prob.amax((2, 3)).sort().values[0, 1].item()  # two classes do not exceed it
    pruned = (prob.amax((2, 3)) <= low)[0]
    assert not rankseg_dep_levels(prob, metric, allow_overlap=True, pruning_prob=low)[0, pruned].any()
    assert not torch.isin(rankseg_dep_levels(prob, metric, pruning_prob=low), pruned.nonzero()[:, 0]).any()


@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_levels_where_all_classes_are_pruned(metric: str):
    prob = smooth_map(5, (40, 50), scale=2.0, seed=6)
    options = {"pruning_prob": 1.0, "assignment": "first_order", "theta": 1e6}
    same = rankseg_dep_levels(prob, metric, pruning_prob=1) == rankseg_dep(prob, metric, **options)
    assert same.float().mean() > 0.99


def test_levels_keep_certain_maps_and_refuse_what_is_no_probability():
    labels = torch.randint(0, 4, (1, 25, 31), generator=torch.Generator().manual_seed(0))
    prob = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert torch.equal(rankseg_dep_levels(prob), labels)
    prob[0, 2, 3, 4] = math.nan
    with pytest.raises(ValueError, match="prob must hold finite probabilities"):
        rankseg_dep_levels(prob)
    with pytest.raises(ValueError, match="one class leaves no labels"):
        rankseg_dep_levels(torch.rand(1, 1, 4, 5))
