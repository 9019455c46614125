"""Beyond the paper: losses, seeds, lengths and noise, true probabilities, and the results in a page of the docs."""

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exp.evaluation.metrics import EvalResult, compute_scores
from exp.evaluation.results import save_results
from exp.reproduction.existing import DONE, UNTRAINED, WAITING, Existing
from exp.reproduction.job import Reevaluation, join_jobs
from exp.reproduction.measured import Measured, Training, compare_seeds, group_seeds, mean_score
from exp.reproduction.published import load_tables
from exp.reproduction.report.build import write_report
from exp.reproduction.report.writers import BEGIN, END, update_readme
from exp.reproduction.runner import Runner
from exp.runtime.errors import InputError
from tests.reproduction.test_page import Page
from tests.reproduction.test_report import without_details, write_results
from tests.reproduction.test_reproduce import SMALL

RULES = ("argmax", "rankseg_rma")
NOISY = replace(
    SMALL,
    data="shapes_noisy_binary",
    test="test_dice",
    rules=RULES,
    overrides=(*SMALL.overrides[:1], "data.val_samples=3", *SMALL.overrides[4:]),
)


def noisy(level: float):
    return replace(NOISY, overrides=(*NOISY.overrides, f"data.label_noise={level}"))


def write_true_results(level: float, output: Path, gain: int) -> None:
    """Results as scripts/evaluate_probabilities.py --true_of writes them, on the images of `write_results`."""
    config = noisy(level).config.to_dict()
    names = tuple(f"0_{i:03d}" for i in range(12))
    counts = np.random.default_rng(3).integers(50, 100, (12, 3, 21))
    results, contexts = [], []
    for place, rule in enumerate(("argmax", "rankseg_exact", "rankseg_rma")):
        better = counts.copy()
        found = gain * place + np.arange(12)[:, None] % 3 * place
        better[:, 0] += found
        better[:, 2] -= found  # the labels stay as they are
        results.append(EvalResult(rule, names, tuple(map(str, range(21))), better))
        evaluated = {"data": config["data"], "predict": {"name": rule}}
        contexts.append({"probabilities": "true", "metric": "mDiceI", "config": evaluated})
    save_results(results, output / f"true{level}" / "results", contexts)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Two lengths, one of them with two seeds, and two levels of noise with and without a network."""
    folder = tmp_path_factory.mktemp("evidence") / "out"
    longer = (*(o for o in SMALL.overrides if "train_iters" not in o), "schedule.train_iters=9")
    for seed in (0, 1):
        write_results(replace(SMALL, rules=RULES, seed=seed), folder)
    write_results(replace(SMALL, rules=RULES, overrides=longer), folder, shift=40)
    for level in (0.0, 0.4):
        write_results(noisy(level), folder, shift=int(10 * level))
        write_true_results(level, folder, gain=1 + int(10 * level))
    write_report(folder)
    return folder


def test_seeds_lengths_and_noise_are_told_apart(output: Path):
    paper, others = Measured(output).trainings()
    assert paper == []
    groups = group_seeds(others)
    assert [(group[0].long_name.partition(", ce, ")[2], len(group)) for group in groups[:4]] == [
        ("3 iterations", 2),
        ("9 iterations", 1),
        ("label noise 0, 3 iterations", 1),
        ("label noise 0.4, 3 iterations", 1),
    ]
    assert [group[0].name for group in groups[4:]] == [
        f"true probabilities, shapes_noisy_binary, label noise {level}" for level in ("0", "0.4")
    ]
    assert all(group[0].is_true and group[0].metric == "mDiceI" for group in groups[4:])
    assert groups[4][0].rules == ("argmax", "rankseg_rma", "rankseg_exact")
    seeds = groups[0]
    pairs = [[compute_scores(r.counts)["mIoUI"] for r in t.results] for t in seeds]
    assert compare_seeds(seeds, "rankseg_rma").difference == pytest.approx(
        np.mean([second - first for first, second in pairs])
    )
    assert mean_score(seeds, "argmax", "mIoUI") == pytest.approx(np.mean([first for first, _ in pairs]))


def test_losses_are_told(tmp_path: Path):
    counts = np.full((8, 3, 3), 50)
    counts[:, 0] += np.arange(8)[:, None]
    worse = counts.copy()
    worse[:, 0, 1] -= 20
    worse[:, 2, 1] += 20
    better = counts.copy()
    better[:, 0] += 9
    results = [
        EvalResult(name, tuple("abcdefgh"), ("x", "y", "z"), c)
        for name, c in (("argmax", counts), ("bad", worse), ("good", better))
    ]
    training = Training(tmp_path, SMALL.config.to_dict(), 3, "mIoUI", tuple(results))
    losses = training.losses
    assert {(c.rule, c.metric) for c in losses} == {("bad", "mIoUI"), ("bad", "mIoUD"), ("bad", "Acc")}
    accuracy = next(c for c in losses if c.metric == "Acc")
    exact = compute_scores(worse)["Acc"] - compute_scores(counts)["Acc"]
    assert accuracy.difference == pytest.approx(exact)
    assert accuracy.interval[0] <= exact <= accuracy.interval[1] < 0
    assert replace(training, results=(results[0], results[2])).losses == []


def test_an_image_without_a_score_in_one_seed_is_left_out_of_all():
    """A foreground that is only predicted has no accuracy."""
    counts = np.zeros((3, 3, 2), np.int64)
    counts[:, 0] = [[50, 10], [50, 20], [50, 30]]
    counts[:, 2, 1] = 10
    lacking = counts.copy()
    lacking[1, :, 1] = [0, 5, 0]
    better = counts.copy()
    better[:, 0, 1] += 5

    def training(seed: int, base: np.ndarray) -> Training:
        results = [EvalResult(n, tuple("abc"), ("x", "y"), c) for n, c in (("argmax", base), ("r", better))]
        return Training(Path("f"), {**SMALL.config.to_dict(), "seed": seed}, 3, "mAccI", tuple(results))

    found = compare_seeds([training(0, counts), training(1, lacking)], "r")
    assert found.num_units == 2
    alone = compare_seeds([training(0, counts)], "r")
    assert alone.num_units == 3
    gains = [
        100 * (better[i, 0, 1] / (better[i, 0, 1] + 10) - counts[i, 0, 1] / (counts[i, 0, 1] + 10)) for i in (0, 2)
    ]
    assert found.difference == pytest.approx(np.mean(gains))


@pytest.mark.parametrize(
    "change", [{"test": 5}, {"test": {"name": "t", "metric": "mIoU", "temperature": 1.0}}, {"data": {}}]
)
def test_results_of_something_else_are_passed_over(tmp_path: Path, change: dict):
    write_results(replace(SMALL, rules=RULES), tmp_path)
    for path in tmp_path.glob("*/*/results/*a*.json"):
        content = json.loads(path.read_text())
        if "config" in content:
            path.write_text(json.dumps({**content, "config": {**content["config"], **change}}))
    assert Measured(tmp_path).trainings() == ([], [])
    write_report(tmp_path)


def test_the_report_has_them(output: Path):
    text = (output / "report" / "tables.md").read_text()
    assert text.index("## Other trainings") < text.index("## table1")  # of which nothing was measured
    section = text.partition("### Rules beside argmax, by mIoUI over images")[2].partition("###")[0]
    seeds = group_seeds(Measured(output).trainings()[1])[0]
    gain = compare_seeds(seeds, "rankseg_rma")
    each = " ".join(f"{compare_seeds([seed], 'rankseg_rma').difference:+.2f}" for seed in seeds)
    interval = f"[{gain.interval[0]:+.2f}, {gain.interval[1]:+.2f}]"
    units = f"12 / 0 | {', '.join(' / '.join(f'{v:.1f}' for v in shares.values()) for shares in gain.losing.values())}"
    assert f"| {gain.difference:+.2f} {interval} | {units} | {each} |" in section
    assert "| images up / down | % lose > 1 / 5: IoU, Dice |" in section
    assert list(gain.losing) == ["mIoUI", "mDiceI"]
    assert "| unet_mobilenetv3_small_100, shapes, ce, 3 iterations, 2 seeds | argmax |" in section
    noise = text.partition("### Rules beside argmax, by mDiceI over images")[2].partition("###")[0]
    assert noise.count("|  | rankseg_exact |") == 2
    assert noise.count("|  | rankseg_rma |") == 4
    assert "Under true probabilities a rule is evaluated on those" in noise
    assert "### true probabilities, shapes_noisy_binary, label noise 0.4\n" in text
    page = Page(without_details((output / "report" / "index.html").read_text()))
    assert page.tags["table"] == len(load_tables()) + 2 + 7  # rules; trainings and true probabilities
    latex = (output / "report" / "tables.tex").read_text()
    assert "\\caption{true probabilities, shapes\\_noisy\\_binary, label noise 0}" in latex


def test_the_readme_is_renewed_between_its_marks(output: Path, script, tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    status, printed, _ = script("report", output, "--readme", path)
    assert status == 0
    assert f"results: {path}" in printed
    text = path.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n\nMeasured: 0 of the ")
    assert text.endswith(f"\n{END}\n\nAfter\n")
    assert "old" not in text
    write_report(output, path)
    assert path.read_text() == text
    lead = (output / "report" / "tables.md").read_text().split("\n\n")[1]
    assert lead.startswith("Measured: 0 of the ")
    assert textwrap.fill(lead, 120) in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert all(table in (output / "report" / "tables.md").read_text() for table in re.findall(r"(?:\|.*\n)+", text))


@pytest.mark.parametrize("content", ["no marks", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_a_file_without_marks_is_left_alone(tmp_path: Path, content: str):
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(InputError, match="expected the lines"):
        update_readme(path, [], "lead")
    assert path.read_text() == content


def test_true_probabilities_need_no_training(script, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = replace(noisy(0.2), rules=(*RULES, "rankseg_exact"), reevaluation=Reevaluation("true", true=True))
    state = Existing(tmp_path).state(job)
    assert state.kind == UNTRAINED != WAITING
    command = Runner(tmp_path, tmp_path, processes=2, device="cpu").command(job, state)
    assert Path(command[1]).name == "evaluate_probabilities.py"
    assert "model.decoder_channels=[8,8,8,8,8]" not in command
    set_rule = replace(job, overrides=(*job.overrides, "predict.opt_metric=iou"))
    assert "predict.opt_metric=iou" in Runner(tmp_path, tmp_path).command(set_rule, state)
    assert script("evaluate_probabilities", *command[2:])[0] == 0
    assert Existing(tmp_path).state(job).kind == DONE
    for other in ("data.label_noise=0.3", "data.val_samples=4", "data.label_spread=1.0"):
        assert Existing(tmp_path).state(replace(job, overrides=(*job.overrides, other))).kind == UNTRAINED
    result = json.loads(next(tmp_path.glob("*/true/results/rankseg_exact.json")).read_text())
    assert result["metric"] == "mDiceI"
    (found,) = Measured(tmp_path).trainings()[1]
    assert found.is_true
    assert [r.rule for r in found.results] == ["argmax", "rankseg_rma", "rankseg_exact"]


def test_the_last_rule_is_that_of_the_pictures():
    (joined,) = join_jobs([replace(SMALL, rules=("rankseg_rma", "rankseg_ba", "argmax"))])
    assert joined.rules == ("argmax", "rankseg_ba", "rankseg_rma")
    flags = joined.flags(Path("d"), Path("o"))
    assert flags[flags.index("--save_pred") + 1] == "2"
