import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from exp.data.slice_files import Case, case_number, list_cases, list_slices, read_case, read_slice, write_case
from exp.files import nifti as volumes
from exp.files.nifti import assemble_labels, find_slices, open_pair, open_volume, read_image, read_labels, save_labels
from exp.runtime.errors import InputError

SUPERIOR_LAST = np.diag([0.7, 0.7, 3.0, 1.0])
SUPERIOR_FIRST = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1.0]])  # as KiTS19
SUPERIOR_SECOND = np.array([[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1.0]])


def save(path: Path, values: np.ndarray, affine: np.ndarray = SUPERIOR_LAST, slope=None, inter=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


def ct(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3000, shape, dtype=np.int16)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("affine", "axis"), [(SUPERIOR_LAST, 2), (SUPERIOR_FIRST, 0), (SUPERIOR_SECOND, 1)])
def test_slices_are_those_of_nibabel_along_the_superior_axis(tmp_path: Path, suffix: str, affine, axis: int):
    values, label = ct((5, 6, 7)), np.zeros((5, 6, 7), np.uint8)
    wanted = [1, 3, 4]
    for index in wanted:
        np.moveaxis(label, axis, 0)[index, 2, 3] = 2
    np.moveaxis(label, axis, 0)[0] = 1
    image, labels = open_pair(
        save(tmp_path / f"i{suffix}", values, affine), save(tmp_path / f"l{suffix}", label, affine)
    )
    assert image.axis == axis
    assert image.num_slices == values.shape[axis]
    np.testing.assert_allclose(image.spacing, np.linalg.norm(affine[:3, :3], axis=0))
    assert find_slices(labels, 2) == wanted
    assert find_slices(labels, None) == [0, *wanted]
    got = read_image(image, wanted)
    assert got.dtype == np.int16
    assert got.shape[1:] == image.slice_shape
    np.testing.assert_array_equal(got, np.moveaxis(values, axis, 0)[wanted])
    np.testing.assert_array_equal(read_labels(labels, wanted), np.moveaxis(label, axis, 0)[wanted])


@pytest.mark.parametrize(
    ("dtype", "slope", "inter"),
    [(np.int16, 2.0, -1024.0), (np.uint8, 1.0, -1000.0), (np.float64, None, None), ("<u2", None, None), (">i2", 1, 0)],
)
def test_stored_values_become_rounded_and_clipped_hu(tmp_path: Path, dtype, slope, inter):
    rng = np.random.default_rng(1)
    stored = rng.uniform(0, 255, (4, 5, 3)) if dtype is np.float64 else rng.integers(0, 250, (4, 5, 3))
    stored = stored.astype(dtype)
    stored[0, 0, 0] = min(60000, np.finfo(dtype).max if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max)
    image = open_volume(save(tmp_path / "i.nii", stored, slope=slope, inter=inter))
    expected = np.rint(stored.astype(float) * (slope or 1) + (inter or 0)).clip(-32768, 32767)
    np.testing.assert_array_equal(read_image(image, [0, 1, 2]), np.moveaxis(expected, 2, 0))
    np.testing.assert_array_equal(nib.load(image.path).get_fdata(), stored.astype(float) * (slope or 1) + (inter or 0))


def test_mr_percentiles_become_0_and_1000(tmp_path: Path):
    values = np.random.default_rng(2).gamma(2.0, 300000, (20, 21, 22)).astype(np.float32)
    image = open_volume(save(tmp_path / "mr.nii.gz", values))
    low, high = np.percentile(values, (0.5, 99.5))
    expected = (np.moveaxis(values, 2, 0)[[3, 9]] - low) / (high - low) * 1000
    np.testing.assert_allclose(read_image(image, [3, 9], rescale=True), expected, atol=0.51)
    flat = open_volume(save(tmp_path / "flat.nii", np.full((4, 4, 4), 7, np.float32)))
    with pytest.raises(InputError, match=r"flat\.nii: got the same intensity 7"):
        read_image(flat, [0], rescale=True)


def test_real_ct_has_nibabels_hu_and_orientation(real_data: Path):
    folder = real_data / "ct_sample"
    image, label = open_pair(folder / "example_ct_sm.nii.gz", folder / "example_seg.nii.gz")
    hu, organs = (nib.load(v.path).get_fdata() for v in (image, label))
    assert image.axis == 2
    assert image.spacing == pytest.approx((3, 3, 3))
    np.testing.assert_array_equal(read_image(image, range(30)), np.moveaxis(hu, 2, 0))
    kidney = find_slices(label, 2)
    assert kidney == [k for k in range(30) if (organs[..., k] == 2).any()]
    assert kidney
    np.testing.assert_array_equal(read_labels(label, kidney), np.moveaxis(organs, 2, 0)[kidney])
    liver = hu[organs == 5]  # a human liver is at 40 to 70 HU, more with contrast medium
    assert 30 < np.median(liver) < 160


