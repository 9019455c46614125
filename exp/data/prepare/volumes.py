"""LiTS, KiTS19 and the decathlon's hippocampus: pairs of volumes -> slices in <data_dir>/<name>/train/<case>/."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from exp.data.prepare.facts import MAX_LABEL, VOLUMES, VolumeFacts
from exp.data.prepare.jobs import report_faults, run_jobs, worker_pool
from exp.data.slice_files import Case, case_number, list_cases, list_slices, read_case, write_case
from exp.files.atomic import remove_stale, replacing, require_room
from exp.files.nifti import find_slices, open_pair, read_image, read_labels
from exp.files.paths import is_hidden
from exp.runtime.errors import InputError, describe_numbers, printable

TRAIN = "train"  # the folder of prepared cases
SLICE_OVERHEAD = 1024  # bytes of a slice file beside its voxels


@dataclass(frozen=True)
class RawCase:
    """An image and its label volume as distributed."""

    name: str
    image: Path
    label: Path

    def __str__(self) -> str:
        return str(self.image)


def find_cases(name: str, data_dir: Path) -> tuple[list[RawCase], list[tuple[Path, str, bool]]]:
    """A data set -> its pairs of volumes by number, and the volumes without a partner, which are left alone.

    Of each of those: the file, what it is, and whether that is as it should be, for the owner's test cases.
    """
    facts = VOLUMES[name]
    root = data_dir / facts.folder
    if not root.is_dir():
        raise InputError(f"{root}: no such folder (DATA.md shows the expected tree)")
    images, labels = (_find_files(root, pattern, facts.case) for pattern in facts.patterns)
    pairs = [RawCase(case, images[case], labels[case]) for case in images.keys() & labels.keys()]
    alone = []
    for case in sorted(images.keys() - labels.keys()):
        is_test = facts.numbers is not None and case_number(case) not in facts.numbers
        text = "a test case, without label volume" if is_test else "an image without its label volume"
        alone.append((images[case], text, is_test))
    alone += [
        (labels[case], "a label volume without its image", False) for case in sorted(labels.keys() - images.keys())
    ]
    return sorted(pairs, key=lambda case: (case_number(case.name), case.name)), alone


def _find_files(root: Path, pattern: str, case: str) -> dict[str, Path]:
    """The files below a folder whose <folder>/<file> fits the pattern, by their case; InputError for two of one case.

    Links to folders are followed, each folder is visited once.
    """
    found, visited = {}, set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        for name in sorted(names):
            if match := re.fullmatch(pattern, f"{os.path.basename(folder)}/{name}"):
                path, key = Path(folder, name), case.format(match[1])
                if key in found:
                    raise InputError(f"{path}: got a second file of {key} beside {found[key]}, expected one")
                found[key] = path
    return found


def prepare_cases(name: str, data_dir: Path, workers: int, *, check_affine: bool = True) -> None:
    """Write the slices of every case that has none yet; InputError at the end if there are cases that cannot be read.

    First all label volumes are looked at, which tells the faulty ones and the disk space needed; then slices are
    written. A case appears under its name when it is complete, so that those found there are finished.
    """
    facts = VOLUMES[name]
    root = data_dir / facts.folder
    folder = root / TRAIN
    cases, alone = find_cases(name, data_dir)
    for path, text, _ in alone:
        print(printable(f"{path}: {text}; left alone"))
    if folder.is_dir():
        remove_stale(folder)
    if not cases and not (folder.is_dir() and list_cases(folder)):
        raise InputError(f"{root}: got no pair of image and label volume (DATA.md shows the expected tree)")
    states, broken = run_jobs(lambda case: is_finished(folder / case.name), cases, None, "recognising", "case")
    waiting = [case for case, finished in states if not finished]
    print(f"{root}: {len(cases)} cases, {len(states) - len(waiting)} of them prepared before")
    _check_orientation(facts, folder, [case.name for case, finished in states if finished], bool(waiting))
    with worker_pool(workers if waiting else 1) as pool:
        scans, faults = run_jobs(partial(scan_case, facts, check_affine), waiting, pool, "looking", "case")
        require_room(folder, sum(num_bytes for _, (_, num_bytes) in scans))
        folder.mkdir(exist_ok=True)
        write = partial(prepare_case, facts, check_affine, root)
        _, more = run_jobs(write, [(raw, slices) for raw, (slices, _) in scans], pool, "writing", "case")
    report_faults(broken + faults + more, "cases")


def _check_orientation(facts: VolumeFacts, folder: Path, finished: list[str], is_waiting: bool) -> None:
    """Say which cases an earlier version cut in another orientation; InputError where they are or would be mixed."""
    old = {name: seen for name in finished if (seen := read_case(folder / name).seen) != facts.orientation}
    if not old:
        return
    found = f"{len(old)} cases that an earlier version cut as they are stored ({', '.join(sorted(set(old.values())))})"
    remedy = f"to have them cut as {facts.orientation}, move them away ({', '.join(old)}) and start this command again"
    if is_waiting or len(old) < len(finished) or len(set(old.values())) > 1:
        raise InputError(f"{folder}: got {found}, expected all in one orientation; {remedy}")
    print(f"{folder}: {found}; {remedy}")


def is_finished(folder: Path) -> bool:
    """Whether a case's folder is there; InputError if it is not whole (it appears whole, but disks fail)."""
    if not folder.exists():
        return False
    case = read_case(folder)
    expected = [folder / f"{index:04d}.npz" for index in case.slices]
    least = 3 * case.size[0] * case.size[1]
    if list_slices(folder) != expected or any(path.stat().st_size < least for path in expected):
        raise InputError(
            f"{folder}: got other slices than its case.json names, expected those; remove it and prepare again"
        )
    return True


