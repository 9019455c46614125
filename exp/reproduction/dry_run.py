"""What a dry run tells of tables: the data sets that are there, and device hours by measured speeds of the networks.

speeds.json, as scripts/check_gpu.py writes it; the key of a network measured with several crops is <YAML>@<h>x<w>:

    {"device": "...", "date": "...", "torch": "...", "networks": {"<model YAML>": {"crop_size": [h, w], "batch_size": 8,
     "variant": "paper", "amp": "off", "train_images_per_second": 12.3, "eval_windows_per_second": 45.6,
     "peak_gib": 10.2}}}

Where `variant` is missing, the network was measured before there was a choice, with the library's decoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exp.config.data import DataConfig
from exp.config.evaluation import TestConfig
from exp.data.loader import count_iterations
from exp.data.prepare.facts import VOLUMES
from exp.data.registry import DATASETS, build_dataset
from exp.evaluation.inference import starts
from exp.files.text import read_json
from exp.reproduction.job import Job
from exp.runtime.errors import InputError

SPEEDS_FILE = Path(__file__).with_name("speeds.json")
# Of the images that are evaluated. VOC: the largest; ADE20K: most, as their shorter side was reduced to 512.
IMAGE_SIZES = {"pascal_voc": (500, 500), "cityscapes": (1024, 2048), "ade20k": (512, 683), "camvid": (360, 480)}


def describe_data(jobs: Sequence[Job], data_dir: Path) -> list[str]:
    """The jobs' data sets -> a line each."""
    configs = {job.data: job.config.data for job in reversed(jobs)}  # of each the first
    return [f"data {name}: {describe_set(configs[name], data_dir)}" for name in dict.fromkeys(j.data for j in jobs)]


def describe_set(config: DataConfig, data_dir: Path) -> str:
    """complete, partial or empty, and why, of all images; files are listed, none is opened."""
    config = replace(config, train_samples=None, val_samples=None)
    try:
        parts = [build_dataset(config, str(data_dir), split) for split in ("train", "val")]
    except InputError as error:
        folders = [data_dir / folder for filled in DATASETS[config.dataset].archives.values() for folder in filled]
        is_partial = any(path.is_file() for folder in folders for path in folder.rglob("*"))
        return f"{'partial' if is_partial else 'empty'}: {error}"
    found = " and ".join(f"{len(part)} {split}" for part, split in zip(parts, ("train", "val"))) + " images"
    if config.fold is not None:
        found += f", fold {config.fold}"
    if not DATASETS[config.dataset].on_disk:
        return f"complete: {found}, made on the fly"
    images, number, what = count_images(config), sum(map(len, parts)), "images"
    known = None if images is None else sum(images)
    if config.dataset == "hippocampus":  # whose slices nobody has counted, but the cases
        known, what = VOLUMES[config.dataset].total_cases, "cases"
        number = len({sample.case for part in parts for sample in part.samples})
    if known is None:
        return f"of unknown total: {found}"
    return f"{'complete' if number == known else 'partial'}: {found}; {number} of {known} {what}"


def describe_network(job: Job) -> str:
    """A network that others trained -> what to fetch, and what its owner says of it."""
    model = job.config.model
    stated = "mIoU not stated" if model.miou is None else f"mIoU {model.miou:g}"
    if model.miou is not None and model.miou_on is not None:
        stated += f" on {model.miou_on}"
    size = "size not stated" if model.megabytes is None else f"{model.megabytes:g} MB"
    licence = f"licence {model.licence or 'not stated'}"
    like = "no network of the paper" if model.like is None else model.like
    weights = model.weights if model.revision is None else f"{model.weights} at {model.revision}"
    return f"{weights} ({model.source}): {size}, {licence}; its owner: {stated}; of the architecture: {like}"


def has_data(job: Job, data_dir: Path) -> bool:
    """Whether the images that the job evaluates are there, all of them or some."""
    try:
        build_dataset(job.config.data, str(data_dir), "val")
    except InputError:
        return False
    return True


