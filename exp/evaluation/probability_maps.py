"""Probability maps of another program, or of a synthetic data set, and labels -> results, one map at a time.

Maps are .npy files or .npz archives of (C, H, W) or (C, D, H, W) floats that sum to 1 over the classes: those of
--save_prob, nnU-Net's --save_probabilities (v2: key `probabilities`) and --save_npz (v1: key `softmax`) among them.
Nothing is unpickled: nnU-Net's .pkl files stay unread, and an array of Python objects is refused.
"""

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from exp.data import decode
from exp.data.base import IGNORE_INDEX, SegmentationDataset, label_table
from exp.evaluation.calibration import count_calibration
from exp.evaluation.metrics import EvalResult, build_results, count_rules
from exp.files.arrays import read_member
from exp.files.nifti import MAX_VOXELS, open_volume, read_labels
from exp.rules.pooled import PooledRule, gather_thresholds
from exp.rules.registry import Rule, bind_rules
from exp.runtime.errors import InputError, decoding

MAP_SUFFIXES = (".npy", ".npz")
LABEL_SUFFIXES = (".nii.gz", ".nii", ".png", ".npy")
KNOWN_KEYS = ("probabilities", "softmax")  # of nnU-Net v2 and v1


@dataclass(frozen=True)
class MapFile:
    """A probability map and its label file; the name is what both file names begin with."""

    name: str
    prob: Path
    label: Path


@dataclass(frozen=True)
class Unit:
    """What a rule decides at a time: (C, *spatial) probabilities and (*spatial) uint8 labels, 0..C-1 or 255."""

    name: str
    case: str | None
    source: str  # where it comes from, for messages
    prob: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class MapReader:
    """How files become units.

    key: the array of an .npz file; None: `probabilities`, `softmax`, or the only one.
    unit: of a (C, D, H, W) map, each slice is a unit with the map as its case, or the whole case is one.
    slice_axis: the spatial axis of a (C, D, H, W) map along which slices lie.
    label_axes: the label file's axes in the map's order: "same", "reversed", a permutation such as "201" (the map's
        first spatial axis is the label's third, ...), or "auto". "auto" takes images and .npy as they are. A NIfTI
        file is stored x, y, z and most maps of volumes z, y, x: it is taken reversed or as it is, whichever fits the
        map's shape, and refused where both do.
    ignore_label: a value of the label files that does not count, besides 255.
    tolerance: how far a pixel's probabilities may sum from 1.
    """

    key: str | None = None
    unit: Literal["slice", "case"] = "slice"
    slice_axis: int = 0
    label_axes: str = "auto"
    ignore_label: int = IGNORE_INDEX
    tolerance: float = 2e-3  # float16 rounds a sum by up to 5e-4, and a resampled softmax is off by as much

    def units(self, file: MapFile) -> Iterator[Unit]:
        """The units of one map; InputError with the path, what was got and what was expected."""
        prob = self.read_map(file.prob)
        label = self.read_label(file.label, prob.shape)
        if prob.ndim == 4 and label.ndim == 2:  # nnU-Net gives a 2-D image a first axis of length 1
            prob = prob[:, 0]
        if prob.ndim == 3:
            yield Unit(file.name, None, str(file.prob), prob, label)
        elif self.unit == "case":
            yield Unit(file.name, file.name, str(file.prob), prob, label)
        else:
            for i in range(label.shape[self.slice_axis]):
                part = np.take(prob, i, axis=1 + self.slice_axis), np.take(label, i, axis=self.slice_axis)
                yield Unit(f"{file.name}/{i:04d}", file.name, str(file.prob), *part)

    def read_map(self, path: Path) -> np.ndarray:
        """A file -> (C, H, W) or (C, D, H, W) float16, float32 or float64 probabilities, checked."""
        prob = read_array(path, self.key)
        if prob.ndim not in (3, 4) or prob.shape[0] < 2 or 0 in prob.shape:
            raise InputError(
                f"{path}: got an array of shape {prob.shape}, expected (C, H, W) or (C, D, H, W) with 2 or more "
                "classes (a foreground alone is written as 1 - p and p)"
            )
        if prob.shape[0] > IGNORE_INDEX or math.prod(prob.shape[1:]) > MAX_VOXELS:
            raise InputError(
                f"{path}: got an array of shape {prob.shape}, expected {IGNORE_INDEX} classes and {MAX_VOXELS} pixels "
                "at most"
            )
        if prob.dtype not in (np.float16, np.float32, np.float64):
            raise InputError(f"{path}: got {prob.dtype} values, expected probabilities in float16, float32 or float64")
        low, high = float(prob.min()), float(prob.max())  # NaN in either if there is one
        if not (low >= 0 and high <= 1 + 4 * float(np.finfo(prob.dtype).eps)):
            raise InputError(f"{path}: got values in {low:.6g}..{high:.6g}, expected probabilities in 0..1")
        total = prob.sum(0, dtype=np.float32)
        total -= 1
        error = float(np.abs(total, out=total).max())
        if error > self.tolerance:
            raise InputError(
                f"{path}: got probabilities whose sum over the classes (the first axis) is off from 1 by {error:.3g}, "
                f"expected {self.tolerance:g} at most"
            )
        return prob

    def read_label(self, path: Path, map_shape: Sequence[int]) -> np.ndarray:
        """A file and the map's (C, *spatial) shape -> (*spatial) uint8 labels, or (H, W) for a map of (C, 1, H, W)."""
        values = read_label_values(path)
        spatial = tuple(map_shape[1:])
        if values.ndim == 2 and len(spatial) == 3 and spatial[0] == 1:
            spatial = spatial[1:]
        values = values.transpose(self._order(path, values.shape, spatial))
        if values.shape != spatial:
            raise InputError(
                f"{path}: got labels of shape {values.shape}, expected {spatial} as its map has (label axes: "
                f"{self.label_axes})"
            )
        return self._decode(values, path, map_shape[0])

    def _order(self, path: Path, shape: tuple[int, ...], spatial: tuple[int, ...]) -> tuple[int, ...]:
        """The permutation of the label's axes that --label_axes means for this file."""
        same = tuple(range(len(shape)))
        if self.label_axes == "auto":
            if not is_nifti(path) or shape[::-1] != spatial:
                return same
            if shape == spatial:
                raise InputError(
                    f"{path}: got labels of shape {shape}, which fit the map as they are and with their axes "
                    "reversed, expected to be told which: --label_axes reversed (nnU-Net's maps) or same"
                )
            return same[::-1]
        if self.label_axes in ("same", "reversed"):
            return same if self.label_axes == "same" else same[::-1]
        order = tuple(int(digit) for digit in self.label_axes)
        if sorted(order) != list(same):
            raise InputError(f"--label_axes {self.label_axes}: got a file of {len(shape)} axes, {path}")
        return order

    def _decode(self, values: np.ndarray, path: Path, num_classes: int) -> np.ndarray:
        """Integer values -> uint8 labels; InputError for a value that is no class."""
        present = np.unique(values)
        inside = present[(present >= 0) & (present <= 255)]
        table = label_table(num_classes, {self.ignore_label: IGNORE_INDEX})
        wrong = [*present[(present < 0) | (present > 255)], *inside[table[inside.astype(np.uint8)] < 0]]
        if wrong:
            raise InputError(
                f"{path}: got label value {wrong[0]}, expected 0..{num_classes - 1} as its map has {num_classes} "
                f"classes, or {self.ignore_label} (ignored)"
            )
        return table[values.astype(np.uint8)].astype(np.uint8)


