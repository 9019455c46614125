import dataclasses
import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from exp.data.prepare import facts
from exp.data.prepare.volumes import prepare_cases
from exp.data.sets.camvid import CamVid
from tests.conftest import write_png
from tests.data.trees import write_camvid, write_cityscapes, write_folder
from tests.data.volume_trees import KITS_AFFINE, ct_case, save_nifti, write_kits, write_list

COPIES = 5


@pytest.fixture
def verify(script):
    """A function: data YAML, data_dir, flags -> (exit status, stdout, stderr) of the script, all files shown."""
    shown = ("--workers", 2, "--show", 99)
    return lambda name, data_dir, *flags: script(
        "verify_data", "--data_yaml", name, "--data_dir", data_dir, *shown, *flags
    )


def faults_of(out: str) -> dict[str, set[str]]:
    """The report -> kinds of fault by file."""
    found: dict[str, set[str]] = {}
    kind = None
    for line in out.splitlines():
        if line.startswith("  "):
            if kind:
                found.setdefault(line.split(": ")[0].strip(), set()).add(kind)
        else:
            kind = None if line.startswith("note") else line.split(":")[0]
    return found


def write_images(data_dir: Path, count: int) -> list[tuple[Path, Path]]:
    """A VOC tree of `count` JPEGs and index PNGs, half of them to train -> the pairs."""
    voc, rng, pairs = data_dir / "VOCdevkit" / "VOC2012", np.random.default_rng(0), []
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    names = [f"2007_{i:06d}" for i in range(count)]
    for i, name in enumerate(names):
        label = np.zeros((60, 80), np.uint8)
        label[10:50, i % 40 : 50] = 1 + i % 20
        label[0] = 255
        image = (rng.integers(0, 200, (60, 80, 3)) + 2 * np.minimum(label, 20)[..., None]).astype(np.uint8)
        folder = "SegmentationClassTrainAug" if i < count // 2 else "SegmentationClass"
        pairs.append((voc / "JPEGImages" / f"{name}.jpg", voc / folder / f"{name}.png"))
        Image.fromarray(image).save(pairs[-1][0])
        write_png(pairs[-1][1], label)
    write_list(voc / "ImageSets" / "Segmentation" / "trainaug.txt", names[: count // 2])
    write_list(voc / "ImageSets" / "Segmentation" / "val.txt", names[count // 2 :])
    return pairs


def truncate(image: Path, label: Path, i: int) -> list[Path]:
    path = (image, label)[i % 2]
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    return [path]


def flip_a_bit(image: Path, label: Path, i: int) -> list[Path]:
    data = bytearray(image.read_bytes())
    data[len(data) // 2 + i] ^= 1
    image.write_bytes(data)
    return [image]


def wrong_size(image: Path, label: Path, i: int) -> list[Path]:
    write_png(label, np.ones((60, 81 + i), np.uint8))
    return [label]


def rgb_mask(image: Path, label: Path, i: int) -> list[Path]:
    write_png(label, np.full((60, 80, 3), i, np.uint8))
    return [label]


def value_200(image: Path, label: Path, i: int) -> list[Path]:
    with Image.open(label) as before:
        values = np.array(before)
    values[30, 40 + i] = 200
    write_png(label, values)
    return [label]


def missing_pair(image: Path, label: Path, i: int) -> list[Path]:
    path = (image, label)[i % 2]
    path.unlink()
    return [path]


def empty_file(image: Path, label: Path, i: int) -> list[Path]:
    path = (image, label)[i % 2]
    path.write_bytes(b"")
    return [path]


def swapped_extensions(image: Path, label: Path, i: int) -> list[Path]:
    first, second = image.read_bytes(), label.read_bytes()
    image.write_bytes(second)
    label.write_bytes(first)
    return [image, label]


def nan_volume(image: Path, label: Path, i: int) -> list[Path]:
    values = nib.load(image).get_fdata().astype(np.float32)
    values[3, 4, 5 + i] = np.nan
    save_nifti(image, values, KITS_AFFINE)
    return [image]


def mismatched_affine(image: Path, label: Path, i: int) -> list[Path]:
    affine = KITS_AFFINE.copy()
    affine[i % 3, 3] += 0.5
    save_nifti(label, np.asarray(nib.load(label).dataobj), affine)
    return [label]


IMAGE_DAMAGES: dict[Callable, str] = {
    truncate: "unreadable",
    flip_a_bit: "changed",
    wrong_size: "size",
    rgb_mask: "channels",
    value_200: "label value",
    missing_pair: "unpaired",
    empty_file: "unreadable",
    swapped_extensions: "wrong format",
}
VOLUME_DAMAGES: dict[Callable, str] = {nan_volume: "non-finite", mismatched_affine: "affine"}


def damage(damages: dict[Callable, str], pairs: list[tuple[Path, Path]]) -> dict[str, str]:
    """Damage five pairs in each way -> the kind expected by file."""
    expected = {}
    for number, (hurt, kind) in enumerate(damages.items()):
        for i in range(COPIES):
            for path in hurt(*pairs[number * COPIES + i], i):
                expected[str(path)] = kind
    return expected


def check_found(out: str, expected: dict[str, str]) -> None:
    found = faults_of(out)
    assert set(found) == set(expected)
    for path, kind in expected.items():
        assert kind in found[path], path


def test_forty_damaged_images_are_found_and_fifty_clean_ones_are_not(verify, tmp_path: Path):
    pairs = write_images(tmp_path, 90)
    status, out, err = verify("pascal_voc", tmp_path)
    assert status == 0, out + err
    assert "pascal_voc: 180 files checked, no faults" in out
    assert "pascal_voc.sha256: written" in out
    expected = damage(IMAGE_DAMAGES, pairs)
    assert len({Path(path).stem for path in expected}) == 40
    status, out, _ = verify("pascal_voc", tmp_path)
    assert status == 1
    check_found(out, expected)
    status, out, _ = verify("pascal_voc", tmp_path, "--no_manifest")
    assert status == 1
    found = faults_of(out)
    assert set(found) <= set(expected)
    assert set(found) >= {path for path, kind in expected.items() if kind != "changed"}


def test_ten_damaged_volumes_are_found_and_ten_clean_ones_are_not(verify, tmp_path: Path):
    write_kits(tmp_path, [*range(10), *range(170, 180)], side=24)
    prepare_cases("kits", tmp_path, 1)
    status, out, err = verify("kits", tmp_path)
    assert status == 0, out + err
    assert "note: not prepared: 1 " in out
    assert "case_00210" in out
    folders = [tmp_path / "kits" / f"case_{number:05d}" for number in (*range(5), *range(170, 175))]
    expected = damage(VOLUME_DAMAGES, [(f / "imaging.nii.gz", f / "segmentation.nii.gz") for f in folders])
    assert len(expected) == 10
    status, out, _ = verify("kits", tmp_path)
    assert status == 1
    check_found(out, expected)
    check_found(verify("kits", tmp_path, "--no_manifest")[1], expected)


def truncated_volume(folder: Path) -> None:
    path = folder / "imaging.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])


def truncated_plain_volume(folder: Path) -> None:
    path = folder / "imaging.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))


def empty_volume(folder: Path) -> None:
    (folder / "segmentation.nii.gz").write_bytes(b"")


def constant_volume(folder: Path) -> None:
    save_nifti(folder / "imaging.nii.gz", np.full((6, 24, 24), -1000, np.int16), KITS_AFFINE)


def other_shape(folder: Path) -> None:
    save_nifti(folder / "segmentation.nii.gz", ct_case(0, 25)[1], KITS_AFFINE)


def wrong_label(folder: Path) -> None:
    save_nifti(folder / "segmentation.nii.gz", ct_case(0, 24)[1] * 2, KITS_AFFINE)


def unlabelled(folder: Path) -> None:
    save_nifti(folder / "segmentation.nii.gz", np.zeros((6, 24, 24), np.uint8), KITS_AFFINE)


def lost_slice(folder: Path) -> None:
    (folder.parent / "train" / "case_00000" / "0002.npz").unlink()


def flipped_slice(folder: Path) -> None:
    path = folder.parent / "train" / "case_00000" / "0002.npz"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def constant_slice(folder: Path) -> None:
    path = folder.parent / "train" / "case_00000" / "0002.npz"
    np.savez(path, image=np.full((512, 512), 3, np.int16), label=np.full((512, 512), 2, np.uint8))


@pytest.mark.parametrize(
    ("damage_volume", "kind", "name"),
    [
        (truncated_volume, "unreadable", "kits/case_00000/imaging.nii.gz"),
        (truncated_plain_volume, "unreadable", "kits/case_00000/imaging.nii.gz"),
        (empty_volume, "unreadable", "kits/case_00000/segmentation.nii.gz"),
        (constant_volume, "constant", "kits/case_00000/imaging.nii.gz"),
        (other_shape, "size", "kits/case_00000/segmentation.nii.gz"),
        (wrong_label, "label value", "kits/case_00000/segmentation.nii.gz"),
        (unlabelled, "empty label", "kits/case_00000/segmentation.nii.gz"),
        (lost_slice, "unreadable", "kits/train/case_00000"),
        (flipped_slice, "unreadable", "kits/train/case_00000/0002.npz"),
        (constant_slice, "constant", "kits/train/case_00000/0002.npz"),
    ],
)
def test_other_faults_of_volumes_and_slices(verify, tmp_path: Path, damage_volume, kind: str, name: str):
    write_kits(tmp_path, [0, 50], side=24)
    prepare_cases("kits", tmp_path, 1)
    damage_volume(tmp_path / "kits" / "case_00000")
    status, out, _ = verify("kits", tmp_path)
    assert status == 1
    assert faults_of(out) == {str(tmp_path / name): {kind}}
    assert "kits.sha256: not written, the data set has faults" in out


def test_known_slice_counts_are_checked_when_every_case_is_there(verify, tmp_path: Path, monkeypatch):
    write_kits(tmp_path, [0, 50, 200], side=24)
    prepare_cases("kits", tmp_path, 1)
    for counts, status in (((2, 2, 0, 0, 2), 0), ((2, 2, 0, 2, 0), 1)):
        known = dataclasses.replace(facts.VOLUMES["kits"], total_cases=3, fold_slices=counts)
        monkeypatch.setitem(facts.VOLUMES, "kits", known)
        got, out, _ = verify("kits", tmp_path, "--no_manifest")
        assert got == status
        assert ("count: 1 totals other than the known ones" in out) == bool(status)


def test_volumes_before_their_preparation_and_a_part_of_the_folds(verify, tmp_path: Path):
    write_kits(tmp_path, [100, 101], side=24)
    status, out, _ = verify("kits", tmp_path)
    assert status == 0
    assert "kits.sha256: not written, the data set is not prepared yet" in out
    assert "no slices yet" in out
    assert "note: not prepared: 3 " in out
    prepare_cases("kits", tmp_path, 1)
    status, out, _ = verify("kits", tmp_path, "--no_manifest")
    assert status == 0
    assert "val: 0 images" in out


def test_volumes_without_their_counterpart_are_faults_but_for_test_cases(verify, tmp_path: Path):
    write_kits(tmp_path, [100, 101, 102], side=24)
    prepare_cases("kits", tmp_path, 1)
    lone = [tmp_path / "kits" / name for name in ("case_00103/imaging.nii.gz", "case_00104/segmentation.nii.gz")]
    for path in lone:
        path.parent.mkdir()
        path.write_bytes((tmp_path / "kits" / "case_00100" / path.name).read_bytes())
    status, out, _ = verify("kits", tmp_path)
    assert status == 1
    assert "3 of 210 known cases have slices; not 0..99, 103..209\n" in out
    faults, _, notes = out.partition("note: not prepared")
    assert "unpaired: 2 " in faults
    assert all(str(path) in faults for path in lone)
    assert "case_00210/imaging.nii.gz" in notes
    assert not any(str(path) in notes for path in lone)


def test_a_city_without_labels_is_told_image_by_image(verify, tmp_path: Path):
    write_cityscapes(tmp_path, {"train": 4, "val": 2}, (48, 64))
    (tmp_path / "cityscapes" / "gtFine" / "train" / "bonn").rename(tmp_path / "bonn")
    status, out, _ = verify("cityscapes", tmp_path)
    assert status == 1
    assert "unpaired: 2 " in out
    assert "train: 2 of 2975 known images" in out


def test_totals_are_those_of_the_split(verify, tmp_path: Path, monkeypatch):
    write_camvid(tmp_path, {"train": 3, "test": 2})
    test_split = ("--no_manifest", "--set", "data.val_split=test")
    status, out, _ = verify("camvid", tmp_path, *test_split)
    assert status == 0
    assert "val: 2 of 233 known images" in out
    monkeypatch.setattr(CamVid, "totals", {"train": 3, "test": 1})
    status, out, _ = verify("camvid", tmp_path, *test_split)
    assert status == 1
    assert "count: 1 " in out
    assert "got 2 images in split 'test', expected 1 at most" in out


def test_masks_may_lie_beside_their_images(verify, tmp_path: Path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        write_png(tmp_path / f"{split}.png", np.full((8, 8), 1, np.uint8))
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / f"{split}.jpg")
        write_list(tmp_path / f"{split}_images.txt", [f"{split}.jpg"])
        write_list(tmp_path / f"{split}_labels.txt", [f"{split}.png"])
    lists = ("data.images='{split}_images.txt'", "data.labels='{split}_labels.txt'")
    status, out, _ = verify("folder", tmp_path, "--set", *lists)
    assert status == 0, out
    assert "folder: 4 files checked, no faults" in out


def test_every_lonely_file_of_a_folder_is_told(verify, tmp_path: Path):
    write_folder(tmp_path, {"train": 4, "val": 2})
    (tmp_path / "train" / "labels" / "photo 0.png").unlink()
    (tmp_path / "train" / "images" / "photo 2.jpg").unlink()
    status, out, _ = verify("folder", tmp_path)
    assert status == 1
    assert "unpaired: 2 " in out
    assert "photo 0.png" in out
    assert "photo 2.jpg" in out


def test_manifest_is_sha256sums_and_never_written_again(verify, camvid_dir: Path, tmp_path: Path):
    manifest = tmp_path / "sums.txt"
    assert verify("camvid", camvid_dir, "--manifest", manifest)[0] == 0
    assert not (camvid_dir / "camvid.sha256").exists()
    subprocess.run(["sha256sum", "--check", "--quiet", manifest], cwd=camvid_dir, check=True)
    before = manifest.read_bytes()
    write_png(camvid_dir / "camvid" / "val" / "new.png", np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    write_png(camvid_dir / "camvid" / "valannot" / "new.png", np.ones((48, 64), np.uint8))
    (camvid_dir / "camvid" / "val" / "val_0.png").unlink()
    (camvid_dir / "camvid" / "valannot" / "val_0.png").unlink()
    status, out, _ = verify("camvid", camvid_dir, "--manifest", manifest)
    assert status == 1
    assert "note: not in the manifest: 2 " in out
    assert faults_of(out) == {
        str(camvid_dir / "camvid" / folder / "val_0.png"): {"changed"} for folder in ("val", "valannot")
    }
    assert manifest.read_bytes() == before
    manifest.write_text("nonsense\n")
    status, _, err = verify("camvid", camvid_dir, "--manifest", manifest)
    assert status == 2
    assert "sums.txt: got a line 1 that is no" in err


def test_notes_are_no_faults(verify, voc_dir: Path):
    root = voc_dir / "VOCdevkit" / "VOC2012"
    first, second = sorted((root / "JPEGImages").glob("*trainaug*"))[:2]
    second.write_bytes(first.read_bytes())
    with Image.open(first) as image:
        empty = np.zeros(image.size[::-1], np.uint8)
    write_png(root / "SegmentationClassTrainAug" / f"{second.stem}.png", empty)
    status, out, _ = verify("pascal_voc", voc_dir, "--no_manifest")
    assert status == 0
    assert "note: only background: 1 " in out
    assert "note: identical images: 1 " in out
    assert "train: 6 of 10582 known images" in out


def test_duplicate_names_and_masks_without_a_counted_pixel(verify, voc_dir: Path):
    root = voc_dir / "VOCdevkit" / "VOC2012"
    names = root / "ImageSets" / "Segmentation" / "val.txt"
    first, second = names.read_text().split()[:2]
    names.write_text(names.read_text() + f"{first}\n")
    path = root / "SegmentationClass" / f"{second}.png"
    with Image.open(path) as label:
        ignored = np.full(label.size[::-1], 255, np.uint8)
    write_png(path, ignored)
    assert faults_of(verify("pascal_voc", voc_dir, "--no_manifest")[1]) == {
        str(root / "JPEGImages" / f"{first}.jpg"): {"duplicate name"},
        str(path): {"empty label"},
    }


def test_what_cannot_be_read_at_all_is_status_2(verify, camvid_dir: Path, tmp_path: Path):
    (tmp_path / "manifest").write_bytes(b"\xff\xfe")
    status, _, err = verify("camvid", camvid_dir, "--manifest", tmp_path / "manifest")
    assert status == 2
    assert f"{tmp_path / 'manifest'}: got a file that cannot be read" in err
    assert verify("camvid", tmp_path)[0] == 2
    assert "known: " in verify("canvid", tmp_path)[2]
    assert "made on the fly" in verify("shapes", tmp_path)[2]
    assert "expected 1 or more workers" in verify("camvid", tmp_path, "--workers", 0)[2]


def test_real_camvid_has_no_faults(verify, real_data: Path, tmp_path: Path):
    for folder in ("train", "trainannot", "val", "valannot"):
        (tmp_path / "camvid" / folder).mkdir(parents=True)
        for path in sorted((real_data / "camvid" / folder).iterdir())[:12]:
            (tmp_path / "camvid" / folder / path.name).symlink_to(path)
    status, out, _ = verify("camvid", tmp_path)
    assert status == 0
    assert "train: 12 of 367 known images" in out
    assert "camvid: 48 files checked, no faults" in out


def test_affines_that_are_to_be_ignored_are_a_note(verify, tmp_path: Path):
    write_kits(tmp_path, [0, 1])
    case = tmp_path / "kits" / "case_00001"
    mismatched_affine(case / "imaging.nii.gz", case / "segmentation.nii.gz", 0)
    prepare_cases("kits", tmp_path, 1, check_affine=False)
    status, out, _ = verify("kits", tmp_path, "--no_manifest")
    assert status == 1
    assert "affine" in out
    status, out, err = verify("kits", tmp_path, "--ignore_affine")
    assert status == 0, out + err
    assert "which was to be ignored" in out
    assert (tmp_path / "kits.sha256").is_file()
