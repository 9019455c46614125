"""Published figures beside measured ones, from runs of any kind."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from exp.data.sets.pascal_voc import PascalVOC
from exp.data.sets.slices import Tumour
from exp.evaluation.comparison import compare_rules
from exp.evaluation.metrics import EvalResult, compute_scores
from exp.evaluation.results import save_results
from exp.reproduction import plans
from exp.reproduction.existing import DONE, MISSING, Existing
from exp.reproduction.job import Job
from exp.reproduction.measured import Measured, Training, compare_seeds, group_seeds
from exp.reproduction.plans import find_counterpart, table_jobs
from exp.reproduction.published import load_tables
from exp.reproduction.report import build
from exp.reproduction.report.build import write_report
from exp.reproduction.report.page import html
from exp.reproduction.report.paper import HEADER, table_lines
from exp.reproduction.report.writers import latex_text
from tests.config.test_config import compose
from tests.reproduction.test_reproduce import SMALL, published


def write_results(job: Job, output: Path, *, shift: int = 0, iteration: int | None = None) -> None:
    """Write results of a job's rules as an evaluation does: random counts; later rules are a little better."""
    config = job.config.to_dict()
    medical = job.fold is not None
    classes = Tumour.classes if medical else PascalVOC.classes
    names = tuple(f"{job.fold or 0}_{i:03d}" for i in range(12))
    cases = tuple(f"case{job.fold}_{i // 3}" for i in range(12)) if medical else None
    rng = np.random.default_rng(shift + 10 * job.seed + (job.fold or 0))
    counts = rng.integers(50, 100, (12, 3, len(classes)))
    results, contexts = [], []
    for place, rule in enumerate(config["predict"]):
        better = counts.copy()
        found = 3 * place + rng.integers(0, 5, better[:, 0].shape)
        better[:, 0] += found
        better[:, 2] -= found  # the labels stay as they are
        results.append(EvalResult(rule["name"], names, classes, better, cases))
        training = {group: config[group] for group in ("model", "data", "loss", "schedule", "optim", "seed")}
        steps = config["schedule"]["train_iters"] or 77
        training |= {"iteration": steps if iteration is None else iteration, "weights": "raw"}
        contexts.append({"training": training, "config": {g: config[g] for g in ("data", "test")} | {"predict": rule}})
    folder = output / job.name / job.config.run_name / "results"
    save_results(results, folder, contexts)
    times = {"images": 12, "forward_passes": 12, "milliseconds_per_image": {"forward": 250.0}}
    times["decision_milliseconds_per_image"] = {rule["name"]: 2.0 for rule in config["predict"]}
    (folder / "timing.json").write_text(json.dumps(times))
    last = folder.parent / "checkpoints" / "last.safetensors.json"  # what tells that a training has come to its end
    last.parent.mkdir(exist_ok=True)
    last.write_text(json.dumps({"config_digest": job.digest, "iteration": config["schedule"]["train_iters"] or 77}))


