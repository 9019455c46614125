"""The parts `networks` and `compile` of scripts/check_gpu.py: the paper's networks at the paper's crops.

Weights and images are random. Steps are those of the training (exp/training/step.py): normalisation, forward, loss,
backward, update. Evaluation is the forward pass of windows: no data loading, no decision, no counting.
"""

from __future__ import annotations

import gc
import json
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from exp.data.loader import Batch
from exp.data.registry import build_normalize
from exp.evaluation.inference import autocast
from exp.models import build_model
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.precision import set_up_cuda
from exp.training.step import TrainStep, build_step, seed_everything

if TYPE_CHECKING:
    from exp.config.experiment import ExperimentConfig
    from scripts.check_gpu import Check

BATCH = 8
STEPS, WARM_UP = 6, 3
TINY = "unet_mobilenetv3_small_100"  # for the tests of this script on a CPU
UPERNET, DEEPLAB, SEGFORMER = (
    "upernet_convnext_base.fb_in22k_ft_in1k_384",
    "deeplabv3plus_resnet101d",
    "segformer_mit_b4",
)
# name: data YAML of the crop and the number of classes (of two data sets with one crop, the one of more classes)
NATURAL, STREETS, MEDICAL = "ade20k", "cityscapes", "lits"
FIRST = ((UPERNET, NATURAL), (DEEPLAB, NATURAL), (SEGFORMER, NATURAL))
THEN = tuple(
    (model, data)
    for data in (NATURAL, STREETS)
    for model in (
        UPERNET,
        DEEPLAB,
        SEGFORMER,
        "deeplabv3plus_resnet50d",
        "pspnet_resnet101d",
        "pspnet_resnet50d",
        "segformer_mit_b2",
        "cpt_swinlarge",
    )
)
MEDICAL_NETWORKS = ("deeplabv3plus_resnet50d", "unet_resnet50d", "deeplabv3plus_resnet18d", "unet_resnet18d")
NETWORKS = tuple(dict.fromkeys((*FIRST, *((model, MEDICAL) for model in MEDICAL_NETWORKS), *THEN)))
VARIANTS = {  # besides the defaults, which are measured for all networks
    "float32": ("schedule.tf32=off",),
    "TF32": ("schedule.tf32=all",),
    "bf16": ("schedule.amp=bf16", "test.amp=bf16"),
    "fp16": ("schedule.amp=fp16", "test.amp=fp16"),
    "contiguous": ("schedule.channels_last=false",),
    "bf16, contiguous": ("schedule.amp=bf16", "test.amp=bf16", "schedule.channels_last=false"),
    "cuDNN benchmark": ("schedule.cudnn_benchmark=true",),
}
COMPILED = (  # network, data YAML, setting without torch.compile; what is compiled in less time comes first
    ("unet_resnet18d", MEDICAL, "defaults"),
    (DEEPLAB, NATURAL, "bf16"),
    (UPERNET, NATURAL, "bf16"),
    (SEGFORMER, NATURAL, "bf16"),
    (DEEPLAB, NATURAL, "defaults"),
)
WINDOWS = (1, 2, 8, 16, 32)  # of a forward pass, besides the default


def compose(model: str, data: str, settings: Iterable[str], tiny: bool) -> ExperimentConfig:
    """A network on the crops of a data set, as the paper trains it."""
    from exp.config.experiment import load_experiment

    optim = "sgd_lr1e-2" if data == MEDICAL else "adamw_lr6e-5"
    yamls = {
        "model": TINY if tiny else model,
        "data": data,
        "loss": "ce",
        "schedule": "40k_iters",
        "optim": optim,
        "test": "test_iou",
    }
    small = ("data.crop_size=[64,64]",) if tiny else ()
    fixed = ("model.pretrained=false", f"schedule.batch_size={2 if tiny else BATCH}", *small)
    names = {group: [name] for group, name in yamls.items()} | {"predict": ["argmax"]}
    config = load_experiment(names, (*fixed, *settings), 0)
    return config.with_window(config.data.crop_size)


def data_facts(config: ExperimentConfig) -> tuple[int, int]:
    """Classes and channels of the config's data set, which need not be there."""
    from exp.data.registry import DATASETS

    dataset = DATASETS[config.data.dataset]
    return len(dataset.classes), getattr(dataset, "channels", 3)


