"""Predicted labels as files in the format of a data set's own labels: palette PNGs, or a NIfTI volume per case."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from exp.data.base import IGNORE_INDEX, Sample, SegmentationDataset, label_table
from exp.data.decode import read_label
from exp.data.slice_files import CASE_FILE, Case, read_case
from exp.files.atomic import replacing
from exp.files.nifti import Volume, assemble_labels, save_labels
from exp.files.output_folders import claim_folder
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError

IGNORE_COLOUR = (255, 255, 255)
COMPRESSION = 3  # zlib's: 6, Pillow's default, takes 3.6 times as long for three quarters of the size (CamVid)
STAGED = ".slices"  # masks of slices wait there for the rest of their case


@dataclass(frozen=True)
class MaskFormat:
    """How labels are written.

    values: (C,) uint8, the value in the data set's files that means class c, the lowest where several do. So
    Cityscapes gets the label ids that its server takes, ADE20K 1..150, VOC its palette's indices.
    colours: (256, 3) uint8, the palette by file value.
    """

    values: np.ndarray
    colours: np.ndarray

    def save_png(self, values: np.ndarray, path: Path) -> None:
        """Write (H, W) file values as a palette PNG, all of it or nothing; folders are made."""
        picture = Image.fromarray(values, "L")
        picture.putpalette(self.colours.tobytes())  # which makes it a palette image
        with replacing(path, durable=False) as temporary:
            picture.save(temporary, format="PNG", compress_level=COMPRESSION)


def mask_format(num_classes: int, palette: Sequence[tuple[int, int, int]], label_map: Mapping[int, int]) -> MaskFormat:
    """A data set's facts -> the format of its label files; InputError for a class without a value.

    label_map: file value -> label, for the values that are not their own label.
    """
    table = label_table(num_classes, dict(label_map))
    present, firsts = np.unique(table, return_index=True)
    missing = set(range(num_classes)) - set(present.tolist())
    if missing:
        raise InputError(
            f"data.label_map: got no value for class {min(missing)}, expected one of every class for masks"
        )
    values = firsts[np.searchsorted(present, np.arange(num_classes))].astype(np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    colours[IGNORE_INDEX] = IGNORE_COLOUR
    colours[values] = palette[:num_classes]
    return MaskFormat(values, colours)


class MaskWriter:
    """A sink of the evaluation: each image's masks are written as soon as the rules have decided, by its process.

    <folder>/<rule>/<image>.png; where the data set's slices come from prepared volumes, <folder>/<rule>/<case>.nii.gz
    on the volume's own grid: slices that were turned or resized are turned and resized back, what was cropped away and
    slices that the data set leaves out are 0. <folder>/<rule>.json says what the masks were made from; masks of another
    origin (another checkpoint, window or option) are in <folder>/older/.
    """

    def __init__(
        self, folder: Path, dataset: SegmentationDataset, origins: Mapping[str, Mapping[str, Any]], dist: Dist
    ) -> None:
        """origins: by rule, what its masks are made from. Every rank makes a writer; rank 0 makes the folders."""
        self.folder, self.samples, self.rules, self.dist = folder, dataset.samples, tuple(origins), dist
        self.format = mask_format(len(dataset.classes), dataset.palette, dataset.label_map)
        self._cases: dict[str, Case] = {}
        if dist.is_main:
            for rule, origin in origins.items():
                shutil.rmtree(claim_folder(folder / rule, origin) / STAGED, ignore_errors=True)  # of an interrupted run
        dist.gather(None)

    def __call__(self, index: int, preds: Mapping[str, Tensor]) -> None:
        """The image's index in the data set and (H, W) labels by rule -> files."""
        sample = self.samples[index]
        case = self._case(sample)
        for rule in self.rules:
            values = self.format.values[preds[rule].cpu().numpy()]
            if case is None:
                self.format.save_png(values, self.folder / rule / f"{sample.name}.png")
            else:
                whole = paste_centre(values, case.size)
                self.format.save_png(whole, self.folder / rule / STAGED / sample.case / f"{sample.image.stem}.png")

    def finish(self) -> None:
        """Put the slices of each case together; to be called on every rank, after the last image of all."""
        self.dist.gather(None)
        cases = {sample.case: sample for sample in self.samples if self._case(sample) is not None}
        for rule in self.rules:
            for name in sorted(cases)[self.dist.rank :: self.dist.world_size]:
                staged = self.folder / rule / STAGED / name
                slices = {int(path.stem): read_label(path) for path in staged.glob("[0-9]*.png")}
                save_volume(slices, self._case(cases[name]), self.folder / rule / f"{name}.nii.gz")
        self.dist.gather(None)
        for rule in self.rules if self.dist.is_main else ():
            shutil.rmtree(self.folder / rule / STAGED, ignore_errors=True)

    def _case(self, sample: Sample) -> Case | None:
        """The volume that a sample is a slice of; None if it is an image, or its slices came without a volume."""
        if sample.case is None or sample.image is None:
            return None
        if sample.case not in self._cases:
            folder = sample.image.parent
            self._cases[sample.case] = read_case(folder) if (folder / CASE_FILE).is_file() else None
        return self._cases[sample.case]


def paste_centre(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> (H, W) = size, in the middle of zeros: where the centre crop of an image was taken from."""
    whole = np.zeros(size, values.dtype)
    top, left = ((side - own) // 2 for side, own in zip(size, values.shape))
    whole[top : top + values.shape[0], left : left + values.shape[1]] = values
    return whole


def save_volume(slices: Mapping[int, np.ndarray], grid: Case | Volume, path: Path) -> None:
    """(H, W) file values by slice index -> a NIfTI volume on the grid's shape and affine, all of it or nothing."""
    with replacing(path, durable=False, suffix=".nii.gz") as temporary:
        save_labels(assemble_labels(slices, grid.shape, grid.axis, grid.view), np.array(grid.affine), temporary)
