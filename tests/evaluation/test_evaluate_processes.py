"""The evaluation on one, two and three gloo processes: the same files, byte for byte."""

import dataclasses
import json
import os
import time
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from exp.data.base import Sample
from exp.data.sets.shapes import Shapes
from exp.evaluation.evaluator import Evaluation, Evaluator
from exp.evaluation.inference import Inference
from exp.evaluation.results import save_results
from exp.rules.registry import build_rule
from exp.runtime import distributed
from exp.runtime.distributed import Dist
from tests.config.test_config import compose
from tests.conftest import free_port

NUM_IMAGES = (1, 7, 8, 9)
RULES = ("argmax", "rankseg_rma", "rankseg_rma_case", "rankseg_rma_dataset_iou")


class Slices(Shapes):
    """Three images a case."""

    def list_samples(self) -> list[Sample]:
        samples = super().list_samples()
        return [dataclasses.replace(sample, case=f"case{i // 3}") for i, sample in enumerate(samples)]


def evaluate(dist: Dist, num_images: int) -> Evaluation:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 6, 5, padding=2)
    network.weight.data *= 8
    config = compose(predict=list(RULES))
    evaluator = Evaluator(
        dataset=Slices(None, "val", max_samples=num_images),
        rules={rule.name: build_rule(rule, 6) for rule in config.predict},
        inference=Inference((64, 64), (43, 43), 4),
        normalize=lambda image: image / 255,
        num_workers=0,
        dist=dist,
        calibration=True,
        cache_bytes=3 * 6 * 96 * 128 * 4,  # of some images alone
    )
    return evaluator(network)


def save(evaluation: Evaluation, folder: Path) -> None:
    save_results(evaluation.results, folder, [{} for _ in RULES], calibration=evaluation.calibration)
    seen = {name: sorted(map(str, found.items())) for name, found in evaluation.thresholds.items()}
    (folder / "thresholds.json").write_text(json.dumps(seen))


def worker(rank: int, world_size: int, port: int, folder: str, started: Barrier) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    started.wait(60)  # importing takes longer than the timeout, and not equally long
    with distributed.session("cpu", timeout=timedelta(seconds=2)) as dist:
        for num_images in NUM_IMAGES:
            evaluation = evaluate(dist, num_images)
            save(evaluation, Path(folder) / f"{world_size}.{rank}" / str(num_images))
            assert evaluation.timing.num_images == num_images
        if rank == 0:
            time.sleep(3.5)  # the others wait longer than the group's timeout, in gather() and at the end
        assert dist.gather(rank) == list(range(world_size))
        if rank == 0:
            time.sleep(3.5)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for num_images in NUM_IMAGES:
        save(evaluate(Dist(0, 1, torch.device("cpu")), num_images), folder / str(num_images))
    torch.set_num_threads(threads)
    return files(folder)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_writes_the_same_files(tmp_path: Path, alone: dict[str, bytes], world_size: int):
    """More processes than images, uneven shares, and ranks that wait for a straggler are among them."""
    started = mp.get_context("spawn").Barrier(world_size)
    mp.spawn(worker, (world_size, free_port(), str(tmp_path), started), nprocs=world_size)
    assert {f"{n}/{rule}.csv" for n in NUM_IMAGES for rule in RULES} <= alone.keys()
    for rank in range(world_size):
        assert files(tmp_path / f"{world_size}.{rank}") == alone
