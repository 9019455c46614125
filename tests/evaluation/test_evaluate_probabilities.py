"""scripts/evaluate_probabilities.py on generated maps, and beside the program's own evaluation."""

import csv
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
    assert "rankseg_rma against argmax: mDiceI" in printed
    rows = read_rows(tmp_path / "out" / "results" / "argmax.csv")
    assert [row["image"] for row in rows] == list(images)
    for row, (prob, label) in zip(rows, images.values(), strict=True):
        check_counts(row, prob.argmax(0), label, 4)
        literal = counts_of(prob.argmax(0), label, 4)
        present = [c for c in range(4) if (label == c).any()]
        ious = [100 * literal[f"tp.{c}"] / sum(literal[f"{k}.{c}"] for k in ("tp", "fp", "fn")) for c in present]
        assert float(row["mIoUI"]) == pytest.approx(np.mean(ious), abs=1e-9)
    context = json.loads((tmp_path / "out" / "results" / "rankseg_rma.json").read_text())
    assert context["config"]["predict"]["opt_metric"] == "dice"
    assert context["maps"]["files"] == 3
    comparison = json.loads((tmp_path / "out" / "results" / "comparison.json").read_text())
    assert comparison["comparisons"][0]["num_units"] == 3


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
    assert "rankseg_rma against argmax: mDiceI" in printed
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
        (["maps"], "MAPS LABELS: expected both folders, or --true_of DATA_YAML in their place"),
    ],
)
def test_bad_data_with_known_probabilities_ends_in_one_line(script, tmp_path: Path, flags: list[str], part: str):
    status, _, err = script(NAME, *NOISY, *flags, "--output_dir", tmp_path / "out")
    assert status == 2
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
