"""What a table costs in device hours, by speeds that are made up here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exp.reproduction import dry_run
from exp.reproduction.dry_run import count_images, count_windows, describe_costs, estimate_hours, load_speeds
from exp.reproduction.job import Job, Reevaluation
from exp.reproduction.plans import DEEPLAB, UPERNET, paper_job
from exp.reproduction.published import load_tables
from exp.runtime.errors import InputError


def network(crop: tuple[int, int], train: float, windows: float, amp: str = "off", variant: str = "paper") -> dict:
    own = {"crop_size": list(crop), "batch_size": 8, "amp": amp, "peak_gib": 1.0, "variant": variant}
    return own | {"train_images_per_second": train, "eval_windows_per_second": windows}


def write_speeds(path: Path, **networks: dict) -> Path:
    content = {"device": "a made-up device", "date": "2000-01-01", "torch": "0.0", "networks": networks}
    path.write_text(json.dumps(content))
    return path


def hours(job: Job, tmp_path: Path, **networks: dict) -> float | None:
    return estimate_hours(job, load_speeds(write_speeds(tmp_path / "speeds.json", **networks)))


def test_a_training_costs_its_images_and_its_windows(tmp_path: Path):
    job = paper_job(UPERNET, "cityscapes", ("argmax",))
    assert count_windows(job.config.data, job.config.test) == 9  # of 512x1024 every 342x683 in 1024x2048
    found = hours(job, tmp_path, **{UPERNET: network((512, 1024), 16, 90)})
    assert found == pytest.approx((40_000 * 8 / 16 + 500 * 9 / 90) / 3600)
    both = {UPERNET: network((64, 64), 1, 1), f"{UPERNET}@512x1024": network((512, 1024), 16, 90)}
    assert hours(job, tmp_path, **both) == found
    assert hours(job, tmp_path, **{f"{UPERNET}@256x1024": network((256, 1024), 32, 180)}) == pytest.approx(found)
    flipped = replace(job, overrides=("test.flip=true", "test.scales=[0.5,1]"))
    assert count_windows(flipped.config.data, flipped.config.test) == 2 * (1 + 9)
    again = replace(job, reevaluation=Reevaluation("again"))
    assert hours(again, tmp_path, **{UPERNET: network((512, 1024), 16, 90)}) == pytest.approx(50 / 3600)
    for other in ({}, {UPERNET: network((512, 1024), 16, 90, amp="bf16")}):
        assert hours(job, tmp_path, **other) is None


def test_folds_and_epochs(tmp_path: Path):
    job = paper_job(DEEPLAB, "lits", ("argmax",), fold=1)
    assert count_images(job.config.data) == (1320 + 459 + 2278 + 2244, 889)
    seen = 60 * (6301 // 8) * 8
    assert hours(job, tmp_path, **{DEEPLAB: network((384, 384), 10, 100)}) == pytest.approx(
        (seen / 10 + 889 / 100) / 3600
    )
    fewer = replace(paper_job(DEEPLAB, "ade20k", ("argmax",)), overrides=("data.val_samples=7",))
    assert count_images(fewer.config.data) == (20210, 7)


def test_a_dry_run_tells_the_costs_where_speeds_were_measured(script, tmp_path: Path, monkeypatch):
    flags = ["table4", "table6", "--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--dry_run"]
    monkeypatch.setattr(dry_run, "SPEEDS_FILE", tmp_path / "speeds.json")
    status, printed, _ = script("reproduce", *flags)
    assert status == 0
    assert "device hours" not in printed
    write_speeds(tmp_path / "speeds.json", **{UPERNET: network((512, 512), 100, 100)})
    status, printed, err = script("reproduce", *flags)
    assert status == 0, err
    voc = (40_000 * 8 + 1449) / 100 / 3600
    cityscapes = 2 * (40_000 * 8 + 500 * 9) / 100 / 3600  # crops of twice as many pixels
    ade20k = (80_000 * 8 + 2000 * 2) / 100 / 3600
    every = f"{voc + cityscapes + ade20k:.1f} device hours"
    assert printed.splitlines()[-4:] == [
        f"cost table4: {voc:.1f} device hours",
        f"cost table6: {every}",
        f"cost in all, each training once: {every}",
        "by the networks' speeds on a made-up device, 2000-01-01, PyTorch 0.0; decision rules, loading and validations "
        "come on top",
    ]
    flags[:2] = ["all"]
    printed = script("reproduce", *flags)[1]
    assert printed.count("\ncost ") == len(load_tables()) + 1
    assert "cost table2: 0.0 device hours, without 40 of 40, whose speed is not known\n" in printed


def test_networks_that_were_measured_with_another_decoder_are_named(tmp_path: Path):
    """As they are in a file from before there was a choice."""
    jobs = [paper_job(name, "pascal_voc", ("argmax",)) for name in (UPERNET, DEEPLAB)]
    speeds = {name: network((512, 512), 100, 100) for name in (UPERNET, DEEPLAB)}
    file = write_speeds(tmp_path / "speeds.json", **speeds)
    assert "decoder" not in describe_costs({}, jobs, load_speeds(file))[-1]
    del speeds[DEEPLAB]["variant"]
    file = write_speeds(tmp_path / "speeds.json", **speeds)
    expected = f"of these, measured with another decoder than they train with: {DEEPLAB}"
    assert describe_costs({}, jobs, load_speeds(file))[-1] == expected


def test_damaged_speeds_are_told(tmp_path: Path):
    path = tmp_path / "speeds.json"
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_speeds(path)