def test_prepared_case_comes_back(tmp_path: Path):
    images, labels = ct((2, 30, 40)), np.random.default_rng(3).integers(0, 3, (2, 30, 40), dtype=np.uint8)
    case = Case(
        "volume-3.nii",
        "segmentation-3.nii",
        (30, 40, 9),
        tuple(map(tuple, SUPERIOR_LAST.tolist())),
        (0.7, 0.7, 3.0),
        2,
        (4, 7),
        (30, 40),
        False,
        False,
    )
    folder = tmp_path / "train" / "volume-3"
    folder.mkdir(parents=True)
    write_case(folder, case, images, labels)
    (tmp_path / "train" / "half").mkdir()
    assert list_cases(tmp_path / "train") == [folder]
    assert read_case(folder) == case
    assert [p.name for p in list_slices(folder)] == ["0004.npz", "0007.npz"]
    for place, path in enumerate(list_slices(folder)):
        image, label = read_slice(path)
        assert image.flags.c_contiguous
        assert image.flags.writeable
        assert (image.dtype, label.dtype) == (np.int16, np.uint8)
        np.testing.assert_array_equal(image, images[place])
        np.testing.assert_array_equal(label, labels[place])


def test_other_sizes_are_resized_and_come_back(tmp_path: Path):
    label = np.zeros((1, 40, 50), np.uint8)
    label[0, 10:30, 15:40] = 2
    image = (label * 100).astype(np.int16) - 50
    values = ((40, 50, 3), tuple(map(tuple, np.eye(4).tolist())), (1.0, 1.0, 1.0), 2, (1,), (512, 512), True, False)
    write_case(tmp_path, Case("i", "l", *values), image, label)
    big_image, big_label = read_slice(tmp_path / "0001.npz")
    assert big_image.shape == big_label.shape == (512, 512)
    assert set(np.unique(big_label)) == {0, 2}
    assert (big_image.min(), big_image.max()) == (-50, 150)
    inner = big_image[big_label == 2]
    assert (inner == 150).mean() > 0.9  # both are resized to the same place
    back = assemble_labels({1: big_label}, (40, 50, 3), 2)
    np.testing.assert_array_equal(back[..., 1], label[0])
    assert not back[..., [0, 2]].any()


@pytest.mark.parametrize(("affine", "axis"), [(SUPERIOR_LAST, 2), (SUPERIOR_FIRST, 0), (SUPERIOR_SECOND, 1)])
def test_labels_go_back_onto_the_grid(tmp_path: Path, affine, axis: int):
    truth = np.random.default_rng(4).integers(0, 3, (6, 7, 8), dtype=np.uint8)
    volume = open_volume(save(tmp_path / "truth.nii", truth, affine))
    slices = dict(zip(range(volume.num_slices), read_labels(volume, range(volume.num_slices))))
    labels = assemble_labels(slices, volume.shape, volume.axis)
    save_labels(labels, volume.affine, tmp_path / "back.nii.gz")
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), truth)
    np.testing.assert_allclose(back.affine, affine)
    assert back.get_data_dtype() == np.uint8


def test_memory_is_that_of_the_slices_read(tmp_path: Path):
    for affine, name in ((SUPERIOR_LAST, "last"), (SUPERIOR_FIRST, "first")):
        volume = open_volume(save(tmp_path / f"{name}.nii.gz", np.zeros((128, 128, 128), np.int16), affine))
        tracemalloc.start()
        read_image(volume, [3, 4])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * 128 * 128 * 2 * 8  # the volume has 64 times the two slices


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_kind(path: Path) -> None:
    path.write_bytes(b"\x89PNG" + bytes(900))


def swapped(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(gzip.decompress(data) if path.suffix == ".gz" else gzip.compress(data))


def absurd(path: Path) -> None:
    save(path, np.zeros((4, 4, 4), np.int16))
    data = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    data[40:56] = np.array([3, 4096, 4096, 4096, 1, 1, 1, 1], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(data)) if path.suffix == ".gz" else bytes(data))


def absurd_side(path: Path) -> None:
    save(path, np.zeros((5000, 1, 1), np.int16))


def four_dimensions(path: Path) -> None:
    save(path, np.zeros((3, 3, 3, 2), np.int16))


