"""NIfTI volumes -> axial slices, the slice files that training reads, and labels back onto a volume's grid."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener

from exp.files.text import MAX_FILE, require_file
from exp.runtime.errors import InputError, decoding

EXPECTED = "a NIfTI volume"
MAX_SIDE = 4096  # voxels; scanners give matrices of up to 2048 and some 2,000 slices
MAX_VOXELS = 2**29  # 512 x 512 x 2048: two metres at a millimetre; scanners' 1024 x 1024 x 512
MAX_HEADER = 2**24  # bytes before the first voxel; extensions (the scanner's or a program's notes) have some kB
MAX_DEFLATE = 1040  # deflate makes nothing smaller than 1/1032 of its size (RFC 1951)
INT16 = np.iinfo(np.int16)
WHOLE_TOLERANCE = 1e-3  # of labels that are stored as floating-point numbers
MAX_STEP = 0.2  # between neighbouring values of labels that are stored as scaled whole numbers
RESCALED = 1000  # MR intensities: percentiles 0.5 and 99.5 of a volume become 0 and this


DIRECTIONS = ("LR", "PA", "IS")  # of the axes of the world: to the left or right, back or front, down or up


@dataclass(frozen=True)
class View:
    """How the axial slices of an array are seen as if it were stored in another orientation.

    reverse: they are counted from the array's other end. transpose: rows and columns change places; then rows,
    columns: these are mirrored.
    """

    reverse: bool = False
    transpose: bool = False
    rows: bool = False
    columns: bool = False

    def show(self, stored: np.ndarray) -> np.ndarray:
        """(..., H, W) as stored -> as seen, without a copy."""
        turned = np.swapaxes(stored, -2, -1) if self.transpose else stored
        return self._mirror(turned)

    def restore(self, seen: np.ndarray) -> np.ndarray:
        """(..., H, W) as seen -> as stored, without a copy."""
        mirrored = self._mirror(seen)
        return np.swapaxes(mirrored, -2, -1) if self.transpose else mirrored

    def _mirror(self, values: np.ndarray) -> np.ndarray:
        return values[..., :: -1 if self.rows else 1, :: -1 if self.columns else 1]

    def place(self, index: int, num_slices: int) -> int:
        """A slice's index as seen -> as stored, or the other way round."""
        return num_slices - 1 - index if self.reverse else index


STORED = View()


@dataclass(frozen=True)
class Volume:
    """The grid of a NIfTI file of three dimensions; the voxels stay on disk until slices are read.

    axis: the voxel axis closest to the patient's superior direction; slices lie across it.
    affine: (4, 4) float64, voxel indices to millimetres (right, anterior, superior).
    view: how slices are handed out; shape, affine and axis are those of the file.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray
    axis: int
    dtype: np.dtype
    offset: int  # bytes before the first voxel
    slope: float
    inter: float
    view: View = STORED

    @property
    def num_slices(self) -> int:
        return self.shape[self.axis]

    @property
    def slice_shape(self) -> tuple[int, int]:
        """(H, W) of a slice as it is handed out."""
        sides = tuple(side for axis, side in enumerate(self.shape) if axis != self.axis)
        return sides[::-1] if self.view.transpose else sides

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along each axis of the array."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))


def open_volume(path: Path, orientation: str | None = None) -> Volume:
    """A .nii or .nii.gz file -> its grid, from the header alone; InputError for what cannot be a volume.

    orientation: "RAS", say: slices are handed out as if the array's axes led to the right, to the front and up,
    whatever they do; None: as the file stores them.
    """
    require_file(path, EXPECTED, MAX_FILE)
    with decoding(path, EXPECTED):
        if (offset := _declared_offset(path)) > MAX_HEADER:  # nibabel reads extensions up to there
            raise ValueError(f"{offset} bytes of header")
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise ValueError(f"a {type(image).__name__}")
        proxy, affine = image.dataobj, np.asarray(image.affine, np.float64)
        shape, dtype = tuple(int(n) for n in proxy.shape), np.dtype(proxy.dtype)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or not all(0 < side <= MAX_SIDE for side in shape):
        raise InputError(f"{path}: got {_times(shape)} voxels, expected three sides of 1 to {MAX_SIDE}")
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: got voxels of type {dtype}, expected whole or floating-point numbers")
    _check_size(path, proxy.offset + math.prod(shape) * dtype.itemsize)
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{path}: got {_times(shape)} voxels, expected {MAX_VOXELS} of them at most")
    scaling = float(proxy.slope), float(proxy.inter)
    if not (np.isfinite(scaling).all() and scaling[0]):
        raise InputError(f"{path}: got slope {scaling[0]} and intercept {scaling[1]}, expected finite numbers")
    axis, view = axial_axis(affine, path), slice_view(affine, path, orientation)
    return Volume(path, shape, affine, axis, dtype, int(proxy.offset), *scaling, view)


def _declared_offset(path: Path) -> int:
    """The bytes before the first voxel as the header of NIfTI-1 or 2 says; 0 if it is neither."""
    with ImageOpener(path) as file:
        head = file.read(540)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(head):
            return int(kind(head[: kind.template_dtype.itemsize], check=False)["vox_offset"])
    return 0


def axial_axis(affine: np.ndarray, path: Path) -> int:
    """(4, 4) affine -> the voxel axis closest to the superior direction."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (lengths > 0).all()):
        raise InputError(
            f"{path}: got the affine {affine.tolist()}, expected finite numbers and axes that have a length"
        )
    return int(np.argmax(np.abs(affine[2, :3]) / lengths))


