"""Data set -> batches: an order that depends on the seed alone, resumable at any iteration."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from exp.config import ScheduleConfig
from exp.data.base import Item, SegmentationDataset
from exp.distributed import Dist
from exp.errors import InputError


@dataclass(frozen=True)
class Batch:
    """(B, channels, H, W) uint8 or int16 images, (B, H, W) uint8 labels, and the samples' indices."""

    image: Tensor
    label: Tensor
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.image.to(device, non_blocking=True), self.label.to(device, non_blocking=True), self.indices)

    def pin_memory(self) -> "Batch":
        return Batch(self.image.pin_memory(), self.label.pin_memory(), self.indices)


def collate(items: list[Item]) -> Batch:
    return Batch(
        torch.stack([i.image for i in items]), torch.stack([i.label for i in items]), tuple(i.index for i in items)
    )


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
        per_epoch = self.num_samples // self.batch_size
        epoch, order = -1, []
        for iteration in range(self.start, self.end):
            if iteration // per_epoch != epoch:
                epoch = iteration // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.num_samples, generator=generator).tolist()
            first = iteration % per_epoch * self.batch_size
            yield [(order[first + place], iteration * self.batch_size + place) for place in self.places]


class Loader:
    """An iterable of batches; a worker's InputError arrives as its one line."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._loader
        except InputError as error:  # PyTorch puts the worker's traceback before the message
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None


def count_iterations(config: ScheduleConfig, num_samples: int) -> int:
    """The schedule's length in iterations (an epoch: the full global batches in the data set)."""
    if config.train_iters is not None:
        return config.train_iters
    return config.train_epochs * max(1, num_samples // config.batch_size)


def build_train_loader(
    dataset: SegmentationDataset, config: ScheduleConfig, start: int, end: int, seed: int, dist: Dist
) -> Loader:
    """Batches of this process for the iterations start..end - 1."""
    sampler = TrainSampler(len(dataset), config.batch_size, start, end, seed, dist)
    return Loader(_data_loader(dataset, config.num_workers, dist, batch_sampler=sampler))


def build_test_loader(dataset: SegmentationDataset, num_workers: int, dist: Dist) -> Loader:
    """Whole images one by one, each on exactly one process."""
    indices = range(dist.rank, len(dataset), dist.world_size)
    return Loader(_data_loader(dataset, num_workers, dist, batch_sampler=[[i] for i in indices]))


def _data_loader(dataset: SegmentationDataset, num_workers: int, dist: Dist, batch_sampler: object) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=dist.device.type == "cuda",
        worker_init_fn=_one_thread,
    )


def _one_thread(worker: int) -> None:
    """A worker's OpenCV starts no threads: there are as many workers as the user wants cores busy.

    0, not 1: that would join the threads of a pool that a forked worker has not got.
    """
    cv2.setNumThreads(0)
