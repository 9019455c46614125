"""Folders of maps and labels -> pairs of files, and these -> arrays as they are stored."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exp.data import decode
from exp.files.arrays import read_member
from exp.files.nifti import MAX_VOXELS, WHOLE_TOLERANCE, open_volume, read_labels
from exp.files.paths import match_names, require_utf8, visible_files
from exp.files.text import MAX_FILE, require_file
from exp.runtime.errors import InputError, decoding

MAP_SUFFIXES = (".npy", ".npz")
LABEL_SUFFIXES = (".nii.gz", ".nii", ".png", ".npy")
FURTHER_SUFFIXES = (".tif", ".tiff")  # of labels, where a name has none of the others
KNOWN_KEYS = ("probabilities", "softmax")  # of nnU-Net v2 and v1
EXPECTED = "what numpy's save or savez writes; nothing is unpickled here"


def pair_files(prob_dir: Path, label_dir: Path, names: Sequence[str] | None = None) -> list[tuple[Path, Path]]:
    """Two folders -> their maps and labels, paired by name and in its order; InputError for one without a partner.

    names: those alone, of all that lie there; None: all of both folders.
    """
    maps = list_by_stem(prob_dir, MAP_SUFFIXES)
    labels = match_names(list_by_stem(label_dir, LABEL_SUFFIXES, FURTHER_SUFFIXES), maps)
    if names is not None:
        if not names:
            raise InputError("--names: got a list without a name, expected one or more")
        for found, folder in ((maps, prob_dir), (labels, label_dir)):
            if missing := sorted(set(names) - found.keys()):
                raise InputError(f"{folder}: got no file of the listed name '{missing[0]}', expected one")
        return [(maps[name], labels[name]) for name in sorted(set(names))]
    if alone := sorted(maps.keys() ^ labels.keys()):
        name = alone[0]
        path, folder = (maps[name], label_dir) if name in maps else (labels[name], prob_dir)
        raise InputError(f"{path}: got no file of that name in {folder}, expected one (--names takes some of them)")
    return [(maps[name], labels[name]) for name in sorted(maps)]


def list_by_stem(folder: Path, suffixes: tuple[str, ...], further: tuple[str, ...] = ()) -> dict[str, Path]:
    """The folder's files of these suffixes by name; hidden and other files are left out.

    further: suffixes of files that count where a name has none of `suffixes`, as do those in capital letters.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one of {', '.join(suffixes)} files")
    found: dict[str, Path] = {}
    paths = visible_files(folder, "*.*")
    for path in sorted(paths, key=lambda path: not path.name.endswith(suffixes)):
        if not path.name.lower().endswith((*suffixes, *further)):
            continue
        require_utf8(path)
        if (other := found.setdefault(stem(path), path)) != path and path.name.endswith(suffixes):
            raise InputError(f"{path}: got two files of the name '{stem(path)}', expected one ({other.name} is there)")
    if not found:
        raise InputError(f"{folder}: got no file of {', '.join(suffixes)}, expected maps, and labels of their names")
    return found


def stem(path: Path) -> str:
    return re.sub(r"(?i)(\.nii(?=\.gz))?\.[^.]*$", "", path.name)


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_array(path: Path, key: str | None, known: Sequence[str] = KNOWN_KEYS) -> np.ndarray:
    """An .npy file (mapped into memory), or an array of an .npz file; InputError for anything that needs unpickling.

    key: the array's name; None: the first of `known` that is there, or the only one.
    """
    require_file(path, EXPECTED, MAX_FILE)
    with decoding(path, EXPECTED):
        if not zipfile.is_zipfile(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            names = _members(archive)
            if key is None:
                key = next((k for k in known if k in names), names[0] if len(names) == 1 else None)
            if key not in names:
                wanted = key or f"{' or '.join(known)}, or one array alone (--key names another)"
                raise InputError(f"{path}: got the arrays {', '.join(names)[:200] or 'none'}, expected {wanted}")
            return read_member(archive, key)


def read_further(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz file that it has; none of an .npy file."""
    with decoding(path, EXPECTED):
        if not zipfile.is_zipfile(path):
            return {}
        with zipfile.ZipFile(path) as archive:
            return {key: read_member(archive, key) for key in keys if key in _members(archive)}


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_label_values(path: Path, most_axes: int = 3) -> np.ndarray:
    """A PNG, TIFF, .npy or NIfTI file -> its whole numbers, 2-D to `most_axes`, axes as stored (rows, columns)."""
    if is_nifti(path):
        volume = open_volume(path)
        return np.moveaxis(read_labels(volume, range(volume.num_slices)), 0, volume.axis)
    values = read_array(path, None) if path.suffix.lower() == ".npy" else decode.read_label(path)
    whole = values.dtype.kind in "bui"
    if values.dtype.kind == "f":
        near, values = values, np.rint(values)
        whole = bool((np.abs(near - values) <= WHOLE_TOLERANCE).all())
    if not 2 <= values.ndim <= most_axes or values.size > MAX_VOXELS or not whole:
        raise InputError(
            f"{path}: got {values.dtype} values of shape {values.shape}, expected one whole number (a class index) per "
            f"pixel, and {MAX_VOXELS} of them at most"
        )
    return values