def without_details(page: str) -> str:
    """The page without the tables that stand on it alone, and without their entries in the contents."""
    return re.sub(r"<article.*?</article>|(?<=</a>)<ul>.*?</ul>", "", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Table 2's U-Net on LiTS in all folds, Table 7's VOC in all seeds, and a run of another kind with two seeds."""
    folder = tmp_path_factory.mktemp("report") / "out"
    for job in table_jobs("table2"):
        if (job.model, job.data) == ("unet_resnet50d", "lits"):
            write_results(job, folder)
    for job in table_jobs("table7"):
        if job.data == "pascal_voc":
            write_results(job, folder)
    for seed in (0, 1):
        write_results(replace(SMALL, rules=("argmax", "rankseg_rma"), seed=seed), folder)
    write_report(folder)
    return folder


def csv_rows(output: Path) -> list[dict[str, str]]:
    with open(output / "report" / "tables.csv", newline="") as file:
        return list(csv.DictReader(file))


def one(output: Path, **wanted: str) -> dict[str, str]:
    (row,) = (row for row in csv_rows(output) if all(row[key] == value for key, value in wanted.items()))
    return row


def test_folds_and_seeds_are_joined_as_the_paper_does(output: Path):
    files = sorted(output.glob("unet_resnet50d.lits_fold*/*/results/rankseg_ba.json"))
    folds = [json.loads(path.read_text())["metrics"]["mDiceI"] for path in files]
    assert len(folds) == 5
    row = one(output, table="table2", row="unet_resnet50d", data="lits", of="rankseg_ba", score="mDiceI")
    assert float(row["measured"]) == pytest.approx(np.mean(folds), rel=1e-12)
    assert float(row["difference"]) == pytest.approx(np.mean(folds) - 50.08)
    seeds = {
        rule: [
            json.loads(path.read_text())["metrics"]["mIoUI"]
            for path in sorted(output.glob(f"upernet*.pascal_voc.*/*/results/{rule}.json"))
        ]
        for rule in ("argmax", "rankseg_rma_paper")
    }
    assert len(seeds["argmax"]) == 10
    own = {"table": "table7", "data": "pascal_voc", "of": "rankseg_rma"}
    assert float(one(output, **own, score="mIoUI_std")["measured"]) == pytest.approx(
        np.std(seeds["rankseg_rma_paper"], ddof=1)
    )
    expected = stats.ttest_rel(seeds["argmax"], seeds["rankseg_rma_paper"]).pvalue
    assert float(one(output, **own, score="p")["measured"]) == pytest.approx(expected)


def test_the_shipped_rule_stands_beside_the_papers(output: Path):
    """The published figure is compared with the paper's own rule; of the same pass, ours is shown."""
    own = {"table": "table1", "row": plans.UPERNET, "data": "pascal_voc", "score": "mIoUI"}
    folder = next((output / table_jobs("table4")[0].name).glob("*/results"))
    scores = {
        rule: json.loads((folder / f"{rule}.json").read_text())["metrics"]["mIoUI"]
        for rule in ("argmax", "rankseg_rma_paper", "rankseg_rma")
    }
    row = one(output, **own, of="rankseg_rma")
    assert float(row["measured"]) == pytest.approx(scores["rankseg_rma_paper"], rel=1e-12)
    assert float(row["shipped"]) == pytest.approx(scores["rankseg_rma"], rel=1e-12)
    gain = one(output, **own, of="rankseg_rma - argmax")
    assert float(gain["shipped"]) == pytest.approx(scores["rankseg_rma"] - scores["argmax"], rel=1e-9)
    assert one(output, **own, of="argmax")["shipped"] == ""
    assert "| measured - published | 95 % interval | shipped rule |" in (output / "report" / "tables.md").read_text()


def test_gains_have_the_interval_of_the_evaluation(output: Path):
    folder = next((output / table_jobs("table4")[0].name).glob("*/results"))
    measured = Measured(output)
    results = [measured.load(folder / f"{rule}.csv") for rule in ("argmax", "rankseg_rma_paper")]
    expected = compare_rules(results, "mIoUI")[0]
    row = one(output, table="table1", row=plans.UPERNET, data="pascal_voc", of="rankseg_rma - argmax", score="mIoUI")
    assert float(row["measured"]) == pytest.approx(expected.difference)
    assert (float(row["low"]), float(row["high"])) == pytest.approx(expected.interval)
    assert float(row["published"]) == pytest.approx(88.25 - 87.82)


def test_classes_times_and_worst_cases(output: Path):
    folder = next((output / table_jobs("table4")[0].name).glob("*/results"))
    scores = json.loads((folder / "argmax.json").read_text())["metrics"]
    row = one(output, table="table5", row=plans.UPERNET, data="pascal_voc", of="argmax", score="mIoUI5")
    assert float(row["measured"]) == pytest.approx(scores["mIoUI5"])
    times = {
        row["of"]: row["measured"]
        for row in csv_rows(output)
        if row["table"] == "table3" and row["data"] == "pascal_voc"
    }
    assert {name: float(value) for name, value in times.items()} == pytest.approx(
        {"argmax": 0.024, "rankseg_rma": 0.024, "forward": 3.0}
    )


def test_what_is_missing_says_how_to_get_it(output: Path):
    text = (output / "report" / "tables.md").read_text()
    assert "`python scripts/reproduce.py table1 --data_dir DATA --output_dir OUTPUT` fills them" in text
    assert one(output, table="table1", row="cpt_swinlarge", data="ade20k", of="argmax", score="mIoUI")["measured"] == ""


def test_misprints_have_their_notes(output: Path):
    section = (output / "report" / "tables.md").read_text().partition("### table2")[2].partition("### table3")[0]
    assert "| unet_resnet50d | kits | mIoUI | rankseg_ba | 50.34 [1][" in section
    medical = (
        (output / "report" / "tables.md").read_text().partition("### readme_medical")[2].partition("### table1")[0]
    )
    assert "| deeplabv3plus_resnet50d | lits | mIoUI | rankseg_rma | 40.09 |" in medical
    assert "| deeplabv3plus_resnet50d | lits | mIoUI | rankseg_rma - argmax | +1.64 [1] |" in medical  # argmax's note
    assert "[1] Print" in section
    row = one(output, table="readme_medical", row="unet_resnet50d", data="kits", of="argmax")
    lits = one(output, table="table2", row="unet_resnet50d", data="lits", of="argmax", score="mDiceI")
    assert row["measured"] == lits["measured"] != ""  # what it is meant to be of
    assert "U-Net's mDiceI on LiTS" in row["erratum"]


def test_the_same_results_give_the_same_bytes(output: Path, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in (output / "report").iterdir()}
    assert set(before) == {"tables.md", "tables.tex", "tables.csv", "index.html"}
    copy = tmp_path / "elsewhere"
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "report")
    for path in copy.glob("*/*/results/*.json"):  # only who trained what is taken from these
        content = json.loads(path.read_text())
        if "metrics" in content:
            path.write_text(json.dumps({**content, "metrics": {}}))
    write_report(copy)
    assert {path.name: path.read_bytes() for path in (copy / "report").iterdir()} == before
    assert str(output).encode() not in b"".join(before.values())


