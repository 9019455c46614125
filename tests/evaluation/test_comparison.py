"""Intervals and tests against scipy's own, closed forms, and simulation."""

import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from exp.evaluation import comparison
from exp.evaluation.comparison import (
    bca_interval,
    compare_rules,
    holm,
    mean_interval,
    paired_differences,
    signed_rank,
    standard_error,
)
from exp.evaluation.metrics import EvalResult, case_scores, compute_scores, image_scores, pooled_scores
from tests.conftest import ROOT


def result(rule: str, seed: int, num: int = 40, cases: tuple[str, ...] | None = None) -> EvalResult:
    """Three classes, about 70 % right, and more with the seed."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 50, (num, 3, 3))
    counts[:, 0] = counts[:, 0] * 3 + seed
    return EvalResult(rule, tuple(f"{i:04d}" for i in range(num)), ("a", "b", "c"), counts, cases)


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_scipys(seed: int):
    """From the same resampled means the same limits to the last digits, and from its own ones nearly."""
    values = np.random.default_rng(seed).exponential(size=30) - 0.5
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=9999, random_state=seed)
    left_out = (values.sum() - values) / (len(values) - 1)
    ours = bca_interval(values.mean(), theirs.bootstrap_distribution, left_out)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=1e-12)
    assert mean_interval(values) == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_the_same_input_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_interval(values) == mean_interval(values.copy())
    assert mean_interval(values) != mean_interval(values, seed=1)


@pytest.mark.parametrize(
    ("values", "interval"),
    [([], None), ([1.0], None), ([2.0, 2.0, 2.0], (2.0, 2.0)), ([0.0] * 9, (0.0, 0.0))],
)
def test_degenerate_data(values: list[float], interval: tuple[float, float] | None):
    assert mean_interval(np.array(values)) == interval


def test_one_image_that_differs():
    """199 equal images and one: the interval holds the mean and is finite."""
    low, high = mean_interval(np.array([0.0] * 199 + [10.0]))
    assert 0 <= low <= 0.05 <= high < 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["normal", "skewed", "mostly zero"])
def test_coverage_of_the_interval(shape: str):
    """Of 1,000 intervals 93 to 97 % hold the mean of the population that the images come from."""
    rng, held = np.random.default_rng(0), 0
    for i in range(1000):
        drawn = rng.normal(size=100) if shape == "normal" else rng.gamma(2.0, size=100) - 2.0
        if shape == "mostly zero":
            drawn = np.where(rng.random(100) < 0.5, 0.0, drawn)
        low, high = mean_interval(drawn, seed=i)
        held += low <= 0.0 <= high
    assert 930 <= held <= 970


@pytest.mark.slow
def test_coverage_where_the_slices_of_a_case_are_alike():
    """60 cases of slices that share the case's own effect: resampled by case, the interval keeps its promise."""
    rng, held = np.random.default_rng(0), 0
    for i in range(1000):
        effects = rng.normal(size=60)
        by_case = [np.mean(effect + 0.2 * rng.normal(size=rng.integers(5, 30))) for effect in effects]
        low, high = mean_interval(np.array(by_case), seed=i)
        held += low <= 0.0 <= high
    assert 930 <= held <= 970


def test_coverage_of_the_interval_in_short():
    """As the slow tests with a fifth of the work: far-off intervals are seen."""
    rng, held = np.random.default_rng(1), 0
    for i in range(200):
        low, high = mean_interval(rng.gamma(2.0, size=50) - 2.0, seed=i, num_resamples=1999)
        held += low <= 0.0 <= high
    assert 176 <= held <= 198


def test_wilcoxon_against_all_signs():
    """Five differences: the p-value is the share of the 32 sign patterns that are as extreme; zeros are dropped."""
    values = np.array([0.5, -1.0, 2.0, 3.0, 4.0])
    ranks = np.array([1, 2, 3, 4, 5])
    observed = abs((ranks * np.sign(values)).sum())
    extreme = sum(abs((ranks * signs).sum()) >= observed for signs in itertools.product((-1, 1), repeat=5))
    assert signed_rank(values) == pytest.approx(extreme / 32)
    assert signed_rank(np.append(values, [0.0, 0.0])) == signed_rank(values)
    assert signed_rank(np.zeros(4)) == 1.0
    assert signed_rank(np.array([])) == 1.0


