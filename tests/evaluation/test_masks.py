"""Masks as files: their format, their place on a volume's grid, and whole runs that write them."""

import csv
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from exp.data.base import IGNORE_INDEX, Sample, label_table
from exp.data.registry import DATASETS
from exp.data.slice_files import Case, write_case
from exp.data.transforms import CenterCrop
from exp.evaluation.masks import MaskWriter, mask_format, paste_centre
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from tests.conftest import TINY, TINY_RUN

ALONE = Dist(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"folder"}))  # whose facts stand in its YAML
def test_files_read_back_as_what_was_predicted(name: str, tmp_path: Path):
    data = DATASETS[name]
    num_classes, path = len(data.classes), tmp_path / "some" / "mask.png"
    label = np.arange(num_classes)[None].repeat(2, 0)
    form = mask_format(num_classes, data.palette, data.label_map)
    form.save_png(form.values[label], path)
    with Image.open(path) as image:
        values = np.asarray(image)
        colours = np.asarray(image.convert("RGB"))
        assert image.mode == "P"
    assert (label_table(num_classes, data.label_map)[values] == label).all()
    assert (colours[0] == np.array(data.palette)).all()
    assert [p.name for p in path.parent.iterdir()] == ["mask.png"]


def test_the_formats_that_servers_take():
    voc = DATASETS["pascal_voc"]
    assert mask_format(21, voc.palette, voc.label_map).values.tolist() == list(range(21))
    ade = DATASETS["ade20k"]
    assert mask_format(150, ade.palette, ade.label_map).values.tolist() == list(range(1, 151))
    streets = DATASETS["cityscapes"]
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # cityscapesScripts' labels.py
    assert mask_format(19, streets.palette, streets.label_map).values.tolist() == ids
    tumour = DATASETS["lits"]
    form = mask_format(2, tumour.palette, tumour.label_map)
    assert form.values.tolist() == [0, 2]
    assert tuple(form.colours[2]) == tumour.palette[1]
    with pytest.raises(InputError, match="got no value for class 2, expected one of every class"):
        mask_format(3, [(0, 0, 0)] * 3, {0: IGNORE_INDEX, 1: 0, 2: 1})


@pytest.mark.parametrize("size", [(7, 9), (8, 9), (4, 4), (20, 3)])
def test_a_centre_crop_is_put_back(size: tuple[int, int]):
    image = np.arange(size[0] * size[1]).reshape(size) + 1
    crop, _ = CenterCrop((4, 5))(image[..., None], image, 0)
    whole = paste_centre(crop[..., 0], size)
    assert (whole == np.where(whole > 0, image, 0)).all()
    assert (whole > 0).sum() == crop.size


def prepared(folder: Path, num_cases: int, resized: bool) -> SimpleNamespace:
    """What a data set of slices says of itself: two slices of each of some volumes whose second axis is axial."""
    samples, rng = [], np.random.default_rng(0)
    for i in range(num_cases):
        name, shape = f"case_{i}", (10, 5, 6)
        affine = ((0.0, 2.0, 0.0, 1.0), (1.0, 0.0, 0.0, 2.0), (0.0, 0.0, 3.0, float(i)), (0.0, 0.0, 0.0, 1.0))
        size = (20, 12) if resized else (10, 6)
        case = Case("image", "label", shape, affine, (1.0, 2.0, 3.0), 1, (1, 3), size, resized, False)
        (folder / name).mkdir(parents=True)
        images = rng.integers(0, 9, (2, 10, 6)).astype(np.int16)
        write_case(folder / name, case, images, (images % 2).astype(np.uint8))
        for k in case.slices:
            path = folder / name / f"{k:04d}.npz"
            samples.append(Sample(f"{name}/{k:04d}", path, path, name))
    palette = ((0, 0, 0), (230, 159, 0))
    return SimpleNamespace(samples=samples, classes=("rest", "tumour"), palette=palette, label_map={0: 0, 1: 0, 2: 1})


@pytest.mark.parametrize("resized", [False, True])
def test_slices_come_back_on_their_volumes_grid(tmp_path: Path, resized: bool):
    data, rng = prepared(tmp_path / "data", 2, resized), np.random.default_rng(1)
    small = torch.from_numpy(rng.integers(0, 2, (len(data.samples), 10, 6)))
    shown = small.repeat_interleave(2, 1).repeat_interleave(2, 2) if resized else small
    shown = shown[:, 2:-2, 2:-2]  # a centre crop
    writer = MaskWriter(tmp_path / "masks", data, {"argmax": {"iteration": 1}}, ALONE)
    for i, label in enumerate(shown):
        writer(i, {"argmax": label})
    writer.finish()
    assert sorted(p.name for p in (tmp_path / "masks" / "argmax").iterdir()) == ["case_0.nii.gz", "case_1.nii.gz"]
    border = 1 if resized else 2
    expected = torch.zeros_like(small)
    expected[:, border:-border, border:-border] = 2 * small[:, border:-border, border:-border]
    for i in range(2):
        volume = nibabel.load(tmp_path / "masks" / "argmax" / f"case_{i}.nii.gz")
        values = np.asarray(volume.dataobj)
        assert values.shape == (10, 5, 6)
        assert values.dtype == np.uint8
        assert volume.affine[2].tolist() == [0, 0, 3, i]
        assert (values[:, [1, 3]] == expected[2 * i : 2 * i + 2].permute(1, 0, 2).numpy()).all()
        assert not values[:, [0, 2, 4]].any()


