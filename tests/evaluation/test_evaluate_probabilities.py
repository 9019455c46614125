"""scripts/evaluate_probabilities.py on generated maps, and beside the program's own evaluation."""

import csv
import io
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from exp.data.sets.shapes import Shapes, ShapesNoisy
from exp.rules.dep import rankseg_dep
from exp.rules.pooled import PooledRule, gather_thresholds
from tests.conftest import ROOT, TINY, TINY_RUN, write_png

NAME = "evaluate_probabilities"
NOISY, FEW = ["--true_of", "shapes_noisy"], ["--set", "data.val_samples=3"]


def make_map(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> np.ndarray:
    logits = 3 * rng.normal(size=shape)
    prob = np.exp(logits - logits.max(0))
    return (prob / prob.sum(0)).astype(dtype)


def save_nifti(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def counts_of(pred: np.ndarray, label: np.ndarray, num_classes: int) -> dict[str, int]:
    """The literal TP, FP, FN."""
    valid, rows = label != 255, {}
    for c in range(num_classes):
        rows[f"tp.{c}"] = int(((pred == c) & (label == c) & valid).sum())
        rows[f"fp.{c}"] = int(((pred == c) & (label != c) & valid).sum())
        rows[f"fn.{c}"] = int(((pred != c) & (label == c) & valid).sum())
    return rows


def check_counts(row: dict[str, str], pred: np.ndarray, label: np.ndarray, num_classes: int) -> None:
    expected = counts_of(pred, label, num_classes)
    assert {name: int(row[name]) for name in expected} == expected


@pytest.fixture
def images(tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Three maps of 4 classes in all three kinds of file, beside labels of two kinds, in maps/ and labels/."""
    rng, made = np.random.default_rng(0), {}
    (tmp_path / "maps").mkdir()
    for i, dtype in enumerate((np.float32, np.float64, np.float16)):
        prob, label = make_map(rng, 4, 9 + i, 12, dtype=dtype), rng.integers(0, 4, (9 + i, 12)).astype(np.uint8)
        label[0] = 255
        made[f"image_{i}"] = prob, label
    np.save(tmp_path / "maps" / "image_0.npy", made["image_0"][0])
    np.savez_compressed(tmp_path / "maps" / "image_1.npz", softmax=made["image_1"][0], other=np.zeros(3))
    np.savez(tmp_path / "maps" / "image_2.npz", made["image_2"][0])
    write_png(tmp_path / "labels" / "image_0.png", made["image_0"][1])
    write_png(tmp_path / "labels" / "image_1.png", made["image_1"][1])
    np.save(tmp_path / "labels" / "image_2.npy", made["image_2"][1].astype(np.int64))
    return made


def evaluate(script, folder: Path, *flags: object) -> tuple[int, str, str]:
    return script(NAME, folder / "maps", folder / "labels", "--output_dir", folder / "out", *flags)


def test_counts_and_scores_of_images(script, tmp_path: Path, images: dict):
    status, printed, err = evaluate(script, tmp_path, "--predict_yaml", "argmax", "rankseg_rma")
    assert status == 0, err
    assert "rankseg_rma against argmax: mIoUI" in printed
    rows = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    assert [row["image"] for row in rows] == list(images)
    for row, (prob, label) in zip(rows, images.values(), strict=True):
        check_counts(row, prob.argmax(0), label, 4)
        literal = counts_of(prob.argmax(0), label, 4)
        present = [c for c in range(4) if (label == c).any()]
        ious = [100 * literal[f"tp.{c}"] / sum(literal[f"{k}.{c}"] for k in ("tp", "fp", "fn")) for c in present]
        assert float(row["mIoUI"]) == pytest.approx(np.mean(ious), abs=1e-9)
    confusion = np.zeros((4, 4), np.int64)
    for prob, label in images.values():
        np.add.at(confusion, (label[label != 255], prob.argmax(0)[label != 255]), 1)
    rows = read_rows(tmp_path / "out" / "results" / "argmax.confusion.csv")
    assert [[int(row[str(c)]) for c in range(4)] for row in rows] == confusion.tolist()
    context = json.loads((tmp_path / "out" / "results" / "rankseg_rma.json").read_text())
    assert context["config"]["predict"]["opt_metric"] == "dice"
    assert context["maps"]["files"] == 3
    comparison = json.loads((tmp_path / "out" / "results" / "comparison.json").read_text())
    assert comparison["comparisons"][0]["num_units"] == 3
    times = json.loads((tmp_path / "out" / "timing.json").read_text())["decision_milliseconds_per_image"]
    assert list(times) == ["argmax", "rankseg_rma"]
    assert min(times.values()) > 0


def test_calibration_is_that_of_the_maps(script, tmp_path: Path, images: dict):
    assert evaluate(script, tmp_path)[0] == 0
    got = json.loads((tmp_path / "out" / "results" / "calibration.json").read_text())["metrics"]["ECED"]
    gaps, pixels = np.zeros(10), 0
    for prob, label in images.values():
        kept, top = label != 255, prob.astype(np.float64).max(0)
        hits = prob.argmax(0) == label
        bins = np.minimum((prob.max(0).astype(np.float32) * np.float32(10)).astype(int), 9)
        gaps += np.bincount(bins[kept], (hits - top)[kept], 10)
        pixels += kept.sum()
    assert got == pytest.approx(100 * np.abs(gaps).sum() / pixels, abs=1e-6)


def test_images_and_volumes_are_not_mixed(script, tmp_path: Path, images: dict):
    rng = np.random.default_rng(5)
    np.save(tmp_path / "maps" / "volume.npy", make_map(rng, 4, 2, 3, 4))
    np.save(tmp_path / "labels" / "volume.npy", rng.integers(0, 4, (2, 3, 4)))
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert f"{tmp_path / 'maps' / 'volume.npy'}: got images and volumes together" in err


def test_one_map_is_in_memory_at_a_time(script, tmp_path: Path, volumes: dict, monkeypatch):
    from exp.evaluation import probability_maps

    read, living = probability_maps.MapReader.read_map, []

    def watched(reader, path: Path) -> np.ndarray:
        assert not any(reference() is not None for reference in living)
        prob = read(reader, path)
        living.append(weakref.ref(prob))
        return prob

    monkeypatch.setattr(probability_maps.MapReader, "read_map", watched)
    for flags in (["--unit", "slice"], ["--unit", "case"], ["--predict_yaml", "rankseg_rma_dataset"]):
        assert evaluate(script, tmp_path, *flags)[0] == 0
    assert len(living) == 2 * 3 + 5, "the first map is read once more, for the number of classes"


def test_the_programs_own_maps_score_as_the_program_scored_them(program, script, tmp_path: Path):
    rules = ["--predict_yaml", "argmax", "rankseg_rma", "rankseg_rma_iou"]
    status, _, err = program(*TINY, "--output_dir", tmp_path / "run", "--save_prob", 3, *rules)
    assert status == 0, err
    shapes, run = Shapes(None, "val", max_samples=3), tmp_path / "run" / TINY_RUN
    for i, sample in enumerate(shapes.samples):
        write_png(tmp_path / "labels" / f"{sample.name}.png", np.asarray(shapes[i].label))
    flags = ["--output_dir", tmp_path / "out", "--classes", *Shapes.classes, *rules]
    status, _, err = script(NAME, run / "probabilities", tmp_path / "labels", *flags)
    assert status == 0, err
    for rule in rules[1:]:
        ours, theirs = (folder / "results" / f"{rule}.csv" for folder in (tmp_path / "out", run))
        assert read_rows(ours) == read_rows(theirs)


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What nnU-Net v2 leaves: (C, z, y, x) maps under `probabilities` beside .pkl, .nii.gz and .json files."""
    rng, made = np.random.default_rng(1), {}
    for i, spatial in enumerate(((3, 5, 4), (2, 6, 5))):
        prob, label = make_map(rng, 3, *spatial), rng.integers(0, 3, spatial).astype(np.uint8)
        made[f"case_{i}"] = prob, label
        save_nifti(tmp_path / "labels" / f"case_{i}.nii.gz", label.transpose(2, 1, 0))  # as nibabel writes x, y, z
        save_nifti(tmp_path / "maps" / f"case_{i}.nii.gz", label.transpose(2, 1, 0))
        np.savez_compressed(tmp_path / "maps" / f"case_{i}.npz", probabilities=prob)
        (tmp_path / "maps" / f"case_{i}.pkl").write_bytes(pickle.dumps({"spacing": [1, 1, 1]}))
    (tmp_path / "maps" / "plans.json").write_text("{}")
    return made


def test_volumes_slice_by_slice_with_their_cases(script, tmp_path: Path, volumes: dict):
    status, _, err = evaluate(script, tmp_path, "--predict_yaml", "argmax")
    assert status == 0, err
    rows = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    names = [f"{name}/{z:04d}" for name, (_, label) in volumes.items() for z in range(len(label))]
    assert [row["image"] for row in rows] == names
    for row in rows:
        name, _, z = row["image"].partition("/")
        prob, label = volumes[name]
        assert row["case"] == name
        check_counts(row, prob.argmax(0)[int(z)], label[int(z)], 3)
    metrics = json.loads((tmp_path / "out" / "results" / "argmax.json").read_text())["metrics"]
    by_case = [np.mean([float(row["mDiceI"]) for row in rows if row["case"] == name]) for name in volumes]
    assert metrics["mDiceI"] == pytest.approx(np.mean(by_case), abs=1e-9)
    cases = read_rows(tmp_path / "out" / "results" / "argmax.cases.csv")
    for row, (prob, label) in zip(cases, volumes.values(), strict=True):
        check_counts(row, prob.argmax(0), label, 3)


def test_volumes_as_one_unit(script, tmp_path: Path, volumes: dict):
    from rankseg_rma import rankseg_rma

    status, _, err = evaluate(script, tmp_path, "--predict_yaml", "rankseg_rma", "--unit", "case")
    assert status == 0, err
    rows = read_rows(tmp_path / "out" / "results" / "rankseg_rma.csv")
    assert [row["image"] for row in rows] == list(volumes)
    for row, (prob, label) in zip(rows, volumes.values(), strict=True):
        check_counts(row, rankseg_rma(prob[None])[0], label, 3)


def test_a_volume_as_one_unit_has_three_dimensions(script, tmp_path: Path, volumes: dict):
    """RankSEG-DEP measures distances: those between slices, too."""
    flags = ["--predict_yaml", "rankseg_dep", "--unit", "case", "--set", "predict.theta=2"]
    assert evaluate(script, tmp_path, *flags)[0] == 0
    rows = read_rows(tmp_path / "out" / "results" / "rankseg_dep.csv")
    for row, (prob, label) in zip(rows, volumes.values(), strict=True):
        check_counts(row, rankseg_dep(prob[None], theta=2)[0], label, 3)


def test_slices_along_another_axis(script, tmp_path: Path, volumes: dict):
    assert evaluate(script, tmp_path, "--predict_yaml", "argmax", "--slice_axis", 2)[0] == 0
    rows = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    prob, label = volumes["case_0"]
    assert [row["image"] for row in rows[:5]] == [*(f"case_0/{x:04d}" for x in range(4)), "case_1/0000"]
    check_counts(rows[3], prob.argmax(0)[..., 3], label[..., 3], 3)


def test_axes_that_fit_both_ways_are_not_guessed(script, tmp_path: Path):
    rng = np.random.default_rng(2)
    prob, label = make_map(rng, 2, 4, 5, 4), rng.integers(0, 2, (4, 5, 4)).astype(np.int16)
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "cube.npy", prob)
    save_nifti(tmp_path / "labels" / "cube.nii", label)
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert "cube.nii: got labels of shape (4, 5, 4)" in err
    assert "--label_axes reversed" in err
    for axes, values in (("same", label), ("reversed", label.T)):
        flags = ["--unit", "case", "--predict_yaml", "argmax", "--label_axes", axes]
        assert evaluate(script, tmp_path, *flags)[0] == 0
        (row,) = read_rows(tmp_path / "out" / "results" / "argmax.csv")
        check_counts(row, prob.argmax(0), values, 2)


def test_nnunets_two_dimensional_maps_and_its_ignore_label(script, tmp_path: Path):
    rng = np.random.default_rng(4)
    prob, label = make_map(rng, 3, 1, 6, 7), rng.integers(0, 4, (6, 7)).astype(np.uint8)
    (tmp_path / "maps").mkdir()
    np.savez(tmp_path / "maps" / "photo.npz", probabilities=prob)
    write_png(tmp_path / "labels" / "photo.png", label)
    status, _, err = evaluate(script, tmp_path, "--predict_yaml", "argmax")
    assert status == 2
    assert "photo.png: got label value 3, expected 0..2 as its map has 3 classes" in err
    assert evaluate(script, tmp_path, "--predict_yaml", "argmax", "--ignore_label", 3)[0] == 0
    (row,) = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    assert row["image"] == "photo"
    check_counts(row, prob.argmax(0)[0], np.where(label == 3, 255, label), 3)


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["npy", "npz", "pickle"])
def test_nothing_is_unpickled(script, tmp_path: Path, images: dict, kind: str):
    marker, path = tmp_path / "executed", tmp_path / "maps" / "image_0.npy"
    path.unlink()
    trap = np.empty(1, object)
    trap[0] = Trap(marker)
    if kind == "npy":
        np.save(path, trap, allow_pickle=True)
    elif kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, probabilities=trap)
    else:
        path.write_bytes(pickle.dumps(Trap(marker)))
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert f"{path}: got a file that cannot be read" in err
    assert "nothing is unpickled here" in err
    assert err.count("\n") == 1
    assert not marker.exists()


