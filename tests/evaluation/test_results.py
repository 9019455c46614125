import json
from pathlib import Path

import numpy as np
import pytest
import torch

from exp.evaluation.calibration import calibration_scores, count_calibration
from exp.evaluation.comparison import compare_rules
from exp.evaluation.metrics import EvalResult, compute_scores
from exp.evaluation.results import (
    case_csv,
    format_results,
    load_confusion,
    load_result,
    report_results,
    result_csv,
    save_results,
    shared_context,
)
from exp.runtime.errors import InputError


def result(rule: str = "argmax", seed: int = 0) -> EvalResult:
    counts = np.random.default_rng(seed).integers(0, 50, (4, 3, 3))
    counts[3] = 0  # an image without a pixel that counts
    return EvalResult(rule, ("a", "b", 'c,"d"', "e"), ("sky", "road", "car"), counts)


def test_csv_comes_back_and_scores_can_be_computed_from_it(tmp_path: Path):
    save_results([result()], tmp_path, [{"revision": "r"}])
    loaded = load_result(tmp_path / "argmax.csv")
    assert (loaded.rule, loaded.names, loaded.classes) == ("argmax", result().names, result().classes)
    assert (loaded.counts == result().counts).all()
    content = json.loads((tmp_path / "argmax.json").read_text())
    assert content["metrics"] == compute_scores(loaded.counts)
    assert content["rule"] == "argmax"
    assert content["revision"] == "r"
    assert content["images"] == {"evaluated": 4, "with_counted_pixels": 3}
    ends = ("D", "C", "C5", "C10", "CQ")
    assert content["per_class"]["road"].keys() == {f"{name}{end}" for name in ("Acc", "IoU", "Dice") for end in ends}


def test_further_metrics_come_back(tmp_path: Path):
    counts = np.random.default_rng(0).integers(1, 50, (4, 5, 3))
    saved = EvalResult("argmax", tuple("abcd"), ("sky", "road", "car"), counts, tuple("kkmm"), ("boundary_iou",))
    save_results([saved], tmp_path, [{}])
    loaded = load_result(tmp_path / "argmax.csv")
    assert loaded.metrics == ("boundary_iou",)
    assert (loaded.counts == counts).all()
    content = json.loads((tmp_path / "argmax.json").read_text())
    assert content["metrics"] == saved.scores()
    assert {"mBIoUD", "mBIoUI", "mBIoUC", "mBIoUI5", "mBIoU3D"} <= content["metrics"].keys()
    assert {"BIoUD", "BIoUC"} <= content["per_class"]["road"].keys()
    assert "mBIoUI" in (tmp_path / "argmax.cases.csv").read_text().splitlines()[0]
    assert "mBIoUI" in format_results([saved], "mIoUI")


def test_csv_has_a_row_an_image_and_leaves_undefined_scores_empty():
    lines = result_csv(result()).splitlines()
    assert lines[0].startswith("image,Acc,mAccI,mIoUI,mDiceI,tp.sky,tp.road,tp.car,fp.sky")
    assert len(lines) == 5
    assert lines[4].startswith("e,,,,,0,")


def test_undefined_scores_are_null_in_json(tmp_path: Path):
    save_results([EvalResult("r", ("a",), ("x", "y", "z"), np.zeros((1, 3, 3), np.int64))], tmp_path, [{}])
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["mIoUI"] is None


def test_an_equal_evaluation_changes_nothing_and_another_keeps_the_older(tmp_path: Path):
    save_results([result()], tmp_path, [{}])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save_results([result()], tmp_path, [{}])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    save_results([result()], tmp_path, [{"revision": "newer"}])
    assert not (tmp_path / "older").exists(), "the same rows"
    save_results([result()], tmp_path, [{}])
    for seed in (1, 2):
        save_results([result(seed=seed)], tmp_path, [{}])
    assert (tmp_path / "older" / "argmax.1.csv").read_bytes() == before["argmax.csv"]
    assert (tmp_path / "older" / "argmax.1.json").read_bytes() == before["argmax.json"]
    assert (tmp_path / "older" / "argmax.2.csv").exists()


def test_other_csv_files_are_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"x\.csv: got a file that cannot be read \(columns \['a', 'b'\]\)"):
        load_result(path)
    for row in ("e,1,2", "e,1,2,x", "e,1,2,3,4"):
        path.write_text(f"image,tp.x,fp.x,fn.x\n{row}\n")
        with pytest.raises(InputError, match=r"x\.csv: got a file that cannot be read"):
            load_result(path)


