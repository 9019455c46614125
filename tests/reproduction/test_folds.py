"""scripts/report.py --folds on the results of generated folds."""

import json
from pathlib import Path

import numpy as np
import pytest

from exp.evaluation.metrics import EvalResult, compute_scores
from exp.evaluation.results import save_results


def save_fold(folder: Path, fold: int, rules: tuple[str, ...] = ("argmax", "rma"), **test: object) -> Path:
    """A run's results: two cases of two slices, other counts in every fold."""
    results, contexts = [], []
    for i, rule in enumerate(rules):
        counts = np.random.default_rng(10 * fold + i).integers(1, 50, (4, 3, 2))
        results.append(EvalResult(rule, tuple("abcd"), ("rest", "tumour"), counts, ("k1", "k1", "k2", "k2")))
        data = {"name": "lits", "fold": fold}
        contexts.append({"config": {"data": data, "test": {"metric": "mDiceI", **test}, "predict": {"name": rule}}})
    save_results(results, folder / "results", contexts)
    return folder


def test_the_mean_over_folds(script, tmp_path: Path):
    runs = [save_fold(tmp_path / f"fold{k}", k) for k in range(3)]
    status, printed, err = script("report", "--folds", *runs, "--output", tmp_path / "folds.json")
    assert status == 0, err
    scores = [json.loads((run / "results" / "rma.json").read_text())["metrics"] for run in runs]
    content = json.loads((tmp_path / "folds.json").read_text())
    assert list(content) == ["argmax", "rma"]
    for name in scores[0]:
        assert content["rma"]["mean"][name] == pytest.approx(np.mean([s[name] for s in scores]))
    assert content["rma"]["folds"][str(runs[1])] == scores[1]
    assert scores[0].keys() == compute_scores(np.ones((1, 3, 2)), ("k",)).keys()
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["mean", "over", "3", "folds"]
    assert ["mDiceI5", "mDiceI10", "mDiceIQ", "mDiceC5", "mDiceC10", "mDiceCQ", "mDice3D"] in lines
    assert lines[4][0] == "rma"
    assert float(lines[4][1]) == pytest.approx(np.mean([s["Acc"] for s in scores]), abs=0.006)


def test_folds_that_cannot_be_averaged(script, tmp_path: Path):
    one, two = save_fold(tmp_path / "one", 0), save_fold(tmp_path / "two", 1)
    same = save_fold(tmp_path / "same", 0)
    otherwise = save_fold(tmp_path / "otherwise", 1, crop_size=[64, 64])
    single = save_fold(tmp_path / "single", 1, ("other",))
    (tmp_path / "broken" / "results").mkdir(parents=True)
    (tmp_path / "broken" / "results" / "argmax.json").write_text("{")
    for args, message in [
        ((one, one), "got a run more than once"),
        ((one, same), "same: got fold 0, which is that of"),
        ((one, otherwise), "otherwise: got another test.crop_size than"),
        ((one, single), "got no rule that all runs have"),
        ((one, tmp_path / "nowhere"), "nowhere/results: got no results"),
        ((two, tmp_path / "broken"), "argmax.json: got a file that cannot be read"),
    ]:
        status, _, err = script("report", "--folds", *args)
        assert status == 2
        assert message in err


def test_what_a_fold_fits_for_itself_may_differ(script, tmp_path: Path):
    runs = [save_fold(tmp_path / f"fold{k}", k, temperature=temperature) for k, temperature in enumerate((0.9, 1.3))]
    status, _, err = script("report", "--folds", *runs)
    assert status == 2
    assert "got another test.temperature" in err, "a number that the user chose is the same in every fold"
    for run, temperature in zip(runs, (0.9, 1.3)):
        (run / "results" / "temperature.json").write_text(json.dumps({"temperature": temperature}))
        result = run / "results" / "rma.json"
        content = json.loads(result.read_text())
        content["config"]["predict"]["thresholds"] = f"{run}/train.thresholds.json"
        result.write_text(json.dumps(content))
    status, printed, err = script("report", "--folds", *runs)
    assert status == 0, err
    assert "rma" in printed
