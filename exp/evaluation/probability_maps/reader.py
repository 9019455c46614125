"""A map and its label file -> units: what a rule decides at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from exp.data.base import IGNORE_INDEX, SegmentationDataset, label_table
from exp.evaluation.probability_maps.files import is_nifti, read_array, read_label_values, stem
from exp.evaluation.probability_maps.logits import Decoding
from exp.files.nifti import MAX_VOXELS
from exp.runtime.errors import InputError, describe_numbers
from exp.runtime.progress import follow


@dataclass(frozen=True)
class Unit:
    """What a rule decides at a time: (C, *spatial) probabilities and (*spatial) uint8 labels, 0..C-1 or 255.

    Of classes that overlap: (C, *spatial) labels, 0, 1 or 255.
    """

    name: str
    case: str | None
    source: str  # where it comes from, for messages
    prob: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class MapReader:
    """How files become units.

    key: the array of an .npz file; None: `probabilities`, `softmax` (of logits: `logits`), or the only one.
    unit: of a (C, D, H, W) map, each slice is a unit with the map as its case, or the whole case is one.
    slice_axis: the spatial axis of a (C, D, H, W) map along which slices lie.
    label_axes: the label file's axes in the map's order. "auto" takes images and .npy as they are. A NIfTI file is
        stored x, y, z and most maps of volumes z, y, x: it is taken reversed or as it is, whichever fits the map's
        shape, and refused where both do.
    ignore_label: a value of the label files that does not count, besides 255.
    tolerance: how far a pixel's probabilities may sum from 1.
    decoding: maps are logits, and become probabilities so; those of images at the label's size.
    overlapping: classes overlap, each has a probability of its own. Labels are (C, *spatial) masks of 0 and 1, or,
    regions: by class the values of a label file that are in it; what is in none is 0.
    """

    key: str | None = None
    unit: Literal["slice", "case"] = "slice"
    slice_axis: int = 0
    label_axes: Literal["auto", "same", "reversed"] = "auto"
    ignore_label: int = IGNORE_INDEX
    tolerance: float = 2e-3  # float16 rounds a sum by up to 5e-4, and a resampled softmax is off by as much
    decoding: Decoding | None = None
    overlapping: bool = False
    regions: tuple[tuple[int, ...], ...] | None = None

    def units(self, map_path: Path, label_path: Path) -> Iterator[Unit]:
        """The units of one map; InputError with the path, what was got and what was expected."""
        yield from self.split(stem(map_path), str(map_path), *self.read_pair(map_path, label_path))

    def split(
        self, name: str, source: str, prob: np.ndarray, label: np.ndarray, case: str | None = None
    ) -> Iterator[Unit]:
        """(C, *spatial) probabilities and their labels -> units. case: of which an image is a slice, if of any."""
        first = self.overlapping  # the labels' first spatial axis
        if prob.ndim == 4 and label.ndim - first == 2:  # nnU-Net gives a 2-D image a first axis of length 1
            prob = prob[:, 0]
        if prob.ndim == 3 or self.unit == "case":
            yield Unit(name, case if prob.ndim == 3 else name, source, prob, label)
            return
        for i in range(prob.shape[1 + self.slice_axis]):
            part = np.take(prob, i, axis=1 + self.slice_axis), np.take(label, i, axis=first + self.slice_axis)
            yield Unit(f"{name}/{i:04d}", name, source, *part)

    def read_pair(self, map_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Files -> (C, *spatial) probabilities and their labels."""
        if self.decoding is None:
            prob = self.read_map(map_path)
            return prob, self.read_label(label_path, prob.shape)
        stored, decoding = self.decoding.read(map_path, self.key)
        self._check_shape(map_path, stored)
        label = self.read_label(label_path, stored.shape, resized=stored.ndim == 3)
        return decoding.decode(stored, label.shape[-2:], self.overlapping, map_path), label

    def count_classes(self, path: Path) -> int:
        if self.decoding is None:
            return len(self.read_map(path))
        stored, _ = self.decoding.read(path, self.key)
        self._check_shape(path, stored)
        return len(stored)

    def _check_shape(self, path: Path | str, values: np.ndarray) -> None:
        fewest = 1 if self.overlapping else 2
        if not (values.ndim in (3, 4) and fewest <= len(values) <= IGNORE_INDEX and 0 < values[0].size <= MAX_VOXELS):
            hint = "" if self.overlapping else " (a foreground alone is written as 1 - p and p)"
            raise InputError(
                f"{path}: got {values.dtype} values of shape {values.shape}, expected (C, H, W) or (C, D, H, W) of "
                f"{fewest}..{IGNORE_INDEX} classes{hint} and {MAX_VOXELS} pixels at most"
            )

    def read_map(self, path: Path) -> np.ndarray:
        """A file -> (C, H, W) or (C, D, H, W) float16, float32 or float64 probabilities, checked."""
        prob = read_array(path, self.key)
        self.check_map(path, prob)
        return prob

    def check_map(self, path: Path | str, prob: np.ndarray) -> None:
        """InputError for what is no map of probabilities; path: where it comes from."""
        self._check_shape(path, prob)
        if prob.dtype not in (np.float16, np.float32, np.float64):
            raise InputError(
                f"{path}: got {prob.dtype} values of shape {prob.shape}, expected probabilities in float16, float32 or "
                "float64 (--logits takes whole numbers with a scale)"
            )
        low, high = float(prob.min()), float(prob.max())  # NaN in either if there is one
        if not (low >= 0 and high <= 1 + 4 * float(np.finfo(prob.dtype).eps)):
            raise InputError(
                f"{path}: got values in {low:.6g}..{high:.6g}, expected probabilities in 0..1 (--logits takes others)"
            )
        if self.overlapping:
            return
        error = float(np.abs(prob.sum(0, dtype=np.float32) - 1).max())
        if error > self.tolerance:
            raise InputError(
                f"{path}: got probabilities whose sum over the classes (the first axis) is off from 1 by {error:.3g}, "
                f"expected {self.tolerance:g} at most (--multilabel takes classes that overlap)"
            )

    def check_label(self, path: Path | str, values: np.ndarray, map_shape: tuple[int, ...]) -> np.ndarray:
        """Whole numbers in the order of axes of a map of that shape -> uint8 labels; of classes that overlap, masks."""
        expected = map_shape if self.overlapping else map_shape[1:]
        if values.shape != expected or values.dtype.kind not in "bui":
            raise InputError(
                f"{path}: got {values.dtype} labels of shape {values.shape}, expected whole numbers of {expected} as "
                "its map has"
            )
        return self._decode_label(path, values, map_shape[0])

    def _decode_label(self, path: Path | str, values: np.ndarray, num_classes: int) -> np.ndarray:
        ignored = {self.ignore_label: IGNORE_INDEX}
        if self.overlapping:
            return self._to_labels(path, values, label_table(2, ignored), "in a mask per class")
        return self._to_labels(path, values, label_table(num_classes, ignored), f"as its map has {num_classes} classes")

    def read_label(self, path: Path, map_shape: Sequence[int], resized: bool = False) -> np.ndarray:
        """A file and the map's (C, *spatial) shape -> (*spatial) uint8 labels, or (H, W) for a map of (C, 1, H, W).

        Of classes that overlap: (C, *spatial) uint8 masks of 0, 1 and 255. resized: an image's label has its own size.
        """
        is_mask = self.overlapping and self.regions is None
        values = self._read_values(path, map_shape[:1] if is_mask else (), tuple(map_shape[1:]), resized)
        if is_mask or not self.overlapping:
            return self._decode_label(path, values, map_shape[0])
        return np.stack([self._to_labels(path, values, table, "as the regions have") for table in self.region_tables()])

    def _read_values(self, path: Path, lead: tuple[int, ...], spatial: tuple[int, ...], resized: bool) -> np.ndarray:
        """A file -> its (*lead, *spatial) values in the map's order of axes. lead: (C,) of masks, else nothing."""
        values = read_label_values(path, 3 + len(lead))
        # The mask of a single class may lack its axis.
        own = () if lead == (1,) and values.ndim <= len(spatial) else lead
        first = len(own)
        if resized and values.ndim == first + 2:
            spatial = values.shape[first:][::-1] if self.label_axes == "reversed" else values.shape[first:]
        elif values.ndim == first + 2 and len(spatial) == 3 and spatial[0] == 1:
            spatial = spatial[1:]
        if self._are_reversed(path, values.shape[first:], spatial):
            values = values.transpose(*range(first), *reversed(range(first, values.ndim)))
        if values.shape != (*own, *spatial):
            raise InputError(
                f"{path}: got labels of shape {values.shape}, expected {(*own, *spatial)} as its map has (label axes: "
                f"{self.label_axes})"
            )
        return values.reshape(*lead, *spatial)

    def _to_labels(self, path: Path | str, values: np.ndarray, table: np.ndarray, why: str) -> np.ndarray:
        """Values of a file -> uint8 labels by a table, in which -1 marks a value that must not be there."""
        wrong = [value for value in np.unique(values) if not 0 <= value <= 255 or table[int(value)] < 0]
        if wrong:
            ignored = (self.ignore_label, IGNORE_INDEX)
            known = describe_numbers(value for value in np.flatnonzero(table >= 0) if value not in ignored)
            raise InputError(
                f"{path}: got label value {wrong[0]}, expected {known} {why}, or {self.ignore_label} (ignored)"
            )
        return table[values.astype(np.uint8)].astype(np.uint8)

    def region_tables(self) -> Iterator[np.ndarray]:
        """By region the table from a file's value to 0, 1, 255 (ignored) or -1 (in no region, and not 0)."""
        known = sorted({0, *(value for region in self.regions for value in region)})
        for region in self.regions:
            table = np.full(256, -1, np.int16)
            table[known] = [value in region for value in known]
            table[[self.ignore_label, IGNORE_INDEX]] = IGNORE_INDEX
            yield table

    def _are_reversed(self, path: Path, shape: tuple[int, ...], spatial: tuple[int, ...]) -> bool:
        """Whether the axes of this label file are those of its map in reverse."""
        if self.label_axes != "auto":
            return self.label_axes == "reversed"
        if is_nifti(path) and shape == spatial == shape[::-1]:
            raise InputError(
                f"{path}: got labels of shape {shape}, which fit the map as they are and with their axes reversed, "
                "expected to be told which: --label_axes reversed (nnU-Net's maps) or same"
            )
        return is_nifti(path) and shape[::-1] == spatial


def read_units(files: Sequence[tuple[Path, Path]], reader: MapReader) -> Iterator[Unit]:
    """The units of all maps and their label files, one map in memory at a time."""
    for map_path, label_path in follow(files, "reading maps", "map"):
        yield from reader.units(map_path, label_path)


def true_units(dataset: SegmentationDataset) -> Iterator[Unit]:
    """The images of a data set that knows the probabilities from which its labels are drawn."""
    for index, sample in enumerate(dataset.samples):
        yield Unit(sample.name, None, sample.name, dataset.probabilities(index), dataset.read(index)[1])
