"""The report's page: what it shows, that it escapes and needs nothing else, and how a browser draws it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exp.evaluation.metrics import EvalResult
from exp.evaluation.results import load_result, save_results
from exp.reproduction.measured import Measured, Training
from exp.reproduction.published import load_tables
from exp.reproduction.report.build import write_report
from exp.reproduction.report.page import html
from exp.reproduction.report.pictures.illustrations import illustrate, read_log
from exp.reproduction.report.pictures.plots import SERIES
from exp.reproduction.report.training_sections import training_section
from tests.reproduction.test_report import without_details, write_results
from tests.reproduction.test_reproduce import SMALL

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
NASTY = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Counts tags, and what the page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.foreign: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action") and not value.startswith(("data:", "#")):
                self.foreign.append(value)
            if name.startswith("on"):
                self.foreign.append(name)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Two seeds of a training, with everything that a run leaves, and a rule and a picture with nasty names."""
    folder = tmp_path_factory.mktemp("page") / "out"
    for seed in (0, 1):
        write_results(replace(SMALL, rules=("argmax", "rankseg_rma"), seed=seed), folder)
    run = next(path.parent for path in folder.glob("*/*/results") if ".seed1." not in str(path))
    bins = {"pixels": [0, 50, 100], "confidence": [None, 0.5, 0.9], "accuracy": [None, 0.4, 0.8]}
    (run / "results" / "calibration.json").write_text(json.dumps({"metrics": {}, "top_label": bins}))
    rows = [{"iteration": i, "train/loss": 1 / i, "val/argmax/mIoUI": 40.0 + i} for i in (1, 2, 3)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 4, "tr')
    for kind in ("gain", "loss", "random"):
        (run / "pictures" / kind).mkdir(parents=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(run / "pictures" / kind / "00_a&b'\".png")
    for results in folder.glob("*/*/results"):
        content = json.loads((results / "rankseg_rma.json").read_text())
        (results / f"{NASTY}.json").write_text(json.dumps({**content, "rule": NASTY}))
        shutil.copy(results / "rankseg_rma.csv", results / f"{NASTY}.csv")
    write_report(folder)
    return folder


def test_the_page_has_everything_and_needs_nothing(output: Path):
    text = (output / "report" / "index.html").read_text()
    page = Page(text)
    assert page.foreign == []
    assert "script" not in page.tags
    assert Page(without_details(text)).tags["table"] == len(load_tables()) + 1 + 2  # rules, trainings
    assert page.tags["article"] == 2 * 3 + 1  # classes, how many images lose, and which; the calibration of one
    # Two plots and the times of each training; of one the calibration, two curves and three pictures.
    assert page.tags["img"] == page.tags["figcaption"] == 12
    for heading in ("table1: Natural images", "table7: Ten seeds", "3 iterations, 2 seeds", "shapes, ce, seed 1"):
        assert heading in text
    for alt in (
        "Reliability",
        "Gains of",
        "Training loss",
        "Validation scores",
        "largest gain",
        "largest loss",
        "at random",
    ):
        assert alt in text
    assert NASTY not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "00_a&amp;b&#x27;&quot;" in text
    assert "cpt_swinlarge" in text


@pytest.mark.parametrize("fold", [None, 0])
def test_the_plots_have_every_rule_in_the_order_of_the_table(tmp_path: Path, fold: int | None):
    """Of images and, in a fold, of cases; with as many rules as there are colours, each in its own."""
    rules = ("rankseg_dep", "rankseg_levelset", "rankseg_rma", "rankseg_rma_iou", "rankseg_rma_prob", "rankseg_dep_iou")
    job = replace(SMALL, rules=("argmax", *rules, "rankseg_rma_paper"))
    job = job if fold is None else replace(job, data="hippocampus", fold=fold, test="test_dice")
    write_results(job, tmp_path)
    training = next(iter(Measured(tmp_path).trainings()[1]))
    assert len(training.rules) == 8
    distribution, scatter = (picture for picture in illustrate(training) if picture.place == "comparisons")
    means = [f"{rule}, mean {training.unit_gains(rule, training.metric).mean():+.2f}" for rule in training.rules[1:]]
    texts = re.findall(r"<!-- (.*?) -->", distribution.data.decode())
    assert [text for text in texts if "mean" in text] == means
    texts = re.findall(r"<!-- (.*?) -->", scatter.data.decode())
    assert [text for text in texts if text.startswith("rankseg")] == list(training.rules[1:])
    for colour, _, _ in SERIES:
        assert colour.lower() in distribution.data.decode()
        assert colour.lower() in scatter.data.decode()
    dots = re.search(r'<g id="PathCollection_1">(.*?)\n {3}</g>', scatter.data.decode(), re.DOTALL)[1].count("<use")
    assert dots == len(training.unit_scores("argmax", training.metric)[0]) == (12 if fold is None else 4)


def test_the_page_is_the_same_again(output: Path):
    before = (output / "report" / "index.html").read_bytes()
    write_report(output)
    assert (output / "report" / "index.html").read_bytes() == before


def test_logs_with_a_cut_line(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == ({}, {})
    path.write_text('{"iteration": 1, "train/loss": 3}\n{"iteration": 1, "train/loss": 2}\n7\n{"iter')
    assert read_log(path) == ({1: 2}, {})


def test_a_training_whose_scores_are_undefined_is_shown(tmp_path: Path):
    config = SMALL.config.to_dict()
    training = {group: config[group] for group in ("model", "data", "loss", "schedule", "optim", "seed")}
    context = {"training": {**training, "iteration": 3}, "config": {g: config[g] for g in ("data", "test")}}
    result = EvalResult("argmax", ("a",), ("x", "y", "z"), np.zeros((1, 3, 3), np.int64))
    save_results([result], tmp_path / "run" / "results", [context])
    assert (write_report(tmp_path) / "index.html").is_file()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("results/calibration.json", "{}", "expected the calibration of an evaluation"),
        ("results/timing.json", "{}", "expected the times of an evaluation"),
        ("results/timing.json", '{"milliseconds_per_image": {"forward": "x"}, "forward_passes": 1, "images": 1, '
         '"decision_milliseconds_per_image": {}}', "expected numbers"),
        ("pictures/gain/a.png", "PNG", "cannot identify image file"),
        ("pictures/gain/a.png", "\x89PNG\r\n\x1a\n cut", "truncated"),
    ],
)  # fmt: skip
def test_damaged_files_of_a_run_are_told(tmp_path: Path, capsys, name: str, content: str, told: str):
    write_results(replace(SMALL, rules=("argmax",)), tmp_path)
    results = next(tmp_path.glob("*/*/results"))
    training = Training(results, SMALL.config.to_dict(), 3, "mIoUI", (load_result(results / "argmax.csv"),))
    path = results.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="latin-1")
    assert "A title" in html([training_section("training-0", "Trainings", "A title", training)], "")
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: left out: {path}: ")
    assert told in warning
    assert "0x" not in warning


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_it(output: Path, tmp_path: Path, width: int):
    """A copy with a script of the test's own, which says what the browser made of the page."""
    probe = (
        "<pre id=probe></pre><script>addEventListener('load', () => { const images = [...document.images];"
        "document.getElementById('probe').textContent = JSON.stringify({images: images.length,"
        "loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,"
        "tables: [...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().height > 0).length,"
        "width: innerWidth, scroll: document.documentElement.scrollWidth, errors: window.seen || []}); });</script>"
    )
    listener = "<script>window.seen = []; addEventListener('error', e => seen.push(String(e.message)), true);</script>"
    text = (output / "report" / "index.html").read_text()
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("<head>", "<head>" + listener, 1).replace("</body>", probe + "</body>", 1))
    frame = tmp_path / "frame.html"  # a window of Chromium is 500 pixels wide at least, a frame is not
    frame.write_text(
        f'<body style="margin:0"><iframe id=f src="copy.html" style="width:{width}px;height:2000px;border:0"></iframe>'
        "<pre id=out></pre><script>f.onload = () => setTimeout(() => { out.textContent = "
        "f.contentDocument.getElementById('probe').textContent; }, 500);</script></body>"
    )
    own = ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]
    own += [f"--window-size={max(width, 600)},1000", "--dump-dom"]
    command = [CHROMIUM, *FLAGS, *own, frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", done.stdout)
    assert found, done.stdout[-1000:] + done.stderr[-1000:]
    seen = json.loads(found[1])
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["loaded"] == seen["images"] > 10
    assert seen["tables"] == Page(text).tags["table"] > len(load_tables()) + 3
    assert seen["errors"] == []
    assert "CONSOLE" not in done.stderr
