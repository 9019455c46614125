"""scripts/benchmarks/trained_networks.py on a small tree in the layout of its data."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from exp.evaluation.metrics import EvalResult
from scripts.benchmarks import trained_networks
from tests.conftest import write_png
from tests.data.trees import write_camvid

NAME = "benchmarks.trained_networks"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Logits of six images of VOC, with labels of these and one more; five of the classes are in them."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "voc"
    (folder / "logits" / "espnetv2").mkdir(parents=True)
    for i in range(7):
        label = rng.integers(0, 5, (16, 20)).astype(np.uint8)
        write_png(folder / "VOCdevkit" / "VOC2012" / "SegmentationClass" / f"2007_{i:06d}.png", label)
        logits = 2 * rng.normal(size=(21, 16, 20)) + 3 * (np.arange(21)[:, None, None] == label)
        stored = ((logits + 10) / 0.1).clip(0, 255).astype(np.uint8)
        if i < 6:
            path = folder / "logits" / "espnetv2" / f"2007_{i:06d}.npz"
            np.savez(path, logits=stored, scale=0.1, offset=-10.0)
    return tmp_path / "data"


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_logits_become_a_table(script, tmp_path: Path, data_dir: Path):
    """The figures against those of the images' own table; the second time nothing is evaluated; half of the images."""
    text = tmp_path / "results.md"
    text.write_text(f"before\n{trained_networks.BEGIN}\nold\n{trained_networks.END}\nafter\n")
    flags = ["--data_dir", data_dir, "--output_dir", tmp_path / "out", "--networks", "voc_espnetv2", "camvid_espnet"]
    flags += ["--predict_yaml", "argmax", "prune_0.5=rankseg_rma:pruning_prob=0.5"]
    status, printed, err = script(NAME, *flags, "--write", text)
    assert status == 0, err
    assert "camvid_espnet: left out, there is no" in printed
    argmax, other = json.loads((tmp_path / "out" / "table.json").read_text())
    tables = [rows_of(tmp_path / "out" / "voc_espnetv2" / "results" / f"{r['rule']}.csv") for r in (argmax, other)]
    assert [argmax["units"], argmax["rule"], other["rule"]] == [6, "argmax", "prune_0.5"]
    for name in ("mIoUI", "mDiceI"):
        first, second = (np.array([float(row[name]) for row in table]) for table in tables)
        gains = second - first
        assert argmax["scores"][name] == pytest.approx(first.mean())
        assert other["differences"][name] == pytest.approx(gains.mean())
        assert other["errors"][name] == pytest.approx(gains.std(ddof=1) / np.sqrt(6))
        assert (other["better"][name], other["worse"][name]) == ((gains > 0).sum(), (gains < 0).sum())
        assert list(other["losing"][name].values()) == pytest.approx([100 * (gains < -p).mean() for p in (1, 5)])
    counts = {k: [sum(int(row[f"{k}.{c}"]) for row in tables[0]) for c in CLASSES] for k in ("tp", "fp", "fn")}
    ious = [100 * tp / (tp + fp + fn) for tp, fp, fn in zip(*counts.values())]
    assert argmax["scores"]["mIoUD"] == pytest.approx(np.mean(ious)), "over the classes that are in the labels"
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| VOC, ESPNetv2, 6 images | argmax | {argmax['scores']['mIoUI']:.2f} |" in table
    difference = f"{other['differences']['mIoUI']:+.2f} ± {1.96 * other['errors']['mIoUI']:.2f}"
    assert f"|  | prune_0.5 | {difference} |" in table
    assert text.read_text() == f"before\n{trained_networks.BEGIN}\n\n{table}\n{trained_networks.END}\nafter\n"
    status, printed, _ = script(NAME, *flags, "--half", "odd")
    assert "evaluated already" in printed
    half = json.loads((tmp_path / "out" / "table.odd.json").read_text())[0]
    assert half["units"] == 3
    assert half["scores"]["mIoUI"] == pytest.approx(np.mean([float(row["mIoUI"]) for row in tables[0][1::2]]))


