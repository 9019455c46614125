"""scripts/predict.py: from a checkpoint alone to masks and overlays of images and volumes."""

import errno
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import exp.main
from exp import predict_images
from exp.config.evaluation import TestConfig
from exp.data.prepare.facts import VolumeFacts
from exp.data.sets.shapes import Shapes
from exp.data.transforms import Normalize
from exp.evaluation.inference import build_inference
from exp.evaluation.masks import mask_format
from exp.predict_images import Predictor, list_sources, predict_files, strip_suffix
from exp.rules.pooled import PooledRule, pool_of, solve
from exp.rules.registry import argmax
from exp.runtime.errors import InputError
from rankseg_rma import rankseg_rma
from tests.conftest import ROOT, TINY, TINY_RUN, write_png

PALETTE = ((0, 0, 0), (230, 159, 0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run, its probability maps of three images, and these images as PNGs in images/."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "--output_dir", str(folder), "--save_prob", "3", "--predict_yaml", "argmax"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *flags])
        exp.main.main()
    shapes = Shapes(None, "val", max_samples=3)
    for i, sample in enumerate(shapes.samples):
        write_png(folder / "images" / f"{sample.name}.png", np.ascontiguousarray(shapes[i].image.permute(1, 2, 0)))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def checkpoint(folder: Path) -> Path:
    return folder / TINY_RUN / "checkpoints" / "iter_0000003.pt"


def test_masks_of_a_folder_are_those_of_the_runs_probabilities(script, trained: Path, tmp_path: Path):
    (trained / "images" / "notes.txt").write_text("no image")
    flags = ["--predict_yaml", "argmax", "rankseg_rma", "--output_dir", tmp_path / "out"]
    status, printed, err = script("predict", checkpoint(trained), trained / "images", *flags)
    assert status == 0, err
    assert "3 file(s)" in printed
    for path in sorted((trained / TINY_RUN / "probabilities").glob("*.npy")):
        prob = torch.from_numpy(np.load(path))[None]
        for rule, expected in (("argmax", prob.argmax(1)[0]), ("rankseg_rma", rankseg_rma(prob)[0])):
            with Image.open(tmp_path / "out" / "masks" / rule / f"{path.stem}.png") as mask:
                assert (np.asarray(mask) == expected.numpy()).all()
            assert png_size(tmp_path / "out" / "overlays" / rule / f"{path.stem}.png") == (128, 96)
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [row["name"] for row in classes] == list(Shapes.classes)
    assert classes[1] == {"value": 1, "name": "disk", "colour": [230, 159, 0]}


def test_existing_files_are_not_overwritten(script, trained: Path, tmp_path: Path):
    image = trained / "images" / "shapes_val_0000.png"
    flags = ["--predict_yaml", "argmax", "--output_dir", tmp_path / "out"]
    mine = tmp_path / "out" / "masks" / "argmax" / "shapes_val_0000.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    status, _, err = script("predict", checkpoint(trained), image, *flags)
    assert status == 2
    assert f"{mine}: got a file there already, expected none (--overwrite replaces it)" in err
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out" / "overlays").exists()
    assert script("predict", checkpoint(trained), image, *flags, "--overwrite")[0] == 0
    assert png_size(mine) == (128, 96)
    other = trained / "images" / "shapes_val_0001.png"
    assert script("predict", checkpoint(trained), other, *flags)[0] == 0, "more images into the same folder"
    (tmp_path / "out" / "classes.json").write_text("[]")
    status, _, err = script("predict", checkpoint(trained), trained / "images" / "shapes_val_0002.png", *flags)
    assert status == 2
    assert "classes.json: got other classes" in err


@pytest.mark.parametrize("size", [(5, 7), (33, 200), (96, 31)])
def test_images_of_any_size_and_mode(script, trained: Path, tmp_path: Path, size: tuple[int, int]):
    rng = np.random.default_rng(0)
    write_png(tmp_path / "in" / "grey.png", rng.integers(0, 255, size).astype(np.uint8))
    write_png(tmp_path / "in" / "deep" / "alpha.png", rng.integers(0, 255, (*size, 4)).astype(np.uint8))
    status, _, err = script("predict", checkpoint(trained), tmp_path / "in", "--output_dir", tmp_path / "in" / "out")
    assert status == 0, err
    for name in ("grey", "deep/alpha"):
        assert png_size(tmp_path / "in" / "out" / "masks" / "rankseg_rma" / f"{name}.png") == size[::-1]
    names = [source.name for source in list_sources(tmp_path / "in", tmp_path / "in" / "out")]
    assert names == ["deep/alpha", "grey"], "what was written is not read"


def test_another_window(script, trained: Path, tmp_path: Path):
    image = trained / "images" / "shapes_val_0000.png"
    flags = ["--output_dir", tmp_path / "out", "--test_yaml", "test_iou", "--set", "test.crop_size=[64,64]"]
    assert script("predict", checkpoint(trained), image, *flags)[0] == 0
    status, _, err = script("predict", checkpoint(trained), image, *flags[:4], "--set", "test.stride=[64,64]")
    assert status == 2
    assert "expected at most the window" in err


def test_the_temperature_that_was_fitted(program, script, trained: Path, tmp_path: Path):
    image, out = trained / "images" / "shapes_val_0000.png", ["--output_dir", tmp_path / "out"]
    fitted = ["--test_yaml", "test_iou", "--set", "test.temperature=fitted"]
    status, _, err = script("predict", checkpoint(trained), image, *out, *fitted[2:])
    assert status == 2
    assert "--set test.temperature=fitted: expected together with --test_yaml" in err
    status, _, err = script("predict", checkpoint(trained), image, *out, *fitted)
    assert status == 2
    assert f"{trained / TINY_RUN / 'results' / 'temperature.json'}: no such file" in err
    flags = [*TINY, "test.temperature=1.7", "--output_dir", tmp_path / "runs", "--test-only", "--save_masks"]
    status, _, err = program(*flags, "--model_checkpoint", checkpoint(trained), "--predict_yaml", "rankseg_rma")
    assert status == 0, err
    masks = tmp_path / "runs" / TINY_RUN / "masks"
    checksum = json.loads((masks / "rankseg_rma.json").read_text())["weights_checksum"]
    record = trained / TINY_RUN / "results" / "temperature.json"
    record.write_text(json.dumps({"temperature": 1.7, "weights_checksum": checksum}))
    status, _, err = script("predict", checkpoint(trained), image, *out, *fitted)
    record.unlink()
    assert status == 0, err
    own = tmp_path / "out" / "masks" / "rankseg_rma" / image.name
    assert own.read_bytes() == (masks / "rankseg_rma" / image.name).read_bytes()


def test_bad_input_is_one_line(script, trained: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    write_png(tmp_path / "broken" / "a.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "broken" / "b.jpg").write_bytes(b"\xff\xd8")
    write_png(tmp_path / "twice" / "a.png", np.zeros((9, 9, 3), np.uint8))
    write_png(tmp_path / "twice" / "a.bmp", np.zeros((9, 9, 3), np.uint8))
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    (tmp_path / "fake.pt").write_bytes(b"no checkpoint")
    good = checkpoint(trained)
    for path, source, message in (
        (good, tmp_path / "nowhere", "nowhere: got no file of .png"),
        (good, tmp_path / "empty", "empty: got no file of .png"),
        (good, tmp_path / "broken", "b.jpg: got a file that cannot be read"),
        (good, tmp_path / "twice", "a.png: got two files of the name 'a'"),
        (
            good,
            tmp_path / "scan.nii.gz",
            "scan.nii.gz: got a volume, expected an image, as the network was trained on",
        ),
        (tmp_path / "no.pt", tmp_path / "broken", "no.pt: no such file, expected a checkpoint"),
        (tmp_path / "fake.pt", tmp_path / "broken", "fake.pt: got a file that cannot be read"),
    ):
        status, _, err = script("predict", path, source, "--output_dir", tmp_path / "out")
        assert status == 2, message
        assert message in err
        assert err.count("error: ") == 1
        assert not (tmp_path / "out").exists()


class Bright(nn.Module):
    """A network without weights: foreground where the normalised value is above 0."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.abs().max() <= 1, "values outside the window"
        return torch.cat([-image, image], dim=1)


def volume_predictor(slice_size: tuple[int, int] | None = None) -> Predictor:
    return Predictor(
        model=Bright(),
        inference=build_inference(TestConfig("t", "mIoUI", (8, 8), (6, 6))),
        normalize=Normalize((100.0,), (200.0,)),
        rules={"argmax": argmax},
        device=torch.device("cpu"),
        classes=("rest", "tumour"),
        palette=PALETTE,
        format=mask_format(2, PALETTE, {0: 0, 1: 0, 2: 1}),
        channels=1,
        window=(-100, 300),
        volumes=VolumeFacts("ct", None, slice_size, False, 1, None, 1, None, "RAS", "{}", ("", "")),
    )


@pytest.mark.parametrize("slice_size", [None, (20, 24)])
@pytest.mark.parametrize("axis", [0, 2])
def test_volumes_get_labels_on_their_own_grid(tmp_path: Path, axis: int, slice_size: tuple[int, int] | None):
    coarse = np.random.default_rng(0).choice([-2000, 50, 150, 3000], (5, 6, 3))
    values = np.moveaxis(coarse.repeat(2, 0).repeat(2, 1), 2, axis).astype(np.int16)
    affine = np.eye(4)[[2, 1, 0, 3]] if axis == 0 else np.eye(4)
    affine[:3, 3] = 7, 8, 9
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "scan.nii.gz")
    sources = list_sources(tmp_path / "scan.nii.gz", tmp_path / "out")
    predict_files(volume_predictor(slice_size=slice_size), sources, tmp_path / "out", "{}")
    mask = nibabel.load(tmp_path / "out" / "masks" / "argmax" / "scan.nii.gz")
    got = np.asarray(mask.dataobj)
    assert (mask.affine == affine).all()
    if slice_size is None:
        assert (got == np.where(values > 100, 2, 0)).all()
    else:  # linear resampling moves edges by less than a voxel
        assert got.shape == values.shape
        assert (got == np.where(values > 100, 2, 0)).mean() > 0.6
    assert png_size(tmp_path / "out" / "overlays" / "argmax" / "scan.png")[0] >= 3 * 270


def test_an_image_for_a_network_of_volumes_is_refused(tmp_path: Path):
    write_png(tmp_path / "photo.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match="got an image, expected a NIfTI volume"):
        volume_predictor().read(list_sources(tmp_path / "photo.png", tmp_path)[0])


def test_names_lose_their_suffix_alone():
    names = ["a.nii.gz", "a.b.NII", "street.1.png", "deep/x.jpeg", "bare"]
    assert [strip_suffix(name) for name in names] == ["a", "a.b", "street.1", "deep/x", "bare"]


def test_help_from_anywhere_needs_nothing_heavy(tmp_path: Path):
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'scripts' / 'predict.py')!r}, run_name='__main__')\n"
        "except SystemExit as exit_:\n    assert exit_.code == 0, exit_.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'nibabel'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--overwrite" in done.stdout


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """A data_dir with four volumes of bright blobs as the hippocampus data set comes, and its prepared slices."""
    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / "hippocampus" / kind).mkdir(parents=True)
    affine = np.array([[0, 0, 1.5, 1], [1, 0, 0, 2], [0, 1.2, 0, 3], [0, 0, 0, 1]])  # the second axis is axial
    for number in (1, 2, 80, 81):
        label = np.zeros((30, 6, 26), np.uint8)
        label[6:18, 1:5, 5:14], label[18:24, 1:4, 5:14] = 1, 2
        image = 300.0 * label + rng.normal(200, 40, label.shape)
        for kind, values in (("imagesTr", image.astype(np.float32)), ("labelsTr", label)):
            path = folder / "hippocampus" / kind / f"hippocampus_{number:03d}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(values, affine), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.setattr(sys, "argv", ["prepare_data.py", "hippocampus", "--data_dir", str(folder), "--workers", "1"])
        importlib.import_module("prepare_data").main()
    return folder


def test_a_volume_gets_the_labels_that_its_evaluation_gave(program, script, volumes: Path, tmp_path: Path):
    rules = ["--predict_yaml", "argmax", "rankseg_rma"]
    flags = [*TINY, "data.fold=0", "data.train_samples=null", "data.val_samples=null", "--data_yaml", "hippocampus"]
    flags += ["--data_dir", volumes, "--output_dir", tmp_path / "runs", "--save_masks", "--save_pred", 1, *rules]
    status, _, err = program(*flags)
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    scans = tmp_path / "scans"
    scans.mkdir()
    for number in (1, 2):
        name = f"hippocampus_{number:03d}.nii.gz"
        (scans / name).symlink_to(volumes / "hippocampus" / "imagesTr" / name)
    path = run / "checkpoints" / "iter_0000003.pt"
    status, _, err = script("predict", path, scans, "--output_dir", tmp_path / "out", *rules)
    assert status == 0, err
    for rule in rules[1:]:
        assert sorted(p.name for p in (run / "masks" / rule).iterdir()) == sorted(p.name for p in scans.iterdir())
        for scan in scans.iterdir():
            judged, own = (nibabel.load(folder / "masks" / rule / scan.name) for folder in (run, tmp_path / "out"))
            assert (own.affine == nibabel.load(scan).affine).all()
            assert (judged.affine == own.affine).all()
            judged, own = np.asarray(judged.dataobj), np.asarray(own.dataobj)
            assert (judged[:, 1:5] == own[:, 1:5]).all()
            assert not judged[:, [0, 5]].any(), "slices without a structure are not in the data set"
            assert set(np.unique(own)) <= {0, 1, 2}


def test_rules_of_a_wider_scope(program, script, trained: Path, volumes: Path, tmp_path: Path):
    """The images of a folder are a data set; a volume is a case, and a data set where it stands alone."""
    good = checkpoint(trained)
    rules = ["--predict_yaml", "rankseg_rma_dataset"]
    flags = [*TINY, "--output_dir", tmp_path / "runs", "--test-only", "--model_checkpoint", good, *rules]
    status, _, err = program(*flags, "--save_masks", "--save_pred", 1)
    assert status == 0, err
    status, _, err = script("predict", good, trained / "images", "--output_dir", tmp_path / "out", *rules)
    assert status == 0, err
    masks = sorted((tmp_path / "runs" / TINY_RUN / "masks" / rules[1]).iterdir())
    assert len(masks) == 3
    for path in masks:
        with Image.open(path) as judged, Image.open(tmp_path / "out" / "masks" / rules[1] / path.name) as own:
            assert (np.asarray(judged) == np.asarray(own)).all()
    status, _, err = script("predict", good, trained / "images", "--predict_yaml", "rankseg_rma_case")
    assert status == 2
    assert "--predict_yaml rankseg_rma_case: got a network of images, expected one of volumes" in err

    thresholds = tmp_path / "runs" / TINY_RUN / "results" / "rankseg_rma_dataset.val.thresholds.json"
    fixed = ["--predict_yaml", "rankseg_rma_fixed", "--set", f"predict.thresholds={thresholds}"]
    status, _, err = script("predict", good, trained / "images", "--output_dir", tmp_path / "out", *fixed)
    assert status == 0, err
    for path in masks:
        with Image.open(path) as judged, Image.open(tmp_path / "out" / "masks" / fixed[1] / path.name) as own:
            assert (np.asarray(judged) == np.asarray(own)).all()


def test_a_volume_is_a_case(tmp_path: Path):
    values = np.random.default_rng(0).integers(-100, 300, (8, 9, 4)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii")
    sources = list_sources(tmp_path / "scan.nii", tmp_path / "out")
    pooled = {scope: PooledRule(scope, "dice", 0.1) for scope in ("case", "dataset")}
    predictor = replace(volume_predictor(), rules={**pooled, "rankseg_rma": rankseg_rma})
    predict_files(predictor, sources, tmp_path / "out", "{}")
    masks = {
        rule: np.asarray(nibabel.load(tmp_path / "out" / "masks" / rule / "scan.nii.gz").dataobj)
        for rule in predictor.rules
    }
    assert (masks["case"] == masks["dataset"]).all()
    prob = torch.cat([predictor.probabilities(v[..., None]) for v in np.moveaxis(values, 2, 0)], dim=2)
    expected = solve(pool_of(prob), "dice", 0.1).decide(prob)[0].reshape(4, 8, 9).permute(1, 2, 0)
    assert (masks["case"] == 2 * expected.numpy()).all()


def test_what_a_full_disk_left_half_made_is_finished_by_the_same_command(script, trained, tmp_path, monkeypatch):
    save, calls = predict_images._save_picture, []

    def full(picture: np.ndarray, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(picture, path)

    monkeypatch.setattr(predict_images, "_save_picture", full)
    flags = [trained / "images", "--predict_yaml", "argmax", "--output_dir", tmp_path / "out"]
    status, _, err = script("predict", checkpoint(trained), *flags)
    assert status == 2
    assert "make room and start the same command again" in err
    other = [trained / "images", "--predict_yaml", "argmax", "rankseg_rma", "--output_dir", tmp_path / "out"]
    status, _, err = script("predict", checkpoint(trained), *other)
    assert status == 2
    assert "got a file there already" in err
    status, _, err = script("predict", checkpoint(trained), *flags)
    assert status == 0, err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6
    assert not (tmp_path / "out" / "unfinished.json").exists()
    status, _, err = script("predict", checkpoint(trained), *flags)  # which is whole now
    assert status == 2
    assert "got a file there already" in err