def test_wilcoxon_with_ties_is_the_normal_approximation():
    values = np.array([1.0, 1.0, -1.0, 2.0, 2.0, 3.0, 3.0, 4.0, -2.0, 5.0])
    ranks = stats.rankdata(np.abs(values))
    total = ranks[values > 0].sum()
    sizes = np.unique(np.abs(values), return_counts=True)[1]
    variance = 10 * 11 * 21 / 24 - (sizes**3 - sizes).sum() / 48
    assert signed_rank(values) == pytest.approx(2 * stats.norm.sf(abs(total - 10 * 11 / 4) / math.sqrt(variance)))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_rules_are_compared_image_by_image():
    base, better, same, worse = result("argmax", 0), result("rma", 9), result("again", 0), result("worse", 5)
    rows = compare_rules([base, better, same], "mIoUI")
    assert [(c.rule, c.metric, c.unit) for c in rows] == [
        ("rma", "mIoUI", "image"),
        ("again", "mIoUI", "image"),
        ("rma", "mIoUD", "image"),
        ("again", "mIoUD", "image"),
    ]
    differences = image_scores(better.counts)["mIoUI"] - image_scores(base.counts)["mIoUI"]
    rma, again, pooled, _ = rows
    assert rma.difference == pytest.approx(differences.mean())
    assert (rma.wins, rma.ties, rma.losses) == ((differences > 0).sum(), 0, (differences < 0).sum())
    assert rma.interval[0] < rma.difference < rma.interval[1]
    assert rma.p_value == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert rma.p_holm == pytest.approx(min(1, 2 * rma.p_value))
    assert (again.difference, again.interval, again.p_value, again.ties) == (0.0, (0.0, 0.0), 1.0, 40)
    for name in ("mIoUI", "mDiceI"):
        lost = image_scores(worse.counts)[name] - image_scores(better.counts)[name]
        shares = [100 * sum(value < -points for value in lost) / 40 for points in (1, 5)]
        assert 100 > shares[0] > shares[1] > 0
        row = compare_rules([better, worse], "mIoUI")[0]
        assert list(row.losing[name].values()) == pytest.approx(shares)
    assert again.losing == {name: {"1": 0.0, "5": 0.0} for name in ("mIoUI", "mDiceI")}
    assert pooled.losing is None
    scores = [compute_scores(r.counts)["mIoUD"] for r in (base, better)]
    assert pooled.difference == pytest.approx(scores[1] - scores[0])
    assert pooled.interval[0] < pooled.difference < pooled.interval[1]
    assert pooled.p_value is pooled.wins is None


def test_undefined_images_are_left_out():
    base, other = result("argmax", 0), result("rma", 3)
    base.counts[:5] = other.counts[:5] = 0
    (row, _) = compare_rules([base, other], "mDiceI")
    assert row.num_units == 35
    base.counts[:] = other.counts[:] = 0
    row, pooled = compare_rules([base, other], "mDiceI")
    assert (row.num_units, row.difference, row.interval) == (0, None, None)
    assert (pooled.difference, pooled.interval) == (None, None)
    json.dumps([vars(row), vars(pooled)], allow_nan=False)


def test_cases_are_what_is_compared_and_resampled():
    cases = tuple(f"case{i // 4}" for i in range(40))
    base, other = result("argmax", 0, cases=cases), result("rma", 5, cases=cases)
    by_slice, volume, pooled = compare_rules([base, other], "mDiceI")
    assert [(c.metric, c.unit, c.num_units) for c in (by_slice, volume, pooled)] == [
        ("mDiceI", "case", 10),
        ("mDice3D", "case", 10),
        ("mDiceD", "case", 10),
    ]
    scores = [case_scores(r.counts, cases)[1] for r in (base, other)]
    assert [list(row.losing) for row in (by_slice, volume)] == [["mIoUI", "mDiceI"], ["mIoU3D", "mDice3D"]]
    for row in (by_slice, volume):
        assert row.difference == pytest.approx((scores[1][row.metric] - scores[0][row.metric]).mean())
        assert row.wins + row.ties + row.losses == 10
    table = [compute_scores(r.counts, cases)["mDiceI"] for r in (base, other)]
    assert by_slice.difference == pytest.approx(table[1] - table[0]), "the difference of what the table shows"
    assert by_slice.interval == mean_interval(paired_differences(base, other, "mDiceI"))


