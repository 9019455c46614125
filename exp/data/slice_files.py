"""Slices of volumes as training reads them: one .npz a slice, and the case they come from."""

import json
import math
import re
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exp.files.arrays import read_member
from exp.files.nifti import (
    MAX_SIDE,
    MAX_VOXELS,
    View,
    is_orientation,
    orientation_of,
    resize_image,
    resize_labels,
    slice_view,
)
from exp.files.paths import visible_files
from exp.files.text import read_json, require_file
from exp.runtime.errors import InputError, decoding

MAX_SLICE = MAX_SIDE**2 * 2 + 4096  # bytes of an array in a slice file
EXPECTED = "a slice of scripts/prepare_data.py, with 'image' int16 and 'label' uint8 of the same size"
CASE_FILE = "case.json"


@dataclass(frozen=True)
class Case:
    """Where prepared slices come from, as written to case.json beside them.

    image, label: the source files' names relative to the data set's folder. shape, affine, spacing: the source's
    grid. slices: indices along `axis`. size: (H, W) of the slice files. rescaled: MR intensities were (read_image).
    orientation: the one that slices and their indices are in, whatever the source's; None: cut by an earlier version,
    as the source stores them.
    """

    image: str
    label: str
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    spacing: tuple[float, float, float]
    axis: int
    slices: tuple[int, ...]
    size: tuple[int, int]
    resized: bool
    rescaled: bool
    orientation: str | None = None

    @property
    def seen(self) -> str:
        """The orientation that the slices are in."""
        return self.orientation or orientation_of(np.array(self.affine), Path(self.image))

    @property
    def view(self) -> View:
        """How the slices stand to the source's array."""
        return slice_view(np.array(self.affine), Path(self.image), self.orientation)


def write_case(folder: Path, case: Case, images: np.ndarray, labels: np.ndarray) -> None:
    """Write <folder>/<slice:04d>.npz for each of case.slices, and case.json; the folder is there and empty.

    images: (N, H, W) int16, labels: (N, H, W) uint8, of the source's size; they are resized to case.size.
    """
    for index, image, label in zip(case.slices, images, labels, strict=True):
        arrays = {"image": resize_image(image, case.size), "label": resize_labels(label, case.size)}
        np.savez(folder / f"{index:04d}.npz", **arrays)
    (folder / CASE_FILE).write_text(json.dumps(asdict(case), indent=1) + "\n", encoding="utf-8")


def read_case(folder: Path) -> Case:
    """A case's folder -> its case.json; InputError if that is missing or damaged."""
    path, expected = folder / CASE_FILE, "what scripts/prepare_data.py writes"
    values = read_json(path, expected)
    with decoding(path, expected):
        case = Case(**{key: _tuples(value) for key, value in values.items()})
        affine = np.asarray(case.affine, np.float64)
        valid = (
            len(case.shape) == 3
            and all(type(side) is int and 0 < side <= MAX_SIDE for side in (*case.shape, *case.size))
            and math.prod(case.shape) <= MAX_VOXELS
            and affine.shape == (4, 4)
            and bool(np.isfinite(affine).all())
            and case.axis in (0, 1, 2)
            and all(type(index) is int and 0 <= index < case.shape[case.axis] for index in case.slices)
            and len(case.size) == 2
            and (case.orientation is None or is_orientation(case.orientation))
        )
    if not valid:
        raise InputError(f"{path}: got values that fit no volume, expected {expected}")
    return case


def list_cases(folder: Path) -> list[Path]:
    """The folder of prepared slices -> the cases' folders by their numbers; what has no case.json is no case."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (scripts/prepare_data.py makes it)")
    cases = (path.parent for path in visible_files(folder, f"*/{CASE_FILE}"))
    return sorted(cases, key=lambda case: (case_number(case.name), case.name))


def find_orientations(cases: Iterable[Path]) -> tuple[str, ...]:
    """Cases' folders -> the orientations that their slices are in, one if all is well."""
    return tuple(sorted({read_case(folder).seen for folder in cases}))


def list_slices(folder: Path) -> list[Path]:
    """A case's folder -> its slice files in the volume's order."""
    return visible_files(folder, "*.npz")


def case_number(name: str) -> int:
    """The last whole number in a case's name: 12 for 'volume-12' and for 'case_00012'."""
    numbers = re.findall(r"\d+", name)
    if not numbers:
        raise InputError(f"{name}: got a case without a number, expected one such as case_00012")
    return int(numbers[-1])


def read_slice(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A slice file -> (H, W) int16 image and (H, W) uint8 label; InputError for anything else. Nothing is unpickled."""
    require_file(path, EXPECTED, 2 * MAX_SLICE)
    with decoding(path, EXPECTED), zipfile.ZipFile(path) as archive:
        if sorted(archive.namelist()) != ["image.npy", "label.npy"]:
            raise ValueError(f"members {archive.namelist()}")
        if (size := max(member.file_size for member in archive.infolist())) > MAX_SLICE:
            raise ValueError(f"an array of {size} bytes")
        image, label = read_member(archive, "image"), read_member(archive, "label")
        if (image.dtype, label.dtype, image.ndim) != (np.int16, np.uint8, 2) or image.shape != label.shape:
            raise ValueError(f"{image.dtype} of shape {image.shape}, {label.dtype} of shape {label.shape}")
    return image, label


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
