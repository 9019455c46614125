"""Small trees in the owners' layouts and encodings: NIfTI volumes of LiTS, KiTS19, the hippocampus; VOC with SBD."""

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy.io import savemat

LITS_AFFINE = np.array([[-0.7, 0, 0, 172.9], [0, -0.7, 0, 179.3], [0, 0, 5.0, -368.7], [0, 0, 0, 1]])
KITS_AFFINE = np.array([[0, 0, -0.9, 0], [0, -0.9, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1.0]])
NAMES = [f"2008_{i:06d}" for i in range(12)]


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def ct_case(seed: int, side: int = 48, depth: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """(depth, side, side) int16 HU of a body, an organ and, in slices 2 and 3, a darker tumour; uint8 labels 0..2."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    label = np.zeros((depth, side, side), np.uint8)
    label[1 : depth - 1, (x + 0.1) ** 2 + y**2 < 0.09] = 1
    label[2:4, (x + 0.1) ** 2 + (y - rng.uniform(-0.1, 0.1)) ** 2 < 0.02] = 2
    hu = np.where(x**2 + y**2 < 0.2, 40.0, -1000.0) + np.array([0.0, 70, -20])[label] + rng.normal(0, 10, label.shape)
    return np.rint(hu).astype(np.int16), label


def write_lits(data_dir: Path, numbers: list[int], side: int = 48) -> None:
    """lits/Training Batch {1,2}/{volume,segmentation}-N.nii, slices along the last axis; a test volume beside them."""
    for number in numbers:
        folder = data_dir / "lits" / f"Training Batch {1 if number < 28 else 2}"
        hu, label = ct_case(number, side)
        save_nifti(folder / f"volume-{number}.nii", np.moveaxis(hu, 0, 2), LITS_AFFINE)
        save_nifti(folder / f"segmentation-{number}.nii", np.moveaxis(label, 0, 2), LITS_AFFINE)
    save_nifti(data_dir / "lits" / "test" / "test-volume-0.nii", np.zeros((4, 4, 4), np.int16), LITS_AFFINE)


def write_kits(data_dir: Path, numbers: list[int], side: int = 48) -> None:
    """kits/case_NNNNN/{imaging,segmentation}.nii.gz, slices along the first axis; a test case without segmentation."""
    for number in numbers:
        folder = data_dir / "kits" / f"case_{number:05d}"
        hu, label = ct_case(number, side)
        save_nifti(folder / "imaging.nii.gz", hu, KITS_AFFINE)
        save_nifti(folder / "segmentation.nii.gz", label, KITS_AFFINE)
    save_nifti(data_dir / "kits" / "case_00210" / "imaging.nii.gz", ct_case(210)[0], KITS_AFFINE)


def write_hippocampus(data_dir: Path, numbers: list[int]) -> None:
    """hippocampus/{imagesTr,labelsTr}/hippocampus_NNN.nii.gz, labels 0..2, sizes that differ; macOS's files beside."""
    root = data_dir / "hippocampus"
    for number in numbers:
        hu, label = ct_case(number, 40 + number % 3)
        name = f"hippocampus_{number:03d}.nii.gz"
        save_nifti(root / "imagesTr" / name, (np.moveaxis(hu, 0, 2) + 1100).astype(np.float32) * 50, np.eye(4))
        save_nifti(root / "labelsTr" / name, np.moveaxis(label, 0, 2), np.eye(4))
        (root / "imagesTr" / f"._{name}").write_bytes(b"\0\5\26\7")
    save_nifti(root / "imagesTs" / "hippocampus_002.nii.gz", np.ones((4, 4, 4), np.float32), np.eye(4))


def write_mat(path: Path, label: np.ndarray) -> None:
    """SBD's dataset/cls/*.mat: a struct GTcls of Boundaries, Segmentation and CategoriesPresent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    present = np.setdiff1d(label, [0]).astype(np.float64)[:, None]
    content = {"Boundaries": np.zeros((20, 1), object), "Segmentation": label, "CategoriesPresent": present}
    savemat(path, {"GTcls": content}, do_compression=True)


def write_voc(data_dir: Path, sides: tuple[int, int] = (60, 80)) -> dict[str, np.ndarray]:
    """VOC 2012 and SBD of twelve images as unpacked -> SBD's labels by name.

    VOC: train 0..3, val 4..6, palette PNGs with ignored borders. SBD: train 2..7, val 8..11, so that its lists hold
    an image of VOC's train (2, 3) and of VOC's val (4, 5, 6).
    """
    voc, sbd = data_dir / "VOCdevkit" / "VOC2012", data_dir / "VOCdevkit" / "VOCaug" / "benchmark_RELEASE" / "dataset"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    rng, labels = np.random.default_rng(0), {}
    for i, name in enumerate(NAMES):
        label = np.zeros(sides, np.uint8)
        label[10 + i : 40, 20:50] = 1 + i
        image = (rng.integers(0, 60, (*sides, 3)) + 9 * label[..., None]).astype(np.uint8)
        Image.fromarray(image).save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
        labels[name] = label
        if i < 7:
            own = label.copy()
            own[0], own[-1] = 255, i  # differs from SBD's
            picture = Image.fromarray(own)
            picture.putpalette(bytes(range(256)) * 3)
            picture.save(voc / "SegmentationClass" / f"{name}.png")
        if i >= 2:
            write_mat(sbd / "cls" / f"{name}.mat", label)
    write_list(voc / "ImageSets" / "Segmentation" / "train.txt", NAMES[:4])
    write_list(voc / "ImageSets" / "Segmentation" / "val.txt", NAMES[4:7])
    write_list(sbd / "train.txt", NAMES[2:8])
    write_list(sbd / "val.txt", NAMES[8:])
    return labels


def write_list(path: Path, names: list[str]) -> None:
    path.write_text("\n".join(names) + "\n")