def test_runs_of_several_folds_are_one_network(script, tmp_path: Path, data_dir: Path):
    out, flags = tmp_path / "out", ["--data_dir", data_dir, "--predict_yaml", "argmax"]
    script(NAME, *flags, "--output_dir", out, "--networks", "voc_espnetv2")
    (whole,) = json.loads((out / "table.json").read_text())
    table, rest = (out / "voc_espnetv2" / "results" / f"argmax.{end}" for end in ("csv", "json"))
    header, *rows = table.read_text().splitlines(keepends=True)
    for fold, part in (("a", rows[:4]), ("b", rows[4:])):
        results = tmp_path / fold / "results"
        results.mkdir(parents=True)
        (results / "argmax.csv").write_text("".join([header, *part]))
        (results / "argmax.json").write_text(rest.read_text())
        times = {"decision_milliseconds_per_image": {"argmax": len(part)}}
        (results / "timing.json").write_text(json.dumps(times))
    flags += [
        "--output_dir",
        tmp_path / "joined",
        "--networks",
        "--run",
        "two folds",
        tmp_path / "b",
    ]
    status, _, err = script(NAME, *flags, tmp_path / "a")
    assert status == 0, err
    (joined,) = json.loads((tmp_path / "joined" / "table.json").read_text())
    assert joined["scores"] == pytest.approx(whole["scores"])
    assert (joined["network"], joined["units"], joined["ms"]) == ("two folds", 6, 3)
    status, _, err = script(NAME, *flags, tmp_path / "b")
    assert status == 2
    assert "in two of the folders, expected it in one" in err


def test_the_plot_has_a_bar_per_network_and_rule():
    def row(network: str, rule: str, gain: float) -> dict:
        return {"network": network, "rule": rule, "differences": {"mIoUI": gain}, "errors": {"mIoUI": 0.5}}

    rows = [row(n, r, g) for n in ("a", "b", "c") for r, g in (("rankseg_rma", -1.0), ("rankseg_levelset", 0.5))]
    plot = trained_networks.draw_gains([*rows, row("a", "rankseg_dep", 3.0)])
    bars = re.findall(rb'<g id="LineCollection_\d+">(.*?)</g>', plot, re.DOTALL)
    assert [bar.count(b"<path") for bar in bars][:2] == [3, 3], "one of each network for either rule"
    assert plot != trained_networks.draw_gains([*rows[:-1], row("c", "rankseg_levelset", 0.1)])


CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat")


def test_halves_are_by_name_and_keep_volumes_whole():
    cases = ("b", "b", "a", "c", "c", "a")
    result = EvalResult("argmax", tuple("uvwxyz"), ("p", "q", "r"), np.arange(54).reshape(6, 3, 3), cases)
    even, odd = (trained_networks.take_half(result, half) for half in ("even", "odd"))
    assert (even.names, even.cases) == (tuple("wxyz"), ("a", "c", "c", "a"))
    assert (odd.names, odd.cases) == (tuple("uv"), ("b", "b"))
    assert (even.counts == result.counts[2:]).all()
    plain = EvalResult("argmax", tuple("zyx"), ("p", "q", "r"), result.counts[:3])
    assert trained_networks.take_half(plain, "even").names == tuple("zx")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--networks", "voc_deeplabv3_mobilenetv2"], "got nothing of the networks asked for, expected some"),
        (["--run", "mine"], "--run mine: got a title alone, expected folders of evaluated runs"),
        (["--run", "mine", "nowhere"], "--run mine: nowhere/results: no such folder, expected the results"),
        (["--write", "nowhere.md"], "nowhere.md: no such file, expected one"),
        (
            ["--plot", "gains.svg", "--predict_yaml", "argmax", "rankseg_rma"],
            "expected rankseg_rma and rankseg_levelset",
        ),
        (["--predict_yaml", "argmaxx"], "did you mean 'argmax'"),
    ],
)
def test_what_cannot_be_evaluated_ends_in_one_line(script, tmp_path: Path, data_dir: Path, flags: list[str], part: str):
    flags = [*flags, *([] if "--networks" in flags else ["--networks", "camvid_espnet"])]
    status, _, err = script(NAME, "--data_dir", data_dir, "--output_dir", tmp_path / "out", *flags)
    assert status == 2
    assert part in err


@pytest.mark.slow
def test_a_network_is_trained_once(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_camvid(tmp_path / "data", {"train": 6, "val": 3})
    short = ("schedule.train_iters=2", "schedule.batch_size=2", "schedule.num_workers=0", "data.crop_size=[32,32]")
    short += ("model.pretrained=false", "test.crop_size=[48,64]")
    monkeypatch.setitem(trained_networks.SETTINGS, "camvid", short)
    flags = ["--data_dir", tmp_path / "data", "--networks", "camvid"]
    status, printed, err = script(NAME, *flags, "--output_dir", tmp_path / "first", "--predict_yaml", "argmax")
    assert status == 0, err
    assert "training: " in printed
    rules = ["--predict_yaml", "argmax", "b=rankseg_rma:pruning_prob=0.5"]
    status, printed, err = script(
        NAME, *flags, "--runs", tmp_path / "first", "--output_dir", tmp_path / "second", *rules
    )
    assert status == 0, err
    assert "training: " not in printed
    rows = json.loads((tmp_path / "second" / "table.json").read_text())
    assert [row["rule"] for row in rows] == ["argmax", "b"]
    assert rows[0]["scores"] == json.loads((tmp_path / "first" / "table.json").read_text())[0]["scores"]
