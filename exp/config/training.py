"""How a network is trained and judged: configs/schedule, optim, test and predict."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from exp.config.checks import (
    MAX_BATCH,
    MAX_COUNT,
    MAX_CROP,
    MAX_SCALE,
    MAX_WORKERS,
    require,
    require_at_most,
    require_positive,
)
from exp.config.data import IGNORE_INDEX


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, in iterations or epochs, and how often to log, save and validate."""

    name: str
    batch_size: int  # over all processes together
    train_iters: int | None = None
    train_epochs: int | None = None
    num_workers: int = 4  # per process
    log_iters: int = 50
    save_iters: int = 2000
    save_epochs: int | None = None  # a checkpoint also at the end of every so many epochs; null: not for that
    val_iters: int | None = None  # null: only at the end
    keep_checkpoints: int = 2  # the newest, at least two: one may be damaged; and the best of the validations
    early_stop: int | None = None  # stop after so many validations without a better score; null: never
    accumulation: int = 1  # micro-batches into which each process cuts its share of the batch
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision of the forward and backward pass
    channels_last: bool = True  # memory format; on a CPU a step of DeepLabV3+ takes 0.6 of the time
    compile: bool = False  # torch.compile
    nonfinite_limit: int = 10  # stop after so many steps in a row whose loss or gradient is no number

    def __post_init__(self) -> None:
        require_positive(
            self,
            "batch_size",
            "train_iters",
            "train_epochs",
            "log_iters",
            "save_iters",
            "save_epochs",
            "val_iters",
            "nonfinite_limit",
            "early_stop",
            "accumulation",
        )
        require(
            self.early_stop is None or self.val_iters is not None,
            "early_stop",
            self.early_stop,
            "null where val_iters is null: the score comes from validations",
        )
        require(self.keep_checkpoints >= 2, "keep_checkpoints", self.keep_checkpoints, "2 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require_at_most(self, MAX_BATCH, "batch_size")
        require_at_most(self, MAX_WORKERS, "num_workers")
        require_at_most(self, MAX_COUNT, "train_iters", "train_epochs", "log_iters", "save_iters", "val_iters")
        require_at_most(self, self.batch_size, "accumulation")
        require(
            (self.train_iters is None) != (self.train_epochs is None),
            "train_iters",
            f"train_iters {self.train_iters}, train_epochs {self.train_epochs}",
            "one of the two, the other null",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and the learning rate's course: linear warm-up from start_lr, then polynomial decay to 0."""

    name: str
    optimizer: Literal["adamw", "sgd"]
    lr: float  # of the encoder
    weight_decay: float
    head_lr_factor: float = 10.0  # decoder and heads, relative to the encoder
    momentum: float | None = None  # sgd alone
    start_lr: float = 1e-6
    warmup_fraction: float = 0.01
    power: float = 0.9
    clip_norm: float | None = None  # gradients are scaled down to this norm over all parameters
    ema_decay: float | None = None  # keeps an exponential moving average of the weights, e.g. 0.999

    def __post_init__(self) -> None:
        require_positive(self, "lr", "head_lr_factor", "power", "clip_norm")
        require_at_most(self, 1000, "lr", "weight_decay", "head_lr_factor", "power")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay", decay, "a value in (0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.start_lr <= self.lr, "start_lr", self.start_lr, f"a value in [0, lr = {self.lr}]")
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", self.warmup_fraction, "a value in [0, 1)")
        sgd = self.optimizer == "sgd"
        require(
            (self.momentum is not None) == sgd,
            "momentum",
            self.momentum,
            "a value in [0, 1)" if sgd else f"no such key with {self.optimizer}",
        )
        require(not sgd or 0 <= self.momentum < 1, "momentum", self.momentum, "a value in [0, 1)")


@dataclass(frozen=True)
class TestConfig:
    """How an image becomes probabilities, and the per-image score by which rules are compared."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    name: str
    metric: Literal["mIoUI", "mDiceI", "mAccI"]
    crop_size: tuple[int, int] | None = None  # null: the training crop
    stride: tuple[int, int] | None = None  # null: ceil(2/3 crop)
    window_batch: int = 4  # windows that go through the network together
    weights: Literal["raw", "ema"] = "raw"  # ema: the moving average of optim.ema_decay
    amp: Literal["off", "bf16", "fp16"] = "off"  # of the forward pass; the softmax is computed in float32 always
    scales: tuple[float, ...] = (1.0,)  # of the image; the probabilities of all views are averaged
    flip: bool = False  # every scale also mirrored
    temperature: float | Literal["fitted"] = 1.0  # divides the logits; fitted: that of --fit_temperature
    calibration: bool = True  # count the calibration errors
    prob_cache_gb: float = 1.0  # a process keeps that many probabilities for the rules that need a second pass

    def __post_init__(self) -> None:
        require_positive(self, "crop_size", "stride", "window_batch", "scales")
        require_at_most(self, MAX_CROP, "crop_size", "stride")
        require_at_most(self, MAX_BATCH, "window_batch")
        require_at_most(self, MAX_SCALE, "scales")
        require(len(set(self.scales)) == len(self.scales), "scales", self.scales, "each scale once")
        require(self.prob_cache_gb >= 0, "prob_cache_gb", self.prob_cache_gb, "0 or more")
        if self.temperature != "fitted":
            require_positive(self, "temperature")
        if self.crop_size and self.stride:
            fits = all(step <= side for step, side in zip(self.stride, self.crop_size))
            require(fits, "stride", self.stride, f"at most the window, {self.crop_size}")

    def resolved(self, train_crop: tuple[int, int]) -> "TestConfig":
        """With the window and its stride filled in: the training crop, and ceil(2/3 crop) as in the paper."""
        crop = self.crop_size or train_crop
        stride = self.stride or tuple(math.ceil(2 * side / 3) for side in crop)
        return dataclasses.replace(self, crop_size=crop, stride=stride)


@dataclass(frozen=True)
class PredictConfig:
    """A decision rule by name and its options; an option that the rule does not read is refused."""

    name: str
    rule: Literal[
        "argmax",
        "threshold",
        "rankseg_rma",
        "rankseg_rma_pooled",
        "rankseg_rma_fixed",
        "rankseg_package",
        "rankseg_exact",
    ]
    threshold: float | None = None
    opt_metric: Literal["dice", "iou"] | None = None
    pruning_prob: float | None = None
    unassigned: Literal["max_score", "first"] | int | None = None
    to_nonoverlap_method: Literal["rma_score", "weight_prob", "prob"] | None = None
    contested: Literal["holders", "all"] | None = None
    solver: Literal["BA", "TRNA"] | None = None
    scope: Literal["case", "dataset"] | None = None  # the pixels that share their thresholds
    thresholds: str | None = None  # a file that a rule of scope: dataset wrote; with --set, for it is nobody's default

    def __post_init__(self) -> None:
        known = RULE_OPTIONS[self.rule]
        for key, value in self.all_options().items():
            if key == "thresholds" and key in known:
                continue  # build_rule asks for it
            if key in known:
                require(value is not None, key, value, f"a value: the rule {self.rule} reads it")
            else:
                require(value is None, key, value, f"no such key: the rule {self.rule} does not read it")
        if isinstance(self.unassigned, int):
            require(0 <= self.unassigned < IGNORE_INDEX, "unassigned", self.unassigned, "a class")
        require(self.thresholds != "", "thresholds", self.thresholds, "a file or null")
        for key in ("threshold", "pruning_prob"):
            value = getattr(self, key)
            require(value is None or 0 <= value < 1, key, value, "a value in [0, 1)")

    def all_options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("name", "rule")}

    def options(self) -> dict[str, Any]:
        """The keywords of this rule's function."""
        return {key: value for key, value in self.all_options().items() if key in RULE_OPTIONS[self.rule]}


RULE_OPTIONS = {
    "argmax": (),
    "threshold": ("threshold",),
    "rankseg_rma": ("opt_metric", "pruning_prob", "unassigned", "to_nonoverlap_method", "contested"),
    "rankseg_rma_pooled": ("opt_metric", "pruning_prob", "scope"),
    "rankseg_rma_fixed": ("thresholds",),
    "rankseg_package": ("opt_metric", "pruning_prob", "solver"),
    "rankseg_exact": ("opt_metric",),
}
