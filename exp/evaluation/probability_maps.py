"""Probability maps of another program, or of a synthetic data set, and labels -> results, one map at a time.

Maps are .npy files or .npz archives of (C, H, W) or (C, D, H, W) floats that sum to 1 over the classes: those of
--save_prob, nnU-Net's --save_probabilities (v2: key `probabilities`) and --save_npz (v1: key `softmax`) among them.
Nothing is unpickled: nnU-Net's .pkl files stay unread, and an array of Python objects is refused.
"""

import re
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
from exp.files.paths import require_utf8
from exp.files.text import MAX_FILE, require_file
from exp.rules.pooled import PooledRule, gather_thresholds
from exp.rules.registry import Rule, bind_rules
from exp.runtime.errors import InputError, decoding

MAP_SUFFIXES = (".npy", ".npz")
LABEL_SUFFIXES = (".nii.gz", ".nii", ".png", ".npy")
KNOWN_KEYS = ("probabilities", "softmax")  # of nnU-Net v2 and v1


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
    label_axes: the label file's axes in the map's order. "auto" takes images and .npy as they are. A NIfTI file is
        stored x, y, z and most maps of volumes z, y, x: it is taken reversed or as it is, whichever fits the map's
        shape, and refused where both do.
    ignore_label: a value of the label files that does not count, besides 255.
    tolerance: how far a pixel's probabilities may sum from 1.
    """

    key: str | None = None
    unit: Literal["slice", "case"] = "slice"
    slice_axis: int = 0
    label_axes: Literal["auto", "same", "reversed"] = "auto"
    ignore_label: int = IGNORE_INDEX
    tolerance: float = 2e-3  # float16 rounds a sum by up to 5e-4, and a resampled softmax is off by as much

    def units(self, map_path: Path, label_path: Path) -> Iterator[Unit]:
        """The units of one map; InputError with the path, what was got and what was expected."""
        prob, name = self.read_map(map_path), stem(map_path)
        label = self.read_label(label_path, prob.shape)
        if prob.ndim == 4 and label.ndim == 2:  # nnU-Net gives a 2-D image a first axis of length 1
            prob = prob[:, 0]
        if prob.ndim == 3 or self.unit == "case":
            yield Unit(name, None if prob.ndim == 3 else name, str(map_path), prob, label)
            return
        for i in range(label.shape[self.slice_axis]):
            part = np.take(prob, i, axis=1 + self.slice_axis), np.take(label, i, axis=self.slice_axis)
            yield Unit(f"{name}/{i:04d}", name, str(map_path), *part)

    def read_map(self, path: Path) -> np.ndarray:
        """A file -> (C, H, W) or (C, D, H, W) float16, float32 or float64 probabilities, checked."""
        prob = read_array(path, self.key)
        sizes_fit = prob.ndim in (3, 4) and 2 <= len(prob) <= IGNORE_INDEX and 0 < prob[0].size <= MAX_VOXELS
        if not sizes_fit or prob.dtype not in (np.float16, np.float32, np.float64):
            raise InputError(
                f"{path}: got {prob.dtype} values of shape {prob.shape}, expected (C, H, W) or (C, D, H, W) "
                f"probabilities in float16, float32 or float64 of 2..{IGNORE_INDEX} classes (a foreground alone is "
                f"written as 1 - p and p) and {MAX_VOXELS} pixels at most"
            )
        low, high = float(prob.min()), float(prob.max())  # NaN in either if there is one
        if not (low >= 0 and high <= 1 + 4 * float(np.finfo(prob.dtype).eps)):
            raise InputError(f"{path}: got values in {low:.6g}..{high:.6g}, expected probabilities in 0..1")
        error = float(np.abs(prob.sum(0, dtype=np.float32) - 1).max())
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
        if self._are_reversed(path, values.shape, spatial):
            values = values.T
        if values.shape != spatial:
            raise InputError(
                f"{path}: got labels of shape {values.shape}, expected {spatial} as its map has (label axes: "
                f"{self.label_axes})"
            )
        table = label_table(map_shape[0], {self.ignore_label: IGNORE_INDEX})
        present = np.unique(values)
        wrong = [value for value in present if not 0 <= value <= 255 or table[int(value)] < 0]
        if wrong:
            raise InputError(
                f"{path}: got label value {wrong[0]}, expected 0..{map_shape[0] - 1} as its map has {map_shape[0]} "
                f"classes, or {self.ignore_label} (ignored)"
            )
        return table[values.astype(np.uint8)].astype(np.uint8)

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


def pair_files(prob_dir: Path, label_dir: Path) -> list[tuple[Path, Path]]:
    """Two folders -> their maps and labels, paired by name and in its order; InputError for one without a partner."""
    maps, labels = list_by_stem(prob_dir, MAP_SUFFIXES), list_by_stem(label_dir, LABEL_SUFFIXES)
    if alone := sorted(maps.keys() ^ labels.keys()):
        name = alone[0]
        path, folder = (maps[name], label_dir) if name in maps else (labels[name], prob_dir)
        raise InputError(f"{path}: got no file of that name in {folder}, expected one")
    return [(maps[name], labels[name]) for name in sorted(maps)]


def list_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The folder's files of these suffixes by name; hidden and other files are left out."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(suffixes):
            continue
        require_utf8(path)
        if (other := found.setdefault(stem(path), path)) != path:
            raise InputError(f"{path}: got two files of the name '{stem(path)}', expected one ({other.name} is there)")
    if not found:
        raise InputError(f"{folder}: got no file of {', '.join(suffixes)}, expected maps, and labels of their names")
    return found


def stem(path: Path) -> str:
    return re.sub(r"(\.nii(?=\.gz))?\.[^.]*$", "", path.name)


def is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def read_array(path: Path, key: str | None) -> np.ndarray:
    """An .npy file (mapped into memory), or an array of an .npz file; InputError for anything that needs unpickling."""
    expected = "what numpy's save or savez writes; nothing is unpickled here"
    require_file(path, expected, MAX_FILE)
    with decoding(path, expected):
        if not zipfile.is_zipfile(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if key is None:
                key = next((k for k in KNOWN_KEYS if k in names), names[0] if len(names) == 1 else None)
            if key not in names:
                wanted = key or f"{' or '.join(KNOWN_KEYS)}, or one array alone (--key names another)"
                raise InputError(f"{path}: got the arrays {', '.join(names)[:200] or 'none'}, expected {wanted}")
            return read_member(archive, key)


def read_label_values(path: Path) -> np.ndarray:
    """A PNG, .npy or NIfTI file -> its whole numbers, 2-D or 3-D, axes as stored (an image: rows, columns)."""
    if is_nifti(path):
        volume = open_volume(path)
        return np.moveaxis(read_labels(volume, range(volume.num_slices)), 0, volume.axis)
    values = read_array(path, None) if path.suffix == ".npy" else decode.read_label(path)
    whole = values.dtype.kind in "bui" or (values.dtype.kind == "f" and (values == np.rint(values)).all())
    if values.ndim not in (2, 3) or values.size > MAX_VOXELS or not whole:
        raise InputError(
            f"{path}: got {values.dtype} values of shape {values.shape}, expected one whole number (a class index) per "
            f"pixel, and {MAX_VOXELS} of them at most"
        )
    return values


def read_units(files: Sequence[tuple[Path, Path]], reader: MapReader) -> Iterator[Unit]:
    """The units of all maps and their label files, one map in memory at a time."""
    for map_path, label_path in tqdm(files, desc="reading maps", unit="map", leave=False, disable=None):
        yield from reader.units(map_path, label_path)


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
    scopes = {rule.scope for rule in rules.values() if isinstance(rule, PooledRule)}

    def maps() -> Iterator[tuple[Tensor, str | None]]:
        for unit in units():
            if "case" in scopes and unit.case is None:
                raise InputError(f"predict.scope: got case for {unit.name}, which is in no case, expected volumes")
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


def to_tensor(unit: Unit, num_classes: int) -> Tensor:
    """(C, ..., W) probabilities -> (1, C, pixels / W, W), which is all one to a rule; float64 stays, else float32."""
    if len(unit.prob) != num_classes:
        raise InputError(f"{unit.source}: got {len(unit.prob)} classes, expected {num_classes}")
    dtype = np.float64 if unit.prob.dtype == np.float64 else np.float32
    return torch.from_numpy(np.require(unit.prob, dtype, "W")).reshape(1, num_classes, -1, unit.prob.shape[-1])
