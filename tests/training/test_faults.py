"""Steps without numbers, and being asked to stop, in the training loop."""

import math
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exp.config.model import ModelConfig
from exp.data.loader import Batch
from exp.models import build_model
from exp.runtime import distributed
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError, memory_named
from exp.runtime.interrupt import Interrupted, StopRequest
from exp.training.step import SCALER_TRIES, Faults, TrainStep
from tests.conftest import TINY
from tests.training.test_train import CPU, batch, build, run_loop, run_loop_of


def state_of(step: TrainStep) -> list[torch.Tensor]:
    """Everything that a step may change, but for the schedule."""
    optimizer = [value for state in step.optimizer.state.values() for value in state.values()]
    averaged = [] if step.ema is None else list(step.ema.module.state_dict().values())
    return [value.clone() for value in (*step.raw_model.state_dict().values(), *optimizer, *averaged)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


class Poison:
    """Makes an image, the loss or the gradient of one call no number."""

    def __init__(self, step: TrainStep, what: str) -> None:
        self.step, self.active = step, False
        if what == "image":
            plain = step.normalize
            step.normalize = lambda image: plain(image) * self.factor()
        elif what == "loss":
            step.criterion.register_forward_hook(lambda module, inputs, loss: loss * self.factor())
        else:
            weight = step.raw_model.head.weight
            weight.register_hook(lambda grad: grad * self.factor())

    def factor(self) -> float:
        return float("nan") if self.active else 1.0


@pytest.mark.parametrize("optim", [{}, {"optimizer": "sgd", "momentum": 0.9}])
@pytest.mark.parametrize("what", ["image", "loss", "gradient"])
def test_what_is_no_number_changes_nothing(what: str, optim: dict, device: torch.device):
    """Also in the very first step; afterwards training goes on as if the bad step had not been, but for the rate."""
    step = build({"ema_decay": 0.9, "clip_norm": 1.0, **optim}, device, accumulation=2)
    poison = Poison(step, what)
    for i in range(4):
        poison.active = i in (0, 2)
        before = state_of(step)
        marks = step(batch(i).to(device)).marks.tolist()
        assert marks == [poison.active, poison.active and what != "gradient", poison.active and what != "gradient"]
        if i:  # the optimiser makes its state in its first step
            assert equal(before, state_of(step)) == poison.active
        assert all(value.isfinite().all() for value in state_of(step))
        assert step.scheduler.last_epoch == i + 1
    clean = build({"ema_decay": 0.9, "clip_norm": 1.0, **optim}, device, accumulation=2)
    clean.scheduler.step()
    clean(batch(1).to(device))
    clean.scheduler.step()
    clean(batch(3).to(device))
    weights = zip(step.raw_model.parameters(), clean.raw_model.parameters())
    assert all(torch.equal(value, expected) for value, expected in weights)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_steps_are_named_counted_and_stop_the_run_in_a_row(what: str, capsys):
    step = build()
    poison, plain = Poison(step, what), step.normalize
    calls = iter([0, 1, 0, 1, 1, 1])

    def normalize(image: torch.Tensor) -> torch.Tensor:
        poison.active = bool(next(calls))
        return plain(image)

    step.normalize = normalize
    done, rows, _ = run_loop(step, [batch(i) for i in range(4)], limit=3)
    err = capsys.readouterr().err
    assert done == 4
    assert [rows[i][1]["train/steps_left_out"] for i in (0, 1)] == [1, 2]
    text = f"warning: iteration 2: got a {what} that is non-finite, nothing updated; its images: a, b, c, d"
    assert err.count(text) == 1
    assert step.faults == Faults(in_row=1, steps=2)
    with pytest.raises(InputError, match=rf"iteration 2: got a {what} .* 3 such steps in a row .*nonfinite_limit"):
        run_loop(step, [batch(i) for i in range(4)], limit=3)


def test_the_logged_loss_is_that_of_the_steps_that_counted():
    good, step = build(), build()
    poison, plain = Poison(step, "loss"), step.normalize
    calls = iter([0, 1, 1])

    def normalize(image: torch.Tensor) -> torch.Tensor:
        poison.active = bool(next(calls))
        return plain(image)

    step.normalize = normalize
    _, rows, _ = run_loop(step, [batch(0), batch(1), batch(2)], limit=9)
    assert rows[0][1]["train/loss"] == pytest.approx(good(batch(0)).loss.item())
    assert math.isnan(rows[1][1]["train/loss"])


def test_fp16s_search_for_its_factor_is_no_fault_until_it_has_gone_too_far(capsys):
    step = build(amp="fp16")
    poison = Poison(step, "gradient")
    poison.active = True
    batches = [batch(i) for i in range(SCALER_TRIES + 2)]
    with pytest.raises(InputError, match=rf"{SCALER_TRIES + 2} such steps in a row"):
        run_loop(step, batches, limit=2)
    assert capsys.readouterr().err.count("warning") == 2


def test_a_request_to_stop_saves_and_leaves():
    step = build()
    stop = StopRequest()
    step.dist = Dist(0, 1, CPU, stop=stop)

    def batches() -> Iterator[Batch]:
        for i in range(9):
            if i == 4:
                stop.signal_name = "SIGTERM"
            yield batch(i)

    saved = []
    with pytest.raises(Interrupted, match="SIGTERM: iteration 5 of 9 is saved"):
        run_loop_of(step, batches(), 9, saved)
    assert saved == [3, 5]


def test_a_validation_that_is_interrupted_leaves_its_iteration_saved():
    def validate(iteration: int) -> bool:
        raise Interrupted("SIGUSR1: the evaluation is unfinished")

    step, saved = build(), []
    with pytest.raises(Interrupted, match="unfinished"):
        run_loop_of(step, [batch(i) for i in range(4)], 4, saved, validate=validate, val_iters=2)
    assert saved == [2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: got '' in the environment"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: got 'abc' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({"RANK": "5"}, r"RANK: got '5' in the environment, expected a whole number of 0\.\.0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: got '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT: got 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT: got '70000'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "taken"}, "got no meeting at 127.0.0.1"),
    ],
)
def test_a_place_among_the_processes_that_cannot_be_is_one_line(monkeypatch, values: dict[str, str], expected: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"MASTER_ADDR": "127.0.0.1", **values}.items():
            monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "taken" else value)
        with pytest.raises(InputError, match=expected), distributed.session("cpu"):
            pass


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you", None])
def test_too_little_memory_names_what_takes_it(text: str | None):
    def take() -> None:
        raise RuntimeError(text) if text else MemoryError

    match = "too little memory .*batch_size .*crop_size.*accumulation.*amp.*window_batch"
    with pytest.raises(InputError, match=match), memory_named():
        take()