def bad_sum(prob: np.ndarray) -> np.ndarray:
    prob[1, 2, 3] += 0.01 if prob[1, 2, 3] < 0.9 else -0.01
    return prob


def bad_nan(prob: np.ndarray) -> np.ndarray:
    prob[0, 0, 0] = np.nan
    return prob


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_sum, "got probabilities whose sum over the classes (the first axis) is off from 1 by 0.01"),
        (bad_nan, "got values in nan..nan, expected probabilities in 0..1"),
        (lambda prob: prob * 3 - 1, "got values in -1..2, expected probabilities in 0..1"),
        (lambda prob: (prob * 255).astype(np.uint8), "got uint8 values of shape (4, 9, 12), expected"),
        (lambda prob: prob[0], "got float32 values of shape (9, 12), expected (C, H, W) or (C, D, H, W)"),
        (lambda prob: prob[:1], "got float32 values of shape (1, 9, 12), expected (C, H, W)"),
        (lambda prob: prob[:, :5], "image_0.png: got labels of shape (9, 12), expected (5, 12) as its map has"),
    ],
)
def test_maps_that_are_no_probabilities(script, tmp_path: Path, images: dict, change, message: str):
    prob = images["image_0"][0].copy()
    prob[:, 0, 0] = 0, 1, 0, 0
    np.save(tmp_path / "maps" / "image_0.npy", change(prob))
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert message in err
    assert str(tmp_path) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_tolerance_is_the_users(script, tmp_path: Path, images: dict):
    np.save(tmp_path / "maps" / "image_0.npy", bad_sum(images["image_0"][0].copy()))
    assert evaluate(script, tmp_path, "--tolerance", 0.02)[0] == 0