def test_processes_share_the_slices_of_a_case(tmp_path: Path):
    data, barrier, failed = prepared(tmp_path / "data", 3, False), threading.Barrier(2, timeout=60), []

    class Rank(Dist):
        def gather(self, item: object) -> list:
            barrier.wait()
            return [item]

    def work(rank: int) -> None:
        try:
            writer = MaskWriter(tmp_path / "masks", data, {"a": {}, "b": {}}, Rank(rank, 2, torch.device("cpu")))
            for i in range(rank, len(data.samples), 2):
                writer(i, {"a": torch.full((10, 6), 1), "b": torch.zeros(10, 6, dtype=torch.int64)})
            writer.finish()
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for i in range(3):
        values = np.asarray(nibabel.load(tmp_path / "masks" / "a" / f"case_{i}.nii.gz").dataobj)
        assert (values[:, [1, 3]] == 2).all()
        assert not np.asarray(nibabel.load(tmp_path / "masks" / "b" / f"case_{i}.nii.gz").dataobj).any()
    assert sorted(p.name for p in (tmp_path / "masks" / "a").iterdir()) == [f"case_{i}.nii.gz" for i in range(3)]


def test_slices_without_their_volume_stay_pictures(tmp_path: Path):
    data = prepared(tmp_path / "data", 1, False)
    (tmp_path / "data" / "case_0" / "case.json").unlink()
    writer = MaskWriter(tmp_path / "masks", data, {"a": {}}, ALONE)
    writer(1, {"a": torch.ones(10, 6, dtype=torch.int64)})
    writer.finish()
    assert (np.asarray(Image.open(tmp_path / "masks" / "a" / "case_0" / "0003.png")) == 2).all()


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def mask_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_masks_of_a_run_are_what_its_scores_say(program, tmp_path: Path):
    rules = ["argmax", "rankseg_rma"]
    flags = [*TINY, "schedule.val_iters=2", "--output_dir", tmp_path, "--save_masks", "--predict_yaml", *rules]
    status, _, err = program(*flags)
    assert status == 0, err
    run = tmp_path / TINY_RUN
    shapes = DATASETS["shapes"](None, "val", max_samples=3)
    for rule in rules:
        with open(run / "results" / f"{rule}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(mask_files(run / "masks" / rule)) == len(rows) == 3
        for i, row in enumerate(rows):
            mask, label = read_mask(run / "masks" / rule / f"{row['image']}.png"), shapes[i].label.numpy()
            for c, name in enumerate(shapes.classes):
                assert int(row[f"tp.{name}"]) == ((mask == c) & (label == c)).sum()
                assert int(row[f"fp.{name}"]) == ((mask == c) & (label != c) & (label != IGNORE_INDEX)).sum()
    origin = json.loads((run / "masks" / "argmax.json").read_text())
    assert origin["training"]["iteration"] == 3
    assert not (run / "masks" / "older").exists(), "masks of the last validation alone"
    assert json.loads((run / "results" / "timing.json").read_text())["milliseconds_per_image"]["write"] > 0

    # The same again is the same; of another window, or of another checkpoint, the masks before are kept.
    first = mask_files(run / "masks")
    assert program(*flags, "--test-only")[0] == 0
    assert mask_files(run / "masks") == first
    (run / "masks" / "argmax" / "shapes_val_0009.png").write_bytes(b"of an older set")
    other = [*flags, "--test-only", "--set", "test.crop_size=[24,24]"]
    assert program(*other)[0] == 0
    kept = mask_files(run / "masks" / "older")
    assert kept.pop("argmax.1/shapes_val_0009.png") == b"of an older set"
    assert kept == {name.replace("/", ".1/"): content for name, content in first.items()}
    assert len(mask_files(run / "masks" / "argmax")) == 3
    assert program(*other, "--model_checkpoint", run / "checkpoints" / "iter_0000002.pt")[0] == 0
    assert json.loads((run / "masks" / "argmax.json").read_text())["training"]["iteration"] == 2
    assert json.loads((run / "masks" / "older" / "argmax.2.json").read_text())["training"]["iteration"] == 3


def test_a_run_that_stops_early_has_its_masks(program, tmp_path: Path):
    flags = [*TINY, "schedule.val_iters=1", "schedule.early_stop=1", "schedule.train_iters=40", "optim.lr=1e-9"]
    flags += ["optim.start_lr=1e-10"]
    status, printed, err = program(*flags, "--output_dir", tmp_path, "--save_masks", "--predict_yaml", "argmax")
    assert status == 0, err
    assert "stopped early" in printed + err
    run = tmp_path / TINY_RUN
    assert len(mask_files(run / "masks" / "argmax")) == 3
    stopped = json.loads((run / "results" / "argmax.json").read_text())["training"]["iteration"]
    assert json.loads((run / "masks" / "argmax.json").read_text())["training"]["iteration"] == stopped < 40


@pytest.mark.slow
def test_two_processes_write_what_one_writes(program, tmp_path: Path):
    from tests.program.test_main import torchrun

    flags = [*TINY, "--predict_yaml", "argmax", "rankseg_rma"]
    assert program(*flags, "--output_dir", tmp_path / "one", "--save_masks")[0] == 0
    path = tmp_path / "one" / TINY_RUN / "checkpoints" / "iter_0000003.pt"
    test_only = ["--test-only", "--model_checkpoint", path, "--save_masks"]
    done = torchrun([*flags, "--output_dir", tmp_path / "two", *test_only])
    assert done.returncode == 0, done.stderr
    one, two = (mask_files(tmp_path / name / TINY_RUN / "masks") for name in ("one", "two"))
    assert one == two
    assert len(one) == 6
