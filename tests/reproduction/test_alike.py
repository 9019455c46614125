"""Results are compared only where weights, images and test config are the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exp.evaluation.comparison import compare_rules
from exp.evaluation.results import format_comparisons, result_csv
from exp.reproduction.existing import differences
from exp.reproduction.job import Job
from exp.reproduction.measured import Measured, beside_argmax, other_images
from exp.reproduction.report.pictures.illustrations import illustrate
from exp.reproduction.report.training_sections import training_section
from tests.conftest import TINY
from tests.reproduction.test_folds import save_fold
from tests.reproduction.test_report import write_results
from tests.reproduction.test_reproduce import SMALL

PAIR = replace(SMALL, rules=("argmax", "rankseg_rma"))
OTHER_EVALUATIONS = {
    "test.flip=true": "test.flip True",
    "test.scales=[1,0.5]": "test.scales [1.0, 0.5]",
    "test.temperature=2": "test.temperature 2.0",
    "test.crop_size=[48,48]": "test.crop_size [48, 48]",
    "test.stride=[8,8]": "test.stride [8, 8]",
    "test.weights=ema": "test.weights ema",
    "test.amp=bf16": "test.amp bf16",
    "data.val_samples=2": "data.val_samples 2",
}


def results_folder(output: Path) -> Path:
    (folder,) = output.glob("*/*/results")
    return folder


def set_argmax(output: Path, *settings: str) -> None:
    """Settings of a later evaluation by argmax alone -> its JSON, as --test-only leaves it."""
    path = results_folder(output) / "argmax.json"
    content, config = json.loads(path.read_text()), replace(PAIR, overrides=(*PAIR.overrides, *settings)).config
    content["config"] |= {group: config.to_dict()[group] for group in ("data", "test")}
    path.write_text(json.dumps(content))


def test_rules_of_different_evaluations_are_not_compared(tmp_path: Path):
    write_results(PAIR, tmp_path)
    (before,) = Measured(tmp_path).trainings()[1]
    assert before.rules == ("argmax", "rankseg_rma")
    for setting, told in OTHER_EVALUATIONS.items():
        set_argmax(tmp_path, setting)
        (after,) = Measured(tmp_path).trainings()[1]
        assert after.rules == ("argmax",), setting
        assert after.apart[0].startswith(f"rankseg_rma: {told} -> ")


def test_what_changes_no_label_does_not_part_them(tmp_path: Path):
    write_results(PAIR, tmp_path)
    set_argmax(
        tmp_path, "test.calibration=false", "test.window_batch=1", "data.crop_size=[32,32]", "test.metric=mDiceI"
    )
    (training,) = Measured(tmp_path).trainings()[1]
    assert training.rules == ("argmax", "rankseg_rma")
    assert training.metric == "mDiceI"


def test_nor_are_those_on_other_labels_images_or_classes(tmp_path: Path):
    write_results(PAIR, tmp_path)
    (training,) = Measured(tmp_path).trainings()[1]
    base, other = training.results
    assert not other_images(base, other)
    corrected = other.counts.copy()
    corrected[3, 2, 4] += 1  # a pixel of the label
    assert other_images(base, replace(other, counts=corrected)) == ["other labels"]
    for change in ({"names": base.names[::-1]}, {"classes": base.classes[::-1]}, {"cases": base.names}):
        assert other_images(base, replace(other, **change)) == ["other images or classes"]
    path = results_folder(tmp_path) / "rankseg_rma.csv"
    path.write_text(result_csv(replace(other, counts=corrected)))
    (training,) = Measured(tmp_path).trainings()[1]
    assert training.rules == ("argmax",)
    assert training.apart == ("rankseg_rma: other labels",)
    for metric in ("mIoUI", "mDiceI"):
        assert beside_argmax(results_folder(tmp_path).parent, ["rankseg_rma"], metric) == (
            "not compared with argmax, evaluated otherwise: rankseg_rma: other labels"
        )


def test_a_rule_beside_the_argmax_of_before_is_compared_by_the_metric_of_now(tmp_path: Path):
    write_results(PAIR, tmp_path)
    (training,) = Measured(tmp_path).trainings()[1]
    for metric in ("mIoUI", "mDiceI"):
        comparisons = compare_rules(training.results, metric)
        expected = f"beside argmax, evaluated before:\n{format_comparisons(comparisons, metric)}"
        assert beside_argmax(results_folder(tmp_path).parent, ["rankseg_rma"], metric) == expected
        assert f"highest {metric}: " in expected


@pytest.mark.parametrize(("key", "value"), [("iteration", 2), ("weights", "ema")])
def test_nor_are_those_of_other_weights(tmp_path: Path, key: str, value: object):
    write_results(PAIR, tmp_path)
    path = results_folder(tmp_path) / "rankseg_rma.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "training": {**content["training"], key: value}}))
    (training,) = Measured(tmp_path).trainings()[1]
    assert training.rules == ("argmax",)


def test_weights_are_told_by_their_checksum_where_both_have_one():
    one, other = {"training": {"iteration": 3}, "weights_checksum": "a"}, {"training": {"iteration": 3}}
    assert differences(one, other) == []
    assert differences(one, {**other, "weights_checksum": "b"}) == ["weights_checksum a -> b"]


def test_the_report_says_so_and_shows_nothing_of_the_other_evaluation(program, tmp_path: Path):
    def shown() -> tuple[tuple[str, ...], str, set[str]]:
        """The rules of the one training, what its section notes, and the first words of its pictures' captions."""
        (training,) = Measured(tmp_path).trainings()[1]
        section = training_section("a", "b", "c", training)
        captions = {picture.caption.split()[0] for picture in illustrate(training)}
        return training.rules, " ".join(section.notes), captions

    plain, flipped = ([*TINY, *more, "--output_dir", tmp_path / PAIR.name] for more in ([], ["test.flip=true"]))
    assert program(*plain, "--predict_yaml", "argmax", "rankseg_rma", "--save_pred", "1")[0] == 0
    rules, notes, captions = shown()
    assert rules == ("argmax", "rankseg_rma")
    assert "not compared" not in notes
    assert {"Reliability", "Milliseconds"} < captions
    assert any(caption.startswith("00_") for caption in captions)
    status, _, err = program(*flipped, "--predict_yaml", "argmax", "--test-only")
    assert status == 0, err
    rules, notes, captions = shown()
    assert rules == ("argmax",)
    assert "not compared with it: rankseg_rma: test.flip True -> False." in notes
    assert {"Reliability", "Milliseconds"} < captions
    assert not any(caption.startswith("00_") for caption in captions), "the pictures are of the first evaluation"
    status, _, err = program(*plain, "--predict_yaml", "rankseg_rma", "--test-only")
    assert status == 0, err
    assert not {"Reliability", "Milliseconds"} & shown()[2], "these are of the last evaluation"