def orientation_of(affine: np.ndarray, path: Path) -> str:
    """(4, 4) affine -> where the three voxel axes lead: "RAS" to the right, to the front and up; "LPS", "IPL", ...

    The same volume stored along other axes has the same letters at other places, also where it lies askew.
    """
    axis, cosines = axial_axis(affine, path), affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    first, second = (other for other in range(3) if other != axis)
    straight, crossed = (abs(cosines[i, first]) + abs(cosines[1 - i, second]) for i in (0, 1))
    world = {axis: 2, first: 0, second: 1} if straight >= crossed else {axis: 2, first: 1, second: 0}
    return "".join(DIRECTIONS[world[i]][int(cosines[world[i], i] > 0)] for i in range(3))


def is_orientation(text: object) -> bool:
    """Whether it is one of the 48 that orientation_of gives."""
    return isinstance(text, str) and len(text) == 3 and all(len(set(text) & set(pair)) == 1 for pair in DIRECTIONS)


def slice_view(affine: np.ndarray, path: Path, orientation: str | None) -> View:
    """(4, 4) affine of an array -> how its axial slices are seen as if it were stored in that orientation."""
    if orientation is None:
        return STORED
    own, pairs = orientation_of(affine, path), {letter: pair for pair in DIRECTIONS for letter in pair}
    source = [next(i for i in range(3) if own[i] in pairs[letter]) for letter in orientation]
    mirrored = [own[i] != letter for i, letter in zip(source, orientation)]
    axial = next(i for i, letter in enumerate(orientation) if letter in DIRECTIONS[2])
    first, second = (i for i in range(3) if i != axial)
    return View(mirrored[axial], source[first] > source[second], mirrored[first], mirrored[second])


def open_pair(
    image: Path, label: Path, orientation: str | None = None, *, check_affine: bool = True
) -> tuple[Volume, Volume]:
    """An image and its label volume -> their grids; InputError if shapes or affines differ.

    Without check_affine the label volume is read as the image is, whatever its own affine says.
    """
    first, second = open_volume(image, orientation), open_volume(label)
    require_same_shape(first, second)
    if check_affine:
        require_same_affine(first, second)
    return first, replace(second, axis=first.axis, view=first.view)


def require_same_shape(image: Volume, label: Volume) -> None:
    """InputError if the grids differ in their sides."""
    if image.shape != label.shape:
        raise InputError(
            f"{label.path}: got {_times(label.shape)} voxels, expected {_times(image.shape)} as in {image.path}"
        )


