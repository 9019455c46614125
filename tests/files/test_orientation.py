"""Volumes stored in any of the 48 orientations: the same slices, the same labels on each file's own grid."""

import json
import shutil
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from exp.checkpoints.checkpoint import load_checkpoint
from exp.data.prepare.facts import VOLUMES
from exp.data.prepare.volumes import prepare_cases
from exp.data.registry import DATASETS
from exp.data.slice_files import Case, list_cases, list_slices, read_case, read_slice, write_case
from exp.data.verify import check_prepared
from exp.evaluation.masks import save_volume
from exp.files.nifti import (
    assemble_labels,
    find_slices,
    is_orientation,
    open_pair,
    open_volume,
    orientation_of,
    read_image,
    read_labels,
)
from exp.predict_images import list_sources, predict_files
from exp.runtime.errors import InputError
from tests.conftest import TINY
from tests.data.volume_trees import ct_case, save_nifti, write_hippocampus, write_lits
from tests.program.test_predict_script import volume_predictor

ALL = sorted("".join(c) for axes in permutations(("LR", "PA", "IS")) for c in product(*axes))
STRAIGHT = np.array([[0.7, 0, 0, -20], [0, 0.9, 0, 30], [0, 0, 3.0, 5], [0, 0, 0, 1]])
TURNED = np.array(
    [[0.8, -0.53, 0.26, 3], [0.59, 0.77, -0.25, 4], [-0.07, 0.35, 0.93, 5], [0, 0, 0, 1]]
)  # by 40 degrees


def stored_in(image: nib.Nifti1Image, letters: str) -> nib.Nifti1Image:
    """The same volume with its array in another orientation and its affine accordingly, by nibabel."""
    there, here = (nib.orientations.axcodes2ornt(codes) for codes in (letters, orientation_of(image.affine, Path("x"))))
    return image.as_reoriented(nib.orientations.ornt_transform(here, there))


def test_there_are_48():
    assert len(ALL) == 48
    assert all(map(is_orientation, ALL))
    assert not any(map(is_orientation, ("RAL", "RA", "ras", "RASS", 3, None, ["R", "A", "S"])))


@pytest.mark.parametrize(("affine", "seen"), [(STRAIGHT, "RAS"), (TURNED, "LPS"), (TURNED, "IPL")])
def test_slices_are_the_same_and_labels_come_back(tmp_path: Path, affine: np.ndarray, seen: str):
    rng = np.random.default_rng(0)
    values, label = rng.gamma(2, 300, (7, 6, 5)).astype(np.float32), rng.integers(0, 3, (7, 6, 5), dtype=np.uint8)
    label[..., 1] = 0
    ras, ras_label = nib.Nifti1Image(values, affine), nib.Nifti1Image(label, affine)
    axis = seen.replace("I", "S").index("S")
    expected = np.moveaxis(np.asarray(stored_in(ras, seen).dataobj), axis, 0)
    expected_label = np.moveaxis(np.asarray(stored_in(ras_label, seen).dataobj), axis, 0)
    kept = [k for k in range(5) if expected_label[k].any()]
    rescaled = None
    for letters in ALL:
        own, own_label = stored_in(ras, letters), stored_in(ras_label, letters)
        nib.save(own, tmp_path / "i.nii")
        nib.save(own_label, tmp_path / "l.nii")
        assert orientation_of(own.affine, tmp_path) == letters
        image, labels = open_pair(tmp_path / "i.nii", tmp_path / "l.nii", seen)
        assert image.slice_shape == expected.shape[1:]
        np.testing.assert_array_equal(read_image(image, range(5)), np.rint(expected), letters)
        assert find_slices(labels, None) == kept
        np.testing.assert_array_equal(read_labels(labels, kept), expected_label[kept], letters)
        mr = read_image(image, kept, rescale=True)
        rescaled = mr if rescaled is None else rescaled
        np.testing.assert_array_equal(mr, rescaled)
        back = assemble_labels(dict(enumerate(expected_label)), labels.shape, labels.axis, labels.view)
        np.testing.assert_array_equal(back, np.asarray(own_label.dataobj), letters)


