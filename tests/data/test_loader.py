import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from exp.config.training import ScheduleConfig
from exp.data import loader as loaders
from exp.data.base import Item
from exp.data.loader import TrainSampler, build_test_loader, build_train_loader, count_iterations
from exp.data.sets.camvid import CamVid
from exp.data.transforms import RandomCrop
from exp.runtime import interrupt
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.runtime.interrupt import Stalled

CPU = torch.device("cpu")


def global_batches(world_size: int, start: int, end: int, samples: int = 23, batch: int = 6) -> list[list]:
    ranks = [list(TrainSampler(samples, batch, start, end, 0, Dist(r, world_size, CPU))) for r in range(world_size)]
    return [[key for share in shares for key in share] for shares in zip(*ranks)]


def test_the_order_is_the_same_for_any_number_of_processes_and_any_restart():
    whole = global_batches(1, 0, 12)
    assert global_batches(2, 0, 12) == global_batches(3, 0, 12) == whole
    assert global_batches(2, 5, 12) == whole[5:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_sees_every_sample_once_but_for_the_dropped_rest(world_size: int):
    batches = global_batches(world_size, 0, 9)  # 23 // 6 = 3 batches an epoch
    for epoch in range(3):
        seen = [index for batch in batches[3 * epoch : 3 * epoch + 3] for index, _ in batch]
        assert len(seen) == len(set(seen)) == 18
    assert [b[0][0] for b in batches[:3]] != [b[0][0] for b in batches[3:6]]
    draws = [draw for batch in batches for _, draw in batch]
    assert draws == list(range(54))


def test_seeds_give_other_orders():
    dist = Dist(0, 1, CPU)
    assert list(TrainSampler(23, 6, 0, 3, 0, dist)) != list(TrainSampler(23, 6, 0, 3, 1, dist))


def test_batch_sizes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="got 6 for 4 processes"):
        TrainSampler(23, 6, 0, 1, 0, Dist(0, 4, CPU))
    with pytest.raises(InputError, match="got 24, expected at most the number of training images, 23"):
        TrainSampler(23, 24, 0, 1, 0, Dist(0, 1, CPU))


def test_schedule_in_iterations_or_epochs():
    assert count_iterations(ScheduleConfig("s", batch_size=6, train_iters=100), 23) == 100
    assert count_iterations(ScheduleConfig("s", batch_size=6, train_epochs=10), 23) == 30


