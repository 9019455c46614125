"""`rankseg_exact` against sums over all label images and all sets, and RankSEG-RMA against it."""

import itertools

import numpy as np
import pytest
import torch

from exp.data.sets.shapes import ShapesNoisyBinary
from exp.rules.exact import best_set, expected_scores, rankseg_exact
from rankseg_rma import rankseg_rma

METRICS = ("dice", "iou")


def literal_score(metric: str, own: np.ndarray, truth: np.ndarray) -> float:
    both, sizes = int((own & truth).sum()), int(own.sum() + truth.sum())
    if sizes == 0:
        return 1.0
    return 2 * both / sizes if metric == "dice" else both / (sizes - both)


def literal_expectation(metric: str, own: np.ndarray, p: np.ndarray) -> float:
    """The sum over all 2^d label images."""
    truths = (np.array(bits, bool) for bits in itertools.product((0, 1), repeat=len(p)))
    return sum(np.where(truth, p, 1 - p).prod() * literal_score(metric, own, truth) for truth in truths)


def small_problems() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    uniform = [rng.random(6) for _ in range(4)]
    rare = [0.2 * rng.random(6) for _ in range(4)]  # the empty set is the best of some
    ties = [rng.choice([0.0, 0.25, 0.5, 0.5, 1.0], 6) for _ in range(4)]
    return [*uniform, *rare, *ties, np.zeros(4), np.ones(4), np.full(5, 0.01)]


@pytest.mark.parametrize("metric", METRICS)
def test_no_set_has_a_larger_expectation(metric: str):
    for p in small_problems():
        sets = [np.array(bits, bool) for bits in itertools.product((0, 1), repeat=len(p))]
        best = max(literal_expectation(metric, own, p) for own in sets)
        assert literal_expectation(metric, best_set(p, metric), p) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_expected_scores_of_prefixes(metric: str):
    for p in small_problems():
        ranked = np.sort(p)[::-1]
        expected = [literal_expectation(metric, np.arange(len(p)) < n, ranked) for n in range(len(p) + 1)]
        np.testing.assert_allclose(expected_scores(ranked, metric), expected, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_expected_scores_of_many_pixels_against_drawn_labels(metric: str):
    """3,000 pixels, more than one block; the mean over 4,000 label images lies within four standard errors."""
    rng = np.random.default_rng(0)
    p = np.sort(np.concatenate([rng.random(1000), 0.02 * rng.random(2000)]))[::-1]
    scores = expected_scores(p, metric)
    truths = rng.random((4000, len(p))) < p
    for n in (1, 300, 900, 2500):
        both, size = truths[:, :n].sum(1), truths.sum(1)
        drawn = 2 * both / (n + size) if metric == "dice" else both / (n + size - both)
        assert abs(drawn.mean() - scores[n]) < 4 * drawn.std() / np.sqrt(len(drawn))


@pytest.mark.parametrize(("noise", "gain"), [(0.0, 0.002), (0.4, 0.02)])
def test_on_true_probabilities_exact_is_best_rma_close_and_argmax_behind(noise: float, gain: float):
    """Expected Dice, no label drawn: RMA within 0.001 of the optimum, argmax on average `gain` or more behind RMA."""
    dataset = ShapesNoisyBinary(None, "val", max_samples=4, facts={"label_noise": noise, "label_spread": 3.0})
    gains = []
    for i in range(4):
        prob = torch.from_numpy(dataset.probabilities(i))[None]
        p = prob[0, 1].numpy().ravel()
        scores = expected_scores(np.sort(p)[::-1], "dice")
        labels = rankseg_exact(prob, opt_metric="dice"), rankseg_rma(prob, "dice"), prob.argmax(1)
        exact, rma, argmax = (scores[int(label.sum())] for label in labels)
        for label in labels:  # each is a set of the most probable pixels: its expectation is that of a prefix
            own = label.numpy().ravel() > 0
            assert p[~own].max(initial=0) <= p[own].min(initial=1)
        assert exact == scores.max()
        assert exact >= rma >= exact - 1e-3
        assert rma >= argmax - 1e-3
        gains.append(rma - argmax)
    assert np.mean(gains) > gain


def test_labels_have_the_maps_shape_and_every_image_its_own_set():
    prob = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    prob = torch.cat([1 - prob, prob], 1)
    labels = rankseg_exact(prob, opt_metric="iou")
    assert labels.shape == (3, 5, 7)
    for i in range(3):
        assert torch.equal(labels[i], rankseg_exact(prob[i : i + 1], opt_metric="iou")[0])