def test_the_interval_of_a_data_set_score_is_that_of_pooling_anew():
    """Against scipy's bootstrap over indices, whose statistic pools the counts and scores them."""
    base, other = result("argmax", 0), result("rma", 4)
    pooled = compare_rules([base, other], "mIoUI")[1]

    def difference(drawn: np.ndarray) -> float:
        scores = [pooled_scores(r.counts[drawn.astype(int)].sum(0))["mIoUD"] for r in (base, other)]
        return scores[1] - scores[0]

    theirs = stats.bootstrap(
        (np.arange(40),), difference, method="BCa", n_resamples=499, vectorized=False, random_state=0
    ).confidence_interval
    width = theirs.high - theirs.low
    assert pooled.interval == pytest.approx((theirs.low, theirs.high), abs=0.15 * width)


def test_a_data_set_score_that_is_a_mean_has_the_interval_of_the_mean(monkeypatch: pytest.MonkeyPatch):
    """Two classes, as many foreground pixels in every image: mAccD is the mean of the images' accuracies."""
    monkeypatch.setattr(comparison, "NUM_POOLED_RESAMPLES", comparison.NUM_RESAMPLES)
    rng = np.random.default_rng(0)
    pair = []
    for rule, scale in (("argmax", 20), ("rma", 90)):
        right = rng.exponential(scale, size=(30, 2)).clip(1, 1000).astype(int)
        counts = np.stack([right, 1000 - right[:, ::-1], 1000 - right], 1)
        pair.append(EvalResult(rule, tuple(map(str, range(30))), ("rest", "tumour"), counts))
    by_image, pooled = compare_rules(pair, "mAccI")
    assert pooled.difference == pytest.approx(by_image.difference)
    assert pooled.interval == pytest.approx(by_image.interval, abs=0.02), "but for how ties are rounded"


@pytest.mark.parametrize("cases", [None, tuple("aabb" * 10)])
def test_counts_of_further_metrics_may_be_of_one_of_two_results(cases: tuple[str, ...] | None):
    base, other = result("argmax", 0, cases=cases), result("rma", 2, cases=cases)
    more = replace(base, counts=np.concatenate([base.counts, base.counts[:, :2]], 1), metrics=("BIoU",))
    plain = compare_rules([base, other], "mIoUI")
    assert compare_rules([more, other], "mIoUI") == plain
    assert [c.difference for c in compare_rules([other, more], "mIoUI")] == [-c.difference for c in plain]


def test_one_rule_is_compared_with_nothing():
    assert compare_rules([result("argmax", 0)], "mIoUI") == []


def test_two_thousand_images_take_less_than_a_second():
    rng = np.random.default_rng(0)
    names, classes = tuple(map(str, range(2000))), tuple(map(str, range(21)))
    pair = [EvalResult(rule, names, classes, rng.integers(0, 50, (2000, 3, 21))) for rule in "ab"]
    compare_rules([pair[0], pair[0]], "mIoUI")  # scipy is imported
    seconds = []
    for _ in range(3):
        start = time.process_time()
        compare_rules(pair, "mIoUI")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0


def test_scipy_is_imported_for_a_comparison_alone():
    code = "import sys; import exp.evaluation.results; assert 'scipy.stats' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_standard_errors_of_differences():
    cases = tuple(f"case{i // 4}" for i in range(40))
    for grouping in (None, cases):
        base, other = result("argmax", 0, cases=grouping), result("rma", 5, cases=grouping)
        values = paired_differences(base, other, "mDiceI")
        assert standard_error(base, other, "mDiceI") == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))
        names = np.array(grouping or range(40))
        left_out = []
        for name in dict.fromkeys(names):
            first, second = (pooled_scores(r.counts[names != name].sum(0))["mIoUD"] for r in (base, other))
            left_out.append(second - first)
        expected = math.sqrt((len(left_out) - 1) / len(left_out) * ((left_out - np.mean(left_out)) ** 2).sum())
        assert standard_error(base, other, "mIoUD") == pytest.approx(expected)