def count_images(config: DataConfig) -> tuple[int, int] | None:
    """Training and validation images of a data set that is complete; None where their number is not known."""
    splits = DATASETS[config.dataset].totals
    totals = (splits.get(config.train_split), splits.get(config.val_split))
    if config.dataset in VOLUMES and VOLUMES[config.dataset].fold_slices is not None:
        slices = VOLUMES[config.dataset].fold_slices
        totals = (sum(slices) - slices[config.fold], slices[config.fold])
    limits = (config.train_samples, config.val_samples)
    chosen = [total and min(total, limit or total) for total, limit in zip(totals, limits)]
    return None if None in chosen else tuple(chosen)


def load_speeds(path: Path) -> dict[str, Any] | None:
    """The file's content; None if it is not there."""
    return read_json(path, "measured speeds of networks") if path.is_file() else None


def estimate_hours(job: Job, speeds: Mapping[str, Any]) -> float | None:
    """Hours of one device for a training and its evaluation; None where the network's speed or the data are not known.

    A network that was measured with another crop is as fast in pixels. Decision rules, loading and the validations of
    the training are left out.
    """
    config = job.config
    if job.reevaluation is not None and job.reevaluation.true:
        return 0.0
    height, width = config.data.crop_size
    network = None if job.is_published else find_speed(job, speeds)
    images = count_images(config.data)
    windows = count_windows(config.data, config.test)
    if network is None or network["amp"] != config.schedule.amp or images is None or windows is None:
        return None
    pixels = network["crop_size"][0] * network["crop_size"][1]
    window_pixels = config.test.crop_size[0] * config.test.crop_size[1]
    seconds = images[1] * windows * window_pixels / pixels / network["eval_windows_per_second"]
    if job.reevaluation is None:
        seen = count_iterations(config.schedule, images[0]) * config.schedule.batch_size
        seconds += seen * height * width / pixels / network["train_images_per_second"]
    return seconds / 3600


def find_speed(job: Job, speeds: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured of a job's network: with its crop, or else with another."""
    height, width = job.config.data.crop_size
    known = speeds["networks"]
    others = (speed for name, speed in known.items() if name.partition("@")[0] == job.model)
    return known.get(f"{job.model}@{height}x{width}") or next(others, None)


def count_windows(data: DataConfig, test: TestConfig) -> int | None:
    """Windows of all views of one image; None where the size of the images is not known."""
    size = data.test_crop or IMAGE_SIZES.get(data.dataset)
    if size is None:
        return None
    if test.whole or test.short_side:
        return None
    windows = 0
    for scale in test.scales:
        rows, columns = (
            len(starts(max(round(side * scale), crop), crop, stride))
            for side, crop, stride in zip(size, test.crop_size, test.stride)
        )
        windows += rows * columns
    return windows * (1 + test.flip)


def describe_costs(tables: Mapping[str, Sequence[Job]], total: Sequence[Job], speeds: Mapping[str, Any]) -> list[str]:
    """A line per table, and one for `total`, in which trainings that tables share count once."""
    lines = [f"cost {name}: {_add_up(jobs, speeds)}" for name, jobs in tables.items()]
    lines.append(f"cost in all, each training once: {_add_up(total, speeds)}")
    measured = "{device}, {date}, PyTorch {torch}".format(**speeds)
    lines.append(f"by the networks' speeds on {measured}; decision rules, loading and validations come on top")
    found = {job: find_speed(job, speeds) for job in total}
    others = {job.model for job, speed in found.items() if speed and _variant(speed) != job.config.model.variant}
    if others:
        lines.append(f"of these, measured with another decoder than they train with: {', '.join(sorted(others))}")
    return lines


def _variant(speed: Mapping[str, Any]) -> str:
    return speed.get("variant", "library")


def _add_up(jobs: Sequence[Job], speeds: Mapping[str, Any]) -> str:
    hours = [estimate_hours(job, speeds) for job in jobs]
    unknown = hours.count(None)
    text = f"{sum(value for value in hours if value is not None):.1f} device hours"
    return f"{text}, without {unknown} of {len(jobs)}, whose speed is not known" if unknown else text
