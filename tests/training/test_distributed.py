"""Two real gloo processes against one."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from exp.config.loss import LossConfig
from exp.config.training import OptimConfig, ScheduleConfig
from exp.data.loader import Batch, TrainSampler
from exp.models import build_model
from exp.runtime import distributed
from exp.runtime.distributed import Dist, pick_device
from exp.runtime.errors import InputError
from exp.training.logger import Logger
from exp.training.loop import train
from exp.training.losses import build_criterion
from exp.training.optim import build_optimizer, build_scheduler
from exp.training.step import TrainStep
from tests.conftest import free_port
from tests.models.test_cpt import train_a_share
from tests.models.test_models import tiny
from tests.training.test_losses import losses_of_a_share

STEPS, BATCH, CLASSES = 20, 8, 3


class Net(nn.Module):
    """The parts and outputs of a Segmentor, small enough to train in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.head, self.aux_head = nn.Conv2d(8, CLASSES, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.encoder(image)
        return self.head(features), self.aux_head(features)


def random_batches(dist: Dist) -> list[Batch]:
    """This process's share of 20 batches of eight 12 x 16 images whose classes show, ignored pixels unevenly spread."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, CLASSES, (24, 12, 16), generator=generator, dtype=torch.uint8)
    image = torch.randint(0, 100, (24, 3, 12, 16), generator=generator, dtype=torch.uint8) + 70 * label[:, None]
    for i in range(24):
        label[i, : i // 2] = 255
    shares = ([index for index, _ in keys] for keys in TrainSampler(24, BATCH, 0, STEPS, 0, dist))
    return [Batch(image[share], label[share], tuple(share)) for share in shares]


class Losses(Logger):
    def __init__(self) -> None:
        self.values: list[float] = []

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self.values.append(values["train/loss"])


def freeze_norms(model: nn.Module) -> None:
    """Norm layers keep to their statistics, which do not depend on how a batch is divided."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
            module.training = False


def train_a_little(dist: Dist, *, frozen: bool = False, double: bool = False, **options: object) -> dict:
    """Twenty steps of the training loop -> the first gradients, the losses, the parameters after each step."""
    torch.manual_seed(0)
    raw_model = Net().to(torch.float64 if double else torch.float32)
    if frozen:
        freeze_norms(raw_model)
    config = OptimConfig("o", "sgd", lr=1e-2, weight_decay=0.01, momentum=0.9)
    optimizer = build_optimizer(config, raw_model)
    step = TrainStep(
        model=dist.wrap(raw_model),
        raw_model=raw_model,
        criterion=build_criterion(LossConfig("l", "ce"), dist.sum),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, STEPS),
        normalize=lambda image: image.to(next(raw_model.parameters()).dtype) / 255 - 0.5,
        dist=dist,
        **options,
    )
    grads, params, logger = {}, [], Losses()

    def record(iteration: int) -> None:
        if not grads:
            grads.update({n: p.grad.clone() for n, p in raw_model.named_parameters()})
        params.append(torch.cat([p.detach().flatten() for p in raw_model.parameters()]))

    train(
        step,
        random_batches(dist),
        ScheduleConfig("s", BATCH, train_iters=STEPS, log_iters=1, nonfinite_limit=1),
        start=0,
        end=STEPS,
        seed=0,
        names=[str(i) for i in range(24)],
        save_iters=[1],
        save=record,
        validate=lambda i: False,
        logger=logger,
    )
    return {"grads": grads, "losses": logger.values, "params": torch.stack(params)}


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
        out = {
            "double": train_a_little(dist, frozen=True, double=True),
            "accumulated": train_a_little(dist, frozen=True, double=True, accumulation=2),
            "float": train_a_little(dist, frozen=True),
            "free": train_a_little(dist, accumulation=2),
            "mixed": train_a_little(dist, amp="bf16", clip_norm=1.0),
        }
        buffer = nn.BatchNorm2d(2)
        buffer.running_mean.fill_(rank)
        dist.share_buffers(buffer)
        out |= {
            "mean": dist.mean(torch.tensor(float(rank))).item(),
            "gather": dist.gather(rank),
            "criteria": losses_of_a_share(dist, rank, 2),
            "cpt": train_a_share(dist),
            "buffer": buffer.running_mean,
        }
    torch.save(out, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (2, free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def whole() -> dict:
    """One process, its batches uncut."""
    return train_a_little(Dist(0, 1, torch.device("cpu")), frozen=True, double=True)


def check_equal(got: dict, expected: dict, grad_tolerance: float, loss_tolerance: float) -> None:
    for name, grad in expected["grads"].items():
        error = (got["grads"][name].double() - grad).norm()
        assert error <= grad_tolerance * grad.norm() + 1e-12, name
    assert got["losses"] == pytest.approx(expected["losses"], rel=loss_tolerance)


@pytest.mark.parametrize("kind", ["double", "accumulated"])
def test_two_processes_train_as_one(two_ranks: list[dict], whole: dict, kind: str):
    """2 x 4 (and 2 x 2 x 2) images as 8: the forward goes through the wrapper, gradients are averaged once, and
    ignored pixels, unevenly spread, do not shift the mean. In float64, so that nothing hides behind rounding."""
    for rank in two_ranks:
        check_equal(rank[kind], whole, grad_tolerance=1e-6, loss_tolerance=1e-5)


def test_the_memory_of_cpt_is_that_of_all_images(two_ranks: list[dict]):
    """Of the prototypes of both processes' images; the step itself reads the memory from before, alike on both."""
    whole = train_a_share(Dist(0, 1, torch.device("cpu")))
    first, second = (rank["cpt"] for rank in two_ranks)
    torch.testing.assert_close(first["after"], second["after"], rtol=0, atol=0)
    torch.testing.assert_close(first["after"], whole["after"])
    assert not any(torch.equal(after, before) for after, before in zip(whole["after"], whole["before"]))
    for rank in (first, second):
        torch.testing.assert_close(rank["grads"], whole["grads"])


def test_two_processes_train_as_one_but_for_rounding_in_float32(two_ranks: list[dict], whole: dict):
    for rank in two_ranks:
        check_equal(rank["float"], whole, grad_tolerance=1e-5, loss_tolerance=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_trains_as_the_uncut_batch(whole: dict, accumulation: int):
    alone = Dist(0, 1, torch.device("cpu"))
    got = train_a_little(alone, frozen=True, double=True, accumulation=accumulation)
    check_equal(got, whole, grad_tolerance=1e-6, loss_tolerance=1e-5)


@pytest.mark.parametrize("kind", ["double", "accumulated", "float", "free", "mixed"])
def test_parameters_stay_bit_identical_across_ranks(two_ranks: list[dict], kind: str):
    first, second = (rank[kind]["params"] for rank in two_ranks)
    assert len(first) == STEPS
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[-1])


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


def test_several_processes_that_cannot_meet_are_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "got 2 in the environment without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    with pytest.raises(InputError, match=message), distributed.session("cpu"):
        pass


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
