"""The parts of a training step: precision, clipping, averaged weights, rates; the figures that a run logs."""

import copy
import shutil
import time
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from exp.config.cli import DEFAULT_YAMLS
from exp.config.experiment import load_experiment
from exp.config.loss import LossConfig
from exp.config.training import OptimConfig, ScheduleConfig
from exp.data.loader import Batch
from exp.evaluation.inference import Inference, autocast
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.logger import Logger, Meter
from exp.training.loop import train
from exp.training.losses import build_criterion
from exp.training.optim import build_ema, build_optimizer, build_scheduler
from exp.training.step import TrainStep, build_step, seed_everything

CPU = torch.device("cpu")


class Net(nn.Module):
    """The parts and outputs of a Segmentor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.aux_head = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)
        self.seen: list[torch.dtype] = []

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        features = self.encoder(image)
        self.seen.append(features.dtype)
        return (self.head(features), self.aux_head(features)) if self.training else self.head(features)


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (4, 8, 8), generator=generator, dtype=torch.uint8)
    noise = torch.randint(0, 100, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Batch(noise + 70 * label[:, None], label, (0, 1, 2, 3))


def build(optim: dict | None = None, device: torch.device = CPU, **options: object) -> TrainStep:
    torch.manual_seed(0)
    net = Net().to(device)
    config = OptimConfig("o", **{"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.01, **(optim or {})})
    optimizer = build_optimizer(config, net)
    return TrainStep(
        model=net,
        raw_model=net,
        criterion=build_criterion(LossConfig("l", "ce"), lambda value: value),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, 100),
        normalize=lambda image: image.float() / 255 - 0.5,
        dist=Dist(0, 1, device),
        clip_norm=config.clip_norm,
        ema=build_ema(config, net),
        **options,
    )


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_learns_with_weights_and_loss_in_float32(amp: str, dtype: torch.dtype, device: torch.device):
    step = build(device=device, amp=amp)
    losses = [step(batch().to(device)).loss for _ in range(30)]
    assert set(step.raw_model.seen) == {dtype}
    assert losses[0].dtype == torch.float32
    assert {p.dtype for p in step.raw_model.parameters()} == {torch.float32}
    assert losses[-1] < 0.5 * losses[0]
    assert step.scaler.is_enabled() == (amp == "fp16")


def test_a_step_whose_gradients_overflow_is_left_out_and_the_schedule_goes_on(device: torch.device):
    step = build(device=device, amp="fp16")
    before = [p.clone() for p in step.raw_model.parameters()]
    usual = step.scaler.state_dict()
    step.scaler.load_state_dict({**usual, "scale": 1e38})
    step(batch().to(device))
    assert all(torch.equal(p, old) for p, old in zip(step.raw_model.parameters(), before))
    assert step.scaler.get_scale() < 1e38
    assert step.scheduler.last_epoch == 1
    step.scaler.load_state_dict(usual)
    step(batch().to(device))
    assert not any(torch.equal(p, old) for p, old in zip(step.raw_model.parameters(), before))


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_clipped_to_the_norm_of_the_whole_step(amp: str, accumulation: int, device: torch.device):
    options = {"device": device, "amp": amp, "accumulation": accumulation}
    plain, clipped = build(**options), build({"clip_norm": 0.01}, **options)
    plain(batch().to(device))
    clipped(batch().to(device))
    norm = nn.utils.get_total_norm([p.grad for p in clipped.raw_model.parameters()])
    assert norm.item() == pytest.approx(0.01, rel=1e-4)
    assert clipped.grad_norm > 0.01
    if amp == "off":
        unclipped = nn.utils.get_total_norm([p.grad for p in plain.raw_model.parameters()])
        assert clipped.grad_norm.item() == pytest.approx(unclipped.item(), rel=1e-6)


def test_averaged_weights_against_their_recursion(device: torch.device):
    step = build({"ema_decay": 0.9}, device=device)
    step(batch(0).to(device))
    expected = {name: value.clone() for name, value in step.raw_model.state_dict().items()}
    for i in range(1, 5):
        step(batch(i).to(device))
        for name, value in step.raw_model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value
    for name, value in step.ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
    assert not torch.equal(step.ema.module.head.weight, step.raw_model.head.weight)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_goes_on_bit_for_bit_from_its_saved_state(amp: str):
    whole = build({"ema_decay": 0.9, "clip_norm": 0.5}, amp=amp, accumulation=2)
    for i in range(3):
        whole(batch(i))
    cut = build({"ema_decay": 0.9, "clip_norm": 0.5}, amp=amp, accumulation=2)
    cut.raw_model.load_state_dict(whole.raw_model.state_dict())
    cut.load_state_dict(*copy.deepcopy((whole.state_dict(), whole.ema.state_dict())))
    for i in range(3, 6):
        assert torch.equal(whole(batch(i)).loss, cut(batch(i)).loss)
    for one, other in ((whole.raw_model, cut.raw_model), (whole.ema, cut.ema)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert whole.scaler.state_dict() == cut.scaler.state_dict()


def test_inference_runs_the_network_alone_under_autocast():
    net = Net().eval()
    image = torch.rand(1, 3, 8, 8)
    low, full = (Inference((8, 8), (8, 8), 1, amp=amp)(net, image) for amp in ("bf16", "off"))
    assert net.seen == [torch.bfloat16, torch.float32]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)
    with autocast("off", CPU):
        assert not torch.is_autocast_enabled("cpu")


class Recorder(Logger):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self.rows.append((iteration, values))


def run_loop_of(
    step: TrainStep,
    batches: Iterable[Batch],
    end: int,
    saved: list[int],
    *,
    validate=lambda iteration: False,
    limit: int = 2,
    logger: Logger | None = None,
    save: tuple[int, ...] = (3,),
    **changes: object,
) -> int:
    """The training loop -> the iterations done; those saved are noted in `saved`."""
    return train(
        step,
        batches,
        ScheduleConfig(
            "s", **{"batch_size": 4, "train_iters": end, "log_iters": 2, "nonfinite_limit": limit, **changes}
        ),
        start=0,
        end=end,
        seed=0,
        names=["a", "b", "c", "d"],
        save_iters=save,
        save=saved.append,
        validate=validate,
        logger=logger or Logger(),
    )


def run_loop(step: TrainStep, batches: list[Batch], **options: object) -> tuple:
    """The training loop over the batches -> (iterations done, rows logged, iterations saved)."""
    logger, saved = Recorder(), []
    done = run_loop_of(step, batches, len(batches), saved, logger=logger, **options)
    return done, logger.rows, saved


def test_what_is_logged_and_when():
    step = build({"clip_norm": 1.0})
    done, rows, saved = run_loop(step, [batch(i) for i in range(5)])
    assert (done, [i for i, _ in rows], saved) == (5, [2, 4, 5], [3, 5])
    assert rows[0][1].keys() == {
        "train/loss",
        "train/grad_norm",
        "train/images_per_second",
        "train/step_seconds",
        "train/data_wait_share",
        "train/peak_memory_gib",
        "train/remaining_seconds",
        *(f"lr/{part}_{kind}" for part in ("encoder", "head") for kind in ("decay", "no_decay")),
    }
    # The rate logged is that of the last step done, not of the next: the closed form at iteration 1 of 100.
    assert rows[0][1]["lr/encoder_decay"] == pytest.approx(1e-2 * (1 - 0 / 99) ** 0.9)
    assert rows[1][1]["lr/encoder_decay"] == pytest.approx(1e-2 * (1 - 2 / 99) ** 0.9)


def test_a_validation_stops_the_training():
    asked = []

    def validate(iteration: int) -> bool:
        asked.append(iteration)
        return iteration == 4

    step = build()
    done, _, saved = run_loop(step, [batch(i) for i in range(9)], validate=validate, val_iters=2)
    assert (done, asked, saved) == (4, [2, 4], [3])
    assert step.model.training


def test_a_loss_that_is_no_number_ends_the_run():
    step = build()
    nn.init.constant_(step.raw_model.head.weight, float("nan"))
    with pytest.raises(InputError, match=r"optim\.lr: iteration 2: got a loss that is non-finite"):
        run_loop(step, [batch(i) for i in range(4)])


def test_a_step_asks_for_no_number_on_the_host(monkeypatch):
    """Nothing in a step waits for the device: no .item(), no bool() or float() of a tensor, no copy to the host."""
    optim = {"optimizer": "sgd", "momentum": 0.9, "clip_norm": 1.0}
    step = build(optim, amp="bf16", accumulation=2)
    step(batch())

    def refuse(*args: object) -> None:
        raise AssertionError("a step synchronises")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    step(batch())


def test_the_meter_tells_waiting_from_working():
    def slow() -> object:
        for i in range(4):
            time.sleep(0.02)
            yield i

    meter = Meter(batch_size=3, device=CPU)
    for _ in meter.timed(slow()):
        time.sleep(0.02)
        with meter.paused():
            time.sleep(0.05)
    row = meter.report(steps_left=10)
    assert row["train/step_seconds"] == pytest.approx(0.04, rel=0.5)
    assert row["train/images_per_second"] == pytest.approx(3 / row["train/step_seconds"])
    assert row["train/data_wait_share"] == pytest.approx(0.5, abs=0.2)
    assert row["train/remaining_seconds"] == pytest.approx(10 * row["train/step_seconds"])
    assert 0.05 < row["train/peak_memory_gib"] < 100
    assert meter.steps == 0


def test_the_compiled_model_shares_the_raw_models_weights():
    config = load_experiment(
        {group: [name] if isinstance(name, str) else name for group, name in DEFAULT_YAMLS.items()},
        ["schedule.compile=true", "optim.ema_decay=0.9", "optim.clip_norm=2"],
        0,
    )
    net = Net()
    step = build_step(config, net, lambda image: image, 10, Dist(0, 1, CPU))
    assert isinstance(step.model, torch._dynamo.OptimizedModule)
    assert step.raw_model is net
    assert next(step.model.parameters()) is next(net.parameters())
    assert step.ema.module.state_dict().keys() == net.state_dict().keys()  # no wrapper's prefix is saved
    assert (step.clip_norm, step.amp, step.accumulation) == (2, "off", 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_a_compiled_step_is_the_eager_one_but_for_rounding():
    sgd = {"optimizer": "sgd", "momentum": 0.9}  # Adam would blow up the rounding of gradients that are 0
    eager, compiled = build(sgd), build(sgd)
    compiled.model = torch.compile(compiled.raw_model)
    for i in range(3):
        torch.testing.assert_close(compiled(batch(i)).loss, eager(batch(i)).loss, rtol=1e-4, atol=1e-5)
    weights = eager.raw_model.state_dict()
    for name, value in compiled.raw_model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-3)


def test_random_choices_are_a_function_of_seed_iteration_and_rank():
    def draw(*key: int) -> list[float]:
        seed_everything(*key)
        return torch.rand(3).tolist()

    draws = [draw(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]
    assert draws[0] == draws[-1]
    assert len({tuple(numbers) for numbers in draws}) == 4
    queued = len(torch.cuda._queued_calls)
    draw(0, 5, 0)
    assert len(torch.cuda._queued_calls) == queued, "a step must not leave anything behind"