def test_one_value_for_a_norm_layer_is_refused(program, tmp_path: Path):
    flags = (*TINY, "schedule.batch_size=1", "--predict_yaml", "argmax", "--output_dir", tmp_path)
    status, _, err = program(*flags)
    assert status == 2
    assert "schedule.batch_size: got 1 image per process (and micro-batch) of 32x32 (data.crop_size)" in err


def test_sizes_that_an_encoder_of_windows_cannot_take_are_refused(program, tmp_path: Path):
    (tmp_path / "m.yaml").write_text(
        "decoder: upernet\nencoder: maxvit_rmlp_pico_rw_256\npretrained: false\ndecoder_channels: 8\naux_channels: 8\n"
    )
    flags = [flag for flag in TINY if not flag.startswith("model.")]
    flags[flags.index("--model_yaml") + 1] = str(tmp_path / "m.yaml")
    status, _, err = program(*flags, "data.crop_size=[64,64]", "--predict_yaml", "argmax", "--output_dir", tmp_path)
    assert status == 2
    assert "model.encoder: got images of 64x64 (data.crop_size, test.crop_size), which this network cannot take" in err


def test_every_parameter_of_an_efficientnet_that_trains_gets_a_gradient():
    """DDP waits for the others."""
    config = ModelConfig("m", "unet", "efficientnet-b0", (8, 8, 8, 8, 8), pretrained=False, aux_channels=8)
    model = build_model(config, 3, pretrained=False)
    sum(logits.sum() for logits in model(torch.rand(2, 3, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