def test_orphans_are_named(script, tmp_path: Path, images: dict):
    (tmp_path / "labels" / "image_1.png").rename(tmp_path / "labels" / "image_9.png")
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert f"{tmp_path / 'maps' / 'image_1.npz'}: got no file of that name in {tmp_path / 'labels'}" in err
    (tmp_path / "maps" / "image_1.npz").unlink()
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert f"{tmp_path / 'labels' / 'image_9.png'}: got no file of that name in {tmp_path / 'maps'}" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "a", "b"], "--classes: got 2 names, expected 4"),
        (["--key", "maps"], "got the arrays softmax, other, expected maps"),
        (["--predict_yaml", "threshold"], "got 4 classes, expected 2"),
        (["--predict_yaml", "argmaxx"], "did you mean 'argmax'"),
        (["--set", "model.encoder=x"], "unknown group 'model'"),
        (["--tolerance", "-1"], "--tolerance: got -1.0"),
        (["--ignore_label", "256"], "--ignore_label: got 256"),
    ],
)
def test_wrong_flags_end_with_one_line(script, tmp_path: Path, images: dict, flags: list[str], message: str):
    status, _, err = evaluate(script, tmp_path, *flags)
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_two_files_of_a_name_and_empty_folders(script, tmp_path: Path, images: dict):
    np.save(tmp_path / "labels" / "image_1.npy", images["image_1"][1])
    status, _, err = evaluate(script, tmp_path)
    assert status == 2
    assert "image_1.png: got two files of the name 'image_1', expected one (image_1.npy is there)" in err
    (tmp_path / "labels" / "image_1.npy").unlink()
    (tmp_path / "none").mkdir()
    status, _, err = script(NAME, tmp_path / "none", tmp_path / "labels", "--output_dir", tmp_path / "out")
    assert status == 2
    assert f"{tmp_path / 'none'}: got no file of .npy, .npz, expected maps" in err
    status, _, err = script(NAME, tmp_path / "nowhere", tmp_path / "labels", "--output_dir", tmp_path / "out")
    assert (status, f"{tmp_path / 'nowhere'}: no such folder, expected one of .npy, .npz files" in err) == (2, True)