def with_confusion(seed: int = 0) -> EvalResult:
    """One image; pixels of any label and any decision."""
    matrix = np.random.default_rng(seed).integers(0, 50, (3, 3))
    tp = matrix.diagonal()
    counts = np.stack([tp, matrix.sum(0) - tp, matrix.sum(1) - tp])[None]
    return EvalResult("argmax", ("a",), ("sky", "road", "car"), counts, confusion=matrix)


def test_a_confusion_matrix_has_a_row_per_label_and_comes_back(tmp_path: Path):
    saved, path = with_confusion(), tmp_path / "argmax.confusion.csv"
    save_results([saved], tmp_path, [{}])
    lines = path.read_text().splitlines()
    assert lines[0] == "label,sky,road,car"
    assert lines[2] == ",".join(["road", *map(str, saved.confusion[1])])
    assert (load_confusion(path, load_result(tmp_path / "argmax.csv")) == saved.confusion).all()
    before = path.read_bytes()
    save_results([with_confusion(seed=1)], tmp_path, [{}])
    assert (tmp_path / "older" / "argmax.confusion.1.csv").read_bytes() == before
    with pytest.raises(InputError, match=r"the sums of other counts.*expected the confusion matrix of the counts in"):
        load_confusion(path, saved)
    path.write_text("label,sky\nsky,1\n")
    with pytest.raises(InputError, match=r"argmax\.confusion\.csv: got a file that cannot be read"):
        load_confusion(path, saved)


def with_cases(rule: str = "argmax", seed: int = 0) -> EvalResult:
    return EvalResult(rule, result().names, result().classes, result(seed=seed).counts, ("k2", "k1", "k2", "k1"))


