"""Training on a CUDA device: the CPU's steps but for rounding, no wait for the host, resumed bit for bit."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exp.config.training import ScheduleConfig
from exp.data.loader import Batch, build_train_loader
from exp.data.registry import build_normalize
from exp.data.sets.camvid import CamVid
from exp.data.transforms import Normalize, RandomCrop
from exp.models import build_model
from exp.runtime.distributed import Dist
from exp.training.precision import set_up_cuda
from exp.training.step import TrainStep, build_step, seed_everything
from tests.config.test_config import compose
from tests.conftest import TINY, TINY_RUN
from tests.training.test_train import CPU, batch, build, run_loop_of

pytestmark = pytest.mark.gpu
SGD = {"optimizer": "sgd", "momentum": 0.9, "lr": 1e-2}
FULL = {**SGD, "ema_decay": 0.9, "clip_norm": 0.5}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", [FULL, {"ema_decay": 0.9, "lr": 1e-3}])
def test_steps_are_the_cpus_but_for_rounding(gpu: torch.device, optim: dict, accumulation: int):
    one, other = (build(optim, device, accumulation=accumulation) for device in (CPU, gpu))
    for i in range(5):
        torch.testing.assert_close(other(batch(i).to(gpu)).loss.cpu(), one(batch(i)).loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.grad_norm.cpu(), one.grad_norm, rtol=1e-3, atol=1e-5)
    # Adam divides by a gradient's size. That of a bias in front of batch norm is rounding alone, and so is its step,
    # which moves the norm's mean: these two may differ by all of five steps, nothing else by more than rounding.
    drifting = () if "momentum" in optim else ("encoder.0.bias", "encoder.1.running_mean")
    for own, expected in ((other.raw_model, one.raw_model), (other.ema, one.ema)):
        for name, value in own.state_dict().items():
            atol = 2 * 5 * optim["lr"] if name.endswith(drifting) else 1e-4
            torch.testing.assert_close(value.cpu(), expected.state_dict()[name], rtol=1e-3, atol=atol)


def test_found_inf_reaches_the_fused_kernels(gpu: torch.device):
    """A step that is left out does not even count in Adam's bias correction."""
    step = build({"optimizer": "adamw"}, gpu, amp="fp16")
    usual = step.scaler.state_dict()
    for scale, counted in ((1e38, 0), (usual["scale"], 1), (1e38, 1), (usual["scale"], 2)):
        step.scaler.load_state_dict({**usual, "scale": scale})
        left_out = bool(step(batch().to(gpu)).marks[0])
        assert left_out == (scale == 1e38)
        assert {float(state["step"]) for state in step.optimizer.state.values()} == {counted}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_goes_on_bit_for_bit_from_its_saved_state(gpu: torch.device, amp: str):
    """Weights, averages and scaler; the loss's own value is summed in no fixed order on a GPU, its gradient is not."""
    whole, cut = (build(FULL, gpu, amp=amp, accumulation=2) for _ in range(2))
    for i in range(3):
        whole(batch(i).to(gpu))
    cut.raw_model.load_state_dict(whole.raw_model.state_dict())
    cut.load_state_dict(*copy.deepcopy((whole.state_dict(), whole.ema.state_dict())))
    for i in range(3, 6):
        torch.testing.assert_close(whole(batch(i).to(gpu)).loss, cut(batch(i).to(gpu)).loss)
    for one, other in ((whole.raw_model, cut.raw_model), (whole.ema, cut.ema)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert whole.scaler.state_dict() == cut.scaler.state_dict()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_no_step_of_the_loop_waits_for_the_device(gpu: torch.device, amp: str):
    """But for its logging steps, here the last one; PyTorch itself refuses every wait in between."""
    step = build(FULL, gpu, amp=amp, accumulation=2)
    step.normalize = Normalize((100.0, 110.0, 120.0), (50.0, 51.0, 52.0))
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0} if amp == "fp16" else {})

    def watched() -> Iterator[Batch]:
        for i in range(6):
            refuses(2 <= i < 5, gpu)  # the first two fill the allocators
            yield batch(i).pin_memory() if gpu.type == "cuda" else batch(i)
        refuses(False, gpu)

    try:
        done = run_loop_of(step, watched(), 6, [], log_iters=6, save=(6,))
    finally:
        refuses(False, gpu)
    assert done == 6


