"""Every file of a data set, decoded to its end and compared with what training expects: all faults, not the first."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from exp.data.base import IGNORE_INDEX, SegmentationDataset
from exp.data.decode import TRANSPOSED, label_values
from exp.data.prepare.facts import MAX_LABEL, NUM_FOLDS, VOLUMES, VolumeFacts, fold_of
from exp.data.prepare.volumes import TRAIN, RawCase, find_cases, is_finished
from exp.data.slice_files import case_number, list_cases, read_case, read_slice
from exp.files.atomic import file_sha256
from exp.files.images import FORMATS, describe_loss, exif_orientation, open_image, read_bytes
from exp.files.nifti import open_volume, require_same_affine, require_same_shape, value_range
from exp.files.text import read_text
from exp.runtime.errors import InputError, printable

# kind: what it means; a data set with one of these is not in order
FAULTS = {
    "unreadable": "files that cannot be decoded to their end",
    "wrong format": "files whose content is not what their name says",
    "unpaired": "images without a label, labels without an image",
    "lossy": "labels in a format that changes their values",
    "channels": "labels that are no single channel of 8-bit class indices",
    "size": "labels of another size than their image",
    "label value": "labels with values that are no class",
    "empty label": "labels without a counted pixel",
    "non-finite": "volumes with NaN or infinite voxels",
    "constant": "images or volumes of one value",
    "affine": "label volumes whose grid lies elsewhere than their image's",
    "orientation": "prepared cases of an earlier version, in another orientation than others",
    "duplicate name": "samples that cannot be told apart",
    "count": "totals other than the known ones",
    "changed": "files that differ from the manifest, or are gone",
}
NOTES = {  # worth a look, but found in sound data too
    "turned": "images that EXIF turns or mirrors: they are taken as viewers show them, and so must their labels lie",
    "only background": "labels of nothing but background",
    "identical images": "images with the same content as another",
    "old slices": "prepared cases of an earlier version, all in the orientation in which they are stored",
    "not prepared": "volumes without slices",
    "other affine": "label volumes whose grid lies elsewhere than their image's, which was to be ignored",
    "not in the manifest": "files that came after it",
}


@dataclass(frozen=True)
class Finding:
    """A fault or note on one file; kind: a key of FAULTS or NOTES."""

    kind: str
    path: Path
    text: str


@contextlib.contextmanager
def noting(findings: list[Finding], kind: str, path: Path) -> Iterator[None]:
    """An InputError of the body is a finding of this kind on this file."""
    try:
        yield
    except InputError as error:
        findings.append(Finding(kind, path, str(error).removeprefix(f"{path}: ")))


def check_sample(dataset: SegmentationDataset, index: int) -> list[Finding]:
    """A sample -> what is wrong with its image and label."""
    sample, findings = dataset.samples[index], []
    if sample.image.suffix == ".npz":
        return _check_slice(dataset, sample.image)
    sizes, values = _decode_image(sample.image, findings), _decode_label(sample.label, findings)
    if values is not None:
        _check_values(dataset, values, sample.label, findings)
        if sizes is not None and values.shape[:2] not in sizes:
            got, *expected = (f"{width}x{height}" for height, width in (values.shape[:2], *sizes))
            stored = f" ({expected[1]} before EXIF turns it)" if len(expected) > 1 else ""
            findings.append(Finding("size", sample.label, f"got {got} pixels, expected {expected[0]}{stored}"))
    if not any(finding.kind in FAULTS for finding in findings):
        with noting(findings, "unreadable", sample.image):
            dataset.read(index)  # whatever else training would stumble over
    return findings


def _decode_image(path: Path, findings: list[Finding]) -> list[tuple[int, int]] | None:
    """An image file, decoded to its end -> its (height, width) as shown and, where EXIF swaps these, as stored.

    None if it cannot be decoded; what is wrong with the file is added to the findings.
    """
    with noting(findings, "unreadable", path):
        data = read_bytes(path)
        with open_image(path, data) as image:
            stored = np.asarray(image).shape[:2]
            _check_format(image, path, findings)
            if (orientation := exif_orientation(image, data)) != 1:
                findings.append(Finding("turned", path, f"got EXIF's orientation {orientation}"))
            return [stored[::-1], stored] if orientation in TRANSPOSED else [stored]


def _decode_label(path: Path, findings: list[Finding]) -> np.ndarray | None:
    """The same of a label file -> its values."""
    with noting(findings, "unreadable", path):
        data = read_bytes(path)
        with open_image(path, data) as image:
            values = label_values(path, image, data)
            _check_format(image, path, findings)
            if loss := describe_loss(image, data):
                findings.append(Finding("lossy", path, f"got a {loss}, expected a lossless format such as PNG"))
            return values


def _check_format(image: Image.Image, path: Path, findings: list[Finding]) -> None:
    found = image.format.replace("MPO", "JPEG")  # MPO: cameras' JPEGs with previews
    expected = FORMATS.get(path.suffix.lower(), found)
    if found != expected:
        findings.append(Finding("wrong format", path, f"got {found} content, expected {expected}"))


def _check_values(dataset: SegmentationDataset, values: np.ndarray, path: Path, findings: list[Finding]) -> None:
    """Add what is wrong with the values of a label file."""
    if values.ndim != 2 or values.dtype != np.uint8:
        got = f"got {values.dtype} values of shape {values.shape}, expected (H, W) uint8"
        findings.append(Finding("channels", path, got))
        return
    with noting(findings, "label value", path):
        present = np.setdiff1d(dataset.decode_label(values, path), [IGNORE_INDEX])
        if not present.size:
            findings.append(Finding("empty label", path, "got ignored pixels alone"))
        elif present.tolist() == [0] and dataset.classes[0] == "background":
            findings.append(Finding("only background", path, "got no other class"))


def _check_slice(dataset: SegmentationDataset, path: Path) -> list[Finding]:
    """A prepared slice -> what is wrong with it."""
    findings = []
    with noting(findings, "unreadable", path):
        image, values = read_slice(path)
        _check_values(dataset, values, path, findings)
        if image.min() == image.max():
            findings.append(Finding("constant", path, f"got {image.min()} everywhere"))
    return findings


def check_volumes(raw: RawCase, *, check_affine: bool = True) -> list[Finding]:
    """A pair of volumes as distributed -> what is wrong with it; every voxel is read.

    Without check_affine, affines that differ are a note.
    """
    findings, volumes, ranges = [], {}, {}
    for path in (raw.image, raw.label):
        with noting(findings, "unreadable", path):
            volumes[path] = open_volume(path)
            ranges[path] = value_range(volumes[path])
            if not ranges[path].finite:
                findings.append(Finding("non-finite", path, "got NaN or infinite voxels"))
    if len(volumes) == 2:
        known, pair = len(findings), (volumes[raw.image], volumes[raw.label])
        with noting(findings, "size", raw.label):
            require_same_shape(*pair)
        if len(findings) == known:
            with noting(findings, "affine" if check_affine else "other affine", raw.label):
                require_same_affine(*pair)
    image, label = ranges.get(raw.image), ranges.get(raw.label)
    if image and image.low >= image.high:
        findings.append(Finding("constant", raw.image, f"got {image.low:g} everywhere"))
    if label and not (label.whole and label.low >= 0 and label.high <= MAX_LABEL):
        text = f"got values of {label.low:g} to {label.high:g}, expected whole ones of 0 to {MAX_LABEL}"
        findings.append(Finding("label value", raw.label, text))
    elif label and label.high == 0:
        findings.append(Finding("empty label", raw.label, "got background alone"))
    return findings


def check_prepared(facts: VolumeFacts, data_dir: Path) -> list[Finding]:
    """The prepared cases of a data set of volumes -> those that are not whole; slices by fold beside the known ones."""
    folder = data_dir / facts.folder / TRAIN
    findings, folds, cases = [], [0] * NUM_FOLDS, prepared_cases(facts, data_dir)
    seen = {}
    for path in cases:
        with noting(findings, "unreadable", path):
            is_finished(path)
            case = read_case(path)
            folds[fold_of(case_number(path.name), facts.cases_per_fold)] += len(case.slices)
            seen[path] = case.seen
    whole, kind = not findings, "orientation" if len(set(seen.values())) > 1 else "old slices"
    for path, orientation in seen.items():
        if orientation != facts.orientation:
            text = f"got {orientation}, in which its volume is stored, expected {facts.orientation}"
            findings.append(Finding(kind, path, text))
    if len(cases) > facts.total_cases:
        findings.append(Finding("count", folder, f"got {len(cases)} cases, expected {facts.total_cases} at most"))
    elif facts.fold_slices and len(cases) == facts.total_cases and whole and tuple(folds) != facts.fold_slices:
        findings.append(Finding("count", folder, f"got {folds} slices by fold, expected {list(facts.fold_slices)}"))
    return findings


def prepared_cases(facts: VolumeFacts, data_dir: Path) -> list[Path]:
    """The folders of prepared cases, none before the preparation."""
    folder = data_dir / facts.folder / TRAIN
    return list_cases(folder) if folder.is_dir() else []


def list_raw(name: str, data_dir: Path) -> tuple[list[RawCase], list[Finding]]:
    """A data set of volumes -> its raw pairs, and which of them and of the prepared cases have no counterpart."""
    cases, alone = find_cases(name, data_dir)
    prepared = {path.name for path in prepared_cases(VOLUMES[name], data_dir)}
    findings = [Finding("not prepared", case.image, "has no slices") for case in cases if case.name not in prepared]
    findings += [Finding("not prepared" if is_test else "unpaired", path, text) for path, text, is_test in alone]
    return cases, findings


def find_duplicates(dataset: SegmentationDataset) -> list[Finding]:
    """Names that a split has twice."""
    counts = Counter(sample.name for sample in dataset.samples)
    twice = {s.name: s.image for s in dataset.samples if counts[s.name] > 1}
    return [Finding("duplicate name", path, f"got '{name}' {counts[name]} times") for name, path in twice.items()]


def find_identical(images: Iterable[Path], hashes: dict[Path, str]) -> list[Finding]:
    """Images whose content an earlier one has too."""
    images = [path for path in images if path in hashes]
    first = {hashes[path]: path for path in reversed(images)}
    pairs = [(path, first[hashes[path]]) for path in images]
    return [Finding("identical images", path, f"got the content of {one}") for path, one in pairs if path != one]


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Files -> SHA-256 by path, of those that can be read."""
    hashes = {}
    for path in paths:
        with contextlib.suppress(OSError):  # reported where the file is decoded
            hashes[path] = file_sha256(path)
    return hashes