def scan_case(facts: VolumeFacts, check_affine: bool, raw: RawCase) -> tuple[tuple[int, ...], int]:
    """A raw case -> the slices to keep and their bytes on disk.

    InputError if the pair does not fit together or the labels cannot be read.
    """
    image, label = open_pair(raw.image, raw.label, facts.orientation, check_affine=check_affine)
    slices = tuple(find_slices(label, facts.label))
    height, width = facts.size or image.slice_shape
    return slices, len(slices) * (3 * height * width + SLICE_OVERHEAD)


def prepare_case(facts: VolumeFacts, check_affine: bool, root: Path, job: tuple[RawCase, tuple[int, ...]]) -> None:
    """Write <root>/train/<case>/ with these slices of a raw case; InputError for labels that are no class."""
    raw, slices = job
    image, label = open_pair(raw.image, raw.label, facts.orientation, check_affine=check_affine)
    labels = read_labels(label, slices)
    if (highest := labels.max(initial=0)) > MAX_LABEL:
        raise InputError(f"{raw.label}: got label value {highest}, expected 0..{MAX_LABEL}")
    size = facts.size or image.slice_shape
    case = Case(
        image=str(raw.image.relative_to(root)),
        label=str(raw.label.relative_to(root)),
        shape=image.shape,
        affine=tuple(map(tuple, image.affine.tolist())),
        spacing=image.spacing,
        axis=image.axis,
        slices=slices,
        size=size,
        resized=size != image.slice_shape,
        rescaled=facts.rescale,
        orientation=facts.orientation,
    )
    with replacing(root / TRAIN / raw.name, durable=False, new=True) as folder:
        folder.mkdir()
        write_case(folder, case, read_image(image, slices, rescale=facts.rescale), labels)


def missing_cases(facts: VolumeFacts, names: Iterable[str]) -> str:
    """The names of the cases that there are -> the numbers that lack, in words; empty if none do, or if unknown."""
    lacking = sorted(set(facts.numbers or ()) - {case_number(name) for name in names})
    return describe_numbers(lacking, ", ") if lacking else ""
