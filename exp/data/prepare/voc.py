"""PASCAL VOC 2012 and SBD -> SegmentationClassTrainAug/ and trainaug.txt."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from exp.data.prepare.jobs import report_faults, run_jobs, worker_pool
from exp.files.atomic import remove_stale, replacing, require_room
from exp.files.images import open_image
from exp.files.paths import Fence, read_names
from exp.files.text import require_file
from exp.runtime.errors import InputError, decoding

MAX_MAT = 2**20  # bytes; SBD's have some 20,000; deflate makes a GB of it at most
BYTES_PER_LABEL = 8192  # twice what a label of VOC takes as a PNG
NUM_CLASSES = 21


def prepare_voc(data_dir: Path, workers: int) -> None:
    """Write ImageSets/Segmentation/trainaug.txt and the labels it names.

    trainaug: SBD's train and val and VOC's train, less VOC's val (so that no image is trained on that is evaluated),
    in alphabetical order. A label or list that is there already must say the same and is kept; if it does not,
    InputError. The list is written last: where it is, the labels are complete.
    """
    voc = data_dir / "VOCdevkit" / "VOC2012"
    sbd = data_dir / "VOCdevkit" / "VOCaug" / "benchmark_RELEASE" / "dataset"
    names = trainaug_names(voc / "ImageSets" / "Segmentation", sbd)
    names_file = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
    labels = voc / "SegmentationClassTrainAug"
    if names_file.exists() and sorted(read_names(names_file)) != names:
        raise InputError(f"{names_file}: got a list of other images, expected the {len(names)} of SBD and VOC")
    sources = list(find_sources(voc, sbd, names))
    waiting = sum(not (labels / f"{source.stem}.png").exists() for source in sources)
    print(f"{labels}: {len(sources)} labels, {len(sources) - waiting} of them there before (compared, not changed)")
    require_room(labels, waiting * BYTES_PER_LABEL)
    labels.mkdir(exist_ok=True)
    remove_stale(labels)
    remove_stale(names_file.parent)
    with worker_pool(max(2, workers)) as pool:  # not in this process: on damaged files scipy can crash
        _, faults = run_jobs(partial(write_label, labels), sources, pool, "labels", "label")
    report_faults(faults, "labels")
    if not names_file.exists():
        with replacing(names_file, durable=False, new=True) as temporary:
            temporary.write_text("\n".join(names) + "\n", encoding="utf-8")


def find_sources(voc: Path, sbd: Path, names: Sequence[str]) -> Iterator[Path]:
    """Names -> VOC's own label of each, where there is one, or SBD's; InputError where a link leads elsewhere."""
    own, others = Fence(voc / "SegmentationClass"), Fence(sbd / "cls")
    for name in names:
        png, mat = own.folder / f"{name}.png", others.folder / f"{name}.mat"
        source, fence = (png, own) if os.path.lexists(png) else (mat, others)
        fence.check(source, is_link=True)
        yield source


def trainaug_names(lists: Path, sbd: Path) -> list[str]:
    """VOC's lists and SBD's folder -> the names of trainaug, sorted."""
    train = [*read_names(sbd / "train.txt"), *read_names(sbd / "val.txt"), *read_names(lists / "train.txt")]
    return sorted(set(train) - set(read_names(lists / "val.txt")))


def write_label(labels: Path, source: Path) -> None:
    """Write a label, from VOC's PNG or SBD's .mat, as a PNG of class indices, or compare it with the one there."""
    values, target = (read_mat if source.suffix == ".mat" else read_png)(source), labels / f"{source.stem}.png"
    if target.exists():
        if not np.array_equal(read_png(target), values):
            raise InputError(f"{target}: got another label than that of {source}; it is left as it is")
        return
    with replacing(target, durable=False, new=True) as temporary:
        Image.fromarray(values).save(temporary, format="PNG")


def read_mat(path: Path) -> np.ndarray:
    """A file of SBD's dataset/cls -> (H, W) uint8 class indices."""
    expected = "SBD's GTcls, the label of an image in its lists"
    require_file(path, expected, MAX_MAT)
    with decoding(path, expected):
        return _check(np.asarray(loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]), path)


def read_png(path: Path) -> np.ndarray:
    """A palette or grey PNG -> (H, W) uint8 class indices."""
    with open_image(path) as image:
        return _check(np.asarray(image), path)


def _check(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype != np.uint8 or values.ndim != 2:
        raise InputError(f"{path}: got {values.dtype} values of shape {values.shape}, expected (H, W) uint8")
    wrong = values[(values >= NUM_CLASSES) & (values != 255)]
    if wrong.size:
        raise InputError(f"{path}: got label value {wrong[0]}, expected 0..{NUM_CLASSES - 1} or 255")
    return values