def pair_files(prob_dir: Path, label_dir: Path) -> list[MapFile]:
    """Two folders -> their files paired by name, in the names' order; InputError for the first without a partner."""
    maps, labels = list_by_stem(prob_dir, MAP_SUFFIXES), list_by_stem(label_dir, LABEL_SUFFIXES)
    if not maps:
        raise InputError(f"{prob_dir}: got no file of {', '.join(MAP_SUFFIXES)}, expected probability maps")
    for path, folder, others, suffixes in (
        *((maps[name], label_dir, labels, LABEL_SUFFIXES) for name in maps),
        *((labels[name], prob_dir, maps, MAP_SUFFIXES) for name in labels),
    ):
        if stem(path, (*MAP_SUFFIXES, *LABEL_SUFFIXES)) not in others:
            raise InputError(f"{path}: got no file of that name in {folder}, expected one of {', '.join(suffixes)}")
    return [MapFile(name, maps[name], labels[name]) for name in sorted(maps)]


def list_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The folder's files of these suffixes by name; hidden and other files are left out."""
    found: dict[str, Path] = {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one of maps or of label files")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(tuple(suffixes)):
            continue
        name = stem(path, suffixes)
        if name in found:
            raise InputError(f"{path}: got two files of the name '{name}', expected one ({found[name].name} is there)")
        found[name] = path
    return found


def stem(path: Path, suffixes: Sequence[str]) -> str:
    """The file's name without the longest of the suffixes that it ends with."""
    return path.name.removesuffix(max((s for s in suffixes if path.name.endswith(s)), key=len, default=""))


def is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def read_array(path: Path, key: str | None) -> np.ndarray:
    """An .npy file (mapped into memory), or an array of an .npz file; InputError for anything that needs unpickling."""
    with decoding(path, "what numpy's save or savez writes; nothing is unpickled here"):
        if not zipfile.is_zipfile(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            return read_member(archive, _pick_key(path, names, key))


def _pick_key(path: Path, keys: list[str], key: str | None) -> str:
    choices = [key] if key is not None else [k for k in KNOWN_KEYS if k in keys] or (keys if len(keys) == 1 else [])
    if not choices or choices[0] not in keys:
        wanted = key or f"{' or '.join(KNOWN_KEYS)}, or one array alone (--key names another)"
        raise InputError(f"{path}: got the arrays {', '.join(keys)[:200] or 'none'}, expected {wanted}")
    return choices[0]


def read_label_values(path: Path) -> np.ndarray:
    """A PNG, .npy or NIfTI file -> its whole numbers, 2-D or 3-D, axes as stored (an image: rows, columns)."""
    if is_nifti(path):
        values = read_nifti(path)
    else:
        values = read_array(path, None) if path.suffix == ".npy" else decode.read_label(path)
    if values.size > MAX_VOXELS:
        raise InputError(f"{path}: got an array of shape {values.shape}, expected {MAX_VOXELS} labels at most")
    if values.ndim not in (2, 3) or (path.suffix == ".png" and values.ndim == 3):
        raise InputError(f"{path}: got an array of shape {values.shape}, expected one label a pixel")
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        raise InputError(f"{path}: got {values.dtype} values with fractions, expected whole numbers (class indices)")
    if values.dtype.kind not in "uif":
        raise InputError(f"{path}: got {values.dtype} values, expected whole numbers (class indices)")
    return values


def read_nifti(path: Path) -> np.ndarray:
    """A NIfTI label volume -> (X, Y, Z) uint8, axes as stored."""
    volume = open_volume(path)
    return np.moveaxis(read_labels(volume, range(volume.num_slices)), 0, volume.axis)


def read_units(files: Sequence[MapFile], reader: MapReader) -> Iterator[Unit]:
    """The units of all files, one map in memory at a time."""
    for file in tqdm(files, desc="reading maps", unit="map", leave=False, disable=None):
        yield from reader.units(file)


def true_units(dataset: SegmentationDataset) -> Iterator[Unit]:
    """The images of a data set that knows the probabilities from which its labels are drawn."""
    for index, sample in enumerate(dataset.samples):
        yield Unit(sample.name, None, sample.name, dataset.probabilities(index), dataset.read(index)[1])


def evaluate_maps(
    units: Callable[[], Iterator[Unit]], rules: Mapping[str, Rule | PooledRule], classes: Sequence[str]
) -> tuple[tuple[EvalResult, ...], np.ndarray]:
    """Every unit under every rule -> a result per rule, and the (N, C + 1, 3, num_bins) counts of the calibration.

    Volumes are cases. Pooled rules have all units read once more before, for their thresholds.
    """

    def maps() -> Iterator[tuple[Tensor, str | None]]:
        for unit in units():
            _require_case(rules, unit)
            yield to_tensor(unit, len(classes)), unit.case
            del unit  # before the next map is read: there is room for one

    thresholds = gather_thresholds(rules, maps())
    rows = []
    for unit in units():
        prob = to_tensor(unit, len(classes))
        label = torch.from_numpy(unit.label.reshape(-1, unit.label.shape[-1]))
        preds = [rule(prob)[0] for rule in bind_rules(rules, thresholds, unit.case).values()]
        counts = count_rules(preds, label, len(classes)).numpy()
        rows.append((unit.name, unit.case, counts, count_calibration(prob, label).numpy()))
        if (unit.case is None) != (rows[0][1] is None):
            raise InputError(f"{unit.source}: got images and volumes together, expected the one or the other")
        del unit, prob, preds
    names, cases, counts, calibration = zip(*rows)
    return build_results(list(rules), names, classes, np.stack(counts), cases), np.stack(calibration)


def _require_case(rules: Mapping[str, Rule | PooledRule], unit: Unit) -> None:
    """InputError for an image where a rule's thresholds are those of a case."""
    for name, rule in rules.items():
        if isinstance(rule, PooledRule) and rule.scope == "case" and unit.case is None:
            raise InputError(f"--predict_yaml {name}: got the image {unit.name}, which is in no case, expected volumes")


def to_tensor(unit: Unit, num_classes: int) -> Tensor:
    """(C, ..., W) probabilities -> (1, C, pixels / W, W), which is all one to a rule; float64 stays, else float32."""
    if len(unit.prob) != num_classes:
        raise InputError(f"{unit.source}: got {len(unit.prob)} classes, expected {num_classes}")
    dtype = np.float64 if unit.prob.dtype == np.float64 else np.float32
    return torch.from_numpy(np.require(unit.prob, dtype, "W")).reshape(1, num_classes, -1, unit.prob.shape[-1])
