"""Which files of a folder count, and which of two folders belong together."""

import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from exp.data.registry import build_dataset
from exp.data.slice_files import list_cases, list_slices
from exp.evaluation.probability_maps import MapReader, pair_files
from exp.evaluation.probability_maps.files import read_label_values
from exp.files.nifti import find_slices, open_volume, read_labels, value_range
from exp.predict_images import list_sources
from exp.runtime.errors import InputError
from tests.conftest import write_png
from tests.data.test_data_sets import data_config, write_slices
from tests.data.trees import write_ade20k, write_camvid, write_cityscapes

PIXELS = np.zeros((8, 8), np.uint8)
HIDDEN = (".ipynb_checkpoints/{}", "@eaDir/{}", "__MACOSX/{}", "._{}", ".trash/deep/{}")
COMPOSED, APART = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def hide_copies(path: Path) -> None:
    """What systems and editors leave beside a file, under its name."""
    for pattern in HIDDEN:
        copy = path.parent / pattern.format(path.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def test_hidden_files_and_folders_are_no_data(tmp_path: Path):
    for kind in ("images", "labels"):
        write_png(tmp_path / "val" / kind / "sub" / "i0.png", PIXELS)
        hide_copies(tmp_path / "val" / kind / "sub" / "i0.png")
        (tmp_path / "val" / kind / "folder.png").mkdir()
    dataset = build_dataset(data_config("folder"), str(tmp_path), "val")
    assert [sample.name for sample in dataset.samples] == ["sub/i0"]
    sources = list_sources(tmp_path / "val" / "images", tmp_path / "out")
    assert [source.name for source in sources] == ["sub/i0"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("camvid", write_camvid),
        ("ade20k", write_ade20k),
        ("cityscapes", lambda folder, splits: write_cityscapes(folder, splits, (16, 20))),
    ],
)
def test_nor_are_they_in_the_known_data_sets(tmp_path: Path, name: str, write):
    config = data_config(name)
    write(tmp_path, {config.train_split: 1, config.val_split: 2})
    before = build_dataset(config, str(tmp_path), "val").samples
    for sample in before:
        for path in (sample.image, sample.label):
            hide_copies(path)
    assert build_dataset(config, str(tmp_path), "val").samples == before


def test_nor_in_prepared_slices_and_maps(tmp_path: Path):
    write_slices(tmp_path, "lits", {"volume-1": 2})
    (case,) = list_cases(tmp_path / "lits" / "train")
    slices = list_slices(case)
    for path in (*slices, case / "case.json"):
        hide_copies(path)
    hidden = case.parent / "@eaDir"
    hidden.mkdir()
    (hidden / "case.json").write_text("{}")
    assert list_cases(case.parent) == [case]
    assert list_slices(case) == slices
    for folder, suffix in (("maps", "npy"), ("labels", "png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"folder.{suffix}").mkdir()
        (tmp_path / folder / f"a.{suffix}").write_bytes(b"")
        hide_copies(tmp_path / folder / f"a.{suffix}")
    assert len(pair_files(tmp_path / "maps", tmp_path / "labels")) == 1


def test_names_that_look_alike_are_paired(tmp_path: Path):
    assert COMPOSED != APART
    write_png(tmp_path / "val" / "images" / f"{COMPOSED}.png", PIXELS)
    write_png(tmp_path / "val" / "labels" / f"{APART}.png", PIXELS)
    (sample,) = build_dataset(data_config("folder"), str(tmp_path), "val").samples
    assert (sample.name, sample.label.stem) == (COMPOSED, APART)
    for kind in ("images", "labels"):  # two files whose names look alike and are not
        for name in (COMPOSED, APART):
            write_png(tmp_path / "val" / kind / f"{name}.png", PIXELS)
    samples = build_dataset(data_config("folder"), str(tmp_path), "val").samples
    assert all(sample.name == sample.image.stem == sample.label.stem for sample in samples)
    assert len(samples) == 2


@pytest.mark.parametrize("name", ["a0.PNG", "a0.tif", "a0.TIFF", "a0.Npy", f"{APART}.png"])
def test_maps_find_their_labels_in_any_spelling(tmp_path: Path, name: str):
    (tmp_path / "maps").mkdir()
    stem = COMPOSED if name.startswith(APART) else "a0"
    prob = np.full((2, 8, 8), 0.5, np.float32)
    np.save(tmp_path / "maps" / f"{stem}.npy", prob)
    path = tmp_path / "labels" / name
    path.parent.mkdir()
    if name.lower().endswith("npy"):
        with path.open("wb") as file:
            np.save(file, PIXELS)
    else:
        write_png(path, PIXELS)
    ((map_path, label_path),) = pair_files(tmp_path / "maps", tmp_path / "labels")
    (unit,) = MapReader().units(map_path, label_path)
    assert (unit.name, label_path) == (stem, path)
    if stem == "a0":  # beside the usual file it is left out, as before
        write_png(tmp_path / "labels" / "a0.png", PIXELS)
        assert pair_files(tmp_path / "maps", tmp_path / "labels")[0][1].name == "a0.png"


@pytest.mark.parametrize("highest", [1, 2, 50])
def test_scaled_and_floating_point_labels_are_whole(tmp_path: Path, highest: int):
    """nibabel stores 1.0 as 255 times 1/255 in 8 bits, which comes to 1.00000006."""
    label = np.resize(np.arange(highest + 1, dtype=np.float64), (6, 6, 6))
    image = nib.Nifti1Image(label, np.eye(4))
    image.header.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "scaled.nii")
    assert nib.load(tmp_path / "scaled.nii").dataobj.slope != 1
    nib.save(nib.Nifti1Image((label + 5e-4).astype(np.float32), np.eye(4)), tmp_path / "float.nii")
    np.save(tmp_path / "float.npy", label[0] - 5e-4)
    for name in ("scaled.nii", "float.nii"):
        volume = open_volume(tmp_path / name)
        assert (read_labels(volume, range(6)) == np.moveaxis(label, 2, 0)).all()
        assert find_slices(volume, 1) == [k for k in range(6) if (label[..., k] == 1).any()]
        assert value_range(volume).whole
    assert (read_label_values(tmp_path / "float.npy") == label[0]).all()


def test_labels_between_two_classes_are_not(tmp_path: Path):
    for name, value, dtype, slope in (("a", 0.01, "f4", 1), ("b", 128, "u1", 1 / 255), ("c", 1, "u1", 0.5)):
        image = nib.Nifti1Image(np.full((4, 4, 4), value, dtype), np.eye(4))
        image.header.set_slope_inter(slope, 0)
        nib.save(image, tmp_path / f"{name}.nii")
        with pytest.raises(InputError, match=r"got label value 0\.\d+, expected whole numbers"):
            read_labels(open_volume(tmp_path / f"{name}.nii"), range(4))
        assert not value_range(open_volume(tmp_path / f"{name}.nii")).whole