def test_overrides_reach_the_rules(script, tmp_path: Path, images: dict):
    flags = ["--predict_yaml", "rankseg_rma", "--set", "predict.pruning_prob=0.5"]
    assert evaluate(script, tmp_path, *flags)[0] == 0
    context = json.loads((tmp_path / "out" / "results" / "rankseg_rma.json").read_text())
    assert context["config"]["predict"]["pruning_prob"] == 0.5


def test_help_from_anywhere_needs_nothing_heavy(tmp_path: Path):
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'scripts' / (NAME + '.py'))!r}, run_name='__main__')\n"
        "except SystemExit as exit_:\n    assert exit_.code == 0, exit_.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'nibabel'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--label_axes" in done.stdout


@pytest.mark.slow
def test_no_network_is_needed():
    code = (
        "import sys, exp.evaluation.probability_maps, exp.evaluation.results, exp.provenance\n"
        "networks = {'timm', 'torchvision', 'segmentation_models_pytorch'} & sys.modules.keys()\n"
        "assert not networks, networks"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_pooled_rules_pool_all_maps_or_a_case(script, tmp_path: Path, volumes: dict):
    from exp.rules.pooled import pool_of, solve

    rules = ["rankseg_rma_case", "rankseg_rma_dataset"]
    assert evaluate(script, tmp_path, "--predict_yaml", *rules)[0] == 0
    pools = {name: pool_of(torch.from_numpy(prob).flatten(1)[None, :, None]) for name, (prob, _) in volumes.items()}
    everything = pools["case_0"] + pools["case_1"]
    for rule in rules:
        for row in read_rows(tmp_path / "out" / "results" / f"{rule}.csv"):
            prob, label = volumes[row["case"]]
            z, pool = int(row["image"].partition("/")[2]), pools[row["case"]] if rule == rules[0] else everything
            pred = solve(pool, "dice", 0.1).decide(torch.from_numpy(prob[:, z])[None])[0].numpy()
            check_counts(row, pred, label[z], 3)


def test_a_case_needs_volumes(script, tmp_path: Path, images: dict):
    status, _, err = evaluate(script, tmp_path, "--predict_yaml", "rankseg_rma_case")
    assert status == 2
    assert "predict.scope: got case for image_0, which is in no case, expected volumes" in err


def test_results_are_those_of_the_true_probabilities(script, tmp_path: Path):
    flags = [*NOISY, *FEW, "data.label_noise=0.3", "--output_dir", tmp_path, "--predict_yaml", "argmax", "rankseg_rma"]
    status, printed, err = script(NAME, *flags)
    assert status == 0, err
    assert "rankseg_rma against argmax: mIoUI" in printed
    dataset = ShapesNoisy(None, "val", max_samples=3, facts={"label_noise": 0.3, "label_spread": 3.0})
    with open(tmp_path / "results" / "argmax.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [sample.name for sample in dataset.samples]
    for i, row in enumerate(rows):
        pred, label = dataset.probabilities(i).argmax(0), dataset.read(i)[1]
        for c, name in enumerate(dataset.classes):
            assert int(row[f"tp.{name}"]) == ((pred == c) & (label == c)).sum()
            assert int(row[f"fn.{name}"]) == ((pred != c) & (label == c)).sum()
    facts = json.loads((tmp_path / "results" / "rankseg_rma.json").read_text())
    assert facts["probabilities"] == "true"
    assert facts["config"]["data"]["label_noise"] == 0.3


def test_the_same_files_again_and_the_exact_rule_with_two_classes(script, tmp_path: Path):
    rules = ["--predict_yaml", "argmax", "rankseg_exact", "--true_of", "shapes_noisy_binary"]
    for name in ("a", "b"):
        status, _, err = script(NAME, *FEW, *rules, "--output_dir", tmp_path / name)
        assert status == 0, err
    files = sorted(path.name for path in (tmp_path / "a" / "results").iterdir() if path.is_file())
    assert {"argmax.csv", "rankseg_exact.csv", "comparison.json"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / "results" / name).read_bytes() == (tmp_path / "b" / "results" / name).read_bytes()


def test_a_pooled_rule_takes_its_first_pass(script, tmp_path: Path):
    status, _, err = script(NAME, *NOISY, *FEW, "--predict_yaml", "rankseg_rma_dataset", "--output_dir", tmp_path)
    assert status == 0, err
    dataset = ShapesNoisy(None, "val", max_samples=3, facts={"label_noise": 0.1, "label_spread": 3.0})
    rules = {"dataset": PooledRule(opt_metric="dice", pruning_prob=0.1, scope="dataset")}
    probs = [torch.from_numpy(dataset.probabilities(i))[None] for i in range(3)]
    thresholds = gather_thresholds(rules, ((prob, None) for prob in probs))["dataset"][None]
    with open(tmp_path / "results" / "rankseg_rma_dataset.csv", newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            pred, label = thresholds.decide(probs[i])[0].numpy(), dataset.read(i)[1]
            assert int(row["tp.disk"]) == ((pred == 1) & (label == 1)).sum()
            assert int(row["fp.background"]) == ((pred == 0) & (label != 0)).sum()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--true_of", "shapes"], "got the data set shapes, expected one whose true probabilities are known"),
        (["--set", "data.test_crop=[32,32]"], "data.test_crop: got [32, 32], expected null"),
        (["--set", "data.label_spread=33"], "key 'label_spread': got 33"),
        (["--set", "data.label_noise=null"], "expected a value: the data"),
        (["--predict_yaml", "rankseg_exact"], "got 6 classes, expected 2"),
        (["--predict_yaml", "rankseg_rma_case"], "which is in no case, expected volumes"),
        (["maps", "labels"], "MAPS LABELS: expected both folders, or --true_of DATA_YAML in their place"),
    ],
)
def test_bad_data_with_known_probabilities_ends_in_one_line(script, tmp_path: Path, flags: list[str], part: str):
    status, _, err = script(NAME, *NOISY, *flags, "--output_dir", tmp_path / "out")
    assert status == 2
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def softmax(logits: np.ndarray) -> np.ndarray:
    scaled = np.exp(logits - logits.max(0))
    return scaled / scaled.sum(0)


def save_logits(folder: Path, name: str, stored: np.ndarray, label: np.ndarray, **facts: object) -> None:
    (folder / "maps").mkdir(exist_ok=True)
    np.savez(folder / "maps" / f"{name}.npz", logits=stored, **facts)
    write_png(folder / "labels" / f"{name}.png", label)


def linear_weights(size: int, length: int, corners: bool) -> np.ndarray:
    """(size, length): what each of `length` values contributes to each of `size` that are interpolated linearly."""
    if corners:
        places = np.arange(size) * (length - 1) / (size - 1)
    else:
        places = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
    return (1 - np.abs(places[:, None] - np.arange(length))).clip(0)


def bilinear(values: np.ndarray, size: tuple[int, int], corners: bool) -> np.ndarray:
    rows, columns = (linear_weights(n, m, corners) for n, m in zip(size, values.shape[1:]))
    return np.einsum("hi,cij,wj->chw", rows, values, columns)


@pytest.mark.parametrize("letterbox", [True, False])
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("facts_in_file", [True, False])
def test_logits_are_decoded(script, tmp_path: Path, letterbox: bool, corners: bool, facts_in_file: bool):
    """Against the same steps in numpy: storage, both resizings, the part that the image fills, temperature."""
    rng = np.random.default_rng(6)
    stored, label = rng.integers(0, 256, (4, 5, 6)).astype(np.uint8), rng.integers(0, 4, (21, 30)).astype(np.uint8)
    label[3] = 255
    facts = {"scale": 0.05, "offset": -7.0, "align_corners": corners}
    if letterbox:
        facts |= {"input_size": (17, 19), "inside": (12, 19)}
    logits = stored * 0.05 - 7
    if letterbox:
        logits = bilinear(bilinear(logits, (17, 19), corners)[:, :12, :19], label.shape, False)
    else:
        logits = bilinear(logits, label.shape, corners)
    prob = softmax(logits / 1.7)
    save_logits(tmp_path, "a", stored, label, **(facts if facts_in_file else {}))
    flags = ["--logits", "--temperature", 1.7]
    for name, value in {} if facts_in_file else facts.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", *values]
    status, _, err = evaluate(script, tmp_path, *flags, "--predict_yaml", "argmax", "rankseg_rma")
    assert status == 0, err
    (row,) = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    check_counts(row, prob.argmax(0), label, 4)
    calibration = json.loads((tmp_path / "out" / "results" / "calibration.json").read_text())["top_label"]
    confidence = sum(c * p for c, p in zip(calibration["confidence"], calibration["pixels"]) if p)
    assert confidence / (label != 255).sum() == pytest.approx(prob.max(0)[label != 255].mean(), abs=1e-5)


def test_half_precision_logits_of_volumes_and_images(script, tmp_path: Path):
    rng = np.random.default_rng(7)
    logits, label = 4 * rng.normal(size=(3, 2, 5, 6)), rng.integers(0, 3, (2, 5, 6))
    (tmp_path / "maps").mkdir()
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "maps" / "a.npy", logits.astype(np.float16))
    np.save(tmp_path / "labels" / "a.npy", label)
    assert evaluate(script, tmp_path, "--logits", "--predict_yaml", "argmax")[0] == 0
    for z, row in enumerate(read_rows(tmp_path / "out" / "results" / "argmax.csv")):
        check_counts(row, logits.astype(np.float16).argmax(0)[z], label[z], 3)
    np.save(tmp_path / "labels" / "a.npy", label[:, :4])
    status, _, err = evaluate(script, tmp_path, "--logits")
    assert status == 2
    assert "a.npy: got labels of shape (2, 4, 6), expected (2, 5, 6) as its map has" in err