def test_other_trainings_and_their_seeds(output: Path):
    section = (output / "report" / "tables.md").read_text().partition("## Other trainings")[2]
    assert section.count("### unet_mobilenetv3_small_100, shapes, ce, seed") == 2
    assert section.index("shapes, ce, seed 0, ") < section.index("shapes, ce, seed 1, ")
    assert "upernet" not in section
    folders = [next(output.glob(f"unet_mobilenetv3*shapes*{end}/*/results")) for end in ("[!1].????????", ".seed1.*")]
    scores = {
        rule: [json.loads((folder / f"{rule}.json").read_text())["metrics"]["mIoUI"] for folder in folders]
        for rule in ("argmax", "rankseg_rma")
    }
    for rule, values in scores.items():
        assert f"| {rule} | {np.mean(values):.2f} |" in section
    gains = np.subtract(scores["rankseg_rma"], scores["argmax"])
    assert f"| {gains[0]:+.2f} {gains[1]:+.2f} |" in section


def test_trainings_of_the_papers_tables_have_plots_too(output: Path):
    """Of seed 0 and fold 0; and what was measured comes first."""
    text = (output / "report" / "index.html").read_text()
    shown = re.findall(r'<section id="paper-\d+"><h3>(.*?)</h3>(.*?)</section>', text, re.DOTALL)
    titles = [title for title, _ in shown]
    assert [title.split(", ")[1:4] for title in titles] == [["lits", "ce", "fold 0"], ["pascal_voc", "ce", "seed 0"]]
    assert all(content.count("<img") >= 3 for _, content in shown)
    assert text.index('<section id="table1">') < text.index('<section id="paper-0">') < text.index('id="training-0"')
    tables = (output / "report" / "tables.md").read_text()
    assert tables.index("## table1") < tables.index("## Trainings of these") < tables.index("## Other trainings")


def test_one_seed_evaluated_twice_is_not_two(tmp_path: Path):
    """A copy of a run is none, and an evaluation under other test settings is compared with none of these."""
    for seed in (0, 1):
        write_results(replace(SMALL, rules=("argmax", "rankseg_rma"), seed=seed), tmp_path)
    run = next(path.parent for path in tmp_path.glob("*/*/results") if ".seed1." not in str(path))
    for folder in ("copy", "flipped"):
        shutil.copytree(run, run.parent / folder / run.name)
    for path in (run.parent / "flipped").glob("*/results/*a*.json"):
        content = json.loads(path.read_text())
        if "config" in content:
            content["config"]["test"]["flip"] = True
            path.write_text(json.dumps(content))
    _, others = Measured(tmp_path).trainings()
    assert len(others) == 4
    groups = group_seeds(others)
    assert [[t.config["seed"] for t in group] for group in groups] == [[0, 1], [0]]
    assert all("copy" not in t.place and "flipped" not in t.place for t in groups[0])


def test_evaluations_of_one_training_have_titles_of_their_own(tmp_path: Path):
    write_results(replace(SMALL, rules=("argmax", "rankseg_rma")), tmp_path)
    run = next(tmp_path.glob("*/*/results")).parent
    shutil.copytree(run, run.parent / "fixed" / run.name)
    write_report(tmp_path)
    titles = re.findall(r"^### (.*)", (tmp_path / "report" / "tables.md").read_text(), re.M)
    title = "unet_mobilenetv3_small_100, shapes, ce, seed 0, 3 iterations"
    assert titles[2:4] == [title, f"{title} (fixed)"]


