"""PASCAL VOC 2012 and SBD -> SegmentationClassTrainAug/ and trainaug.txt."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from exp.data.prepare.jobs import remove_stale, report_faults, require_space, run_jobs, staged, worker_pool
from exp.data.prepare.mat_files import check_mat
from exp.files.images import PILLOW_ERRORS, open_image, read_bytes, unreadable
from exp.files.paths import Fence, files_and_links, read_names
from exp.runtime.errors import InputError

# What scipy raises on files that are damaged or of another kind.
UNREADABLE = (
    MatReadError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    NameError,
    MemoryError,
    NotImplementedError,
    zlib.error,
    struct.error,
)
MAX_MAT = 2**20  # bytes; SBD's have some 20,000
BYTES_PER_LABEL = 8192  # twice what a label of VOC takes as a PNG
NUM_CLASSES = 21


@dataclass(frozen=True)
class LabelJob:
    """A label to be written: from VOC's own PNG or SBD's .mat."""

    source: Path
    target: Path


def prepare_voc(data_dir: Path, workers: int) -> None:
    """Write ImageSets/Segmentation/trainaug.txt and the labels it names.

    trainaug: SBD's train and val and VOC's train, less VOC's val (so that no image is trained on that is judged),
    in alphabetical order. A label or list that is there already must say the same and is kept; if it does not,
    InputError. The list is written last: where it is, the labels are complete.
    """
    voc = data_dir / "VOCdevkit" / "VOC2012"
    sbd = data_dir / "VOCdevkit" / "VOCaug" / "benchmark_RELEASE" / "dataset"
    names = trainaug_names(voc / "ImageSets" / "Segmentation", sbd)
    names_file = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
    labels = voc / "SegmentationClassTrainAug"
    if names_file.exists() and sorted(read_names(names_file)) != names:
        raise InputError(
            f"{names_file}: got a list of other images, expected the {len(names)} of SBD and VOC; move it away to have "
            "it written"
        )
    jobs = [LabelJob(source, labels / f"{source.stem}.png") for source in find_sources(voc, sbd, names)]
    waiting = sum(not job.target.exists() for job in jobs)
    print(f"{labels}: {len(jobs)} labels, {len(jobs) - waiting} of them there before (compared, not changed)")
    require_space(labels, waiting * BYTES_PER_LABEL)
    labels.mkdir(exist_ok=True)
    remove_stale(labels)
    remove_stale(names_file.parent)
    with worker_pool(workers) as pool:
        _, faults = run_jobs(write_label, jobs, pool, "labels", "label")
    report_faults(faults, "labels")
    if not names_file.exists():
        with staged(names_file) as temporary:
            temporary.write_text("\n".join(names) + "\n", encoding="utf-8")


def find_sources(voc: Path, sbd: Path, names: Sequence[str]) -> Iterator[Path]:
    """Names -> VOC's own label of each, where there is one, or SBD's; InputError where a link leads elsewhere."""
    own, others = voc / "SegmentationClass", sbd / "cls"
    folders = {folder: (files_and_links(folder), Fence(folder)) for folder in (own, others)}
    for name in names:
        source = own / f"{name}.png" if f"{name}.png" in folders[own][0] else others / f"{name}.mat"
        links, fence = folders[source.parent] if source.parent in folders else ({}, Fence(others))
        fence.check(source, is_link=links.get(source.name, False))
        yield source


def trainaug_names(lists: Path, sbd: Path) -> list[str]:
    """VOC's lists and SBD's folder -> the names of trainaug, sorted."""
    train = [*read_names(sbd / "train.txt"), *read_names(sbd / "val.txt"), *read_names(lists / "train.txt")]
    return sorted(set(train) - set(read_names(lists / "val.txt")))


def write_label(job: LabelJob) -> None:
    """Write a label as a PNG of class indices, or compare it with the one that is there."""
    values = read_mat(job.source) if job.source.suffix == ".mat" else read_png(job.source)
    if job.target.exists():
        if not np.array_equal(read_png(job.target), values):
            raise InputError(f"{job.target}: got another label than that of {job.source}; it is left as it is")
        return
    with staged(job.target) as temporary:
        Image.fromarray(values).save(temporary, format="PNG")


def read_mat(path: Path) -> np.ndarray:
    """A file of SBD's dataset/cls -> (H, W) uint8 class indices."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected the label of an image in SBD's lists")
    if (size := path.stat().st_size) > MAX_MAT:
        raise InputError(f"{path}: got {size} bytes, expected SBD's GTcls, of {MAX_MAT} bytes at most")
    try:
        check_mat(path.read_bytes())
        values = loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: got a file that cannot be read ({reason}), expected SBD's GTcls") from None
    return _check(np.asarray(values), path)


def read_png(path: Path) -> np.ndarray:
    """A palette or grey PNG -> (H, W) uint8 class indices."""
    with open_image(read_bytes(path), path) as image:
        try:
            values = np.asarray(image)
        except PILLOW_ERRORS as error:
            raise unreadable(path, error) from None
    return _check(values, path)


def _check(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype != np.uint8 or values.ndim != 2:
        raise InputError(f"{path}: got {values.dtype} values of shape {values.shape}, expected (H, W) uint8")
    wrong = values[(values >= NUM_CLASSES) & (values != 255)]
    if wrong.size:
        raise InputError(f"{path}: got label value {wrong[0]}, expected 0..{NUM_CLASSES - 1} or 255")
    return values
