"""How a network is trained: configs/schedule and configs/optim."""

from dataclasses import dataclass
from typing import Literal

from exp.config.checks import require, require_positive


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
    tf32: Literal["off", "conv", "all"] = "conv"  # on CUDA: float32 products in TF32; conv: PyTorch's and the paper's
    cudnn_benchmark: bool = False  # on CUDA: cuDNN times its algorithms for every new shape, and keeps the fastest
    nonfinite_limit: int = 10  # stop after so many steps in a row whose loss or gradient is non-finite

    def __post_init__(self) -> None:
        intervals = ("log_iters", "save_iters", "save_epochs", "val_iters")
        require_positive(self, "batch_size", "train_iters", "train_epochs", *intervals, "nonfinite_limit", "early_stop")
        require_positive(self, "accumulation", most=self.batch_size)
        expected = "null where val_iters is null: the score comes from validations"
        require(self.early_stop is None or self.val_iters is not None, "early_stop", self.early_stop, expected)
        require(self.keep_checkpoints >= 2, "keep_checkpoints", self.keep_checkpoints, "2 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        got = f"train_iters {self.train_iters}, train_epochs {self.train_epochs}"
        one = (self.train_iters is None) != (self.train_epochs is None)
        require(one, "train_iters", got, "one of the two, the other null")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule: linear warm-up, then polynomial decay to 0.

    warmup: from_zero, the paper's: lr x iteration / length, at least start_lr. from_start: a line from start_lr to lr,
    that of trainings before there was this key.
    """

    name: str
    optimizer: Literal["adamw", "sgd"]
    lr: float  # of the encoder
    weight_decay: float
    head_lr_factor: float = 10.0  # decoder and heads, relative to the encoder
    momentum: float | None = None  # sgd alone
    start_lr: float = 1e-6
    warmup: Literal["from_zero", "from_start"] = "from_zero"
    warmup_fraction: float = 0.01  # of all iterations
    power: float = 0.9  # of the polynomial decay; 1: linear
    clip_norm: float | None = None  # gradients are scaled down to this norm over all parameters
    ema_decay: float | None = None  # keeps an exponential moving average of the weights, e.g. 0.999

    def __post_init__(self) -> None:
        require_positive(self, "lr", "head_lr_factor", "power", "clip_norm")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay", decay, "a value in (0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.start_lr <= self.lr, "start_lr", self.start_lr, f"a value in [0, lr = {self.lr}]")
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", self.warmup_fraction, "a value in [0, 1)")
        if self.optimizer == "sgd":
            fits = self.momentum is not None and 0 <= self.momentum < 1
            require(fits, "momentum", self.momentum, "a value in [0, 1)")
        else:
            require(self.momentum is None, "momentum", self.momentum, f"no such key with {self.optimizer}")