def test_statistics_over_seeds():
    def training(seed: int, gain: int) -> Training:
        config = compose(seed=seed).to_dict()
        counts = np.full((6, 3, 3), 50)
        better = counts.copy()
        better[:, 0] += gain + np.arange(6)[:, None]
        results = [
            EvalResult(rule, tuple("abcdef"), ("x", "y", "z"), c) for rule, c in (("argmax", counts), ("r", better))
        ]
        return Training(Path("f"), config, 3, "mIoUI", tuple(results))

    group = [training(seed, gain) for seed, gain in ((0, 1), (1, 5), (2, 3))]
    found = compare_seeds(group, "r")
    scores = [
        compute_scores(t.results[1].counts)["mIoUI"] - compute_scores(t.results[0].counts)["mIoUI"] for t in group
    ]
    assert found.difference == pytest.approx(np.mean(scores))
    assert (found.wins, found.losses, found.num_units) == (6, 0, 6)
    assert found.interval[0] < found.difference < found.interval[1]


def test_latex_is_balanced_and_escaped(output: Path):
    text = (output / "report" / "tables.tex").read_text()
    tables = len(load_tables()) + 2 + 1 + 2  # the paper's trainings, rules of others, each alone
    assert text.count("\\begin{longtable}") == text.count("\\end{longtable}") == tables
    assert text.replace("\\{", "").replace("\\}", "").count("{") == text.replace("\\{", "").replace("\\}", "").count(
        "}"
    )
    body = [line for line in text.splitlines() if line.endswith("\\\\") and not line.startswith("\\label")]
    published = body[: next(i for i, line in enumerate(body) if line.startswith("rule & "))]
    assert len(published) > 500
    assert all(line.replace("\\&", "").count(" & ") == len(HEADER) - 1 for line in published)
    assert "unet\\_resnet50d" in text
    assert latex_text("a_b & 5% of $x {y} #1 ~^\\") == (
        r"a\_b \& 5\% of \$x \{y\} \#1 \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert latex_text("-1.5 -> [+2, -3], fold-0 <") == r"$-$1.5 $\to$ [+2, $-$3], fold-0 $<$"


def test_all_files_have_the_same_sections_in_the_same_order(output: Path, monkeypatch):
    """Titles, tables, footnotes and notes; tables.csv has the lines of the published tables."""
    seen = []
    monkeypatch.setattr(build, "html", lambda *given: seen.append(given) or html(*given))
    write_report(output)
    ((sections, lead),) = seen
    tables, page, tex = ((output / "report" / name).read_text() for name in ("tables.md", "index.html", "tables.tex"))
    page = without_details(page)
    titles = [section.title for section in sections]
    assert len(set(titles)) == len(titles) == len(load_tables()) + 2 + 2 + 2
    assert re.findall(r"^### (.*)", tables, re.M) == titles
    assert list(map(unescape, re.findall(r"<h3>(.*?)</h3>", page))) == titles
    with_table = [section for section in sections if section.rows]
    assert re.findall(r"\\caption\{(.*)\}", tex) == [latex_text(section.title) for section in with_table]
    keys = [section.key for section in sections]
    assert re.findall(r'<section id="(.*?)">', page) == re.findall(r'<a href="#(.*?)">', page) == keys
    for section in sections:
        texts = [section.lead, *section.footnotes, *section.notes]
        assert all(text in tables and escape(text).replace("`", "") in re.sub("</?code>", "", page) for text in texts)
        plain = tex.replace("\\texttt{", "").replace("\\allowbreak ", "").replace("}", "")
        assert all(latex_text(text.replace("`", "")).replace("}", "") in plain for text in texts)
    rows = [row for section in with_table for row in section.rows]
    marked = (
        [cell.text + " " * bool(cell.marks) + "".join(f"[{m}]" for m in cell.marks) for cell in row] for row in rows
    )
    in_markdown = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    starts = {f"| {' | '.join(section.header)} |" for section in with_table}
    assert [line for line in in_markdown if line not in starts] == [f"| {' | '.join(row)} |" for row in marked]
    in_page = re.findall(r"<tr>(<td.*?)</tr>", page)
    assert len(in_page) == len(rows)
    in_tex = [line for line in tex.splitlines() if line.endswith(" \\\\") and not line.startswith("\\label")]
    headers = [" & ".join(map(latex_text, section.header)) + " \\\\" for section in with_table]
    in_tex = [line for line in in_tex if line not in headers]
    for row, html_row, tex_row in zip(rows, in_page, in_tex, strict=True):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", html_row)
        assert [unescape(re.sub(r"<sup>.*</sup>", "", cell)) for cell in cells] == [cell.text for cell in row]
        plain = re.sub(r"\\textsuperscript\{[\d,]+\}", "", tex_row.removesuffix(" \\\\"))
        assert plain.split(" & ") == [latex_text(cell.text) for cell in row]
    measured = Measured(output)
    lines = [line for table in load_tables().values() for line in table_lines(table, measured)]
    assert [row["row"] for row in csv_rows(output)] == [line.row for line in lines]
    assert lead in tables
    assert escape(lead) in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_latex_makes_a_document_of_it(output: Path, tmp_path: Path):
    shutil.copy(output / "report" / "tables.tex", tmp_path)
    packages = "\\usepackage[margin=1.5cm]{geometry}\\usepackage{booktabs,longtable,pdflscape}"
    (tmp_path / "paper.tex").write_text(
        f"\\documentclass[a4paper]{{article}}{packages}\\begin{{document}}\\input{{tables}}\\end{{document}}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=200)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout
    assert (tmp_path / "paper.pdf").stat().st_size > 20_000


def test_unfinished_trainings_do_not_count(tmp_path: Path):
    job = table_jobs("table4")[0]
    medical = next(c for c in table_jobs("table2") if c.data == "kits")
    write_results(medical, tmp_path, iteration=70)  # of a schedule in epochs
    assert Measured(tmp_path).find(medical, "argmax") is None
    write_results(job, tmp_path, iteration=30_000)
    assert (
        Measured(tmp_path).value(find_counterpart(published("table4", "cat", "pascal_voc", "argmax", "IoUC"))) is None
    )
    shutil.rmtree(tmp_path / job.name)
    write_results(job, tmp_path)
    assert Measured(tmp_path).value(find_counterpart(published("table4", "cat", "pascal_voc", "argmax", "IoUC"))) > 0


def test_trainings_under_the_recipe_of_before_do_not_count(tmp_path: Path):
    """Their results stay, as those of another training; their config has none of the keys that came since."""
    job = table_jobs("table4")[0]
    before = ("optim.warmup=from_start", "data.augmentation=corner", "schedule.batch_size=16")
    old = replace(job, overrides=before)
    write_results(old, tmp_path)
    for path in tmp_path.glob("*/*/results/*.json"):
        content = json.loads(path.read_text())
        if "training" in content:
            del content["training"]["optim"]["warmup"], content["training"]["data"]["augmentation"]
            path.write_text(json.dumps(content))
    existing = Existing(tmp_path)
    assert existing.state(job).kind == MISSING
    assert existing.results.keys() == {old.digest}
    assert existing.state(replace(old, rules=("argmax",))).kind == DONE


def test_empty_and_damaged_folders(script, tmp_path: Path):
    status, _, err = script("report", tmp_path / "no")
    assert status == 2
    assert "no such folder, expected one with runs below it" in err
    status, printed, _ = script("report", tmp_path)
    assert status == 0
    assert f"page: {tmp_path / 'report' / 'index.html'}" in printed
    write_results(replace(SMALL, rules=("argmax",)), tmp_path)
    for text in ('{"rule": "argmax", "training": 5, "config": {}}', '{"rule": "argmax"}'):  # results of something else
        (tmp_path / "other" / "results").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / "results" / "argmax.json").write_text(text)
        (tmp_path / "other" / "results" / "argmax.csv").write_text("image\n")
        assert script("report", tmp_path)[0] == 0
    table = next(tmp_path.glob(f"{SMALL.name}/*/results/argmax.csv"))
    whole = table.read_text()
    table.write_text("image,tp.a\nx,none\n")
    status, _, err = script("report", tmp_path)
    assert status == 0
    assert err.startswith(f"warning: left out: {table}: got a file that cannot be read")
    assert err.count("\n") == 1
    table.write_text(whole)
    damaged = table.with_name("rankseg_rma.json")
    damaged.write_text("{")
    damaged.with_suffix(".csv").write_text(whole)
    status, _, err = script("report", tmp_path)
    assert status == 0
    assert err.startswith(f"warning: left out: {damaged}: got ")
    assert "| argmax |" in (tmp_path / "report" / "tables.md").read_text().partition("## Published")[0]