def require_same_affine(image: Volume, label: Volume) -> None:
    """InputError if a voxel is a tenth of its size or more from where the other volume has it."""
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in image.shape], [1])).reshape(4, -1)
    apart = np.abs((image.affine - label.affine) @ corners)[:3].max()
    if apart > 0.1 * min(image.spacing):
        raise InputError(
            f"{label.path}: got an affine that puts voxels up to {apart:.3g} mm away from those of {image.path}, "
            "expected the same"
        )


@dataclass(frozen=True)
class ValueRange:
    """What the voxels of a volume are: smallest and largest finite value, whether all are finite, and whole."""

    low: float
    high: float
    finite: bool
    whole: bool


def value_range(volume: Volume) -> ValueRange:
    """One pass through every voxel; InputError if the file does not hold them all."""
    low, high, finite, whole = np.inf, -np.inf, True, True
    for _, plane in _planes(volume):
        values = plane.astype(np.float64) * volume.slope + volume.inter
        good = values[np.isfinite(values)]
        finite &= good.size == values.size
        whole &= bool((np.abs(good - np.rint(good)) <= _label_tolerance(volume)).all())
        low, high = min(low, good.min(initial=np.inf)), max(high, good.max(initial=-np.inf))
    return ValueRange(float(low), float(high), bool(finite), bool(whole))


def find_slices(volume: Volume, label: int | None) -> list[int]:
    """A label volume -> the slices that hold this label (None: any but 0), ascending; one pass, a plane in memory."""
    found = np.zeros(volume.num_slices, bool)
    for k, plane in _planes(volume):
        values = _to_label(plane, volume)
        held = values == label if label is not None else values != 0
        if volume.axis == 2:
            found[k] = held.any()
        else:
            found |= held.any(1 - volume.axis)
    return np.flatnonzero(found[::-1] if volume.view.reverse else found).tolist()


def read_image(volume: Volume, indices: Sequence[int], *, rescale: bool = False) -> np.ndarray:
    """Slices of a volume, ascending -> (N, H, W) int16, stored values times slope plus intercept (HU for CT), rounded;
    what int16 cannot hold is clipped.

    rescale: for MR, whose units are arbitrary: the volume's percentiles 0.5 and 99.5 become 0 and 1000.
    InputError for NaN, infinity, a file that ends early, or a constant volume that is to be rescaled.
    """
    if not rescale:
        return _read(volume, indices, _to_int16, np.int16)
    values = _read(volume, range(volume.num_slices), _to_float, np.float32)
    low, high = np.percentile(values, (0.5, 99.5))
    if low == high:
        raise InputError(f"{volume.path}: got the same intensity {low:g} nearly everywhere, expected an image")
    return _round_to_int16((values[list(indices)] - low) * (RESCALED / (high - low)))