@pytest.mark.parametrize(
    ("facts", "flags", "message"),
    [
        ({}, ["--logits"], "got uint8 values, expected their scale: an array 'scale', or --scale"),
        ({"scale": 1.0}, [], "got the arrays logits, scale, expected probabilities or softmax"),
        ({"scale": 1.0, "inside": (4, 4)}, ["--logits"], "got inside 4x4 of an input of no size, expected a part"),
        ({"scale": 1.0, "inside": (9, 4)}, ["--logits", "--input_size", 8, 8], "got inside 9x4 of an input of 8x8"),
        (
            {"scale": 1.0, "inside": (0, 4)},
            ["--logits", "--input_size", 8, 8],
            "got 'inside' [0, 4], expected a height",
        ),
        ({"scale": np.ones(3)}, ["--logits"], "got 'scale' of float64 and shape (3,), expected a single number"),
        ({"scale": 1e39}, ["--logits"], "got logits that are non-finite, expected finite ones"),
        ({}, ["--scale", 2], "--scale: expected together with --logits"),
        ({}, ["--logits", "--temperature", 0], "--temperature: got 0.0, expected a number above 0"),
        ({}, ["--logits", "--input_size", 0, 8], "--input_size: got [0, 8], expected a height and a width"),
        ({}, ["--regions", "1,2"], "--regions: expected together with --multilabel"),
    ],
)
def test_logits_that_cannot_be_decoded(script, tmp_path: Path, facts: dict, flags: list, message: str):
    stored = np.arange(1, 4 * 16 + 1, dtype=np.uint8).reshape(4, 4, 4)
    save_logits(tmp_path, "a", stored, np.zeros((6, 6), np.uint8), **facts)
    status, _, err = evaluate(script, tmp_path, *flags)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_palette_pngs_and_listed_names(script, tmp_path: Path):
    """Labels as VOC has them: colours of a palette, 255 at the borders; and more of them than maps."""
    rng = np.random.default_rng(8)
    label = rng.choice(np.array([0, 1, 2, 255], np.uint8), (7, 8))
    logits = rng.normal(size=(3, 7, 8)).astype(np.float32)
    save_logits(tmp_path, "b", logits, label)
    image = Image.fromarray(label, "P")
    image.putpalette(rng.integers(0, 255, 768, np.uint8).tobytes())
    image.save(tmp_path / "labels" / "b.png")
    write_png(tmp_path / "labels" / "a.png", label)
    assert "a.png: got no file of that name" in evaluate(script, tmp_path, "--logits")[2]
    (tmp_path / "val.txt").write_text("b\n")
    assert evaluate(script, tmp_path, "--logits", "--names", tmp_path / "val.txt")[0] == 0
    (row,) = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    check_counts(row, logits.argmax(0), label, 3)
    (tmp_path / "val.txt").write_text("b\na\n")
    status, _, err = evaluate(script, tmp_path, "--logits", "--names", tmp_path / "val.txt")
    assert status == 2
    assert f"{tmp_path / 'maps'}: got no file of the listed name 'a', expected one" in err
    (tmp_path / "val.txt").write_text("")
    assert (
        "--names: got a list without a name"
        in evaluate(script, tmp_path, "--logits", "--names", tmp_path / "val.txt")[2]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "mean_iou"),
    [("deeplabv3_mobilenetv2", ["--input_size", 513, 513, "--align_corners"], 83.73), ("espnetv2", [], 80.16)],
)
def test_known_figures_of_trained_networks(script, tmp_path: Path, real_data: Path, name, flags, mean_iou):
    maps, labels = (
        real_data / "voc" / "logits" / name,
        real_data / "voc" / "VOCdevkit" / "VOC2012" / "SegmentationClass",
    )
    shared = ["--output_dir", tmp_path, "--metric", "mIoUI", "--predict_yaml", "argmax", "--logits"]
    status, _, err = script(NAME, maps, labels, *shared, *flags)
    assert status == 0, err
    metrics = json.loads((tmp_path / "results" / "argmax.json").read_text())["metrics"]
    assert metrics["mIoUI"] == pytest.approx(mean_iou, abs=0.005)