def camvid_batches(data_dir: Path, num_workers: int, seed: int = 0) -> list:
    """Seven training batches of two, in the order of `seed` with its augmentations."""
    dataset = CamVid(data_dir, "train", transform=RandomCrop((32, 32), (0.5, 2.0), 0.5, (128, 128, 128), seed))
    schedule = ScheduleConfig("s", batch_size=2, train_iters=7, num_workers=num_workers)
    return list(build_train_loader(dataset, schedule, 0, 7, seed, Dist(0, 1, CPU)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_workers(camvid_dir: Path, num_workers: int):
    for batch, other in zip(camvid_batches(camvid_dir, 0), camvid_batches(camvid_dir, num_workers), strict=True):
        assert batch.indices == other.indices
        assert torch.equal(batch.image, other.image)
        assert torch.equal(batch.label, other.label)
        assert batch.image.is_contiguous()


def test_every_epoch_and_seed_augments_in_its_own_way(camvid_dir: Path):
    """Six images in three batches an epoch: the same image comes out otherwise in the next epoch."""
    crops = {}
    for number, batch in enumerate(camvid_batches(camvid_dir, 0)[:6]):
        for index, image in zip(batch.indices, batch.image):
            crops[number // 3, index] = image
    assert all(not torch.equal(crops[0, index], crops[1, index]) for index in range(6))
    first, other = camvid_batches(camvid_dir, 0)[0], camvid_batches(camvid_dir, 0, seed=1)[0]
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_error_in_a_worker_names_the_file(camvid_dir: Path, capfd, num_workers: int):
    path = camvid_dir / "camvid" / "train" / "train_3.png"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"^[^\n]*train_3\.png: got a file that cannot be read[^\n]*$"):
        camvid_batches(camvid_dir, num_workers)


class Threads(CamVid):
    """Every image is the number of threads that OpenCV may use."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((4, 4, 3), cv2.getNumThreads(), np.uint8), np.zeros((4, 4), np.uint8)


def test_workers_start_no_threads_of_opencv_and_the_program_keeps_its_own(camvid_dir: Path):
    """Also after this process has used its pool of threads, of which a forked worker has nothing but the memory."""
    before = cv2.getNumThreads()
    cv2.warpAffine(np.zeros((2000, 2000, 4), np.uint8), np.eye(2, 3), (2000, 2000))
    batches = list(build_test_loader(Threads(camvid_dir, "val"), 2, Dist(0, 1, CPU)))
    assert {int(batch.image.max()) for batch in batches} == {1}  # getNumThreads() of a switched off pool
    assert cv2.getNumThreads() == before


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_test_images_are_on_exactly_one_process(camvid_dir: Path, world_size: int):
    dataset = CamVid(camvid_dir, "val")
    seen = [
        batch.indices[0]
        for rank in range(world_size)
        for batch in build_test_loader(dataset, 0, Dist(rank, world_size, CPU))
    ]
    assert sorted(seen) == [0, 1, 2]


class Standing(Dataset):
    """Items 0 to 3; the worker that is to read the last one waits, as for a disk that is gone, or is stopped."""

    def __init__(self, stopped: bool = False) -> None:
        self.stopped = stopped

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Item:
        if index == 3:
            os.kill(os.getpid(), signal.SIGSTOP if self.stopped else 0)
            time.sleep(600)
        return Item(torch.full((3, 8, 8), index, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8), index)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_stands_still_does_not_outlast_a_request_to_stop(monkeypatch: pytest.MonkeyPatch, stopped: bool):
    monkeypatch.setattr(interrupt, "PATIENCE", 0.5)
    threading.Timer(1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()
    stalled = pytest.raises(Stalled, match="SIGTERM: left while it waited for images")
    with stalled, interrupt.catch_signals() as stop:
        list(loaders.Loader(Standing(stopped), 2, Dist(0, 1, CPU, stop=stop), [[i] for i in range(4)]))
    assert multiprocessing.active_children() == []


def test_a_batch_that_comes_after_a_request_to_stop_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interrupt, "PATIENCE", 30)
    monkeypatch.setattr(Standing, "__getitem__", lambda self, i: time.sleep(1) or Item(torch.ones(1), torch.ones(1), i))
    with interrupt.catch_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        batches = list(loaders.Loader(Standing(), 1, Dist(0, 1, CPU, stop=stop), [[0], [1]]))
    assert [batch.indices for batch in batches] == [(0,), (1,)]


def test_a_batch_that_shared_memory_has_no_room_for_is_an_error_of_the_loader(monkeypatch: pytest.MonkeyPatch):
    def full(size: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    match = r"^schedule\.num_workers: got no room for a batch of 192 bytes in /dev/shm .*No space left.*--shm-size"
    with pytest.raises(InputError, match=match):
        next(iter(loaders.Loader(Standing(), 1, Dist(0, 1, CPU), [[0], [1]])))
    assert len(list(loaders.Loader(Standing(), 0, Dist(0, 1, CPU), [[0], [1]]))) == 2  # which needs none


def test_batches_come_in_the_memory_that_the_worker_put_them_into():
    for batch in loaders.Loader(Standing(), 1, Dist(0, 1, CPU), [[0, 1], [2]]):
        assert batch.image.is_shared()
        assert batch.label.is_shared()
        assert batch.image.is_contiguous()
        assert (batch.image[:, 0, 0, 0] == torch.tensor(batch.indices)).all()