def refuses(on: bool, device: torch.device) -> None:
    """Whether every wait for the device is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error" if on else "default")


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_a_compiled_step_is_the_eager_one_but_for_rounding(gpu: torch.device):
    eager, compiled = build(SGD, gpu), build(SGD, gpu)
    compiled.model = torch.compile(compiled.raw_model)
    for i in range(3):
        losses = [step(batch(i).to(gpu)).loss for step in (compiled, eager)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def make_step(device: torch.device, *settings: str) -> TrainStep:
    """A real network's step."""
    config = compose("model.pretrained=false", "model.dropout=0.0", *settings, model="unet_resnet18d", data="camvid")
    seed_everything(0, 0, 0)
    layout = torch.channels_last if config.schedule.channels_last else torch.contiguous_format
    model = build_model(config.model, 11, pretrained=False).to(device, memory_format=layout).train()
    return build_step(config, model, build_normalize(config.data), 100, Dist(0, 1, device))


@pytest.mark.parametrize("settings", [["schedule.channels_last=false"], ["schedule.amp=bf16"], ["schedule.amp=fp16"]])
def test_a_networks_losses_are_close_in_every_layout_and_precision(gpu: torch.device, settings: list[str]):
    steps = make_step(gpu), make_step(gpu, *settings)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 64, 96), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 11, (4, 64, 96), generator=generator, dtype=torch.uint8)
    for _ in range(2):
        one, other = (step(Batch(image, label, (0, 1, 2, 3)).to(gpu)) for step in steps)
        assert not bool(other.marks[0])
        torch.testing.assert_close(other.loss, one.loss, rtol=0.05, atol=0.05)


def test_random_choices_are_a_function_of_the_seed(gpu: torch.device):
    draws = []
    for key in ((0, 5, 0), (0, 6, 0), (0, 5, 0)):
        seed_everything(*key)
        draws.append(torch.rand(4, device=gpu))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_pinned_memory(gpu: torch.device, camvid_dir: Path, workers: int):
    dataset = CamVid(camvid_dir, "train", transform=RandomCrop((32, 32), (0.5, 2.0), 0.5, (0, 0, 0), 0))
    schedule = ScheduleConfig("s", batch_size=2, train_iters=3, num_workers=workers)
    for item in build_train_loader(dataset, schedule, 0, 3, 0, Dist(0, 1, gpu)):
        assert item.image.is_pinned() == item.label.is_pinned() == (gpu.type == "cuda")
        assert item.to(gpu).image.device.type == gpu.type


@pytest.mark.parametrize(
    ("tf32", "conv", "matmul"), [("off", False, False), ("conv", True, False), ("all", True, True)]
)
def test_the_keys_of_the_schedule_set_up_cuda(gpu: torch.device, tf32: str, conv: bool, matmul: bool):
    before = torch.get_float32_matmul_precision()
    try:
        set_up_cuda(tf32, True, gpu)
        if gpu.type == "cuda":
            assert torch.backends.cudnn.allow_tf32 == conv
            assert torch.backends.cudnn.benchmark
            assert (torch.get_float32_matmul_precision() != "highest") == matmul
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_program_trains_resumes_and_evaluates(gpu: torch.device, program, tmp_path: Path):
    flags = [*TINY, "--device", gpu.type, "--output_dir", tmp_path, "--predict_yaml", "argmax", "rankseg_rma_dataset"]
    flags += ["--set", "optim.ema_decay=0.9", "optim.clip_norm=1.0", "schedule.amp=bf16", "schedule.num_workers=1"]
    status, _, err = program(*flags)
    assert status == 0, err
    run = tmp_path / TINY_RUN
    newest = sorted((run / "checkpoints").glob("iter_*.pt"))[-1]
    for path in (newest, newest.with_name(f"{newest.name}.json")):
        path.unlink()
    results = {path.name: path.read_text() for path in (run / "results").glob("*.csv")}
    for path in itertools.chain(run.glob("checkpoints/last*"), run.glob("results/*")):
        if path.is_file():
            path.unlink()
    status, _, err = program(*flags)
    assert status == 0, err
    assert results.keys() == {path.name for path in (run / "results").glob("*.csv")}
