"""Files of a run that could be taken for, or overwritten by, those of another image, evaluation or data set."""

import json
from pathlib import Path

import numpy as np
import pytest

from exp.files.paths import flat_names
from exp.reproduction.existing import Existing
from tests.conftest import TINY_SETTINGS, write_png

YAML = """
dataset: folder
train_split: train
val_split: val
images: "{split}/images"
labels: "{split}/labels"
classes: [background, object]
palette: [[0, 0, 0], [230, 159, 0]]
label_map: {0: 0, 1: 0, 2: 1, 10: 1}
crop_size: [32, 32]
"""


@pytest.fixture
def flags(tmp_path: Path) -> list:
    """Those of a tiny training on images named a/b and a_b, whose masks have the values of a label map."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a/b", "a_b", "c"):
            label = rng.choice([0, 1, 2, 10], (40, 36)).astype(np.uint8)
            write_png(tmp_path / "data" / split / "images" / f"{name}.png", np.stack([25 * label] * 3, 2))
            write_png(tmp_path / "data" / split / "labels" / f"{name}.png", label)
    (tmp_path / "mine.yaml").write_text(YAML)
    settings = [text for text in TINY_SETTINGS if not text.startswith(("data.", "schedule.batch"))]
    return ["--data_dir", tmp_path / "data", "--data_yaml", tmp_path / "mine.yaml", "--output_dir", tmp_path / "runs",
            "--predict_yaml", "argmax", "--set", *settings, "schedule.batch_size=3"]  # fmt: skip


def test_a_run_with_a_label_map(program, script, flags: list, tmp_path: Path):
    status, _, err = program(*flags, "--save_prob", 2)
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    maps = sorted(path.name for path in (run / "probabilities").iterdir())
    assert maps == ["a_b.2.npy", "a_b.npy"], "one of each image"

    facts = json.loads((run / "checkpoints" / "last.safetensors.json").read_text())
    existing = Existing(tmp_path / "runs")
    assert set(existing.results) == {facts["config_digest"]}, "the results are known as those of the weights"
    image = tmp_path / "data" / "val" / "images" / "c.png"
    last = run / "checkpoints" / "last.safetensors"
    status, _, err = script("predict", last, image, "--output_dir", tmp_path / "out")
    assert status == 0, err
    status, _, err = program(*flags, "--test-only", "--model_checkpoint", last)
    assert status == 0, err
    assert not (run / "results" / "older").exists()

    status, _, err = program(*flags, "test.calibration=false", "--test-only")
    assert status == 0, err
    assert not (run / "results" / "images.csv").exists(), "entropies of an earlier evaluation beside later results"
    assert (run / "results" / "older" / "images.1.csv").is_file()


def test_names_in_one_folder_are_each_their_own():
    assert flat_names(["a/b", "c"]) == ["a_b", "c"]
    assert flat_names(["a/b", "a_b", "a_b.2", "a/b/c", "a_b/c"]) == ["a_b.3", "a_b", "a_b.2", "a_b_c", "a_b_c.2"]
