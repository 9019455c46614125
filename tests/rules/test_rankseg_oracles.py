"""`rankseg_rma` against independent float64 oracles: brute force, the exact expected Dice, the paper's words, PyPI."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankseg_rma as module
from rankseg_rma import rankseg_rma

METRICS = ("dice", "iou")
STREAMED, BATCHED = 0, 2**40  # values of SMALL that force one strategy or the other


def objective(metric: str, n, s, mu):
    """RMA of the expected metric of a set of n pixels and mass s, in a class of mass mu."""
    return 2 * s / (n + mu + 1) if metric == "dice" else s / np.maximum(n + mu - s, 1e-300)


def best_objective(metric: str, p: np.ndarray) -> float:
    """Brute force over all prefixes of the sorted probabilities, the empty one included."""
    ranked = np.sort(p)[::-1]
    scores = objective(metric, np.arange(1, len(p) + 1), np.cumsum(ranked), p.sum())
    return max(0.0, scores.max())


def random_map(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """(B, C, *spatial) float64 map of one of the kinds that matter."""
    if kind == "ties":
        return rng.choice([0.0, 0.1, 0.25, 0.5, 1.0], shape)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "one":
        return np.ones(shape)
    if kind == "adversarial":  # a few certain pixels in a long tail, of every scale
        tail = 10.0 ** rng.uniform(-9, 0, (*shape[:2], *[1] * (len(shape) - 2))) * rng.random(shape)
        return np.where(rng.random(shape) < 0.02, rng.random(shape), tail)
    scale = {"flat": 0.1, "soft": 2.0, "confident": 15.0}[kind]
    logits = scale * rng.standard_normal(shape)
    if shape[1] == 1:
        return 1 / (1 + np.exp(-logits))
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


KINDS = ("ties", "zero", "one", "adversarial", "flat", "soft", "confident")


@settings(max_examples=1200, deadline=None, derandomize=True, database=None)
@given(
    classes=st.sampled_from([1, 2, 3, 21, 150]),
    spatial=st.one_of(
        st.tuples(st.integers(1, 60)),
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    ),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    small=st.sampled_from([STREAMED, BATCHED]),
    pruning_prob=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sets_are_optimal(classes, spatial, kind, metric, dtype, small, pruning_prob, seed):
    prob = torch.from_numpy(random_map(kind, (1, classes, *spatial), np.random.default_rng(seed))).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        masks, tau = rankseg_rma(prob, metric, allow_overlap=True, return_tau=True, pruning_prob=pruning_prob)
    limit = float(torch.tensor(pruning_prob, dtype=dtype))
    for p, own, n in zip(prob.double().flatten(2)[0].numpy(), masks.flatten(2)[0].numpy(), tau[0].tolist()):
        assert own.sum() == n
        if p.max() <= limit:
            assert n == 0
        else:
            assert objective(metric, n, p[own].sum(), p.sum()) >= best_objective(metric, p) - 1e-6


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["soft", "adversarial", "ties", "flat"])
def test_sets_are_optimal_on_large_maps(metric, kind):
    rng = np.random.default_rng(5)
    prob = torch.from_numpy(random_map(kind, (1, 3, 500, 900), rng)).float()  # starts from a sample of the pixels
    masks = rankseg_rma(prob, metric, allow_overlap=True)
    for p, own in zip(prob.double().flatten(2)[0].numpy(), masks.flatten(2)[0].numpy()):
        if p.max() > 0.1:
            reached = objective(metric, own.sum(), p[own].sum(), p.sum())
            assert reached >= best_objective(metric, p) - 1e-9


def reference_labels(prob, own, metric, method, contested, unassigned, pruning_prob):
    """(C, d) map and sets -> (d,) sets of labels that are right, pixel by pixel in plain words."""
    classes, size = prob.shape
    kept = [c for c in range(classes) if prob[c].max() > pruning_prob]
    alone = own & (own.sum(0) == 1)
    answers = []
    for j in range(size):
        holders = np.flatnonzero(own[:, j])
        if len(holders) == 1:
            answers.append({int(holders[0])})
            continue
        if len(holders) == 0 and unassigned != "max_score":
            answers.append({0 if unassigned == "first" else unassigned})
            continue
        if len(holders) == 0:
            competing = kept or list(range(classes))
        else:
            competing = list(holders) if contested == "holders" else list(range(classes))
        scores = {}
        for c in competing:
            n, s, mu, p = alone[c].sum(), prob[c][alone[c]].sum(), prob[c].sum(), prob[c, j]
            if kept and c not in kept and method == "rma_score":
                scores[c] = 0.0
            elif method == "prob":
                scores[c] = p
            elif method == "weight_prob":
                scores[c] = p / (1 + n)
            else:
                scores[c] = objective(metric, n + 1, s + p, mu) - objective(metric, n, s, mu)
        top = max(scores.values())
        answers.append({int(c) for c, value in scores.items() if value >= top - 1e-8})
    return answers


@pytest.mark.parametrize("small", [STREAMED, BATCHED])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["rma_score", "weight_prob", "prob"])
@pytest.mark.parametrize("contested", ["holders", "all"])
@pytest.mark.parametrize("unassigned", ["max_score", "first", 255])
def test_labels_follow_the_rule(small, metric, method, contested, unassigned, monkeypatch):
    monkeypatch.setattr(module, "SMALL", small)
    rng = np.random.default_rng(7)
    undecided = 0
    for trial in range(24):
        kind = ("soft", "flat", "adversarial", "confident")[trial % 4]
        prob = random_map(kind, (1, (3, 6, 21)[trial % 3], 40), rng)
        limit = (0.1, 0.3, 1.0)[trial % 3 if trial < 18 else 0]
        options = {"opt_metric": metric, "pruning_prob": limit}
        own = rankseg_rma(prob, allow_overlap=True, **options)[0]
        options |= {"to_nonoverlap_method": method, "contested": contested, "unassigned": unassigned}
        labels = rankseg_rma(prob, **options)[0]
        answers = reference_labels(prob[0], own, metric, method, contested, unassigned, limit)
        assert all(int(label) in answer for label, answer in zip(labels, answers))
        undecided += (own.sum(0) != 1).sum()
    assert undecided > 100


def paper_reference(prob: np.ndarray, metric: str, method: str = "rma_score") -> np.ndarray:
    """(C, d) -> (d,): the paper's procedure word for word, with its sort, in float64."""
    classes, size = prob.shape
    own = np.zeros((classes, size), bool)
    for c in range(classes):
        if prob[c].max() > 0.1:
            order = np.argsort(-prob[c], kind="stable")
            mass = np.cumsum(prob[c][order])
            count = np.arange(1, size + 1)
            own[c, order[: 1 + objective(metric, count, mass, prob[c].sum()).argmax()]] = True
    alone = own & (own.sum(0) == 1)
    labels = np.zeros(size, np.int64)  # what no set holds stays with class 0
    for j in range(size):
        if own[:, j].sum() == 1:
            labels[j] = own[:, j].argmax()
        elif own[:, j].sum() > 1:
            gains = np.zeros(classes)  # a pruned class competes with growth 0, or with its own probability
            for c in range(classes):
                if prob[c].max() > 0.1 or method != "rma_score":
                    n, s, mu = alone[c].sum(), prob[c][alone[c]].sum(), prob[c].sum()
                    gains[c] = {
                        "rma_score": objective(metric, n + 1, s + prob[c, j], mu) - objective(metric, n, s, mu),
                        "prob": prob[c, j],
                        "weight_prob": prob[c, j] / (1 + n),
                    }[method]
            labels[j] = gains.argmax()
    return labels