REGIONS = ((1, 2, 3), (2, 3), (3,))  # as BraTS has them: whole tumour, core, enhancing


@pytest.fixture
def regions(tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sigmoid maps (C, z, y, x) as nnU-Net writes those of regions, and NIfTI labels (x, y, z) of values 0..3 and 7."""
    rng, made = np.random.default_rng(9), {}
    (tmp_path / "maps").mkdir()
    for i, spatial in enumerate(((3, 5, 4), (2, 6, 5))):
        logits = 3 * rng.normal(size=(3, *spatial)).astype(np.float32)
        label = rng.choice(np.array([0, 1, 2, 3, 7], np.uint8), spatial)
        save_nifti(tmp_path / "labels" / f"case_{i}.nii.gz", label.transpose(2, 1, 0))
        np.savez(tmp_path / "maps" / f"case_{i}.npz", probabilities=1 / (1 + np.exp(-logits)))
        made[f"case_{i}"] = logits, label
    return made


def masks_of(label: np.ndarray) -> np.ndarray:
    return np.stack([np.where(label == 7, 255, np.isin(label, region)) for region in REGIONS]).astype(np.uint8)


def check_region(row: dict[str, str], chosen: np.ndarray, mask: np.ndarray, name: str) -> None:
    literal = counts_of(chosen.astype(int), mask, 2)
    assert [int(row[f"{kind}.{name}"]) for kind in ("tp", "fp", "fn")] == [
        literal[f"{k}.1"] for k in ("tp", "fp", "fn")
    ]


OVERLAPPING = ["--multilabel", "--regions", "1,2,3", "2,3", "3", "--classes", "whole", "core", "enhancing"]


def test_regions_are_decided_and_scored_one_by_one(script, tmp_path: Path, regions: dict):
    from rankseg_rma import rankseg_rma

    flags = [*OVERLAPPING, "--unit", "case", "--ignore_label", 7, "--predict_yaml", "argmax", "rankseg_rma"]
    status, printed, err = evaluate(script, tmp_path, *flags)
    assert status == 0, err
    assert "mean over 3 classes" in printed
    means = []
    for c, name in enumerate(("whole", "core", "enhancing")):
        folder = tmp_path / "out" / "results" / name
        for rule in ("argmax", "rankseg_rma"):
            for row, (logits, label) in zip(read_rows(folder / f"{rule}.csv"), regions.values(), strict=True):
                prob = 1 / (1 + np.exp(-logits[None]))
                chosen = prob > 0.5 if rule == "argmax" else rankseg_rma(prob, allow_overlap=True)
                check_region(row, np.asarray(chosen)[0, c], masks_of(label)[c], name)
        means.append(json.loads((folder / "argmax.json").read_text())["metrics"]["mDiceI"])
    content = json.loads((tmp_path / "out" / "results" / "classes.json").read_text())
    assert content["metrics"]["argmax"]["mDiceI"] == pytest.approx(np.mean(means))


def test_masks_and_logits_of_overlapping_classes(script, tmp_path: Path, regions: dict):
    """The same as masks of (C, ...) and logits, slice by slice."""
    shared = ["--multilabel", "--slice_axis", 1, "--predict_yaml", "argmax", "--classes", "whole", "core", "enhancing"]
    assert evaluate(script, tmp_path, *OVERLAPPING, *shared[1:], "--ignore_label", 7)[0] == 0
    other = tmp_path / "other"
    for folder in ("maps", "labels"):
        (other / folder).mkdir(parents=True)
    for name, (logits, label) in regions.items():
        np.savez(other / "maps" / f"{name}.npz", logits=logits)
        np.save(other / "labels" / f"{name}.npy", masks_of(label))
    status, _, err = evaluate(script, other, "--logits", *shared)
    assert status == 0, err
    for name in ("whole", "core", "enhancing"):
        rows = [read_rows(folder / "out" / "results" / name / "argmax.csv") for folder in (tmp_path, other)]
        assert rows[0] == rows[1]
        assert [row["image"] for row in rows[0]][:6] == [*(f"case_0/{y:04d}" for y in range(5)), "case_1/0000"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (OVERLAPPING, "case_0.nii.gz: got label value 7, expected 0..3 as the regions have, or 255 (ignored)"),
        (OVERLAPPING[:4], "--regions: got 2 regions, expected 3"),
        (["--multilabel"], "case_0.nii.gz: got labels of shape (4, 5, 3), expected (3, 3, 5, 4)"),
        ([], "is off from 1 by"),
        ([*OVERLAPPING, "--predict_yaml", "rankseg_rma_dataset"], "expected a rule that decides unit by unit"),
        ([*OVERLAPPING[:-1], "a/b"], "--classes: got 'a/b', expected names of folders"),
    ],
)
def test_wrong_regions_end_in_one_line(script, tmp_path: Path, regions: dict, flags: list[str], message: str):
    status, _, err = evaluate(script, tmp_path, *flags)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_single_class_and_its_mask_without_an_axis(script, tmp_path: Path):
    rng = np.random.default_rng(10)
    prob, label = rng.random((1, 6, 7)).astype(np.float32), rng.integers(0, 2, (6, 7)).astype(np.uint8)
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a.npy", prob)
    write_png(tmp_path / "labels" / "a.png", label)
    status, _, err = evaluate(script, tmp_path, "--multilabel", "--classes", "lesion", "--predict_yaml", "argmax")
    assert status == 0, err
    (row,) = read_rows(tmp_path / "out" / "results" / "lesion" / "argmax.csv")
    check_region(row, prob[0] > 0.5, label, "lesion")


def npy(values: np.ndarray) -> bytes:
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def write_parquet(path: Path, columns: dict[str, list], types: dict | None = None) -> None:
    """A table of two rows to a row group. types: of columns, where pyarrow is not to find them out."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the package pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the package pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pyarrow.array(values, (types or {}).get(name)) for name, values in columns.items()}
    parquet.write_table(pyarrow.table(arrays), path, row_group_size=2)


@pytest.fixture
def rows() -> list[tuple[np.ndarray, np.ndarray]]:
    """Five float16 maps of 4 classes and several sizes, and int64 labels with ignored pixels."""
    rng = np.random.default_rng(0)
    made = [make_map(rng, 4, 6 + i, 9, dtype=np.float16) for i in range(5)]
    labels = [rng.integers(0, 4, prob.shape[1:]) for prob in made]
    for label in labels:
        label[0] = 255
    return list(zip(made, labels))


def test_rows_of_parquet_files_are_evaluated_as_their_maps_in_files(script, tmp_path: Path, rows: list):
    """Bytes of .npy files, as the authors' benchmark stores arrays, in several files and row groups."""
    columns = [
        {"probs": [npy(p) for p, _ in part], "label": [npy(y) for _, y in part]} for part in (rows[:3], rows[3:])
    ]
    for i, part in enumerate(columns):
        write_parquet(tmp_path / "hosted" / "pascal_voc" / f"test-{i}.parquet", part)
    for i, (prob, label) in enumerate(rows):
        (tmp_path / "maps").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        np.save(tmp_path / "maps" / f"{i}.npy", prob)
        np.save(tmp_path / "labels" / f"{i}.npy", label)
    rules = ["--predict_yaml", "argmax", "rankseg_rma", "rankseg_rma_dataset"]
    assert evaluate(script, tmp_path, *rules)[0] == 0
    status, _, err = script(NAME, tmp_path / "hosted", "--output_dir", tmp_path / "from", *rules)
    assert status == 0, err
    for rule in rules[1:]:
        expected = read_rows(tmp_path / "out" / "results" / f"{rule}.csv")
        found = read_rows(tmp_path / "from" / "results" / f"{rule}.csv")
        names = ["test-0/00000", "test-0/00001", "test-0/00002", "test-1/00000", "test-1/00001"]
        assert [row.pop("image") for row in found] == names
        assert [{**row, "image": name} for row, name in zip(found, "01234")] == expected
    maps = json.loads((tmp_path / "from" / "results" / "argmax.json").read_text())["maps"]
    assert (maps["files"], maps["label_dir"]) == (2, None)


def test_rows_of_nested_lists_of_volumes(script, tmp_path: Path, rows: list):
    """Slices of two cases, as lists of floats; each case counts once."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the package pyarrow")
    deep = pyarrow.list_(pyarrow.list_(pyarrow.large_list(pyarrow.float16())))
    columns = {
        "probs": [prob.tolist() for prob, _ in rows],
        "case_id": ["a", "a", "b", "b", "b"],
        "label": [label.tolist() for _, label in rows],
    }
    write_parquet(tmp_path / "kits.parquet", columns, {"probs": deep})
    status, _, err = script(NAME, tmp_path / "kits.parquet", "--output_dir", tmp_path / "out")
    assert status == 0, err
    found = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    assert [row["case"] for row in found] == columns["case_id"]
    for row, (prob, label) in zip(found, rows, strict=True):
        check_counts(row, prob.argmax(0), label, 4)


def test_rows_of_classes_that_overlap(script, tmp_path: Path):
    rng = np.random.default_rng(0)
    prob, mask = rng.random((2, 5, 7), np.float32), rng.random((2, 5, 7)) > 0.5
    write_parquet(tmp_path / "a.parquet", {"probs": [npy(prob)], "label": [npy(mask)]})
    flags = ["--multilabel", "--classes", "one", "two", "--output_dir", tmp_path / "out"]
    status, _, err = script(NAME, tmp_path / "a.parquet", *flags)
    assert status == 0, err
    (row,) = read_rows(tmp_path / "out" / "results" / "two" / "argmax.csv")
    check_region(row, prob[1] > 0.5, mask[1], "two")


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"probs": [b"x"], "labels": [b"x"]}, "got the columns probs, labels, expected also label"),
        ({"probs": [b"x"], "label": [b"x"]}, "a.parquet, row 0: got a file that cannot be read"),
        ({"probs": [pickle.dumps([1])], "label": [b""]}, "a.parquet, row 0: got a file that cannot be read"),
        ({"probs": [[[[0.5, 1.0]], [[0.5]]]], "label": [[[0, 1]]]}, "lists of 2 lengths at one depth"),
        ({"probs": [[[[0.5, 1.0]], [[0.5, 1.0]]]], "label": [[[0, 1]]]}, "sum over the classes"),
        ({"probs": [[[[0.5, 1.0]], [[0.5, 0.0]]]], "label": [[[0, 2]]]}, "row 0: got label value 2, expected 0..1"),
        ({"probs": [[[[0.5, 1.0]], [[0.5, 0.0]]]], "label": [[[0, 0, 1]]]}, "labels of shape (1, 3), expected"),
        ({"probs": [[[[0.5, 1.0]], [[0.5, 0.0]]]], "label": [[[0.5, 0]]]}, "expected whole numbers of (1, 2)"),
        ({"probs": [[[[0.5, 1.0]], [[0.5, None]]]], "label": [[[0, 0]]]}, "without an array in it"),
        ({"probs": [["a"]], "label": [[[0, 0]]]}, "a.parquet, row 0: got"),
    ],
)
def test_rows_that_are_no_maps_end_in_one_line(script, tmp_path: Path, columns: dict, part: str):
    write_parquet(tmp_path / "a.parquet", columns)
    status, _, err = script(NAME, tmp_path / "a.parquet", "--output_dir", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1), err
    assert part in err


def test_maps_alone_must_be_parquet(script, tmp_path: Path, monkeypatch):
    status, _, err = script(NAME, tmp_path, "--output_dir", tmp_path / "out")
    assert status == 2
    assert f"{tmp_path}: got no file of .parquet, expected some, or a folder LABELS beside this one of maps" in err
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    flags = [tmp_path / "a.parquet", "--output_dir", tmp_path / "out"]
    assert "--logits: expected together with LABELS" in script(NAME, *flags, "--logits")[2]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    status, _, err = script(NAME, *flags)
    assert status == 2
    assert "a.parquet: got no package pyarrow, expected it: pip install pyarrow" in err
    monkeypatch.undo()
    pytest.importorskip("pyarrow", reason="needs the package pyarrow")
    status, _, err = script(NAME, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert "a.parquet: got a file that cannot be read" in err


def test_one_row_is_in_memory_at_a_time(script, tmp_path: Path, rows: list, monkeypatch):
    """Every map is let go before the next row is read."""
    from exp.evaluation.probability_maps import parquet

    write_parquet(tmp_path / "a.parquet", {"probs": [npy(p) for p, _ in rows], "label": [npy(y) for _, y in rows]})
    alive: list[weakref.ref] = []
    decode = parquet._to_array

    def watch(column):
        array = decode(column)
        if array.ndim == 3:
            assert not [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(parquet, "_to_array", watch)
    assert script(NAME, tmp_path / "a.parquet", "--output_dir", tmp_path / "out")[0] == 0
    assert len(alive) >= len(rows)
