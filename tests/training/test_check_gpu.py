"""scripts/check_gpu.py without a device: what it says, that a part cannot harm the others, and the parts on a CPU."""

import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from scripts import check_gpu
from scripts.benchmarks.gpu import loader as gpu_loader
from scripts.benchmarks.gpu import networks as gpu_networks
from scripts.benchmarks.gpu import rules as gpu_rules
from scripts.benchmarks.gpu import training as gpu_training
from scripts.benchmarks.gpu.page import format_page, make_page, parse_page
from scripts.check_gpu import PARTS, Check, Part, main, read_rows, shares, write_row
from tests.models.test_models import build_without_weights

CPU = torch.device("cpu")
OTHERWISE = (("float32", "iou"), ("float16", "dice"), ("bfloat16", "dice"))


class Counts(NamedTuple):
    names: list[str]
    counts: np.ndarray


def check(part: str, folder: Path, seconds: float = 600) -> Check:
    return Check(part, CPU, folder, seconds, None)


def tables(folder: Path) -> dict[str, list[dict]]:
    """The rows that a part wrote, by table; nothing may be wrong."""
    rows, found = read_rows(folder), {}
    assert not [row["wrong"] for row in rows if "wrong" in row]
    for row in rows:
        if "table" in row:
            found.setdefault(row["table"], []).append(row["values"])
    outcomes = [{"part": part, "outcome": "right", "seconds": 1} for part in {row["part"] for row in rows}]
    page = make_page(rows + outcomes, {name: part.text for name, part in PARTS.items()}, PARTS)
    assert format_page(page, PARTS).count("\n### ") == len(found)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_device_is_said_in_one_line(tmp_path: Path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "no CUDA device here: nothing was checked (--dry_run lists the parts)\n"


def test_dry_run_lists_the_parts_and_their_minutes(capsys):
    assert main(["--dry_run", "--minutes", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PARTS)
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(6, abs=0.3)
    assert shares(["rules"], 3) == {"rules": 3}


def test_parts_that_crash_hang_or_find_something_cost_the_others_nothing(tmp_path: Path, monkeypatch, capsys):
    """Each runs in a process of its own, here a line of Python in the place of this script."""
    programs = {
        "tests": "import os; os.kill(os.getpid(), 11)",
        "rules": "import time; time.sleep(60)",
        "networks": f"import json; open({str(tmp_path / 'results.jsonl')!r}, 'a')"
        ".write(json.dumps({'part': 'networks', 'wrong': 'a figure'}) + chr(10))",
        "training": "print('fine')",
    }
    monkeypatch.setattr(check_gpu, "PARTS", {name: Part("none", 1.0, name) for name in programs})
    monkeypatch.setattr(check_gpu, "GRACE", 0)
    real = check_gpu.subprocess.Popen

    def popen(command: list[str], **options: object):
        if "--run_part" in command:
            command = [sys.executable, "-c", programs[command[command.index("--run_part") + 1]]]
        return real(command, **options)

    monkeypatch.setattr(check_gpu.subprocess, "Popen", popen)
    args = check_gpu.parse_args(["--output", str(tmp_path), "--device", "cpu", "--parts", *programs])
    args.minutes = 0.3
    (tmp_path / "log.txt").write_text("the user's own")
    assert not check_gpu.run_parts(args)
    assert [path.read_text() for path in tmp_path.glob("older/log.*.txt")] == ["the user's own"]
    outcomes = {row["part"]: row["outcome"] for row in read_rows(tmp_path) if "outcome" in row}
    assert outcomes["tests"] == "crashed with status -11"
    assert outcomes["rules"].startswith("ended after ")
    assert (outcomes["networks"], outcomes["training"]) == ("wrong", "right")
    page = (tmp_path / "results.md").read_text()
    assert "- **wrong**: a figure" in page
    assert "| rules | rules | ended after " in page


def test_a_part_that_raises_is_wrong(tmp_path: Path, monkeypatch):
    def fail(given: Check) -> None:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(gpu_rules, "check_rules", fail)
    assert main(["--run_part", "rules", "--device", "cpu", "--seconds", "5", "--output", str(tmp_path)]) == 0
    assert read_rows(tmp_path) == [{"part": "rules", "wrong": "RuntimeError: out of everything"}]


def write_check(folder: Path, date: str, outcomes: dict[str, str], value: int, words: tuple[str, ...] = ()) -> Path:
    """A check's folder with a table of one value per part, and the speed of one network."""
    folder.mkdir()
    machine = {"date": date, "commit": f"of {date}", "devices": "a device", "command": "`check_gpu.py`"}
    write_row(folder, {"machine": machine, "networks": words})
    for part, outcome in outcomes.items():
        if not outcome.startswith("not begun"):
            write_row(folder, {"part": part, "table": "Values", "values": {"value": value}})
        write_row(folder, {"part": part, "outcome": outcome, "seconds": 1.0})
    networks = {f"net@{words[0] if words else '512x512'}": {"train_images_per_second": value}}
    speeds = {"device": "a device", "date": date, "torch": "2", "networks": networks}
    (folder / "speeds.json").write_text(json.dumps(speeds))
    return folder


def test_what_a_run_found_replaces_the_part_that_it_ran(tmp_path: Path, monkeypatch, capsys):
    page, speeds = tmp_path / "gpu.md", tmp_path / "speeds.json"
    monkeypatch.setattr(check_gpu, "PAGE", page)
    monkeypatch.setattr(check_gpu, "SPEEDS", speeds)
    page.write_text("# On a GPU\n\n## Notes on these runs\n\nBy hand: | a | b |.\n")
    one = write_check(tmp_path / "one", "day 1", {"rules": "right", "networks": "right", "nccl": "right"}, 11)
    two = {"nccl": "ended after 5 s", "networks": "right", "rules": "not begun: no time was left"}
    two = write_check(tmp_path / "two", "day 2", two, 22, ("512x1024",))
    three = write_check(tmp_path / "three", "day 3", {"networks": "wrong", "rules": "right"}, 33)
    for folder, flags in ((one, ()), (two, ()), (three, ("--parts", "rules"))):
        assert main(["--output", str(folder), "--keep", *flags]) == 0
    text = page.read_text()
    found = parse_page(text)
    assert list(found.sections) == ["rules", "networks", "networks: 512x1024", "nccl", "Notes on these runs"]
    values = {title: body.split()[-2] for title, body in found.sections.items()}
    assert list(values.values())[:4] == ["33", "11", "22", "22"]
    assert "By hand: | a | b |.\n" in text
    runs = {title: row.split("|")[-2].strip() for title, row in found.rows.items()}
    assert runs == {"rules": "day 3", "networks": "day 1", "networks: 512x1024": "day 2", "nccl": "day 2"}
    assert list(found.runs) == ["day 1", "day 2", "day 3"]
    assert format_page(found, PARTS) == text
    networks = json.loads(speeds.read_text())["networks"]
    assert {name: network["train_images_per_second"] for name, network in networks.items()} == {
        "net@512x512": 11,
        "net@512x1024": 22,
    }
    speeds.write_text(speeds.read_text().replace("a device", "another"))
    before = page.read_text()
    assert main(["--output", str(three), "--keep"]) == 2
    assert "speeds.json: got speeds of device a device, expected another as in " in capsys.readouterr().err
    assert page.read_text() == before
    assert main(["--output", str(tmp_path), "--keep"]) == 2


def test_the_page_of_the_last_runs_can_be_merged():
    """As it stands: parts, notes, nothing that merging would change or lose."""
    text = check_gpu.PAGE.read_text()
    page = parse_page(text)
    assert format_page(page, PARTS) == text
    assert {title.split(":")[0] for title in page.rows} == set(PARTS)
    assert all(any(date in row for date in page.runs) for row in page.rows.values())
    assert page.sections.keys() == {*page.rows, "Notes on these runs"}


def test_rules(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_rules, "ORDER", ("voc", "volume, 2 classes", "tiny"))
    gpu_rules.check_rules(check("rules", tmp_path))
    found = tables(tmp_path)
    for table in ("Labels against the CPU's", "Labels of rankseg_levelset against the CPU's"):
        assert [(row["map"], row["type"], row["metric"]) for row in found[table]] == [
            *((name, "float32", "dice") for name in gpu_rules.ORDER),
            *((name, *how) for name in gpu_rules.ORDER for how in OTHERWISE),
        ]
    assert len(found["Time and peak memory"]) == 3 * 4 + 1
    first, second = found["Time and peak memory"][:2]
    assert first.keys() >= {"ours, ms", "argmax(1), ms", "max(1), ms", "levelset, ms", "dep, ms", "sort, ms"}
    assert "dep, ms" not in second


def test_other_labels_are_wrong_where_they_are_worse(tmp_path: Path, monkeypatch):
    calls = iter(range(100))
    real = gpu_rules.rankseg_rma
    monkeypatch.setattr(gpu_rules, "rankseg_rma", lambda prob, metric: real(prob, metric) * (next(calls) % 2 == 0))
    prob = gpu_rules.make_map((1, 5, 32, 32), 0.0)
    gpu_rules.compare(check("rules", tmp_path), "map", prob, "dice", torch.float32)
    assert any(row.get("wrong", "").startswith("map float32 dice: ") for row in read_rows(tmp_path))


def test_networks(tmp_path: Path):
    gpu_networks.check_networks(check("networks", tmp_path))
    found = tables(tmp_path)
    assert found["Defaults"][0].keys() >= {"training, images/s", "evaluation, windows/s", "peak GiB"}
    speeds = json.loads((tmp_path / "speeds.json").read_text())
    assert speeds["networks"]["unet_mobilenetv3_small_100@64x64"].keys() == {
        "crop_size",
        "batch_size",
        "variant",
        "amp",
        "train_images_per_second",
        "eval_windows_per_second",
        "peak_gib",
    }


def test_networks_are_picked_by_name_crop_or_setting():
    plan, streets = gpu_networks.plan_networks(()), gpu_networks.plan_networks(["512x1024"])
    assert len(set(plan)) == len(plan)
    assert [entry[2] for entry in plan] == sorted((entry[2] for entry in plan), key=lambda what: what != "defaults")
    assert streets == [entry for entry in plan if entry[1] == gpu_networks.STREETS]
    assert len(streets) == 8
    assert gpu_networks.plan_networks(["unet_", "windows"]) == [
        ("unet_resnet50d", "lits", "defaults"),
        ("unet_resnet18d", "lits", "defaults"),
        (gpu_networks.UPERNET, "ade20k", "windows"),
    ]


def test_a_word_of_no_network_is_refused_before_anything_runs(tmp_path: Path, capsys):
    assert main(["--output", str(tmp_path / "out"), "--networks", "bf16", "512x1025"]) == 2
    assert capsys.readouterr().err.startswith("error: --networks 512x1025: got a word that is in no network's name")
    assert not (tmp_path / "out").exists()


def test_a_network_that_has_no_time_left_is_said_and_not_wrong(tmp_path: Path, monkeypatch):
    """Not even by what compiles, which reports every Exception as its own."""
    measured = []

    def measure(check: Check, model: str, data: str, setting: str, *_: object) -> None:
        measured.append(setting)
        try:
            time.sleep(60 if len(measured) == 4 else 0)
        except Exception as error:
            check.wrong(str(error))

    monkeypatch.setattr(gpu_networks, "measure", measure)
    given = Check("compile", torch.device("meta"), tmp_path, 1.0, None)
    gpu_networks.check_compile(given)
    assert measured == ["defaults, not compiled", "defaults, compiled", "bf16, not compiled", "bf16, compiled"]
    text = "no time was left for deeplabv3plus_resnet101d, bf16, compiled, and what follows"
    assert read_rows(tmp_path) == [{"part": "compile", "note": text}]


@pytest.mark.slow
def test_every_network_of_the_paper_can_be_measured(monkeypatch):
    """Its YAMLs go together, and the plans need no other network or crop."""
    from exp.reproduction.plans import table_jobs

    measured = set()
    for model, data in gpu_networks.NETWORKS:
        config = gpu_networks.compose(model, data, (), tiny=False)
        classes, channels = gpu_networks.data_facts(config)
        assert build_without_weights(monkeypatch, config.model, classes, channels).num_classes == classes
        measured.add((config.model.name, config.data.crop_size))
    assert measured == {(job.config.model.name, job.config.data.crop_size) for job in table_jobs("all")}


def test_rows_of_two_evaluations_are_equal_or_differ_by_ties_or_are_wrong(tmp_path: Path):
    def found(*moved: int) -> tuple[Counts, float]:
        """Four images of 10,000 pixels and two classes, of which so many went to the other class."""
        counts = [[[5000 - n, 5000], [0, n], [n, 0]] for n in moved]
        return Counts([f"image {i}" for i in range(len(moved))], np.array(counts)), 50.0

    same = {"argmax": found(0, 0, 0, 0), "rankseg_levelset": found(0, 0, 0, 0)}
    other = {"argmax": found(0, 1, 0, 1), "rankseg_levelset": found(0, 0, 11, 0)}
    gpu_training.compare_results(check("training", tmp_path), other, same)
    rows = read_rows(tmp_path)
    argmax, levelset = (row["values"] for row in rows if "table" in row)
    assert (argmax["rows equal"], argmax["other by ties"], argmax["wrong"]) == (2, 2, 0)
    assert argmax["which"] == "image 1 1, image 3 1"
    assert (levelset["rows equal"], levelset["other by ties"], levelset["wrong"]) == (3, 0, 1)
    assert [row["wrong"].split(":")[0] for row in rows if "wrong" in row] == ["rankseg_rma", "rankseg_levelset"]


@pytest.fixture
def environment(monkeypatch):
    """What a group's process reads there is as before, afterwards."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")


def test_a_step_in_a_group_is_that_of_one_process(tmp_path: Path, environment):
    gpu_training.check_nccl(check("nccl", tmp_path))
    rows = {row["what"]: row["value"] for row in tables(tmp_path)["Steps in a group and alone"]}
    compared = [value for what, value in rows.items() if what.endswith("relative difference")]
    assert len(compared) == 4
    assert max(compared) < 1e-9
    assert rows["backend"] == "gloo"
    assert "seconds until the group was left" in rows


def test_gradients_that_are_no_average_are_wrong(tmp_path: Path, environment, monkeypatch):
    """Of one small tensor alone: a norm layer's bias, twice as large."""
    real = gpu_training.wrap_anyway

    def wrap(model: torch.nn.Module, dist):
        bias = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).bias
        bias.register_hook(lambda gradient: 2 * gradient)
        return real(model, dist)

    monkeypatch.setattr(gpu_training, "wrap_anyway", wrap)
    gpu_training.check_nccl(check("nccl", tmp_path))
    wrong = [row["wrong"] for row in read_rows(tmp_path) if "wrong" in row]
    assert any(text.startswith("1 process(es): gradients of the first step differ by 1.0e+00 ") for text in wrong)


def test_a_value_that_is_no_number_is_no_small_difference():
    one = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.ones(2)}
    assert math.isnan(gpu_training.largest_change(one, {name: torch.ones(2) for name in one}))


@pytest.mark.slow
def test_a_group_of_two_processes(tmp_path: Path):
    """On CPUs norm layers keep to their own share, so figures differ; that all come is what is tested."""
    gpu_training.launch_group(check("nccl", tmp_path), 2)
    rows = {row["what"]: row["value"] for row in tables(tmp_path)["Steps in a group and alone"]}
    assert rows["losses, relative difference"] < 0.2
    assert "seconds until the group was left" in rows


def test_loader(tmp_path: Path):
    gpu_loader.check_loader(check("loader", tmp_path))
    assert tables(tmp_path)["Images per second"][0]["workers"] == "none: a batch on the device"


@pytest.mark.slow
def test_training_and_tests(tmp_path: Path):
    gpu_training.check_training(check("training", tmp_path))
    gpu_training.check_tests(check("tests", tmp_path))
    found = tables(tmp_path)
    assert [row["status"] for row in found["Runs"]] == [75, 0, 0]
    assert all(row["pixels, at most"] == 0 for row in found["Evaluation: the device and the CPU"])
    assert {row["outcome"] for row in found["Tests"]} == {"passed"}