def read_manifest(path: Path) -> dict[str, str]:
    """A manifest as sha256sum writes it -> hash by the file's path below data_dir."""
    lines = [line.partition("  ") for line in read_text(path, "a manifest").splitlines()]
    for number, (digest, space, _) in enumerate(lines, 1):
        if not (space and len(digest) == 64):
            raise InputError(f"{path}: got a line {number} that is no '<sha256>  <path>', expected a manifest")
    return {name: digest for digest, _, name in lines}


def compare_manifest(manifest: dict[str, str], hashes: dict[Path, str], data_dir: Path) -> list[Finding]:
    """The files now beside those of the manifest -> what differs."""
    now = {relative_name(path, data_dir): digest for path, digest in hashes.items()}
    findings = []
    for name, digest in manifest.items():
        if name not in now:
            if not (data_dir / name).exists():
                findings.append(Finding("changed", data_dir / name, "it is gone"))
        elif now[name] != digest:
            findings.append(Finding("changed", data_dir / name, f"got SHA-256 {now[name]}, expected {digest}"))
    new = sorted(now.keys() - manifest.keys())
    return findings + [Finding("not in the manifest", data_dir / name, "it came later") for name in new]


def relative_name(path: Path, data_dir: Path) -> str:
    """A file's name in the manifest: below data_dir if it lies there."""
    return path.relative_to(data_dir).as_posix() if path.is_relative_to(data_dir) else str(path)


def format_manifest(hashes: dict[Path, str], data_dir: Path) -> str:
    """Hashes by file -> the text that `sha256sum --check` reads in data_dir."""
    return "".join(f"{hashes[path]}  {relative_name(path, data_dir)}\n" for path in sorted(hashes))


def format_report(findings: Sequence[Finding], shown: int) -> str:
    """Findings by kind: how many, and the first `shown` of each."""
    lines = []
    for kind, meaning in {**FAULTS, **NOTES}.items():
        found = sorted((f for f in findings if f.kind == kind), key=lambda f: str(f.path))
        if found:
            lines.append(f"{'note: ' if kind in NOTES else ''}{kind}: {len(found)} {meaning}")
            lines += [printable(f"  {finding.path}: {finding.text}") for finding in found[:shown]]
            lines += [f"  and {len(found) - shown} more"] if len(found) > shown else []
    return "\n".join(lines)
