"""Whole runs of the program."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from exp.checkpoints.checkpoint import load_checkpoint
from exp.evaluation.comparison import compare_rules
from exp.evaluation.results import format_comparisons, load_result
from exp.models.weights import HUB
from exp.runtime.errors import one_line
from exp.runtime.progress import follow
from exp.training.step import TrainStep
from exp.training.validation import ScoreHistory
from tests.conftest import ROOT, TINY, TINY_RUN, free_port


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}


def checkpoint_names(run: Path) -> list[str]:
    """The checkpoints; each has its JSON beside it, and nothing half written is left."""
    names = checkpoint_bytes(run).keys()
    files = {name for name in names if not name.endswith(".json")}
    assert names == files | {f"{name}.json" for name in files}
    return sorted(files)


@pytest.mark.parametrize(
    ("encoder", "address"),
    [
        ("mobilenetv3_small_100", f"{HUB}/timm/mobilenetv3_small_100.lamb_in1k"),
        ("mit_b0", f"{HUB}/smp-hub/mit_b0.imagenet"),
        ("gluon_resnet50_v1b", "gluon_resnet50_v1b"),  # has weights under another name
        ("resnet50.nosuch", "resnet50.nosuch"),
    ],
)
def test_a_hub_is_named_before_it_is_asked(program, tmp_path: Path, monkeypatch, encoder: str, address: str):
    def unreachable(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("exp.models.segmentor.build_parts", unreachable)
    flags = [*TINY, f"model.encoder={encoder}", "model.pretrained=true", "--output_dir", tmp_path]
    status, printed, err = program(*flags)
    assert status == 2
    assert f"first weights: {address} (downloaded" in printed.splitlines()[1]
    assert err.startswith(f"error: model.pretrained: got no weights of encoder {encoder} from the hub (no network)")
    assert err.count("\n") == 1
    assert "model.pretrained to a local file" in err


def test_a_file_gets_a_line_every_minute(capsys, monkeypatch):
    seconds = iter(range(0, 1000, 25))  # at the start, then after each item
    monkeypatch.setattr("exp.runtime.progress.time.monotonic", lambda: next(seconds))
    assert list(follow(list("abcdefg"), "evaluating", "img")) == list("abcdefg")
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 3 of 7 img done, 0:01:40 left",
        "evaluating: 6 of 7 img done, 0:00:25 left",
    ]
    assert list(follow([1, 2], "evaluating", "img", shown=False)) == [1, 2]
    assert not capsys.readouterr().err


def test_long_reasons_of_libraries_are_cut_between_words():
    assert one_line(OSError("no\n network")) == "no network"
    assert one_line("word " * 50) == "word " * 40 + "..."
    assert one_line("x" * 300) == "x" * 200 + " ..."


def test_train_then_test_only_under_other_rules(program, tmp_path: Path):
    flags = [*TINY, "schedule.val_iters=2"]
    out, run = tmp_path / "out", tmp_path / "out" / TINY_RUN
    status, printed, err = program(*flags, "--output_dir", out, "--predict_yaml", "argmax")
    assert status == 0, err
    assert "mIoUI" in printed
    begins = [
        "shapes: 8 training and 3 validation images",
        "encoder's first weights: random",
        f"{run}: 1.0 M parameters",
    ]
    assert [line.partition(",")[0] for line in printed.splitlines()[:3]] == begins
    assert err.splitlines()[0] == "iteration 1 of 3 done"
    assert printed.splitlines()[-1] == f"for a page: python {ROOT / 'scripts' / 'report.py'} {run}"
    assert "iteration 3 of 3: loss" in err  # no terminal, no bar
    assert "\r" not in err
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "results",
        "starts.jsonl",
        "tensorboard",
    ]
    weights = ["best.safetensors", "last.safetensors"]
    assert checkpoint_names(run) == sorted(["best.pt", "iter_0000002.pt", "iter_0000003.pt", *weights])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train_lines = [line for line in lines if "train/loss" in line]
    assert [line["iteration"] for line in train_lines] == [1, 2, 3]
    names = {"images_per_second", "step_seconds", "data_wait_share", "peak_memory_gib", "remaining_seconds"}
    assert {"lr/encoder_decay", "lr/head_no_decay", *(f"train/{name}" for name in names)} <= train_lines[0].keys()
    assert train_lines[-1]["train/remaining_seconds"] == 0
    assert [line["iteration"] for line in lines if "val/argmax/mIoUI" in line] == [2, 3]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["crop_size"] == [32, 32]
    start = json.loads((run / "starts.jsonl").read_text())
    assert torch.__version__.startswith(start["versions"]["torch"])
    assert start["revision"]

    before = checkpoint_bytes(run)
    status, printed, err = program(
        *flags,
        "--output_dir",
        out,
        "--predict_yaml",
        "rankseg_rma",
        "--test-only",
        "--save_pred",
        "2",
        "--save_prob",
        "1",
    )
    assert status == 0, err
    assert checkpoint_bytes(run) == before
    base, other = (load_result(run / "results" / f"{rule}.csv") for rule in ("argmax", "rankseg_rma"))
    assert format_comparisons(compare_rules([base, other], "mIoUI"), "mIoUI") in printed  # beside the argmax of before
    names = {"argmax.csv", "argmax.json", "rankseg_rma.csv", "rankseg_rma.json"}
    assert {p.name for p in (run / "results").iterdir()} >= names | {"timing.json"}
    assert len(list((run / "pictures" / "random").glob("*.png"))) == 2
    prob = np.load(run / "probabilities" / "shapes_val_0000.npy")
    assert prob.shape == (6, 96, 128)
    assert prob.dtype == np.float32
    assert np.allclose(prob.sum(0), 1, atol=1e-5)
    result = json.loads((run / "results" / "rankseg_rma.json").read_text())
    assert result["rule"] == "rankseg_rma"
    assert result["training"]["iteration"] == 3
    assert result["training"]["optim"]["lr"] == 6e-4
    assert result["config"]["predict"]["opt_metric"] == "dice"
    with open(run / "results" / "rankseg_rma.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"shapes_val_{i:04d}" for i in range(3)]

    # Another data.crop_size is not another window: that is the training's, and it is said.
    status, printed, err = program(
        *flags, "data.crop_size=[64,64]", "--output_dir", out, "--predict_yaml", "rankseg_rma", "--test-only"
    )
    assert status == 0, err
    assert "windows of 32x32 as in the training" in printed
    again = json.loads((run / "results" / "rankseg_rma.json").read_text())
    assert again["metrics"] == result["metrics"]
    assert again["config"]["test"]["crop_size"] == [32, 32]
    assert program(*flags, "--output_dir", out, "--predict_yaml", "rankseg_rma", "--test-only")[0] == 0

    # A rule that was evaluated otherwise than the argmax of before is not compared with it.
    status, printed, err = program(
        *flags, "test.flip=true", "--output_dir", out, "--predict_yaml", "rankseg_levelset", "--test-only"
    )
    assert status == 0, err
    assert "differences in points" not in printed
    assert "not compared with argmax, evaluated otherwise: rankseg_levelset: test.flip " in printed

    # Thresholds of a data set, then the same from their file, image by image.
    rules = ("--predict_yaml", "rankseg_rma_dataset")
    status, printed, err = program(*flags, "--output_dir", out, *rules, "--test-only", "--save_pred", "1")
    assert status == 0, err
    thresholds = run / "results" / "rankseg_rma_dataset.val.thresholds.json"
    rules = ("--predict_yaml", "rankseg_rma_fixed", "--set", f"predict.thresholds={thresholds}")
    status, printed, err = program(*flags, "--output_dir", out, *rules, "--test-only")
    assert status == 0, err
    tables = [(run / "results" / f"rankseg_rma_{name}.csv").read_bytes() for name in ("dataset", "fixed")]
    assert tables[0] == tables[1]

    # Both rules in one pass, from the checkpoint named: the same files, byte for byte.
    apart = {name: (run / "results" / name).read_bytes() for name in names}
    status, printed, err = program(
        *flags,
        "--output_dir",
        tmp_path / "other",
        "--predict_yaml",
        "argmax",
        "rankseg_rma",
        "--test-only",
        "--model_checkpoint",
        run / "checkpoints" / "iter_0000003.pt",
        "--save_page",
    )
    assert status == 0, err
    assert "rankseg_rma against argmax: mIoUI" in printed
    page = tmp_path / "other" / TINY_RUN / "report" / "index.html"
    assert printed.splitlines()[-1] == f"page: {page}"
    assert "Confusion matrix of rankseg_rma" in page.read_text()
    together = {name: (tmp_path / "other" / TINY_RUN / "results" / name).read_bytes() for name in names}
    assert together == apart


ALL_STATE = [  # everything that a checkpoint must remember besides weights, optimiser and schedule
    "schedule.amp=bf16",
    "schedule.accumulation=2",
    "schedule.val_iters=1",
    "schedule.early_stop=9",
    "optim.ema_decay=0.9",
    "optim.clip_norm=1",
    "test.weights=ema",
]


@pytest.mark.parametrize("more", [[], ALL_STATE, ["schedule.amp=fp16", "schedule.channels_last=false"]])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(program, tmp_path: Path, more: list[str]):
    flags = [*TINY, "schedule.train_iters=4", "schedule.save_iters=2", "schedule.keep_checkpoints=9", *more]
    assert program(*flags, "--output_dir", tmp_path / "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    run = tmp_path / "cut" / TINY_RUN
    (run / "checkpoints" / "iter_0000004.pt").unlink()
    status, printed, _ = program(*flags, "--output_dir", tmp_path / "cut")
    assert status == 0
    assert "iterations 2 to 4" in printed
    whole, cut = (
        load_checkpoint(tmp_path / name / TINY_RUN / "checkpoints" / "iter_0000004.pt") for name in ("whole", "cut")
    )
    assert whole.model.keys() == cut.model.keys()
    assert all(torch.equal(whole.model[name], cut.model[name]) for name in whole.model)
    assert (whole.ema is None) == (more != ALL_STATE)
    assert all(torch.equal(value, cut.ema[name]) for name, value in (whole.ema or {}).items())
    for part in ("scheduler", "scaler", "validations"):
        assert whole.training[part] == cut.training[part]
    assert list(whole.training["validations"]["scores"]) == ([1, 2, 3, 4] if more == ALL_STATE else [4])
    optimizers = (checkpoint.training["optimizer"]["state"].values() for checkpoint in (whole, cut))
    for state, other in zip(*optimizers, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)
    for name in ("argmax.csv", "argmax.json", "rankseg_rma.csv", "rankseg_rma.json"):
        expected = (tmp_path / "whole" / TINY_RUN / "results" / name).read_bytes()
        assert (run / "results" / name).read_bytes() == expected

    before = checkpoint_bytes(run)
    status, printed, _ = program(*flags, "--output_dir", tmp_path / "cut")
    assert status == 0
    assert "training is complete (4 iterations)" in printed
    assert checkpoint_bytes(run) == before


def test_early_stop_best_and_averaged_weights(program, tmp_path: Path, monkeypatch):
    """Scores 5, 9, 7, 6 after 1, 2, 3, 4 iterations and a patience of 2: stopped after 4 of 8, the best after 2."""
    add = ScoreHistory.add
    monkeypatch.setattr(ScoreHistory, "add", lambda self, i, score: add(self, i, {1: 5, 2: 9, 3: 7, 4: 6}[i]))
    flags = [*TINY, "schedule.train_iters=8", "schedule.val_iters=1", "schedule.early_stop=2", "optim.ema_decay=0.5"]
    flags += ["--output_dir", tmp_path, "--predict_yaml", "argmax"]
    run = tmp_path / TINY_RUN
    status, printed, err = program(*flags)
    assert status == 0, err
    assert (
        "stopped early after 4 iterations; best mIoUI of argmax, raw weights, 3 images of val: 9.00 after 2" in printed
    )
    exported = [f"{name}{kind}.safetensors" for name in ("best", "last") for kind in ("", ".ema")]
    assert checkpoint_names(run) == sorted(["best.pt", "iter_0000002.pt", "iter_0000004.pt", *exported])
    best = load_checkpoint(run / "checkpoints" / "best.pt")
    assert best.iteration == 2
    at_two = load_checkpoint(run / "checkpoints" / "iter_0000002.pt")
    assert all(torch.equal(best.model[name], at_two.model[name]) for name in best.model)

    def judged() -> tuple[int, str, list]:
        result = json.loads((run / "results" / "argmax.json").read_text())
        return result["training"]["iteration"], result["training"]["weights"], list(result["metrics"].values())

    last, before = judged(), checkpoint_bytes(run)
    assert last[:2] == (4, "raw")
    status, printed, err = program(*flags)
    assert status == 0, err
    assert "training is complete (4 iterations)" in printed
    assert program(*flags, "--test-only", "--model_checkpoint", "best")[0] == 0
    assert judged()[:2] == (2, "raw")
    assert program(*flags, "--test-only", "--set", "test.weights=ema")[0] == 0
    assert judged()[:2] == (4, "ema")
    assert judged()[2] != last[2]
    assert checkpoint_bytes(run) == before
    status, _, err = program(*TINY, "--output_dir", tmp_path / "out", "--set", "test.weights=ema")
    assert status == 2
    assert "test.weights: got ema, expected raw where optim.ema_decay keeps no moving average" in err


def test_evaluation_is_in_float32_unless_the_test_yaml_says_so(program, tmp_path: Path):
    """Training in bf16 does not change how its weights are evaluated; probabilities are float32 in either case."""
    flags = [*TINY, "schedule.amp=bf16", "--output_dir", tmp_path, "--predict_yaml", "argmax", "--save_prob", "1"]
    assert program(*flags)[0] == 0
    path = tmp_path / TINY_RUN / "probabilities" / "shapes_val_0000.npy"
    after_training = np.load(path)
    assert program(*flags, "--test-only")[0] == 0
    assert np.array_equal(np.load(path), after_training)
    assert program(*flags, "--test-only", "--set", "test.amp=bf16")[0] == 0
    low = np.load(path)
    assert low.dtype == after_training.dtype == np.float32
    assert np.allclose(low.sum(0), 1, atol=1e-5)  # bf16's softmax would be off by up to 2 ** -8
    assert 0 < abs(low - after_training).max() < 0.1


def test_boundary_iou_is_an_option(program, tmp_path: Path):
    flags = [*TINY, "--output_dir", tmp_path, "--predict_yaml", "argmax"]
    assert program(*flags)[0] == 0
    results = tmp_path / TINY_RUN / "results"
    plain = json.loads((results / "argmax.json").read_text())
    assert "metrics" not in plain["config"]["test"], "results of before this key stay what they are"
    status, printed, err = program(*flags, "--test-only", "--set", "test.metrics=[boundary_iou]")
    assert status == 0, err
    assert "mBIoUI" in printed
    more = json.loads((results / "argmax.json").read_text())
    assert more["config"]["test"]["metrics"] == ["boundary_iou"]
    assert {name: more["metrics"][name] for name in plain["metrics"]} == plain["metrics"]
    assert 0 < more["metrics"]["mBIoUI"] < more["metrics"]["mIoUI"]


def test_a_training_resumes_from_the_checkpoint_that_it_is_given(program, tmp_path: Path):
    """It comes out as the uninterrupted one, in a folder of its own; the file is left as it is. Started again, the run
    resumes from its own checkpoints."""
    flags = [*TINY, "--predict_yaml", "argmax"]
    assert program(*flags, "--output_dir", tmp_path / "whole")[0] == 0
    whole = tmp_path / "whole" / TINY_RUN / "checkpoints"
    given = tmp_path / "elsewhere" / "iter_0000010.pt"  # whose name says nothing outside of a run
    given.parent.mkdir()
    shutil.copy(whole / "iter_0000002.pt", given)
    before = given.read_bytes()
    more = [*flags, "--output_dir", tmp_path / "more", "--model_checkpoint", given]
    status, printed, err = program(*more)
    assert status == 0, err
    assert "iterations 2 to 3" in printed + err
    own = tmp_path / "more" / TINY_RUN / "checkpoints"
    assert [path.name for path in sorted(own.glob("iter_*.pt"))] == ["iter_0000003.pt"]
    states = [load_checkpoint(folder / "iter_0000003.pt").model for folder in (whole, own)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    status, printed, err = program(*more)
    assert status == 0, err
    assert f"{own / 'iter_0000003.pt'}: resumed in place of {given}" in printed
    assert "training is complete (3 iterations)" in printed
    status, _, err = program(*flags, "--output_dir", tmp_path / "more", "--model_checkpoint", own / "iter_0000003.pt")
    assert status == 2
    assert "got a checkpoint of the run itself" in err
    status, _, err = program(*more, "--seed", "7", "--output_dir", tmp_path / "other")
    assert status == 2
    assert f"{given}: got a run trained with other settings (checkpoint -> flags: seed 0 -> 7)" in err
    weights = whole / "last.safetensors"
    status, _, err = program(*flags, "--output_dir", tmp_path / "third", "--model_checkpoint", weights)
    assert status == 2
    assert f"{weights}: got a checkpoint without the whole state of a training" in err
    assert given.read_bytes() == before
    assert [path.name for path in given.parent.iterdir()] == [given.name]


def test_other_settings_in_the_same_folder_are_refused(program, tmp_path: Path):
    assert program(*TINY, "--output_dir", tmp_path)[0] == 0
    before = checkpoint_bytes(tmp_path / TINY_RUN)
    status, _, err = program(*TINY, "optim.lr=1e-3", "--output_dir", tmp_path)
    assert status == 2
    assert "optim.lr 0.0006 -> 0.001" in err
    status, _, err = program(*TINY, "model.encoder=resnet18d", "--output_dir", tmp_path, "--test-only")
    assert status == 2
    assert "checkpoint of another model" in err
    assert "model.encoder mobilenetv3_small_100 -> resnet18d" in err
    status, _, err = program(*TINY, "--output_dir", tmp_path, "--seed", "5")
    assert status == 2
    assert "seed 0 -> 5" in err
    assert checkpoint_bytes(tmp_path / TINY_RUN) == before


def test_a_checkpoint_of_other_classes_is_refused(program, tmp_path: Path, camvid_dir: Path):
    assert program(*TINY, "--output_dir", tmp_path)[0] == 0
    path = tmp_path / TINY_RUN / "checkpoints" / "iter_0000003.pt"
    status, _, err = program(
        *TINY,
        "--output_dir",
        tmp_path,
        "--data_yaml",
        "camvid",
        "--data_dir",
        camvid_dir,
        "--test-only",
        "--model_checkpoint",
        path,
    )
    assert status == 2
    assert f"{path}: got a checkpoint of another model" in err
    assert "classes [" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save_page", "--predict_yaml", "rankseg_rma"], "--save_page: got no argmax among --predict_yaml"),
        (["--test-only"], "got no checkpoint, expected one: train first"),
        (["--test-only", "--model_checkpoint", "nowhere.pt"], "nowhere.pt: no such file, expected a checkpoint"),
        (["--model_checkpoint", "some.pt"], "some.pt: no such file, expected a checkpoint"),
        (["--model_checkpoint", "best"], "best: expected together with --test-only"),
        (["--model_yaml", "unet_mobilenetv3_smal"], "did you mean 'unet_mobilenetv3_small_100'"),
        (["--data_yaml", "camvid"], "--data_dir: got none"),
        (["--data_yaml", "camvid", "--data_dir", "nowhere"], "nowhere: no such folder"),
        (["--predict_yaml", "argmaxx"], "did you mean 'argmax'"),
        (["--set", "schedule.accumulation=3"], "schedule.accumulation: got 3 for batches of 4 on 1 process(es)"),
        (["--set", "schedule.early_stop=3"], "null where val_iters is null"),
        (["--set", "schedule.amp=half"], "off, bf16, fp16"),
        (["--set", "test.metrics=[hausdorff]"], "expected some of boundary_iou"),
        (["--set", "schedule.batch_size=99"], "expected at most the number of training images, 8"),
        (["--seed", "5000000000"], "--seed: got 5000000000"),
        (["--set", "test.stride=[64,64]"], "expected at most the window, (32, 32)"),
        (["--set", "predict.unassigned=9"], "predict.unassigned: got 9, expected a label in 0..5"),
        (["--save_pred", "-1"], "--save_pred: got -1"),
        (["--tset-only"], "unrecognized arguments"),
    ],
)
def test_wrong_flags_end_at_once_with_status_2(program, tmp_path: Path, flags: list[str], message: str):
    out = tmp_path / "out"
    status, _, err = program(*TINY, "--output_dir", out, *flags)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not out.exists()


def test_an_output_folder_that_is_a_file_is_refused(program, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    status, _, err = program(*TINY, "--output_dir", tmp_path / "out")
    assert status == 2
    assert f"--output_dir: {tmp_path / 'out'}: got a file, expected a folder" in err
    assert (tmp_path / "out").read_text() == "mine"


def test_epochs_and_real_layouts(program, tmp_path: Path, camvid_dir: Path):
    status, printed, err = program(
        "--data_dir",
        camvid_dir,
        "--output_dir",
        tmp_path / "out",
        "--data_yaml",
        "camvid",
        "--model_yaml",
        "deeplabv3plus_mobilenetv2_100",
        "--set",
        "model.pretrained=false",
        "data.crop_size=[32,48]",
        "schedule.train_epochs=2",
        "schedule.batch_size=4",
        "schedule.accumulation=2",
        "schedule.num_workers=0",
        "--loss_yaml",
        "jaccard_d_present_all",
    )
    assert status == 0, err
    assert "iterations 0 to 2" in printed
    assert "the loss over the data set is taken over each micro-batch: schedule.accumulation=2" in printed


def test_curves_and_pictures_are_in_tensorboard(program, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert program(*TINY, "schedule.val_iters=2", "--output_dir", tmp_path)[0] == 0
    events = EventAccumulator(str(tmp_path / TINY_RUN / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    groups = ("encoder_decay", "encoder_no_decay", "head_decay", "head_no_decay")
    assert {"train/loss", "train/images_per_second", *(f"lr/{group}" for group in groups)} <= scalars
    assert {
        f"val/{rule}/{name}" for rule in ("argmax", "rankseg_rma") for name in ("Acc", "mIoUI", "mDiceC")
    } <= scalars
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("val/argmax/mIoUI")] == [2, 3]
    assert set(events.Tags()["images"]) == {"val/0", "val/1", "val/2"}


def test_two_classes_under_every_rule(program, tmp_path: Path):
    rules = ["argmax", "threshold", "rankseg_rma", "rankseg_rma_iou", "rankseg_ba", "rankseg_trna"]
    small = "data.test_crop=[24,24]"  # TRNA takes seconds on a whole image of an untrained network
    flags = [*TINY, small, "--data_yaml", "shapes_binary", "--predict_yaml", *rules]
    status, printed, err = program(*flags, "--output_dir", tmp_path)
    assert status == 0, err
    lines = [line.split() for line in printed.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line[0] in rules and len(line) == 11}
    assert rows.keys() == set(rules)
    assert rows["threshold"] == rows["argmax"]


def test_non_finite_weights_are_not_saved(program, tmp_path: Path, monkeypatch):
    step = TrainStep.__call__

    def overflowing(self: TrainStep, batch: object) -> object:
        outcome = step(self, batch)
        if self.scheduler.last_epoch == 2:
            torch.nn.init.constant_(next(self.raw_model.parameters()), float("inf"))
        return outcome

    monkeypatch.setattr(TrainStep, "__call__", overflowing)
    status, _, err = program(*TINY, "--output_dir", tmp_path, "--set", "schedule.save_iters=1")
    assert status == 2
    assert "error: optim.lr: got non-finite weights at iteration 2, which are not saved" in err
    assert checkpoint_names(tmp_path / TINY_RUN) == ["iter_0000001.pt"]


def test_one_image_a_process_where_batch_norm_cannot_take_it(program, tmp_path: Path):
    status, _, err = program(
        *TINY,
        "--output_dir",
        tmp_path / "out",
        "--model_yaml",
        "deeplabv3plus_resnet18d",
        "--set",
        "model.decoder_channels=16",
        "schedule.batch_size=1",
        "model.pretrained=false",
    )
    assert status == 2
    assert "schedule.batch_size: got 1 image per process (and micro-batch), expected 2 or more" in err
    assert not (tmp_path / "out").exists()


PAPER_FLAGS = [
    "--model_yaml",
    "upernet_convnext_base.fb_in22k_ft_in1k_384",
    "--data_yaml",
    "pascal_voc",
    "--loss_yaml",
    "ce",
    "--schedule_yaml",
    "40k_iters",
    "--optim_yaml",
    "adamw_lr6e-5",
    "--test_yaml",
    "test_iou",
]
SMALL = [
    "--set",
    "model.pretrained=false",
    "model.encoder=convnext_atto",
    "model.decoder_channels=16",
    "data.crop_size=[32,32]",
    "schedule.train_iters=2",
    "schedule.batch_size=4",
    "schedule.num_workers=0",
    "schedule.log_iters=1",
]


def torchrun(flags: list, cwd: Path = ROOT / "exp") -> subprocess.CompletedProcess:
    """The program on two processes, as a user starts it."""
    start = ["--nnodes=1", "--nproc_per_node=2", "--node_rank=0", f"--master_port={free_port()}", "main.py"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *start, *map(str, flags)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_readmes_commands_on_two_processes(voc_dir: Path, tmp_path: Path):
    """torchrun from exp/, then test-only as one process from the top level, as a user types them."""
    common = ["--data_dir", str(voc_dir), "--output_dir", str(tmp_path / "out"), *PAPER_FLAGS]
    small = [*SMALL, "schedule.save_iters=1", "schedule.keep_checkpoints=9"]
    trained = torchrun([*common, "--predict_yaml", "argmax", *small])
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "out" / "upernet_convnext_base.fb_in22k_ft_in1k_384.pascal_voc.ce.40k_iters.adamw_lr6e-5"
    assert (run / "results" / "argmax.json").exists()
    assert trained.stdout.count("batch norm stays local") == 1
    before = checkpoint_bytes(run)
    tested = subprocess.run(
        [sys.executable, ROOT / "exp" / "main.py", *common, "--predict_yaml", "argmax", "rankseg_rma", "--test-only"]
        + small,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert tested.returncode == 0, tested.stderr
    assert checkpoint_bytes(run) == before
    assert not (run / "results" / "older").exists(), "one process scores what two processes scored"
    with open(run / "results" / "rankseg_rma.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [f"2007_val_{i:06d}" for i in range(3)]

    # Interrupted after the first step, the two processes go on to the same weights.
    whole = load_checkpoint(run / "checkpoints" / "iter_0000002.pt")
    (run / "checkpoints" / "iter_0000002.pt").unlink()
    resumed = torchrun([*common, "--predict_yaml", "argmax", *small])
    assert resumed.returncode == 0, resumed.stderr
    assert "iterations 1 to 2" in resumed.stdout
    again = load_checkpoint(run / "checkpoints" / "iter_0000002.pt")
    assert all(torch.equal(whole.model[name], again.model[name]) for name in whole.model)


def test_errors_on_two_processes_end_the_run(camvid_dir: Path, tmp_path: Path):
    """A damaged image that one process alone reads: its line names the rank, and the other process does not hang."""
    (camvid_dir / "camvid" / "val" / "val_1.png").write_bytes(b"")
    done = torchrun([*TINY, "--data_yaml", "camvid", "--data_dir", camvid_dir, "--output_dir", tmp_path / "out"])
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("val/val_1.png: got a file that cannot be read" in line and "[rank 1]" in line for line in lines)
    assert not (tmp_path / "out").exists()