def colours(path: Path) -> None:
    save(path, np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "got a file"),
        (empty, "got a file that cannot be read"),
        (other_kind, "got a file that cannot be read"),
        (swapped, "got a file that cannot be read"),
        (absurd, r"got a file of \d+ bytes, expected the 137438953824"),
        (absurd_side, "got 5000x1x1 voxels, expected three sides of 1 to 4096"),
        (four_dimensions, "got 3x3x3x2 voxels, expected three sides"),
        (colours, "got voxels of type"),
    ],
)
def test_damaged_volumes_are_named(tmp_path: Path, suffix: str, damage, reason: str):
    path = save(tmp_path / f"volume{suffix}", ct((12, 12, 12)))
    damage(path)
    with pytest.raises(InputError, match=rf"volume{suffix}: {reason}"):
        read_image(open_volume(path), range(12))


def test_a_wrong_checksum_is_found_by_a_full_pass(tmp_path: Path):
    path = save(tmp_path / "label.nii.gz", np.zeros((9, 9, 9), np.uint8))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="CRC"):
        find_slices(open_volume(path), 2)


def test_a_missing_volume(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.nii: no such file"):
        open_volume(tmp_path / "none.nii")


def test_nan_voxels_and_label_values_that_are_no_classes(tmp_path: Path):
    values = np.zeros((4, 4, 4), np.float32)
    values[1, 1, 1] = np.nan
    with pytest.raises(InputError, match="got NaN"):
        read_image(open_volume(save(tmp_path / "nan.nii", values)), range(4))
    for wrong in (1.5, -1, 256):
        values[1, 1, 1] = wrong
        with pytest.raises(InputError, match=f"got label value {wrong}"):
            find_slices(open_volume(save(tmp_path / "label.nii", values)), 2)


def test_a_pair_must_share_its_grid(tmp_path: Path):
    image = save(tmp_path / "i.nii", ct((4, 5, 6)))
    with pytest.raises(InputError, match=r"l\.nii: got 4x5x7 voxels, expected 4x5x6 as in .*i\.nii"):
        open_pair(image, save(tmp_path / "l.nii", np.zeros((4, 5, 7), np.uint8)))
    shifted = SUPERIOR_LAST.copy()
    shifted[0, 3] = 0.05  # less than a tenth of a voxel
    open_pair(image, save(tmp_path / "l.nii", np.zeros((4, 5, 6), np.uint8), shifted))
    flipped = SUPERIOR_LAST @ np.diag([-1.0, 1, 1, 1])
    label = save(tmp_path / "l.nii", np.zeros((4, 5, 6), np.uint8), flipped)
    with pytest.raises(InputError, match=r"l\.nii: got an affine that puts voxels up to"):
        open_pair(image, label)
    assert open_pair(image, label, check_affine=False)[1].axis == 2


def test_an_affine_without_directions(tmp_path: Path):
    with pytest.raises(InputError, match="got the affine"):
        volumes.axial_axis(np.diag([1.0, 0, 1, 1]), tmp_path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": np.zeros((3, 3), np.int16)},
        {"image": np.zeros((3, 3), np.float32), "label": np.zeros((3, 3), np.uint8)},
        {"image": np.zeros((3, 4), np.int16), "label": np.zeros((3, 3), np.uint8)},
        {"image": np.zeros((1, 3, 3), np.int16), "label": np.zeros((1, 3, 3), np.uint8)},
        {"image": np.array([[{}]]), "label": np.zeros((1, 1), np.uint8)},
        {"image": np.zeros((3, 3), np.int16), "label": np.zeros((3, 3), np.uint8), "more": np.zeros(1)},
    ],
)
def test_other_files_are_no_slices(tmp_path: Path, arrays: dict):
    np.savez(tmp_path / "0001.npz", **arrays)
    with pytest.raises(InputError, match=r"0001\.npz: got .*expected a slice of scripts/prepare_data\.py"):
        read_slice(tmp_path / "0001.npz")


@pytest.mark.parametrize("position", [0, 200, -300])
def test_damaged_slices_are_named(tmp_path: Path, position: int):
    path = tmp_path / "0001.npz"
    np.savez(path, image=ct((30, 30)), label=np.zeros((30, 30), np.uint8))
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"0001\.npz: got"):
        read_slice(path)
    path.write_bytes(data[:100])
    with pytest.raises(InputError, match=r"0001\.npz: got"):
        read_slice(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"image": 3}'])
def test_a_damaged_case_file_is_named(tmp_path: Path, text: str):
    with pytest.raises(InputError, match=r"case\.json: no such file"):
        read_case(tmp_path)
    (tmp_path / "case.json").write_text(text)
    with pytest.raises(InputError, match=r"case\.json: got a file that cannot be read"):
        read_case(tmp_path)


def test_case_numbers():
    assert [case_number(name) for name in ("volume-12", "case_00012", "hippocampus_394")] == [12, 12, 394]
    with pytest.raises(InputError, match="without a number"):
        case_number("liver")
