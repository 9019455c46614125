"""What the page alone says of a training, and the page of a single run."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exp.evaluation.calibration import count_calibration, describe_bins
from exp.evaluation.comparison import mean_interval
from exp.evaluation.metrics import build_results, count_rules
from exp.evaluation.results import load_result, save_results
from exp.reproduction.measured import Training
from exp.reproduction.report.details import training_details
from exp.reproduction.report.page import html
from exp.reproduction.report.training_sections import run_section
from tests.reproduction.test_reproduce import SMALL

CLASSES = ("sky", "road", "<car>")
NAMES = ("a", "b", "day/c", "d", "e", "f")
WRONG = {"good": (0,) * 6, "bad": (0, 0, 3, 12, 0, 40)}  # by rule: pixels of each image, of 100, that argmax has right
GAINS = {"day/c": -3, "d": -12, "f": -40}  # in accuracy, as all three classes have as many pixels


def labels() -> torch.Tensor:
    """(6, 3, 100): every class has a row of its own; image e has no car."""
    label = torch.arange(3)[None, :, None].repeat(6, 1, 100)
    label[4, 2] = 1
    return label


def save_run(folder: Path, cases: tuple[str, ...] | None = None) -> dict:
    """results/ of three rules on six images -> the context of argmax. `good` mends what argmax has wrong in car."""
    label, preds = labels(), {name: labels() for name in ("argmax", "good", "bad")}
    for name in ("argmax", "bad"):
        preds[name][[0, 1, 2, 3, 5], 2, 90:] = 0
    for image, pixels in enumerate(WRONG["bad"]):
        for row in range(3):
            preds["bad"][image, row, :pixels] = (label[image, row, :pixels] + 1) % 3
    confusion = torch.zeros(3, 3, 3, dtype=torch.int64)
    pairs = [([pred[i] for pred in preds.values()], label[i]) for i in range(6)]
    table = np.stack([count_rules(own, item, 3, confusion=confusion).numpy() for own, item in pairs])
    results = build_results(list(preds), NAMES, CLASSES, table, cases or [None] * 6, confusion=confusion.numpy())
    config = SMALL.config.to_dict()
    training = {group: config[group] for group in ("model", "data", "loss", "schedule", "optim", "seed")}
    shared = {"training": {**training, "iteration": 3}, "weights_checksum": "w"}
    contexts = [
        {**shared, "config": {"data": config["data"], "test": config["test"], "predict": {"name": name}}}
        for name in preds
    ]
    save_results(results, folder / "results", contexts)
    return contexts[0]


def training(folder: Path, content: dict) -> Training:
    results = tuple(load_result(folder / "results" / f"{name}.csv") for name in ("argmax", "good", "bad"))
    return Training(folder / "results", SMALL.config.to_dict(), 3, "mAccI", results, content=content)


def rows_of(sections: tuple, key: str) -> list[list[str]]:
    (section,) = (section for section in sections if section.key == key)
    return [[cell.text for cell in row] for row in section.rows]


def test_classes_have_their_gains_with_intervals(tmp_path: Path):
    found = training_details("run", training(tmp_path, save_run(tmp_path)))
    rows = rows_of(found, "run-classes")
    assert [row[0] for row in rows] == list(CLASSES)
    assert [float(row[1]) for row in rows] == pytest.approx([100 * n / 18 for n in (6, 7, 5)], abs=0.006)
    assert [row[2] for row in rows] == ["6", "6", "5"]  # an image has no car
    assert [float(row[3]) for row in rows] == [100, 100, 90]
    assert [row[4] for row in rows] == ["+0.00 [+0.00, +0.00]"] * 2 + ["+10.00 [+10.00, +10.00]"]
    values = np.array([-w for i, w in enumerate(WRONG["bad"]) if i != 4], float)  # the last ten columns are no gain
    interval = mean_interval(values)
    assert rows[2][5] == f"{values.mean():+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    tones = [[cell.tone for cell in row[4:]] for row in found[0].rows]
    assert tones == [["", "loss"], ["", "loss"], ["gain", "loss"]]


def test_images_that_lose_are_counted_and_named(tmp_path: Path):
    content = save_run(tmp_path)
    found = training_details("run", training(tmp_path, content))
    counts = {(row[0], row[1]): row[2:] for row in rows_of(found, "run-losing")}
    assert counts["good", "mIoUI"] == ["6", "0 (0.0 %)", "0 (0.0 %)", "–"]  # noqa: RUF001
    assert counts["bad", "mIoUI"][:3] == ["6", "3 (50.0 %)", "3 (50.0 %)"]
    rows = rows_of(found, "run-losing-names")
    assert [row[0] for row in rows] == ["f", "d", "day/c"]
    assert [float(row[3]) for row in rows] == sorted(GAINS.values())
    tones = [row[3].tone for row in found[2].rows]
    assert tones == ["heavy", "heavy", "loss"]


def test_cases_lose_as_one(tmp_path: Path):
    content = save_run(tmp_path, ("k", "k", "k", "l", "l", "l"))
    (tmp_path / "pictures" / "loss").mkdir(parents=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "pictures" / "loss" / "00_d.png")
    found = training_details("run", training(tmp_path, content))
    (row,) = rows_of(found, "run-losing-names")  # k loses 1, not more
    assert row[0] == "l"
    assert found[2].rows[0][0].link == "run-loss-0"  # a slice of it
    assert float(row[3]) == pytest.approx(-(12 + 40) / 3, abs=0.006)


def test_names_lead_to_the_pictures(tmp_path: Path):
    content = save_run(tmp_path)
    for path in ("gain/00_a", "loss/00_f", "loss/01_day_c", "random/00_f"):
        (tmp_path / "pictures" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "pictures" / f"{path}.png")
    page = html([run_section(training(tmp_path, content))], "")
    figures = dict(re.findall(r'<figure id="(.*?)">.*?<figcaption>(.*?)</figcaption>', page))
    links = {unescape(name): key for key, name in re.findall(r'<td><a href="#(.*?)">(.*?)</a></td>', page)}
    assert links.keys() == {"f", "day/c"}
    assert figures[links["f"]] == "00_f, largest loss"
    assert figures[links["day/c"]] == "01_day_c, largest loss"


def test_every_rule_has_its_confusion_matrix(tmp_path: Path, capsys):
    content = save_run(tmp_path)
    captions = re.findall(
        r"<figcaption>(Confusion.*?)</figcaption>", html([run_section(training(tmp_path, content))], "")
    )
    assert captions == [
        f"Confusion matrix of {name}; results/{name}.confusion.csv has the pixels" for name in ("argmax", "good", "bad")
    ]
    shutil.copy(tmp_path / "results" / "bad.confusion.csv", tmp_path / "results" / "good.confusion.csv")
    (tmp_path / "results" / "argmax.confusion.csv").unlink()  # as an evaluation of before
    html([run_section(training(tmp_path, content))], "")
    (warning,) = capsys.readouterr().err.splitlines()
    assert "good.confusion.csv: got a file that cannot be read (the sums of other counts)" in warning


def fit(ece: float, confidence: float) -> dict:
    prob = torch.tensor([confidence, 1 - confidence]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    bins = describe_bins(count_calibration(prob, torch.zeros(4, 5)).numpy()[-1])
    return {"NLL": 0.12345, "ECED": ece, "SCED": 2.5, "top_label": bins}


def test_calibration_before_and_after_a_temperature(tmp_path: Path):
    content = save_run(tmp_path)
    part = {"pixels": 20, "before": fit(7.5, 0.95), "after": fit(1.25, 0.6)}
    stored = {"temperature": 1.5, "weights_checksum": "w", "fitted_on": part, "held_out": part}
    path = tmp_path / "results" / "temperature.json"
    path.write_text(json.dumps(stored))
    found = training(tmp_path, content)
    rows = rows_of(training_details("run", found), "run-calibration")
    assert [row[:3] for row in rows[:2]] == [
        ["20 pixels held out, temperature 1", "0.1235", "7.50"],
        ["20 pixels held out, temperature 1.5", "0.1235", "1.25"],
    ]
    assert "Reliability before and after the temperature" in html([run_section(found)], "")
    for when in ("before", "after"):  # a file of before has no bins
        del stored["held_out"][when]["top_label"]
    path.write_text(json.dumps(stored))
    found = training(tmp_path, content)
    assert len(rows_of(training_details("run", found), "run-calibration")) == 4
    assert "Reliability before and after" not in html([run_section(found)], "")
    path.write_text(json.dumps({**stored, "weights_checksum": "another"}))
    assert "run-calibration" not in [section.key for section in training_details("run", training(tmp_path, content))]


def test_a_temperature_that_is_damaged_is_told(tmp_path: Path, capsys):
    content = save_run(tmp_path)
    (tmp_path / "results" / "temperature.json").write_text('{"temperature": "x"}')
    html([run_section(training(tmp_path, content))], "")
    (warning,) = capsys.readouterr().err.splitlines()
    assert "temperature.json: cannot be read (KeyError('fitted_on')), expected a fitted temperature" in warning


def test_a_single_run_has_a_page_of_its_own(script, tmp_path: Path):
    run = tmp_path / "run"
    save_run(run)
    status, printed, err = script("report", run)
    assert (status, printed, err) == (0, f"page: {run / 'report' / 'index.html'}\n", "")
    assert {path.name for path in (run / "report").iterdir()} == {"index.html", "tables.md", "tables.tex"}
    text = (run / "report" / "tables.md").read_text()
    assert text.startswith("# unet_mobilenetv3_small_100, shapes, ce, seed 0, 3 iterations\n")
    assert text.count("\n### ") == 1
    assert "\n| bad | " in text
    assert "From `run`." in text
    page = (run / "report" / "index.html").read_text()
    assert page.count("<h3>") == 1
    assert "6 images of 3 classes under argmax and bad, good, compared by mIoUI." in page
    (tmp_path / "notes.md").write_text("")
    assert "a single run, expected a folder with runs" in script("report", run, "--readme", tmp_path / "notes.md")[2]
    (run / "results" / "argmax.json").unlink()
    status, _, err = script("report", run)
    assert status == 2
    assert f"{run / 'results'}: got no results of argmax" in err


def test_maps_of_another_program_have_a_page(script, tmp_path: Path):
    rng = np.random.default_rng(0)
    for folder in ("maps", "labels"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "maps" / f"{name}.npy", rng.dirichlet(np.ones(3), (8, 9)).transpose(2, 0, 1))
        np.save(tmp_path / "labels" / f"{name}.npy", rng.integers(0, 3, (8, 9)))
    out = tmp_path / "out"
    status, printed, err = script("evaluate_probabilities", tmp_path / "maps", tmp_path / "labels", "--output_dir", out)
    assert status == 0, err
    command = next(line for line in printed.splitlines() if line.startswith("for a page: ")).split(": ")[1].split()
    assert command[0] == "python"
    assert script(Path(command[1]).stem, *command[2:])[0] == 0
    page = (out / "report" / "index.html").read_text()
    assert "<h1>maps in maps</h1>" in page
    assert "2 images of 3 classes under argmax and rankseg_rma, compared by mIoUI." in page
    assert page.count("Confusion matrix of") == 4  # two figures, each with an alt text
    shutil.copytree(tmp_path / "maps", tmp_path / "others")
    flags = ("--output_dir", out, "--predict_yaml", "rankseg_levelset")
    assert script("evaluate_probabilities", tmp_path / "others", tmp_path / "labels", *flags)[0] == 0
    assert script("report", tmp_path)[0] == 0  # beside others, too
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "### maps in maps\n" in text
    assert f"not compared with it: rankseg_levelset: maps.prob_dir {tmp_path / 'maps'} -> " in text