def calibration_counts(seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    prob = torch.randn(4, 3, 5, 6, generator=generator).softmax(1)
    label = torch.randint(0, 3, (5, 6), generator=generator)
    return np.stack([count_calibration(p[None], label) for p in prob])


def contexts(revision: str) -> list[dict]:
    config = {"data": {"dataset": "camvid"}, "test": {"metric": "mIoUI"}}
    return [{"revision": revision, "config": {**config, "predict": {"name": rule}}} for rule in ("argmax", "rma")]


def test_cases_have_a_column_and_a_table(tmp_path: Path):
    save_results([with_cases()], tmp_path, [{}])
    loaded = load_result(tmp_path / "argmax.csv")
    assert loaded.cases == with_cases().cases
    assert (loaded.counts == with_cases().counts).all()
    lines = (tmp_path / "argmax.cases.csv").read_text().splitlines()
    assert lines[0].startswith("case,slices,Acc,mAccI,mAcc3D,mIoUI,mIoU3D,mDiceI,mDice3D,tp.sky")
    assert [line.split(",")[:2] for line in lines[1:]] == [["k2", "2"], ["k1", "2"]]
    counts = with_cases().counts
    assert lines[1].endswith(",".join(map(str, (counts[0] + counts[2]).flatten())))
    content = json.loads((tmp_path / "argmax.json").read_text())
    assert content["cases"] == 2
    assert content["metrics"] == compute_scores(counts, with_cases().cases)
    assert "mIoU3D" in format_results([with_cases()], "mIoUI")
    with pytest.raises(InputError, match="columns"):
        load_result(tmp_path / "argmax.cases.csv")


def test_files_are_the_same_byte_for_byte():
    assert result_csv(with_cases()) == result_csv(with_cases())
    assert case_csv(with_cases()) == case_csv(with_cases())
    numbers = [float(cell) for cell in result_csv(result()).splitlines()[1].split(",")[1:5]]
    assert numbers == [compute_scores(result().counts[:1])[name] for name in ("Acc", "mAccI", "mIoUI", "mDiceI")]


def test_comparison_and_calibration_say_what_they_are_of(tmp_path: Path):
    pair = [result(), result("rma", seed=1)]
    text = report_results(pair, tmp_path, contexts("r"), metric="mDiceI", calibration=calibration_counts(0))
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    rows = compare_rules(pair, "mDiceI")
    assert [(r["rule"], r["base"], r["metric"]) for r in comparison["comparisons"]] == [
        ("rma", "argmax", "mDiceI"),
        ("rma", "argmax", "mDiceD"),
    ]
    assert [r["difference"] for r in comparison["comparisons"]] == [r.difference for r in rows]
    assert tuple(comparison["comparisons"][0]["interval"]) == rows[0].interval
    assert comparison["rules"] == [{"name": "argmax"}, {"name": "rma"}]
    assert comparison["revision"] == "r"
    assert comparison["config"] == {"data": {"dataset": "camvid"}, "test": {"metric": "mIoUI"}}

    calibration = json.loads((tmp_path / "calibration.json").read_text())
    scores = calibration_scores(calibration_counts(0))
    assert calibration["metrics"] == scores
    assert calibration["images"] == 4
    assert calibration["config"] == comparison["config"]
    assert sum(calibration["top_label"]["pixels"]) == sum(calibration["per_class"]["sky"]["pixels"]) == 120
    assert f"every class): ECED {scores['ECED']:.2f} %, ECEI" in text
    assert f"SCED_paper {scores['SCED_paper']:.2f} per mille" in text
    assert "rma against argmax: mDiceI" in text


def test_one_rule_alone_has_no_comparison(tmp_path: Path):
    report_results([result()], tmp_path, contexts("r")[:1], metric="mIoUI")
    assert {p.name for p in tmp_path.iterdir()} == {"argmax.csv", "argmax.json"}


def test_old_and_new_never_stand_side_by_side(tmp_path: Path):
    """Other rows of one rule put the comparison and the calibration of the older ones aside, the case table too."""
    pair = [with_cases(), with_cases("rma", seed=1)]
    report_results(pair, tmp_path, contexts("r"), metric="mIoUI", calibration=calibration_counts(0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    report_results(pair, tmp_path, contexts("r"), metric="mIoUI", calibration=calibration_counts(0))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    report_results(pair, tmp_path, contexts("newer"), metric="mIoUI", calibration=calibration_counts(0))
    assert not (tmp_path / "older").exists(), "the same figures of another revision"
    report_results(pair, tmp_path, contexts("r"), metric="mIoUI", calibration=calibration_counts(0))
    report_results([result("argmax", seed=2)], tmp_path, contexts("r")[:1], metric="mIoUI")
    assert {p.name for p in tmp_path.iterdir()} == {
        "argmax.csv",
        "argmax.json",
        "rma.csv",
        "rma.cases.csv",
        "rma.json",
        "older",
    }
    kept = ("argmax.csv", "argmax.cases.csv", "argmax.json", "comparison.json", "calibration.json")
    for name in kept:
        stem, dot, suffix = name.rpartition(".")
        assert (tmp_path / "older" / f"{stem}.1{dot}{suffix}").read_bytes() == before[name]


def test_what_contexts_share():
    assert shared_context([{"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}, "e": 5}]) == {
        "a": 1,
        "b": {"c": 2},
    }


def test_tables_and_comparison():
    base, other = result(), result("rankseg_rma", seed=1)
    lines = format_results([base, other], "mIoUI", compare_rules([base, other], "mIoUI")).splitlines()
    assert [line.split()[0] for line in lines] == [
        "scores",
        *("Acc", "argmax", "rankseg_rma"),
        *("mIoUI5", "argmax", "rankseg_rma"),
        *("D", "I", "C", "5,", "Q"),
        "differences",
        "rankseg_rma",
        "rankseg_rma",
        "highest",
    ]
    assert "3D    volumes" in format_results([with_cases()], "mIoUI")
    scores = compute_scores(base.counts)
    for header, row in ((lines[1], lines[2]), (lines[4], lines[5])):
        assert row.split()[1:] == [f"{scores[name]:.2f}" for name in header.split()]
    gains = [
        compute_scores(other.counts[i : i + 1])["mIoUI"] - compute_scores(base.counts[i : i + 1])["mIoUI"]
        for i in range(3)
    ]
    assert lines[13].startswith(f"rankseg_rma against argmax: mIoUI {np.mean(gains):+.2f} [")
    assert f"better on {sum(g > 0 for g in gains)} of 3 images, worse on {sum(g < 0 for g in gains)}, p = " in lines[13]
    shares = " / ".join(f"{100 * sum(g < -points for g in gains) / 3:.1f}" for points in (1, 5))
    assert f"; images that lose > 1 / > 5 points: mIoUI {shares} %, mDiceI " in lines[13]
    assert lines[14].startswith("rankseg_rma against argmax: mIoUD ")
    best = f"rankseg_rma, {np.mean(gains):.2f} points above argmax" if np.mean(gains) > 0 else "argmax"
    assert lines[15] == f"highest mIoUI: {best}"
    turned = format_results([other, base], "mIoUI", compare_rules([other, base], "mIoUI")).splitlines()[15]
    assert ("above" in lines[15]) != ("above" in turned)
    assert "after Holm" not in lines[12]
    three = [base, other, result("again")]
    assert "after Holm" in format_results(three, "mIoUI", compare_rules(three, "mIoUI"))
