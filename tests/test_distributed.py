"""Two real gloo processes against one."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port
from test_losses import losses_of_a_share
from test_models import tiny
from torch import nn

from exp import distributed
from exp.config import LossConfig, OptimConfig, ScheduleConfig
from exp.data.loader import build_train_loader
from exp.data.shapes import Shapes
from exp.data.transforms import Normalize, RandomCrop
from exp.distributed import Dist, pick_device
from exp.errors import InputError
from exp.logger import NullLogger
from exp.losses import build_criterion
from exp.models import build_model
from exp.optim import build_optimizer, build_scheduler
from exp.train import Intervals, train

STEPS, BATCH = 4, 4
MEAN, STD = (124.0, 116.0, 104.0), (58.0, 57.0, 57.0)


class Losses(NullLogger):
    def __init__(self) -> None:
        self.values: list[float] = []

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self.values.append(values["train/loss"])


def train_a_little(dist: Dist, freeze_norm: bool) -> dict:
    """Four steps of the training loop -> gradients, parameters and loss after each."""
    dataset = Shapes(None, "train", max_samples=8, transform=RandomCrop((32, 32), (0.5, 2.0), 0.5, (124, 116, 104), 0))
    loader = build_train_loader(
        dataset, ScheduleConfig("s", BATCH, train_iters=STEPS, num_workers=0), 0, STEPS, 0, dist
    )
    torch.manual_seed(0)
    raw_model = build_model(tiny(dropout=0.0), 6)
    if freeze_norm:
        for module in raw_model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
    model = dist.wrap(raw_model)
    config = OptimConfig("o", "sgd", lr=1e-2, weight_decay=0.01, momentum=0.9)
    optimizer = build_optimizer(config, raw_model)
    grads, params, logger = [], [], Losses()

    def record(iteration: int) -> None:
        grads.append({n: p.grad.clone() for n, p in raw_model.named_parameters()})
        params.append({n: p.detach().clone() for n, p in raw_model.named_parameters()})

    train(
        model,
        build_criterion(LossConfig("l", "ce"), dist.sum),
        loader,
        optimizer,
        build_scheduler(config, optimizer, STEPS),
        normalize=Normalize(MEAN, STD),
        start=0,
        end=STEPS,
        batch_size=BATCH,
        seed=0,
        intervals=Intervals(1, 1, None),
        save=record,
        validate=lambda i: None,
        logger=logger,
        dist=dist,
    )
    return {"grads": grads, "params": params, "losses": logger.values}


def worker(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.session("cpu") as dist:
        out = {"frozen": train_a_little(dist, freeze_norm=True), "free": train_a_little(dist, freeze_norm=False)}
        buffer = nn.BatchNorm2d(2)
        buffer.running_mean.fill_(rank)
        dist.share_buffers(buffer)
        out |= {
            "mean": dist.mean(torch.tensor(float(rank))).item(),
            "gather": dist.gather(rank),
            "criteria": losses_of_a_share(dist, rank, 2),
            "buffer": buffer.running_mean,
        }
    torch.save(out, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (2, free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return train_a_little(Dist(0, 1, torch.device("cpu")), freeze_norm=True)


def test_gradients_of_two_processes_are_those_of_one(two_ranks: list[dict], one_rank: dict):
    """The forward goes through the wrapper, and ignored pixels, unevenly spread, do not shift the mean."""
    for name, expected in one_rank["grads"][0].items():
        for rank in two_ranks:
            got = rank["frozen"]["grads"][0][name]
            assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def test_losses_of_two_processes_are_those_of_one(two_ranks: list[dict], one_rank: dict):
    for rank in two_ranks:
        assert rank["frozen"]["losses"] == pytest.approx(one_rank["losses"], rel=1e-4)


@pytest.mark.parametrize("norm", ["frozen", "free"])
def test_parameters_stay_bit_identical_across_ranks(two_ranks: list[dict], norm: str):
    for first, second in zip(two_ranks[0][norm]["params"], two_ranks[1][norm]["params"], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    first, last = two_ranks[0][norm]["params"][0], two_ranks[0][norm]["params"][-1]
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_every_loss_and_its_gradient_are_those_of_one_process(two_ranks: list[dict]):
    """The mean of the losses over the processes, and what DDP makes of the gradients, under every YAML."""
    first, second = (rank["criteria"] for rank in two_ranks)
    for name, (value, grad) in losses_of_a_share(Dist(0, 1, torch.device("cpu")), 0, 4).items():
        torch.testing.assert_close((first[name][0] + second[name][0]) / 2, value, rtol=1e-6, atol=0, msg=name)
        # DDP averages the gradients of the weights; each process's logits hang on its own images alone.
        got = torch.cat([first[name][1], second[name][1]]) / 2
        torch.testing.assert_close(got, grad, rtol=1e-6, atol=1e-9, msg=name)


def test_collectives(two_ranks: list[dict]):
    for rank in two_ranks:
        assert rank["mean"] == 0.5
        assert rank["gather"] == [0, 1]
        assert (rank["buffer"] == 0).all()


def test_alone_everything_is_a_no_op():
    with distributed.session("cpu") as dist:
        value = torch.tensor(3.0)
        assert dist == Dist(0, 1, torch.device("cpu"))
        assert dist.mean(value) == 3
        assert dist.gather("x") == ["x"]
        model = nn.Linear(1, 1)
        assert dist.wrap(model) is model


@pytest.mark.parametrize("encoder", ["mobilenetv3_small_100", "resnet18d"])
def test_accelerators_get_sync_batch_norm(monkeypatch, encoder: str):
    """What would be wrapped on a GPU computes the same, activations inside norm layers included; it is not run here."""
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **options: (model, options))
    model = build_model(tiny(encoder=encoder), 2).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = model(image)
        wrapped, options = Dist(1, 2, torch.device("cuda", 1)).wrap(model)
        torch.testing.assert_close(wrapped(image), before)
    norms = [m for m in wrapped.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert options["device_ids"] == [torch.device("cuda", 1)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--device cuda: got no usable CUDA device"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")