def test_times_of_another_evaluation_are_not_a_rules(tmp_path: Path):
    job: Job = PAIR
    write_results(job, tmp_path)
    path = results_folder(tmp_path) / "timing.json"
    times = json.loads(path.read_text())
    assert Measured(tmp_path)._seconds(job, "argmax", "forward") == 3.0
    for flip, seconds in ((False, 3.0), (True, None)):
        path.write_text(json.dumps({**times, "config": {"test": {**job.config.to_dict()["test"], "flip": flip}}}))
        assert Measured(tmp_path)._seconds(job, "argmax", "forward") == seconds


def test_folds_keep_rules_of_other_evaluations_apart(script, tmp_path: Path):
    runs = [save_fold(tmp_path / f"fold{k}", k) for k in range(2)]
    for run in runs:
        path = run / "results" / "argmax.json"
        content = json.loads(path.read_text())
        content["config"]["test"]["flip"] = True
        path.write_text(json.dumps(content))
    status, printed, err = script("report", "--folds", *runs)
    assert status == 0, err
    first, second = printed.split("evaluated otherwise than argmax: test.flip True -> None\n")
    assert "argmax  " in first
    assert "rma  " not in first
    assert "rma  " in second


def test_folds_of_different_networks_are_not_averaged(script, tmp_path: Path):
    runs = [save_fold(tmp_path / f"fold{k}", k) for k in range(2)]
    for run, encoder in zip(runs, ("resnet18", "resnet50")):
        for path in (run / "results").glob("*a*.json"):
            content = json.loads(path.read_text())
            if "rule" in content:
                path.write_text(json.dumps({**content, "training": {"model": {"name": encoder, "encoder": encoder}}}))
    status, _, err = script("report", "--folds", *runs)
    assert status == 2
    assert "got another training.model.encoder than" in err