@pytest.mark.parametrize("method", ["rma_score", "prob", "weight_prob"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("small", [STREAMED, BATCHED])
def test_the_papers_code_to_the_letter(metric, small, method, monkeypatch):
    monkeypatch.setattr(module, "SMALL", small)
    rng = np.random.default_rng(11)
    for trial in range(60):
        prob = random_map(("soft", "flat", "confident")[trial % 3], (1, (3, 8, 21)[trial // 3 % 3], 90), rng)
        options = {"to_nonoverlap_method": method, "unassigned": "first", "contested": "all", "pruning_prob": 0.1}
        labels = rankseg_rma(prob, metric, **options)[0]
        np.testing.assert_array_equal(labels, paper_reference(prob[0], metric, method))


@pytest.mark.parametrize("method", ["prob", "weight_prob"])
@pytest.mark.parametrize("small", [STREAMED, BATCHED])
def test_a_pruned_class_competes_with_its_own_probability(small, method, monkeypatch):
    """The authors' code gives the third class, whose largest probability is 0.06, the pixels of both others."""
    monkeypatch.setattr(module, "SMALL", small)
    prob = torch.zeros(1, 3, 20, 20)
    prob[:, 0, :10], prob[:, 1, :10], prob[:, 0, 10:], prob[:, 1, 10:] = 0.9, 0.04, 0.04, 0.9
    prob[:, 2], prob[:, 0, 9:11], prob[:, 1, 9:11] = 0.06, 0.48, 0.46
    labels = rankseg_rma(prob, to_nonoverlap_method=method, unassigned="first", contested="all")
    expected = [180, 180, 40] if method == "weight_prob" else [220, 180, 0]
    assert labels.flatten().bincount(minlength=3).tolist() == expected
    labels = rankseg_rma(prob, to_nonoverlap_method=method, contested="holders")
    assert labels.flatten().bincount(minlength=3).tolist() == [220, 180, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shape", [(2, 21, 90, 121), (1, 150, 60, 71), (3, 2, 200, 190), (1, 19, 300, 310), (1, 4, 700, 900)]
)
def test_same_labels_as_the_published_package(metric, shape):
    package = pytest.importorskip("rankseg")
    different = total = 0
    for seed, scale in enumerate((1.0, 3.0, 8.0)):
        generator = torch.Generator().manual_seed(seed)
        prob = (scale * torch.randn(shape, generator=generator)).softmax(1)
        binary = shape[1] == 2
        options = {"metric": metric, "solver": "RMA", "pruning_prob": 0.1}
        theirs = package.RankSEG(output_mode="multilabel", **options).predict(prob[:, int(binary) :])
        ours = rankseg_rma(prob, metric, allow_overlap=True)[:, int(binary) :]
        exact = prob[:, int(binary) :].double().flatten(2).numpy()
        mine, other = (
            objective(metric, own.sum(-1), (exact * own).sum(-1), exact.sum(-1))
            for own in (ours.flatten(2).numpy(), theirs.flatten(2).numpy())
        )
        assert (mine >= other - 1e-12).all()
        labels = ours[:, 0] if binary else rankseg_rma(prob, metric)
        expected = theirs[:, 0] if binary else package.RankSEG(output_mode="multiclass", **options).predict(prob)
        different += int((labels != expected).sum())
        total += labels.numel()
    print(f"{metric} {shape}: {different} of {total} labels differ")
    assert different < 1e-3 * total


def exact_dice(p: np.ndarray) -> np.ndarray:
    """(d,) descending probabilities -> (d + 1,) exact expected Dice of each prefix, by Poisson-binomial convolution."""
    size = len(p)
    suffix = [np.ones(1)]
    for value in p[::-1]:
        suffix.append(np.convolve(suffix[-1], [1 - value, value]))
    expected, prefix = np.zeros(size + 1), np.ones(1)
    for n in range(1, size + 1):
        prefix = np.convolve(prefix, [1 - p[n - 1], p[n - 1]])
        rest = suffix[size - n]
        hits, others = np.arange(len(prefix))[:, None], np.arange(len(rest))
        expected[n] = prefix @ ((2 * hits / (n + hits + others)) @ rest)
    return expected


def regret(p: np.ndarray) -> tuple[float, float]:
    """Descending probabilities -> what the RMA set loses of the exact expected Dice, and its bound."""
    exact = exact_dice(p)
    n = int(rankseg_rma(p[None, None], allow_overlap=True, pruning_prob=0.0).sum())
    best, mu = int(exact.argmax()), p.sum()
    return exact[best] - exact[n], 2 * (best + mu + 1) / max(best + mu, 1e-9) ** 2


def regret_maps(size: int) -> list[np.ndarray]:
    """Sorted maps of `size` pixels: confident to flat, and rare foreground."""
    rng = np.random.default_rng(size)
    shapes = [(0.2, 0.2), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (0.3, 2.0), (1.0, 9.0), (5.0, 1.0), (20.0, 20.0)]
    return [np.sort(rng.beta(a, b, size))[::-1] for a, b in shapes for _ in range(3)]


def test_exact_dice_by_enumeration():
    p = np.array([0.9, 0.6, 0.35, 0.2])
    for n in range(1, 5):
        total = 0.0
        for outcome in range(16):
            y = np.array([outcome >> j & 1 for j in range(4)])
            total += np.prod(np.where(y, p, 1 - p)) * 2 * y[:n].sum() / (n + y.sum())
        assert math.isclose(exact_dice(p)[n], total, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("size", "limit"), [(4, 0.05), (10, 0.02), (25, 0.01), (50, 0.005), (100, 0.003), (400, 0.0005)]
)
def test_regret_in_the_exact_expected_dice(size, limit):
    losses = [regret(p) for p in regret_maps(size)]
    print(f"d = {size}: mean {np.mean([a for a, _ in losses]):.1e}, worst {max(a for a, _ in losses):.1e}")
    assert all(-1e-12 <= loss <= min(bound, limit) for loss, bound in losses)