def make_step(config: ExperimentConfig, device: torch.device) -> TrainStep:
    classes, channels = data_facts(config)
    seed_everything(0, 0, 0)
    try:
        with torch.device(device):  # random weights are drawn there: on a CPU it takes seconds
            model = build_model(config.model, classes, channels, pretrained=False)
    except (TypeError, RuntimeError, ValueError) as error:  # a library that expects what it makes on the CPU
        print(f"{config.model.name} is made on the CPU: {' '.join(str(error).split())[:200]}", flush=True)
        model = build_model(config.model, classes, channels, pretrained=False)
    layout = torch.channels_last if config.schedule.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout).train()
    set_up_cuda(config.schedule.tf32, config.schedule.cudnn_benchmark, device)
    return build_step(config, model, build_normalize(config.data), 1000, Dist(0, 1, device))


def make_batch(config: ExperimentConfig, device: torch.device) -> Batch:
    classes, channels = data_facts(config)
    size, (height, width) = config.schedule.batch_size, config.data.crop_size
    image = torch.randint(0, 256, (size, channels, height, width), device=device, dtype=torch.uint8)
    cells = torch.randint(0, classes, (size, 1, height // 16, width // 16), device=device).float()
    label = torch.nn.functional.interpolate(cells, (height, width))[:, 0].to(torch.uint8)
    return Batch(image, label, tuple(range(size)))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, work, repeats: int, warm_up: int) -> float:
    """Seconds a call, over `repeats` calls in a row."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_gib(device: torch.device) -> float:
    """The most memory that tensors took on the device since the last call."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 2)


def measure_first_step(step: TrainStep, batch: Batch, device: torch.device) -> dict[str, float]:
    """With all that it sets up: kernels are chosen, and compiled if they are to be."""
    peak_gib(device)
    start = time.perf_counter()
    step(batch).loss.item()
    return {"first step, s": time.perf_counter() - start}


def measure_training(step: TrainStep, batch: Batch, device: torch.device) -> dict[str, float]:
    losses: list[torch.Tensor] = []
    seconds = seconds_of(device, lambda: losses.append(step(batch).loss), STEPS, WARM_UP)
    row = {"training, images/s": len(batch.image) / seconds, "ms a step": 1000 * seconds, "peak GiB": peak_gib(device)}
    if not all(loss.isfinite() for loss in losses) and step.amp != "fp16":
        raise ValueError(f"the losses of {len(losses)} steps are not finite")
    return row


@torch.inference_mode()
def measure_evaluation(step: TrainStep, config: ExperimentConfig, batch: Batch, windows: int) -> dict[str, float]:
    device, model = step.dist.device, step.raw_model.eval()
    image = step.normalize(batch.image)
    crops = image.repeat(-(-windows // len(image)), 1, 1, 1)[:windows]
    peak_gib(device)
    with autocast(config.test.amp, device):
        seconds = seconds_of(device, lambda: model(crops), STEPS, 2)
    step.raw_model.train()
    return {"evaluation, windows/s": windows / seconds, "evaluation, peak GiB": peak_gib(device)}


def free(device: torch.device) -> None:
    """What the last network held, and what was compiled for it."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Speeds:
    """speeds.json, in the form of exp/reproduction/speeds.json; written after every network."""

    def __init__(self, check: Check) -> None:
        device = torch.cuda.get_device_name(check.device) if check.device.type == "cuda" else "cpu"
        date = time.strftime("%Y-%m-%d", time.gmtime())
        self.path = check.output / "speeds.json"
        self.content = {"device": device, "date": date, "torch": torch.__version__, "networks": {}}

    def add(self, config: ExperimentConfig, row: dict[str, float]) -> None:
        height, width = config.data.crop_size
        self.content["networks"][f"{config.model.name}@{height}x{width}"] = {
            "crop_size": [height, width],
            "batch_size": config.schedule.batch_size,
            "variant": config.model.variant,
            "amp": config.schedule.amp,
            "train_images_per_second": round(row["training, images/s"], 2),
            "eval_windows_per_second": round(row["evaluation, windows/s"], 2),
            "peak_gib": row["peak GiB"],
        }
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def measure(
    check: Check, model: str, data: str, variant: str, settings: tuple[str, ...], speeds: Speeds | None
) -> None:
    """One network under one setting; one that cannot be run is wrong, and the others go on."""
    config = compose(model, data, settings, check.tiny)
    height, width = config.data.crop_size
    row = {"network": model, "crop": f"{height}x{width}", "classes": data_facts(config)[0], "setting": variant}
    try:
        step, batch = make_step(config, check.device), make_batch(config, check.device)
        row |= measure_first_step(step, batch, check.device)
        if config.schedule.compile:
            check.row("Compilation", **row)  # at once: it may have been all there is time for
        row |= measure_training(step, batch, check.device)
        if not config.schedule.compile:  # the evaluation runs the network as it is
            row |= measure_evaluation(step, config, batch, config.test.window_batch)
        if speeds is not None:
            speeds.add(config, row)
        check.row("Defaults" if variant == "defaults" else "Settings", **row)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        check.wrong(f"{model} at {height}x{width}, {variant}: {type(error).__name__}: {reason}")
    step = batch = None
    free(check.device)


def measure_windows(check: Check, model: str, data: str) -> None:
    """Windows per second by test.window_batch."""
    config = compose(model, data, ("test.amp=bf16",), check.tiny)
    step, batch = make_step(config, check.device), make_batch(config, check.device)
    for windows in (config.test.window_batch, *WINDOWS[: 2 if check.tiny else None]):
        row = measure_evaluation(step, config, batch, windows)
        check.row("Windows per forward pass (test.window_batch), bf16", network=model, window_batch=windows, **row)
    step = batch = None
    free(check.device)


def plan_networks(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """(network, data YAML, setting) in the order of measuring: all under the defaults, then the largest otherwise.

    words: leaves those whose name, crop or setting has one of them in it; none: all. InputError where none is left.
    """
    order = [(model, data, "defaults") for model, data in NETWORKS]
    order += [(UPERNET, NATURAL, variant) for variant in ("bf16", "TF32", "float32")]
    order += [(DEEPLAB, NATURAL, variant) for variant in ("bf16", "TF32", "float32", "bf16, contiguous")]
    order += [(UPERNET, NATURAL, "windows")]
    order += [(UPERNET, NATURAL, v) for v in ("contiguous", "bf16, contiguous", "fp16", "cuDNN benchmark")]
    order += [(SEGFORMER, NATURAL, variant) for variant in VARIANTS]
    crops = {data: "{}x{}".format(*compose(UPERNET, data, (), False).data.crop_size) for _, data in NETWORKS}
    named = {entry: f"{entry[0]} {crops[entry[1]]} {entry[2]}" for entry in order}
    for word in words:
        if not any(word in name for name in named.values()):
            raise InputError(
                f"--networks {word}: got a word that is in no network's name, crop or setting, expected such as "
                f"{', '.join((DEEPLAB, *sorted(set(crops.values())), 'bf16'))}"
            )
    return [entry for entry, name in named.items() if any(word in name for word in words or ("",))]


def check_networks(check: Check) -> None:
    """All networks under the defaults, then the largest under other settings; --networks picks among them."""
    speeds, order = Speeds(check), plan_networks(check.networks)
    if check.tiny:
        order = [(UPERNET, NATURAL, what) for what in ("defaults", "contiguous", "windows")]
    longest = 0.0
    for place, (model, data, what) in enumerate(order):
        if check.left() < longest:
            check.say(f"no time was left for {len(order) - place} of {len(order)} measurements, from {model}, {what}")
            return
        start = time.monotonic()
        if what == "windows":
            measure_windows(check, model, data)
        else:
            measure(check, model, data, what, VARIANTS.get(what, ()), speeds if what == "defaults" else None)
        longest = max(longest, time.monotonic() - start)


class OutOfTime(BaseException):
    """The part's share is over. No Exception: what compiles would report it as a failure of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """OutOfTime in this thread, the main one, after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_compile(check: Check) -> None:
    """Training steps as they are and compiled, one network after the other until the part's share is over."""
    for model, data, setting in COMPILED[: 1 if check.tiny else None]:
        plain = VARIANTS.get(setting, ())
        try:
            with time_limit(check.left()):
                measure(check, model, data, f"{setting}, not compiled", plain, None)
                measure(check, model, data, f"{setting}, compiled", (*plain, "schedule.compile=true"), None)
        except OutOfTime:
            check.say(f"no time was left for {model}, {setting}, compiled, and what follows")
            return
