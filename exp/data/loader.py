"""Data set -> batches: an order that depends on the seed alone, resumable at any iteration."""

import hashlib
import math
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from exp.config.data import IGNORE_INDEX
from exp.config.training import ScheduleConfig
from exp.data.base import Item, SegmentationDataset
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.runtime.interrupt import Stalled, obey_parent_alone

GRACE = 5  # seconds for a killed process to be gone; one that a disk does not let go may take longer


@dataclass(frozen=True)
class Batch:
    """(B, channels, H, W) uint8 or int16 images, (B, H, W) uint8 labels, and the samples' indices.

    damaged: what was wrong with those of them that could not be read, and count for nothing.
    """

    image: Tensor
    label: Tensor
    indices: tuple[int, ...]
    damaged: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self, image=self.image.to(device, non_blocking=True), label=self.label.to(device, non_blocking=True)
        )

    def pin_memory(self) -> "Batch":
        return replace(self, image=self.image.pin_memory(), label=self.label.pin_memory())


def collate(items: list[Item]) -> Batch:
    return Batch(
        image=_stack([i.image for i in items]),
        label=_stack([i.label for i in items]),
        indices=tuple(i.index for i in items),
        damaged=tuple(i.damaged for i in items if i.damaged is not None),
    )


def _stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape -> them along a new first axis; of a worker, in memory shared with the process that trains.

    There they have to go in any case. Left to the queue, an error would be a thread's, and the batch would never come.
    """
    if get_worker_info() is None:
        return torch.stack(tensors)
    shape = (len(tensors), *tensors[0].shape)
    size = math.prod(shape) * tensors[0].element_size()
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise InputError(
            f"schedule.num_workers: got no room for a batch of {size:,} bytes in /dev/shm "
            f"({' '.join(str(error).split())[:120]}), expected some: make it larger (docker run --shm-size=8g), or "
            "have fewer workers (0 needs none), a smaller batch or crop"
        ) from None
    return torch.stack(tensors, out=torch.empty(0, dtype=tensors[0].dtype).set_(storage, 0, shape))


class SkipDamaged(Dataset):
    """A training set in which an image that cannot be read is a black crop without a label, and says what is wrong.

    Batches keep their size and the others their places; a label of 255 alone adds nothing to loss and gradient.
    """

    def __init__(self, dataset: SegmentationDataset, crop_size: tuple[int, int]) -> None:
        self.dataset, self.crop_size = dataset, crop_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        try:
            return self.dataset[key]
        except InputError as error:
            image = torch.zeros(self.dataset.channels, *self.crop_size, dtype=self.dataset.image_dtype)
            label = torch.full(self.crop_size, IGNORE_INDEX, dtype=torch.uint8)
            return Item(image, label, key[0], damaged=str(error))


class TrainSampler(Sampler):
    """Batches of (index, draw) for one process, from iteration `start` to the end of the schedule.

    Each epoch is a permutation by (seed, epoch), cut into global batches; the rest that fills no batch is dropped.
    A rank takes its share of each global batch, and draw = iteration * batch_size + place numbers the augmentation:
    images and augmentations are the same whatever the number of processes, workers or restarts.
    """

    def __init__(self, num_samples: int, batch_size: int, start: int, end: int, seed: int, dist: Dist) -> None:
        share = dist.split_batch(batch_size)
        if num_samples < batch_size:
            raise InputError(
                f"schedule.batch_size: got {batch_size}, expected at most the number of training images, {num_samples}"
            )
        self.num_samples, self.batch_size, self.start, self.end, self.seed = num_samples, batch_size, start, end, seed
        self.places = range(dist.rank * share, (dist.rank + 1) * share)

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = iterations_per_epoch(self.num_samples, self.batch_size)
        epoch, order = -1, []
        for iteration in range(self.start, self.end):
            if iteration // per_epoch != epoch:
                epoch = iteration // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.num_samples, generator=generator).tolist()
            first = iteration % per_epoch * self.batch_size
            yield [(order[first + place], iteration * self.batch_size + place) for place in self.places]


class Loader(DataLoader):
    """An iterable of batches; a worker's InputError arrives as its one line.

    Where none comes though the process has been asked to stop, its workers are killed, and it is Stalled: one of them
    may wait for a disk that is gone.
    """

    def __init__(self, dataset: Dataset, num_workers: int, dist: Dist, batch_sampler: object) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=dist.device.type == "cuda",
            worker_init_fn=_settle_worker,
        )
        self.stop = dist.stop

    def __iter__(self) -> Iterator[Batch]:
        iterator = super().__iter__()
        try:
            while True:
                with self.stop.waiting("images"):
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch
        except Stalled:
            _kill_children()
            raise
        except InputError as error:  # PyTorch puts the worker's traceback before the message
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None


def count_iterations(config: ScheduleConfig, num_samples: int) -> int:
    """The schedule's length in iterations (an epoch: the full global batches in the data set)."""
    if config.train_iters is not None:
        return config.train_iters
    return config.train_epochs * iterations_per_epoch(num_samples, config.batch_size)


def iterations_per_epoch(num_samples: int, batch_size: int) -> int:
    """The full global batches in a data set."""
    return max(1, num_samples // batch_size)


def describe_position(dataset: SegmentationDataset, batch_size: int, iteration: int) -> dict[str, Any]:
    """Where the order of training images stands after so many iterations, and of which images it is the order.

    epoch: the current one, from 0; position: the images of it that were drawn.
    """
    epoch, batches = divmod(iteration, iterations_per_epoch(len(dataset), batch_size))
    return {"epoch": epoch, "position": batches * batch_size, **describe_images(dataset)}


def describe_images(dataset: SegmentationDataset) -> dict[str, Any]:
    """A data set -> the number of its images and a checksum of their names in their order."""
    names = "\n".join(sample.name for sample in dataset.samples)
    return {"images": len(dataset), "names_sha256": hashlib.sha256(names.encode()).hexdigest()}


def build_train_loader(
    dataset: SegmentationDataset | SkipDamaged, config: ScheduleConfig, start: int, end: int, seed: int, dist: Dist
) -> Loader:
    """Batches of this process for the iterations start..end - 1."""
    sampler = TrainSampler(len(dataset), config.batch_size, start, end, seed, dist)
    return Loader(dataset, config.num_workers, dist, sampler)


def build_test_loader(dataset: SegmentationDataset, num_workers: int, dist: Dist) -> Loader:
    """Whole images one by one, each on exactly one process."""
    indices = range(dist.rank, len(dataset), dist.world_size)
    return Loader(dataset, num_workers, dist, [[i] for i in indices])


@contextmanager
def worker_deaths_named() -> Iterator[None]:
    """A dead loader process is an InputError wherever the news of it arrives (within five seconds)."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # others are errors of the program in a worker
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"schedule.num_workers: a process that loads images died ({reason}); out of memory? try fewer of them"
        ) from None


def _kill_children() -> None:
    """End the processes that this one has started, also those that stand still."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes the end of a worker for an error
    try:
        for child in multiprocessing.active_children():
            child.kill()
            child.join(GRACE)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _settle_worker(worker: int) -> None:
    """A worker ends when its loader does, and its OpenCV starts no threads: there are as many as cores are to be busy.

    0, not 1: that would join the threads of a pool that a forked worker has not got.
    """
    cv2.setNumThreads(0)
    obey_parent_alone()
