"""The part `loader` of scripts/check_gpu.py: how many workers keep one device busy at 512x512."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from exp.config.training import ScheduleConfig
from exp.data.loader import Batch, build_train_loader
from exp.data.transforms import RandomCrop
from exp.runtime.distributed import Dist
from scripts.benchmarks.benchmark_loader import CASES, MEAN, SCALES, open_folder, write_files
from scripts.benchmarks.gpu.networks import BATCH, compose, make_batch, make_step, synchronize

if TYPE_CHECKING:
    from exp.training.step import TrainStep
    from scripts.check_gpu import Check

WORKERS = (1, 2, 4, 6, 8, 12, 16)
BUSY = 0.97  # of the speed with images that are on the device already
SETTINGS = {"float32": (), "bf16": ("schedule.amp=bf16",)}
NETWORK = "deeplabv3plus_resnet50d"


def rate(step: TrainStep, batches: Iterable[Batch], warm_up: int, seconds: float) -> float:
    """Images per second over some seconds of steps."""
    batches = iter(batches)
    for batch in islice(batches, warm_up):
        step(batch.to(step.dist.device))
    synchronize(step.dist.device)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for batch in islice(batches, 5):
            step(batch.to(step.dist.device))
            images += len(batch.image)
        synchronize(step.dist.device)
    return images / (time.perf_counter() - start)


def endless(batch: Batch) -> Iterable[Batch]:
    while True:
        yield batch


def check_loader(check: Check) -> None:
    """Steps on generated JPEGs of 500x375, read by more and more workers, against steps without a loader."""
    case = replace(CASES[0], num_files=4) if check.tiny else CASES[0]
    side = 64 if check.tiny else 512
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder) / case.name, case)
        crop = RandomCrop((side, side), SCALES, 0.5, tuple(map(round, MEAN)), 0)
        dataset = open_folder(Path(folder), case, crop)
        for name, settings in reversed(SETTINGS.items()):
            measure(check, name, settings, lambda workers: make_loader(dataset, workers, check))


def make_loader(dataset: object, workers: int, check: Check) -> Iterable[Batch]:
    size = 2 if check.tiny else BATCH
    schedule = ScheduleConfig("check", batch_size=size, train_iters=100_000, num_workers=workers)
    return build_train_loader(dataset, schedule, 0, 100_000, 0, Dist(0, 1, check.device))


def measure(check: Check, name: str, settings: tuple[str, ...], loader: Callable[[int], Iterable[Batch]]) -> None:
    config = compose(NETWORK, "pascal_voc", settings, check.tiny)
    step = make_step(config, check.device)
    seconds = 0.1 if check.tiny else 2.0
    whole = rate(step, endless(make_batch(config, check.device)), 2 if check.tiny else 8, seconds)
    check.row(
        "Images per second", network=NETWORK, setting=name, workers="none: a batch on the device", **{"images/s": whole}
    )
    for workers in WORKERS[:2] if check.tiny else WORKERS:
        if check.left() < 5:
            check.say(f"{NETWORK}, {name}: no time was left to try {workers} workers")
            return
        if workers > (os.cpu_count() or 1):
            break
        found = rate(step, loader(workers), 2 * workers + 4, seconds)
        check.row(
            "Images per second",
            network=NETWORK,
            setting=name,
            workers=workers,
            **{"images/s": found, "of the device's": found / whole},
        )
        if found >= BUSY * whole:
            check.say(f"{NETWORK} at {config.data.crop_size}, {name}: {workers} workers keep the device busy")
            return
    check.say(f"{NETWORK}, {name}: no number of workers that was tried keeps the device busy ({os.cpu_count()} cores)")
