"""Masks as files: their format, their place on a volume's grid, and whole runs that write them."""

import threading
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from exp.data import DATASETS
from exp.data.base import IGNORE_INDEX, Sample, label_table
from exp.data.transforms import CenterCrop
from exp.distributed import Dist
from exp.masks import MaskWriter, mask_format, paste_centre
from exp.volumes import Case, write_case

ALONE = Dist(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", DATASETS)
def test_files_read_back_as_what_was_predicted(name: str, tmp_path: Path):
    data = DATASETS[name]
    num_classes, path = len(data.classes), tmp_path / "some" / "mask.png"
    label = np.arange(num_classes)[None].repeat(2, 0)
    form = mask_format(num_classes, data.palette, data.label_map)
    form.save_png(form.encode(label), path)
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
    ade = mask_format(150, [(0, 0, 0)] * 150, {0: IGNORE_INDEX, **{v: v - 1 for v in range(1, 151)}})
    assert ade.values.tolist() == list(range(1, 151))
    tumour = mask_format(2, [(0, 0, 0), (9, 9, 9)], {0: 0, 1: 0, 2: 1})
    assert tumour.values.tolist() == [0, 2]
    assert tumour.colours[2].tolist() == [9, 9, 9]


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
