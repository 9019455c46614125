"""scripts/evaluate_bayes.py: rules on the true probabilities of noisy shapes."""

import csv
import json
from pathlib import Path

import pytest
import torch

from exp.data.sets.shapes import ShapesNoisy
from exp.rules.pooled import PooledRule, Pools

FEW = ["--set", "data.val_samples=3"]
NAME = "evaluate_bayes"


def test_results_are_those_of_the_true_probabilities(script, tmp_path: Path):
    flags = [*FEW, "data.label_noise=0.3", "--output_dir", tmp_path, "--predict_yaml", "argmax", "rankseg_rma"]
    status, printed, err = script(NAME, *flags)
    assert status == 0, err
    assert "rankseg_rma against argmax: mDiceI" in printed
    dataset = ShapesNoisy(None, "val", max_samples=3, facts={"label_noise": 0.3, "label_spread": 3.0})
    with open(tmp_path / "results" / "argmax.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [sample.name for sample in dataset.samples]
    for i, row in enumerate(rows):
        pred, label = dataset.probabilities(i).argmax(0), dataset.read(i)[1]
        for c, name in enumerate(dataset.classes):
            assert int(row[f"tp.{name}"]) == ((pred == c) & (label == c)).sum()
            assert int(row[f"fn.{name}"]) == ((pred != c) & (label == c)).sum()
    facts = json.loads((tmp_path / "results" / "rankseg_rma.json").read_text())
    assert facts["probabilities"] == "true"
    assert facts["config"]["data"]["label_noise"] == 0.3


def test_the_same_files_again_and_the_exact_rule_with_two_classes(script, tmp_path: Path):
    rules = ["--predict_yaml", "argmax", "rankseg_exact", "--data_yaml", "shapes_noisy_binary"]
    for name in ("a", "b"):
        status, _, err = script(NAME, *FEW, *rules, "--output_dir", tmp_path / name)
        assert status == 0, err
    files = sorted(path.name for path in (tmp_path / "a" / "results").iterdir() if path.is_file())
    assert {"argmax.csv", "rankseg_exact.csv", "comparison.json"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / "results" / name).read_bytes() == (tmp_path / "b" / "results" / name).read_bytes()


def test_a_pooled_rule_takes_its_first_pass(script, tmp_path: Path):
    status, _, err = script(NAME, *FEW, "--predict_yaml", "rankseg_rma_dataset", "--output_dir", tmp_path)
    assert status == 0, err
    dataset = ShapesNoisy(None, "val", max_samples=3, facts={"label_noise": 0.1, "label_spread": 3.0})
    pools = Pools({"dataset": PooledRule(opt_metric="dice", pruning_prob=0.1, scope="dataset")})
    probs = [torch.from_numpy(dataset.probabilities(i))[None] for i in range(3)]
    for prob in probs:
        pools.add(prob, None)
    thresholds = pools.thresholds()["dataset"][None]
    with open(tmp_path / "results" / "rankseg_rma_dataset.csv", newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            pred, label = thresholds.decide(probs[i])[0].numpy(), dataset.read(i)[1]
            assert int(row["tp.disk"]) == ((pred == 1) & (label == 1)).sum()
            assert int(row["fp.background"]) == ((pred == 0) & (label != 0)).sum()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data_yaml", "shapes"], "got the data set shapes, expected one whose true probabilities are known"),
        (["--set", "data.test_crop=[32,32]"], "data.test_crop: got [32, 32], expected null"),
        (["--set", "data.label_spread=33"], "key 'label_spread': got 33"),
        (["--set", "data.label_noise=null"], "expected a value: the data set shapes_noisy"),
        (["--predict_yaml", "rankseg_exact"], "got 6 classes, expected 2"),
        (["--predict_yaml", "rankseg_rma_case"], "which is in no case, expected volumes"),
    ],
)
def test_bad_input_ends_in_one_line(script, tmp_path: Path, flags: list[str], part: str):
    status, _, err = script(NAME, *flags, "--output_dir", tmp_path / "out")
    assert status == 2
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