class Leaning(nn.Module):
    """A network without weights whose decisions depend on where in the slice a value stands."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        place = torch.linspace(-1, 1, width) + 2 * torch.linspace(-1, 1, height)[:, None]
        return torch.cat([-image - place, image + place], dim=1)


def test_predictions_are_the_same_on_each_files_own_grid(tmp_path: Path):
    values = np.random.default_rng(1).integers(-100, 300, (9, 8, 3)).astype(np.int16)
    ras, masks = nib.Nifti1Image(values, STRAIGHT), {}
    (tmp_path / "scans").mkdir()
    for letters in ALL:
        nib.save(stored_in(ras, letters), tmp_path / "scans" / f"{letters}.nii")
    predictor = replace(volume_predictor(slice_size=(10, 12)), model=Leaning())
    predict_files(predictor, list_sources(tmp_path / "scans", tmp_path / "out"), tmp_path / "out", "")
    for letters in ALL:
        mask = nib.load(tmp_path / "out" / "masks" / "argmax" / f"{letters}.nii.gz")
        np.testing.assert_allclose(mask.affine, stored_in(ras, letters).affine)
        masks[letters] = np.asarray(stored_in(mask, "RAS").dataobj)
    for letters in ALL:
        np.testing.assert_array_equal(masks[letters], masks["RAS"], letters)
    assert 0.2 < (masks["RAS"] > 0).mean() < 0.8


def test_masks_of_prepared_slices_lie_on_their_source(tmp_path: Path):
    label = np.random.default_rng(2).integers(0, 3, (7, 6, 5), dtype=np.uint8)
    own = stored_in(nib.Nifti1Image(label, STRAIGHT), "PIL")
    nib.save(own, tmp_path / "l.nii")
    volume = open_volume(tmp_path / "l.nii", "RAS")
    slices = read_labels(volume, range(5))
    facts = ("i", "l", own.shape, tuple(map(tuple, own.affine.tolist())), volume.spacing, volume.axis, tuple(range(5)))
    (tmp_path / "case").mkdir()
    write_case(tmp_path / "case", Case(*facts, (7, 6), False, False, "RAS"), slices.astype(np.int16), slices)
    stored = {i: read_slice(path)[1] for i, path in enumerate(list_slices(tmp_path / "case"))}
    save_volume(stored, read_case(tmp_path / "case"), tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "back.nii.gz").dataobj), label_of(own))


def label_of(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


def store_otherwise(data_dir: Path, *letters: str) -> None:
    """The hippocampus volumes below a data_dir, image and label alike, in these orientations one after the other."""
    for kind in ("images*", "labels*"):
        for i, path in enumerate(sorted((data_dir / "hippocampus").glob(f"{kind}/hippo*.nii.gz"))):
            save_nifti(path, *turned(path, letters[i % len(letters)]))


def prepared_slices(data_dir: Path) -> dict[str, np.ndarray]:
    cases = list_cases(data_dir / "hippocampus" / "train")
    return {f"{case.name}/{p.name}": np.stack(read_slice(p)) for case in cases for p in list_slices(case)}


def test_a_mixture_gives_the_slices_of_one_orientation(tmp_path: Path, real_data: Path):
    for name, letters in (("one", ("RAS",)), ("mixed", ("LAS", "ASR", "LPS", "PRS"))):
        for kind in ("images", "labels"):
            (tmp_path / name / "hippocampus" / kind).mkdir(parents=True)
            for path in sorted((real_data / "hippocampus" / kind).glob("*.nii.gz"))[:4]:
                shutil.copy(path, tmp_path / name / "hippocampus" / kind)
        store_otherwise(tmp_path / name, *letters)
        prepare_cases("hippocampus", tmp_path / name, 1)
    one, mixed = prepared_slices(tmp_path / "one"), prepared_slices(tmp_path / "mixed")
    assert one.keys() == mixed.keys()
    assert len(one) > 60
    for name in one:
        np.testing.assert_array_equal(one[name], mixed[name], name)
    assert check_prepared(VOLUMES["hippocampus"], tmp_path / "mixed") == []


def make_old(case: Path, letters: str) -> None:
    """A prepared case as an earlier version left it, of a volume that was stored in this orientation."""
    path = case / "case.json"
    content = json.loads(path.read_text())
    content.pop("orientation", None)
    affine = stored_in(nib.Nifti1Image(np.zeros((3, 3, 3)), STRAIGHT), letters).affine
    path.write_text(json.dumps({**content, "affine": affine.tolist()}))


def test_old_slices_say_so(tmp_path: Path, capsys):
    write_hippocampus(tmp_path, [1, 2, 90])
    prepare_cases("hippocampus", tmp_path, 1)
    facts, cases = VOLUMES["hippocampus"], list_cases(tmp_path / "hippocampus" / "train")
    for case in cases:
        make_old(case, "RAS")
    assert check_prepared(facts, tmp_path) == [], "as they would be cut now"
    for case in cases:
        make_old(case, "LPS")
    assert {(f.kind, f.text[:7]) for f in check_prepared(facts, tmp_path)} == {("old slices", "got LPS")}
    prepare_cases("hippocampus", tmp_path, 1)
    assert (
        "3 cases that an earlier version cut as they are stored (LPS); to have them cut as RAS"
        in capsys.readouterr()[0]
    )
    shutil.rmtree(cases[0])
    with pytest.raises(InputError, match="expected all in one orientation"):
        prepare_cases("hippocampus", tmp_path, 1)
    make_old(cases[1], "LAS")
    assert {f.kind for f in check_prepared(facts, tmp_path)} == {"orientation"}
    assert DATASETS["hippocampus"](tmp_path, "train", facts={"fold": 1, "window": (0.0, 1000.0)}).orientations == (
        "LAS",
        "LPS",
    )


def test_a_training_sees_one_orientation_and_its_checkpoint_says_which(program, script, tmp_path: Path):
    write_hippocampus(tmp_path, [1, 2, 80, 81])
    prepare_cases("hippocampus", tmp_path, 1)
    flags = [*TINY, "data.fold=0", "data.train_samples=null", "data.val_samples=2", "--data_yaml", "hippocampus"]
    flags += ["--data_dir", tmp_path, "--output_dir", tmp_path / "runs", "--predict_yaml", "argmax"]
    cases = list_cases(tmp_path / "hippocampus" / "train")
    make_old(cases[0], "LAS")
    status, _, err = program(*flags)
    assert status == 2
    assert "in LAS, RAS, expected one orientation: prepare them again" in err
    for case in cases:
        make_old(case, "LPS")
    status, _, err = program(*flags)
    assert status == 0, err
    assert "slices that an earlier version cut as they are stored (LPS; now all are cut as RAS)" in err
    (run,) = (tmp_path / "runs").iterdir()
    for name in ("iter_0000003.pt", "last.safetensors"):
        assert load_checkpoint(run / "checkpoints" / name).orientation == "LPS"
    shutil.rmtree(tmp_path / "hippocampus" / "train")
    prepare_cases("hippocampus", tmp_path, 1)
    status, _, err = program(*flags, "--test-only")
    assert status == 2
    assert "got a network of slices in LPS, expected one of slices in RAS" in err
    scan, checkpoint = (
        tmp_path / "hippocampus" / "imagesTr" / "hippocampus_001.nii.gz",
        run / "checkpoints" / "iter_0000003.pt",
    )
    (tmp_path / "scans").mkdir()
    for letters in ("LPS", "RAS", "ASR"):
        nib.save(stored_in(nib.load(scan), letters), tmp_path / "scans" / f"{letters}.nii.gz")
    status, _, err = script("predict", checkpoint, tmp_path / "scans", "--output_dir", tmp_path / "out")
    assert status == 0, err
    assert "warning" not in err
    masks = [nib.load(path) for path in sorted((tmp_path / "out").glob("masks/*/*.nii.gz"))]
    assert len({label_of(stored_in(mask, "RAS")).tobytes() for mask in masks}) == 1
    content = torch.load(checkpoint, weights_only=True)
    del content["orientation"]
    torch.save(content, tmp_path / "old.pt")
    status, _, err = script("predict", tmp_path / "old.pt", scan, "--output_dir", tmp_path / "old")
    assert status == 0, err
    assert "old.pt: does not say in which orientation its volumes were, taken as RAS" in err


def test_lits_is_cut_as_before_and_others_alike(tmp_path: Path):
    """Rows and columns of LiTS stay those of the array, where that is LPS."""
    write_lits(tmp_path, [3], side=512)
    folder = tmp_path / "lits" / "Training Batch 1"
    for kind in ("volume", "segmentation"):
        save_nifti(folder / f"{kind}-4.nii", *turned(folder / f"{kind}-3.nii", "SAL"))
    prepare_cases("lits", tmp_path, 1)
    hu, _ = ct_case(3, 512)
    for index in (2, 3):
        for number in (3, 4):
            image, _ = read_slice(tmp_path / "lits" / "train" / f"volume-{number}" / f"{index:04d}.npz")
            np.testing.assert_array_equal(image, hu[index])


def turned(path: Path, letters: str) -> tuple[np.ndarray, np.ndarray]:
    image = stored_in(nib.load(path), letters)
    return np.asarray(image.dataobj), image.affine
