import json
from pathlib import Path

import numpy as np
import pytest

from exp.errors import InputError
from exp.metrics import EvalResult, compute_scores
from exp.results import format_results, load_result, result_csv, save_results
from exp.statistics import compare_rules


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
    with pytest.raises(InputError, match=r"x\.csv: got the columns"):
        load_result(path)


def test_tables_and_comparison():
    base, other = result(), result("rankseg_rma", seed=1)
    lines = format_results([base, other], "mIoUI", compare_rules([base, other], "mIoUI")).splitlines()
    assert [line.split()[0] for line in lines] == [
        "Acc",
        "argmax",
        "rankseg_rma",
        "mIoUI5",
        "argmax",
        "rankseg_rma",
        "rankseg_rma",
        "rankseg_rma",
    ]
    scores = compute_scores(base.counts)
    for header, row in ((lines[0], lines[1]), (lines[3], lines[4])):
        assert row.split()[1:] == [f"{scores[name]:.2f}" for name in header.split()]
    gains = [
        compute_scores(other.counts[i : i + 1])["mIoUI"] - compute_scores(base.counts[i : i + 1])["mIoUI"]
        for i in range(3)
    ]
    assert lines[6].startswith(f"rankseg_rma against argmax: mIoUI {np.mean(gains):+.2f} (95% interval ")
    assert f"better on {sum(g > 0 for g in gains)} of 3 images, worse on {sum(g < 0 for g in gains)}, p = " in lines[6]
    assert lines[7].startswith("rankseg_rma against argmax: mIoUD ")