def read_labels(volume: Volume, indices: Sequence[int]) -> np.ndarray:
    """Slices of a label volume, ascending -> (N, H, W) uint8; InputError for values that are no whole 0..255."""
    return _read(volume, indices, _to_label, np.uint8)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) int16 -> the same at `size` (height, width), linear."""
    return cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_labels(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 -> the same at `size` (height, width), nearest."""
    return cv2.resize(np.ascontiguousarray(label), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def assemble_labels(
    slices: Mapping[int, np.ndarray], shape: tuple[int, int, int], axis: int, view: View = STORED
) -> np.ndarray:
    """(H, W) uint8 labels by slice index -> (X, Y, Z) uint8 on the volume's grid, 0 where there is no slice.

    shape, axis, view: those of a Volume or a Case. Slices of another size are resized, nearest.
    """
    labels = np.zeros(shape, np.uint8)
    target = np.moveaxis(labels, axis, 0)
    for index, values in slices.items():
        seen = view.show(target[view.place(index, len(target))])
        seen[...] = resize_labels(values.astype(np.uint8), seen.shape)
    return labels


def save_labels(labels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write (X, Y, Z) uint8 labels as a NIfTI volume (.nii or .nii.gz) with this affine."""
    nib.save(nib.Nifti1Image(labels, np.asarray(affine, np.float64)), path)


Convert = Callable[[np.ndarray, Volume], np.ndarray]


def _read(volume: Volume, indices: Sequence[int], convert: Convert, dtype: type) -> np.ndarray:
    """Slices -> (N, H, W) of `dtype`: one pass through the file, in memory the slices and one plane."""
    indices, view = list(indices), volume.view
    assert indices == sorted(set(indices)), "slices are read in ascending order"
    slices = np.empty((len(indices), *volume.slice_shape), dtype)
    stored = view.restore(slices[::-1] if view.reverse else slices)  # the same memory, in the file's order
    indices = sorted(view.place(index, volume.num_slices) for index in indices)
    if volume.axis == 2:  # slices lie one after the other in the file
        for place, (_, plane) in enumerate(_planes(volume, indices)):
            stored[place] = convert(plane, volume)
        return slices
    for k, plane in _planes(volume):  # a plane of the file holds one line of every slice
        taken = np.take(plane, indices, volume.axis)
        stored[:, :, k] = convert(taken if volume.axis == 0 else taken.T, volume)
    return slices


def _planes(volume: Volume, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """The file's planes across its last axis -> (index, (X, Y) stored values), in one pass through the file."""
    size = volume.shape[0] * volume.shape[1] * volume.dtype.itemsize
    with decoding(volume.path, EXPECTED), ImageOpener(volume.path) as file:
        for k in range(volume.shape[2]) if wanted is None else wanted:
            file.seek(volume.offset + k * size)
            data = file.read(size)
            if len(data) < size:
                raise EOFError(f"it ends in plane {k} of {volume.shape[2]}")
            yield k, np.frombuffer(data, volume.dtype).reshape(volume.shape[:2], order="F")
        if wanted is None:
            file.read(1)  # gzip compares its checksum where the data end


def _to_float(plane: np.ndarray, volume: Volume) -> np.ndarray:
    """Stored values -> float64, scaled; InputError for NaN and infinity."""
    values = plane.astype(np.float64) * volume.slope + volume.inter
    if not np.isfinite(values).all():
        raise InputError(f"{volume.path}: got NaN or infinite voxels, expected numbers")
    return values


def _to_int16(plane: np.ndarray, volume: Volume) -> np.ndarray:
    unscaled = volume.slope == 1 and volume.inter == 0
    if unscaled and np.can_cast(volume.dtype, np.int16):
        return plane.astype(np.int16)
    return _round_to_int16(_to_float(plane, volume))


def _round_to_int16(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(INT16.min, INT16.max).astype(np.int16)


def _to_label(plane: np.ndarray, volume: Volume) -> np.ndarray:
    unscaled = volume.slope == 1 and volume.inter == 0
    if unscaled and volume.dtype == np.uint8:
        return plane
    values = plane if unscaled and volume.dtype.kind in "iu" else _to_float(plane, volume)
    labels = np.rint(values).clip(0, 255).astype(np.uint8)
    wrong = np.abs(values - labels.astype(np.float64)) > _label_tolerance(volume)
    if wrong.any():
        got = values[wrong].flat[0]
        raise InputError(f"{volume.path}: got label value {got:.9g}, expected whole numbers of 0..255")
    return labels


def _label_tolerance(volume: Volume) -> float:
    """How far a label's value may be from a whole number: what floating-point numbers, or half a step of values that
    were scaled to whole ones, leave of it."""
    step = abs(volume.slope) if volume.dtype.kind in "iu" else 0.0
    return WHOLE_TOLERANCE + (step / 2 if step <= MAX_STEP else 0.0)


def _check_size(path: Path, expected: int) -> None:
    """InputError if the file cannot hold the voxels its header promises; before any of them is allocated."""
    size = path.stat().st_size
    most = size * MAX_DEFLATE if path.suffix.lower() == ".gz" else size
    if most < expected:
        raise InputError(f"{path}: got a file of {size} bytes, expected the {expected} that its header promises")


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
