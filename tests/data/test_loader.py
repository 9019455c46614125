from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from exp.config.training import ScheduleConfig
from exp.data.loader import TrainSampler, build_test_loader, build_train_loader, count_iterations
from exp.data.sets.camvid import CamVid
from exp.data.transforms import RandomCrop
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError

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
